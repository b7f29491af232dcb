"""Compile every kernel in Triton for a GPU that is not there: `python ahead.py 90` prints what each spills."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POINTERS = ["statistics", "partial", "prior_mean", "prior_variance", "gain", "weight", "bias", "to_statistics", "sums"]
POINTERS += ["coefficients", "sensitivity", "gathered", "to_prior_mean", "to_prior_variance", "to_gain", "to_weight"]
POINTERS += ["to_bias"]
STEPS = [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]


def resources(capability: int) -> dict[str, int]:
    """Return the bytes of stack that each kernel needs, by its name and constants, compiled by a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, __file__, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def kernels() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield name, kernel and constants of every form that is launched."""
    from bkn_core.ops.cuda import backward, chains, chains_back, forward, layout, memory, track, weights
    from bkn_core.ops.cuda.normalize import LARGEST, LARGEST_GRADIENT, VECTORS

    yield "track", memory.track, {"FIELDS": memory.FIELDS, "CHANNELS": track.CHANNELS}
    yield "write_row", memory.write_row, {}
    yield "evaluate", chains.evaluate, {"CHANNELS": layout.CHANNELS}
    yield "reverse", chains_back.reverse, {"CHANNELS": layout.CHANNELS}
    yield "weigh", weights.weigh, {"ROWS": layout.ROWS, "COLUMNS": layout.COLUMNS}
    back = {"ROWS": layout.ROWS_BACK, "COLUMNS": layout.COLUMNS_BACK, "PART": layout.ROWS_OF_PART}
    yield "weigh_back", weights.weigh_back, back
    for last, positions, channels in ((True, 16, 64), (False, 512, 1)):
        tile = {"CHANNELS_LAST": last, "POSITIONS": positions, "CHANNELS": channels}
        yield f"observe {last}", forward.observe_parts, tile
        vectors = {"HAS_PRIOR": True, "HAS_WEIGHT": True, "LARGEST": LARGEST}
        for whole in (True, False):
            yield (
                f"normalize {last} {whole}",
                forward.normalize,
                {**tile, **vectors, "IS_WHOLE": whole, "HAS_BIAS": True},
            )
        limits = {
            "LARGEST_GRADIENT": LARGEST_GRADIENT,
            "RATIO": 3.0,
            "USUAL": 30.0,
            "HAS_STATISTICS": True,
            "FOLLOWS": True,
        }
        for sums, makes, applies in STEPS:
            step = {"SUMS": sums, "VECTORS": makes, "APPLIES": applies}
            if makes and not sums:
                step |= {"CHANNELS": VECTORS}
            yield (
                f"backward {last} {sums}{makes}{applies}",
                backward.normalize_backward,
                tile | vectors | limits | step,
            )


def stack_of(kernel: Any, constants: dict[str, Any], activation: str, capability: int) -> int:
    """Compile a kernel, and return the bytes of stack that a thread needs: what does not fit into registers."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from bkn_core.ops.cuda.layout import WARPS
    from bkn_core.ops.cuda.memory import FIELDS
    from bkn_core.ops.cuda.track import WARPS as TRACKING

    warps = {"track": TRACKING, "evaluate": WARPS, "reverse": WARPS}
    types = dict.fromkeys(("x", "y", "dy", "dx"), activation) | dict.fromkeys(POINTERS, "*fp32")
    types |= dict.fromkeys(("values", "gradients", "flat", "scratch"), "*fp32")
    types |= {"table": "*i64", "numbers": "*fp32", "before": "*fp32"}
    types |= dict.fromkeys(("eps", "count", "own_part", "slowest", "momentum"), "fp32")
    types |= {f"f{i}": "i64" for i in range(FIELDS)}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    numbers = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, numbers)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps.get(kernel.fn.__name__, 4)},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    used = {
        name: int(value) for name, _, value in (word.partition(":") for word in words) if name in ("STACK", "LOCAL")
    }
    return used["STACK"] + used["LOCAL"]


if __name__ == "__main__":
    found = {}
    for name, kernel, constants in kernels():
        for activation in ("*fp32", "*bf16"):
            found[f"{name} {activation}"] = stack_of(kernel, constants, activation, int(sys.argv[1]))
    print(json.dumps(found))
