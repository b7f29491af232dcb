"""What a training step asks of a GPU, over batch normalization: `benchmarks/launches.py` counts, nothing is run."""

from __future__ import annotations

import launches
import pytest
import torch

from bkn_core.ops import backend, extension, kernels

pytest.importorskip("triton")


def slow(*network: object) -> object:
    return pytest.param(*network, marks=pytest.mark.slow)


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted by Triton's interpreter")
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("cifar_resnet20", 32),
        slow("resnet50", 64),
        slow("efficientnet_b0", 64),
        slow("unet", 64),
    ],
)
def test_a_step_asks_for_little_more_than_with_batch_normalization(
    name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "chosen", lambda: "triton")
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(extension, "operations", lambda: None)
    reference, (plain, shared) = launches.measured(name, size, 132)
    assert plain[1] > 0 and shared[1] > 0
    assert sum(plain) <= 1.5 * reference
    assert sum(shared) <= 1.4 * reference
