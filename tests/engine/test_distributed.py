"""Several processes train as one does with the joint batch."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import CPU, STEPS, tiny
from torch import Tensor, nn

from bkn_core.engine.checkpoint import load_state
from bkn_core.engine.distributed import World, join_world
from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder
from bkn_core.engine.training import Training
from bkn_core.errors import DeviceError, RecipeError
from bkn_core.recipe import BatchConfig

# 36 images in passes of 8: the last pass of two processes has four images for the first and none for the second.
WORDS = ("batch.per_device=8", "train.epochs=2", "log.every=1", "norm.gain_schedule=constant", "eval.batch_size=40")
WORKER = """
import sys
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from tiny_runs import stop_at, tiny
from bkn_core.engine.loop import train
from bkn_core.errors import InterruptedRun

torch.set_num_threads(1)
folder = Path(sys.argv[2])
target = {"resume": folder} if folder.exists() else {"out": folder}
try:
    train(tiny(*sys.argv[4:]), should_stop=stop_at(int(sys.argv[3])), **target)
except InterruptedRun:
    pass
"""


@dataclasses.dataclass(frozen=True)
class Apart(World):
    """A process among others that exchanges nothing, so that one test can play all of them."""

    def wrap(self, model: nn.Module) -> nn.Module:
        return model

    def total(self, value: Tensor) -> Tensor:
        return value

    def average_(self, tensors: list[Tensor]) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Beside(Apart):
    """A process that averages with one in another thread."""

    barrier: threading.Barrier = dataclasses.field(default_factory=lambda: threading.Barrier(2, timeout=60))
    sent: dict[int, list[Tensor]] = dataclasses.field(default_factory=dict)

    def average_(self, tensors: list[Tensor]) -> None:
        self.sent[self.rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait()
        for tensor, first, second in zip(tensors, self.sent[0], self.sent[1], strict=True):
            tensor.copy_((first + second) / 2)
        self.barrier.wait()


def first_gradients(run: Training, epoch_step: int) -> dict[str, Tensor]:
    """The gradients of one step of the first epoch, from the weights that all runs start with."""
    found: dict[str, Tensor] = {}

    def remember(*_: Any) -> None:
        found.update({name: p.grad.clone() for name, p in run.model.named_parameters()})

    run.optimizer.register_step_pre_hook(remember)
    run.take_step(0, list(run.epoch(0))[epoch_step])
    return found


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def torchrun(folder: Path, *words: str, stop: int = 999) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = folder.parent / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    arguments = [str(Path(__file__).parent), str(folder), str(stop), *WORDS, *words]
    done = subprocess.run(command + arguments, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("step", [0, 2], ids=["whole", "uneven"])
@pytest.mark.parametrize("per_device", [2, 8])
def test_gradients_of_all_processes_average_to_those_of_one(per_device: int, step: int) -> None:
    words = (*WORDS, "norm.innovation=false", f"batch.per_device={per_device}")
    parts = [first_gradients(Training(tiny(*words), Apart(CPU.device, rank, 2)), step) for rank in range(2)]
    joint = first_gradients(Training(tiny(*words, "batch.per_device=16"), CPU), step)
    for name, expected in joint.items():
        average = (parts[0][name] + parts[1][name]) / 2
        torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_processes_start_alike_and_draw_apart() -> None:
    runs = [Training(tiny("data.augment=crop_flip"), Apart(CPU.device, rank, 2)) for rank in range(2)]
    first, second = (run.model.state_dict() for run in runs)
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    seen = [torch.cat([part.images for passes in run.epoch(0) for part in passes]) for run in runs]
    assert sum(len(images) for images in seen) == 36


@pytest.mark.parametrize(
    ("gradient", "statistics", "per_device", "processes", "expected"),
    [(16, 2, 8, 1, 8), (16, 2, 8, 2, 8), (16, 2, 16, 2, 8), (128, 2, 128, 4, 32), (64, 1, 16, 4, 16), (8, 2, 2, 2, 2)],
)
def test_the_gradient_batch_stays_what_the_recipe_says(
    gradient: int, statistics: int, per_device: int, processes: int, expected: int
) -> None:
    batch = BatchConfig(gradient=gradient, statistics=statistics, per_device=per_device)
    assert World(CPU.device, 0, processes).images_per_pass(batch) == expected


@pytest.mark.parametrize(("gradient", "statistics", "processes"), [(16, 2, 3), (2, 2, 2), (16, 8, 4), (4, 2, 8)])
def test_a_gradient_batch_that_cannot_be_shared_is_refused(gradient: int, statistics: int, processes: int) -> None:
    batch = BatchConfig(gradient=gradient, statistics=statistics)
    with pytest.raises(RecipeError, match=rf"batch\.gradient is {gradient}, which {processes} processes cannot share"):
        World(CPU.device, 0, processes).images_per_pass(batch)


def test_one_process_joins_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join_world("cpu") as world:
        assert (world.rank, world.size, world.is_main) == (0, 1, True)
        assert world.any(True) and not world.any(False)
        assert not torch.distributed.is_initialized()
    with pytest.raises(DeviceError), join_world("cuda:99"):
        pass


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'; it is a number from 1 to 65536"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2"}, "MASTER_PORT is ''"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "1"}, "no MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "1", "MASTER_ADDR": "127.0.0.1"}, "RANK is ''; it is a number from 0 to 1"),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "1", "MASTER_ADDR": "127.0.0.1", "RANK": "2"}, "RANK is '2'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], named: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=named), join_world("cpu"):
        pass


def test_processes_that_do_not_find_each_other_are_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda _: (_ for _ in ()).throw(RuntimeError("late")))
    with pytest.raises(DeviceError, match="the 2 processes do not find each other: late"), join_world("cpu"):
        pass


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path: Path) -> None:
    """Weights, average, optimizer, moving statistics and records, where every pass has images for both.

    Without innovations: the average of two logarithms is not the logarithm that one process takes.
    """
    words = ("optim.lr=0.02", "train.ema=0.9", "norm.innovation=false", "data.train_images=48")
    torchrun(tmp_path / "two", *words)
    train(tiny(*WORDS, *words, "batch.per_device=16"), out=tmp_path / "one")
    two, one = (load_state(RunFolder(tmp_path / name).state) for name in ("two", "one"))
    assert two["step"] == one["step"] == STEPS
    for part in ("model", "average"):
        assert_close(two[part], one[part])
    for index, values in one["optimizer"]["state"].items():
        assert_close(two["optimizer"]["state"][index], values)
    rows, others = (RunFolder(tmp_path / name).records() for name in ("two", "one"))
    assert [row["kind"] for row in rows] == [row["kind"] for row in others]
    for row, other in zip(rows, others, strict=True):
        key = {"step": "loss", "epoch": "train_loss"}[row["kind"]]
        assert row[key] == pytest.approx(other[key], rel=1e-3)


@pytest.mark.parametrize("kind", ["bkn", "bn", "brn"])
def test_after_a_step_all_processes_have_the_same_statistics(kind: str) -> None:
    first = Beside(CPU.device, 0, 2)
    worlds = [first, dataclasses.replace(first, rank=1)]
    runs = [Training(tiny(*WORDS, f"norm.kind={kind}"), world) for world in worlds]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda run: run.take_step(0, next(run.epoch(0))), runs))
    one, other = (dict(run.model.named_buffers()) for run in runs)
    assert any(name.endswith("running_var") for name in one)
    for name, buffer in one.items():
        assert torch.equal(buffer, other[name]), name
    joint = Training(tiny(*WORDS, f"norm.kind={kind}", "batch.per_device=16"), CPU)
    joint.take_step(0, next(joint.epoch(0)))
    for name, expected in joint.model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            torch.testing.assert_close(one[name], expected, rtol=1e-5, atol=1e-7)


def test_a_pass_without_images_of_its_own_leaves_no_trace_in_a_process() -> None:
    run = Training(tiny(*WORDS, "norm.innovation=true"), Apart(CPU.device, 1, 2))
    last = list(run.epoch(0))[-1]
    assert [len(part.labels) for part in last] == [0]
    before = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
    assert run.take_step(0, last).loss == 0
    assert all(torch.equal(buffer, before[name]) for name, buffer in run.model.named_buffers())


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(tmp_path: Path) -> None:
    torchrun(tmp_path / "straight")
    torchrun(tmp_path / "parts", stop=2)
    assert load_state(RunFolder(tmp_path / "parts").state)["step"] == 2
    torchrun(tmp_path / "parts")
    parts, straight = (load_state(RunFolder(tmp_path / name).state) for name in ("parts", "straight"))
    assert parts["step"] == straight["step"] == STEPS
    for name, expected in straight["model"].items():
        assert torch.equal(parts["model"][name], expected), name


@pytest.mark.slow
def test_what_is_not_finite_in_one_process_ends_all(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="DivergedError"):
        torchrun(tmp_path / "run", "optim.lr=1e30")
    assert RunFolder(tmp_path / "run").summary()["status"] == "failed"
