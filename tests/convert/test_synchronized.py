"""Two processes with synchronized layers find what one process finds on the joint batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import joint_batches
import pytest
import torch
from joint_batches import CASES, build, joint_batch, plain, trained
from small_models import assert_same
from torch import nn

from bkn_core.filter.kalman import moments
from bkn_core.ops.synchronized import joint_moments

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Found, Found]:
    """What each of two processes found in every case."""
    folder = tmp_path_factory.mktemp("processes")
    words = [sys.executable, str(Path(joint_batches.__file__))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    running = [subprocess.Popen([*words, str(rank), str(folder)], env=environment) for rank in range(2)]
    assert [process.wait(100) for process in running] == [0, 0]
    return torch.load(folder / "0.pt"), torch.load(folder / "1.pt")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_equal_one_with_the_joint_batch(found: tuple[Found, Found], name: str) -> None:
    first, second = (part[name] for part in found)
    expected = trained(build(nn.BatchNorm2d, name))
    torch.testing.assert_close(torch.cat([first["y"], second["y"]]), expected["y"])
    torch.testing.assert_close(torch.cat([first["x"], second["x"]]), expected["x"])
    assert_same(first["gradients"], second["gradients"], 1e-12)
    assert_same(expected["gradients"], {n: 2 * g for n, g in first["gradients"].items()}, 1e-9)
    if name != "groups of two":  # whose moving statistics each process keeps of its own groups
        assert_same(first["buffers"], second["buffers"], 1e-12)
        assert_same(expected["buffers"], first["buffers"], 1e-9)


def test_gain_one_is_synchronized_batch_normalization(found: tuple[Found, Found]) -> None:
    first, second = (part["batch normalization"] for part in found)
    model = plain(nn.BatchNorm2d).double()
    model.load_state_dict(build(nn.BatchNorm2d, "batch normalization").state_dict(), strict=False)
    expected = trained(model.train())
    torch.testing.assert_close(torch.cat([first["y"], second["y"]]), expected["y"])
    torch.testing.assert_close(torch.cat([first["x"], second["x"]]), expected["x"])
    assert_same(expected["gradients"], {n: 2 * g for n, g in first["gradients"].items()}, 1e-9)
    assert_same(expected["buffers"], {n: first["buffers"][n] for n in expected["buffers"]}, 1e-9)


def test_alone_and_in_evaluation_a_synchronized_layer_is_like_any_other() -> None:
    for name in ("network transition", "groups of two"):
        synchronized, other = build(nn.SyncBatchNorm, name), build(nn.BatchNorm2d, name)
        assert synchronized[4].synchronized and not other[4].synchronized
        x, _ = joint_batch()
        assert torch.equal(synchronized(x), other(x))
        assert torch.equal(synchronized.eval()(x), other.eval()(x))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("covariance", [False, True])
def test_the_moments_of_large_values_are_those_of_float64(covariance: bool) -> None:
    x = 1e18 * torch.randn(4, 3, 20, 20)
    exact = moments(x.double(), covariance=covariance)
    for found, wanted in zip(joint_moments(x, None, covariance=covariance), exact, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
