"""Files are there whole or not at all, whatever the disk does."""

from __future__ import annotations

import builtins
import contextlib
import errno
import json
import math
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import litter, tiny
from torch import nn

from bkn_core.data.preprocess import Preprocess
from bkn_core.data.splits import ImageSet
from bkn_core.engine import files
from bkn_core.engine.checkpoint import load_state, load_weights, save_state, save_weights
from bkn_core.engine.evaluation import save_predictions
from bkn_core.engine.files import replacing, write_json, write_text
from bkn_core.engine.plots import plot_curves
from bkn_core.engine.run_folder import RunFolder
from bkn_core.engine.tasks.classification import Metrics
from bkn_core.errors import OutputError
from bkn_core.recipe import dump_recipe, load_recipe

CODES = [errno.ENOSPC, errno.EIO, errno.EROFS]
Writer = Callable[[Path, int], Any]


def write_state(path: Path, value: int) -> None:
    save_state(path, {"step": value, "tensor": torch.full((200_000,), float(value))})


def write_weights(path: Path, value: int) -> None:
    net = nn.Linear(400, 400)
    nn.init.constant_(net.weight, value)
    save_weights(path, net, tiny(), ("a",), Preprocess("L", (8, 8), (0.0,), (1.0,)))


def write_arrays(path: Path, value: int) -> None:
    torch.manual_seed(value)
    losses = torch.rand(100_000)
    measured = Metrics(0.5, {}, 1.0, len(losses), losses > 0.5, losses, torch.ones(len(losses)))
    save_predictions(path, ImageSet(losses, torch.ones(len(losses)), ()), {"population": measured})


def write_letters(path: Path, value: int) -> None:
    write_text(path, str(value) * 500_000)


def write_picture(path: Path, value: int) -> None:
    """Draws plots/curves.png; `path` is that file."""
    folder = RunFolder(path.parent.parent)
    if not (folder.path / "config.yaml").exists():
        write_text(folder.path / "config.yaml", dump_recipe(load_recipe()))
    folder.record({"kind": "epoch", "step": value, "epoch": 1, "population_top1": 0.5, "population_loss": 1.0})
    plot_curves(folder)


WRITERS = {
    "last.state.pt": write_state,
    "last.safetensors": write_weights,
    "predictions.npz": write_arrays,
    "metrics.csv": write_letters,
    "plots/curves.png": write_picture,
}


def fault(code: int, path: Path) -> OSError:
    return OSError(code, os.strerror(code), str(path))


class FailingFile:
    """A file that takes some bytes and then fails as a full disk does."""

    def __init__(self, file: Any, code: int) -> None:
        self.file, self.code, self.left = file, code, 1000

    def write(self, data: Any) -> int:
        self.left -= memoryview(data).nbytes
        if self.left < 0:
            raise fault(self.code, Path(self.file.name))
        return int(self.file.write(data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


@contextlib.contextmanager
def broken(where: str, code: int) -> Iterator[None]:
    """Let one kind of call of the writer fail, and on a read-only disk the tidying up as well."""

    def fail(path: Any, *_: Any, **__: Any) -> Any:
        raise fault(code, path)

    def opened(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if where == "open":
            fail(path)
        file = builtins.open(path, mode, *rest, **named)  # noqa: SIM115
        return FailingFile(file, code) if mode == "wb" and where == "write" else file

    with pytest.MonkeyPatch.context() as patch:
        if where in ("open", "write"):
            patch.setattr(files, "open", opened, raising=False)
        else:
            patch.setattr(os, where, fail)
        if code == errno.EROFS and where == "open":
            patch.setattr(Path, "unlink", fail)
        yield


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let the kernel refuse to write files beyond a size: a fault that also libraries in other languages meet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def assert_untouched(path: Path, content: bytes) -> None:
    assert path.read_bytes() == content
    assert not litter(path.parent)


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["open", "write", "fsync", "replace"])
@pytest.mark.parametrize("name", ["last.state.pt", "predictions.npz", "metrics.csv"])
def test_a_fault_while_writing_leaves_the_old_file(tmp_path: Path, name: str, where: str, code: int) -> None:
    path, write = tmp_path / name, WRITERS[name]
    write(path, 1)
    before = path.read_bytes()
    with broken(where, code), pytest.raises(OutputError) as caught:
        write(path, 2)
    assert str(path) in caught.value.message and os.strerror(code) in caught.value.message
    assert caught.value.exit_code != 0
    assert_untouched(path, before)
    write(path, 2)
    assert path.read_bytes() != before


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("name", ["last.safetensors", "plots/curves.png"])
def test_a_fault_after_another_library_has_written_leaves_the_old_file(tmp_path: Path, name: str, where: str) -> None:
    path, write = tmp_path / "run" / name, WRITERS[name]
    write(path, 1)
    before = path.read_bytes()
    with broken(where, errno.EIO), pytest.raises(OutputError, match=path.name):
        write(path, 2)
    assert_untouched(path, before)


@pytest.mark.parametrize("limit", [0, 5_000])
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_the_kernel_does_not_let_grow_leaves_the_old_one(tmp_path: Path, name: str, limit: int) -> None:
    path, write = tmp_path / "run" / name, WRITERS[name]
    write(path, 1)
    before = path.read_bytes()
    assert len(before) > limit
    with file_size_limit(limit), pytest.raises(OutputError) as caught:
        if name == "plots/curves.png":
            plot_curves(RunFolder(tmp_path / "run"))
        else:
            write(path, 2)
    assert str(path) in caught.value.message
    assert os.strerror(errno.EFBIG) in caught.value.message, "the cause is named"
    assert_untouched(path, before)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file/deep/x\.txt.*Not a directory"):
        write_text(tmp_path / "file" / "deep" / "x.txt", "text")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="taken"):
        write_text(tmp_path / "taken", "text")
    assert not litter(tmp_path)


def test_an_error_of_the_content_itself_passes_and_leaves_no_litter(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "old")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), replacing(tmp_path / "x") as aside:
            aside.write_text("half")
            raise error
    assert_untouched(tmp_path / "x", b"old")


