"""Everything that is said of a GPU, in one command of some minutes: correctness first, then times and memory.

    python benchmarks/gpu.py [--device cuda] [--quick]

Needs torch, triton, torchvision and this checkout, and no network; ONNX Runtime's CUDA provider is taken where it is
installed. What is missing is said by name. Ratios are medians of interleaved pairs, with their quartiles.

1. The layer against PyTorch in float64: outputs, statistics and gradients; three types, both layouts.
2. The layer, forward and backward, over `nn.BatchNorm2d`.
3. A training step of ResNet-50 and of a U-Net, two images, over batch normalization: eager, compiled, and captured
   in a graph.
4. Peak memory of a step.
5. The exported file of a ResNet-18 by ONNX Runtime: outputs against PyTorch, latency over the batch normalization's.

`--device cpu --quick` goes through all of it by Triton's interpreter, to see that it runs. Not run on a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
if "--device" in sys.argv and sys.argv[sys.argv.index("--device") + 1] == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
os.environ.setdefault("BKN_BACKEND", "triton")

import torch
from paired import paired
from robustness_networks import UNet
from torch import Tensor, nn

import bkn_core as bkn
from bkn_core.filter.kalman import Gaussian
from bkn_core.filter.state import FilterSettings
from bkn_core.ops import backend
from bkn_core.ops.normalize import kalman_normalize

LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
TOLERANCE = {torch.float32: 3e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def leaves(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str) -> list[Tensor]:
    """Draw x, dy, and µ', v', gain, γ, β."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device)

    x, dy = (draw(*shape).to(dtype).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    c = shape[1]
    return [x * 2 + 1, dy, draw(c), draw(c).square() + 0.5, torch.tensor(0.3, device=device), draw(c), draw(c)]


def run_layer(values: list[Tensor], size: int) -> list[Tensor]:
    """Return y and the gradients of all but dy."""
    x, dy, *parameters = values
    inputs = [value.detach().requires_grad_() for value in (x, *parameters)]
    mean, variance, gain, weight, bias = inputs[1:]
    y = kalman_normalize(inputs[0], Gaussian(mean, variance), gain, weight, bias, FilterSettings(1e-5, size)).y
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def correctness(device: str, shapes: list[tuple[int, ...]]) -> int:
    """Print the largest error of each case over its tolerance, and return how many are beyond."""
    print("| layer | type | layout | s | largest error / tolerance |\n|---|---|---|---|---|")
    wrong = 0
    for shape in shapes:
        for dtype, tolerance in TOLERANCE.items():
            for layout in LAYOUTS:
                for size in sorted({1, 2, shape[0]}):
                    values = leaves(shape, dtype, layout, device)
                    exact = [value.double() for value in values]
                    pairs = zip(run_layer(values, size), run_layer(exact, size), strict=True)
                    error = max(float(((a.double() - b).abs() / (b.abs() + b.abs().mean())).max()) for a, b in pairs)
                    wrong += not error <= tolerance
                    words = (
                        "×".join(map(str, shape)),
                        str(dtype)[6:],
                        f"channels {layout}",
                        size,
                        f"{error / tolerance:.2f}",
                    )
                    print("|", " | ".join(map(str, words)), "|", flush=True)
    return wrong


def layer_times(device: str, shapes: list[tuple[int, ...]], pairs: int) -> None:
    """Print what a layer costs beside `nn.BatchNorm2d`."""
    print("\n| layer | type | layout | s | forward and backward over BN |\n|---|---|---|---|---|")
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for layout in LAYOUTS:
                for size in (shape[0], 1):
                    values = leaves(shape, dtype, layout, device)
                    norm = nn.BatchNorm2d(shape[1], device=device)
                    x = values[0].clone().requires_grad_()

                    def reference(norm: nn.Module = norm, x: Tensor = x, dy: Tensor = values[1]) -> None:
                        torch.autograd.grad(norm(x), (x, *norm.parameters()), dy)

                    def candidate(values: list[Tensor] = values, size: int = size) -> None:
                        run_layer(values, size)

                    ratio = paired(reference, candidate, pairs=pairs)
                    words = "×".join(map(str, shape)), str(dtype)[6:], f"channels {layout}", str(size), str(ratio)
                    print("|", " | ".join(words), "|", flush=True)


def step(model: nn.Module, x: Tensor, *, mixed: bool) -> Callable[[], None]:
    """Return a training step on a batch: forward, backward, SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)

    def run() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=mixed):
            y = model(x)
            loss = (y if y.dim() == 2 else y.flatten(2).mean(2)).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # the same memory at each step, as a captured graph needs it

    return run


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """Return a step as a graph that the GPU replays."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def networks(*, quick: bool) -> Iterator[tuple[str, nn.Module, int]]:
    """Yield name, network and size of images."""
    if quick:
        yield "U-Net", UNet(classes=2, widths=(4, 4)), 8
        return
    from torchvision.models import resnet50

    yield "ResNet-50", resnet50(), 224
    yield "U-Net", UNet(classes=4), 256


def steps(device: str, pairs: int, *, quick: bool) -> None:
    """Print what a training step of two images costs beside batch normalization, and its peak memory."""
    print("\n| step, two images | type | how | BKN / BN | BN, ms |\n|---|---|---|---|---|")
    for name, plain, size in networks(quick=quick):
        x = torch.randn(2, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
        plain = plain.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
        converted = bkn.convert(plain, x, statistics_batch_size=2, input_prior=x).train()
        for mixed in (False, True):
            for how, wrap in (("eager", None), ("compiled", torch.compile), ("captured", captured)):
                if device == "cpu" and how != "eager":
                    continue
                try:
                    models = [m if how != "compiled" else torch.compile(m) for m in (plain, converted)]
                    works = [step(m, x, mixed=mixed) for m in models]
                    ratio = paired(*(captured(w) if wrap is captured else w for w in works), pairs=pairs)
                    words = f"{ratio} | {ratio.reference_ms:.1f}"
                except Exception as error:  # one way that fails must not hide the others
                    words = f"failed: {str(error).splitlines()[0][:80]} | "
                print(f"| {name} | {'bfloat16 AMP' if mixed else 'float32'} | {how} | {words} |", flush=True)
        if device == "cuda":
            peaks = []
            for model in (plain, converted):
                torch.cuda.reset_peak_memory_stats()
                step(model, x, mixed=False)()
                peaks.append(torch.cuda.max_memory_allocated() / 2**20)
            print(f"| {name} | float32 | peak memory | {peaks[1] / peaks[0]:.3f} | {peaks[0]:.0f} MiB |", flush=True)


def exported(device: str, pairs: int) -> None:
    """Print what ONNX Runtime makes of an exported file on the GPU."""
    print("\n## ONNX Runtime")
    try:
        import onnxruntime
        from torchvision.models import resnet18
    except ImportError as error:
        print(f"left out: {error}")
        return
    providers = onnxruntime.get_available_providers()
    if device == "cpu" or "CUDAExecutionProvider" not in providers:
        print("left out on the CPU" if device == "cpu" else f"left out: no CUDA provider in {', '.join(providers)}")
        return
    x = torch.randn(1, 3, 224, 224)
    plain = resnet18().eval()
    model = bkn.to_batch_norm(bkn.convert(plain, x, statistics_batch_size=2, input_prior=x)).eval()
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for name, network in (("bn", plain), ("bkn", model)):
            path = Path(folder) / f"{name}.onnx"
            torch.onnx.export(network, (x,), path, dynamo=True, verbose=False)
            sessions.append(onnxruntime.InferenceSession(path, providers=["CUDAExecutionProvider"]))
        feeds = {sessions[0].get_inputs()[0].name: x.numpy()}
        with torch.no_grad():
            error = (torch.from_numpy(sessions[1].run(None, feeds)[0]) - model(x)).abs().max()
        ratio = paired(lambda: sessions[0].run(None, feeds), lambda: sessions[1].run(None, feeds), pairs=pairs)
    words = f"{float(error):.1e}; latency {ratio} of batch normalization's {ratio.reference_ms:.2f} ms"
    print(f"largest difference {words}")


def main() -> None:
    """Run everything; exit 1 where a layer is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, three pairs")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --device cpu --quick runs by Triton's interpreter")
    if not backend.takes_triton(arguments.device):
        parser.error("Triton's kernels cannot be used (the reason stands above): pip install triton, and a C compiler")
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "Triton's interpreter"
    print(f"{card}, torch {torch.__version__}\n")
    pairs = 3 if arguments.quick else 21
    shapes = (
        [(2, 3, 4, 4)] if arguments.quick else [(2, 64, 56, 56), (8, 130, 7, 7), (128, 16, 16, 16), (1, 3, 224, 224)]
    )
    wrong = correctness(arguments.device, shapes)
    layer_times(arguments.device, shapes, pairs)
    steps(arguments.device, pairs, quick=arguments.quick)
    exported(arguments.device, pairs)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