def test_nothing_but_the_finished_file_is_ever_seen(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "old")
    with replacing(tmp_path / "x") as aside:
        aside.write_text("new")
        assert (tmp_path / "x").read_text() == "old" and litter(tmp_path) == [aside]
    assert_untouched(tmp_path / "x", b"new")


def test_content_reaches_the_disk_before_its_name_and_the_name_thereafter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        target = os.readlink(f"/proc/self/fd/{handle}")
        calls.append(f"fsync {'folder' if os.path.isdir(target) else Path(target).read_text()}")
        fsync(handle)

    def replaced(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_text(tmp_path / "x", "new")
    assert calls == ["fsync new", "replace", "fsync folder"]


def test_what_a_killed_process_left_of_a_file_goes_when_it_is_written_again(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as gone:
        pass
    left = [
        tmp_path / f".{name}.{number}.part" for name in ("[x].json", "other") for number in (gone.pid, os.getppid())
    ]
    for path in left:
        path.touch()
    write_text(tmp_path / "[x].json", "new")
    assert [path.exists() for path in left] == [False, True, True, True], "neither of the living nor of other files"
    (tmp_path / ".mine.x.part").touch()
    RunFolder(tmp_path).sweep()
    assert {path.name for path in litter(tmp_path)} == {".mine.x.part", *(path.name for path in left[1::2])}


def test_json_has_null_for_what_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [math.nan, 1.5, {"b": math.inf}], "c": (-math.inf, 2), "d": "NaN"})
    expected = {"a": [None, 1.5, {"b": None}], "c": [None, 2], "d": "NaN"}

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=refuse) == expected


def test_what_was_written_reads_back(tmp_path: Path) -> None:
    for name, write in WRITERS.items():
        write(tmp_path / name, 3)
    assert load_state(tmp_path / "last.state.pt")["step"] == 3
    assert load_weights(tmp_path / "last.safetensors").tensors["weight"].unique() == 3
    with np.load(tmp_path / "predictions.npz") as arrays:
        assert arrays["population_losses"].shape == (100_000,)


def test_a_line_that_cannot_be_appended_names_its_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.record({"kind": "step", "step": 1, "epoch": 1})
    for append, name in ((folder.log, "train.log"), (lambda text: folder.record({"text": text}), "metrics.jsonl")):
        with file_size_limit(100), pytest.raises(OutputError, match=f"{name} could not be written.*File too large"):
            append("x" * 1000)
    assert [row["step"] for row in folder.records()] == [1], "a torn line does not count"
