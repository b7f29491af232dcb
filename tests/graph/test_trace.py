"""What discovery accepts and leaves behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from test_structures import EXAMPLE, Base, Residual, Tied
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.errors import ConversionError
from bkn_core.graph.trace import trace


def test_one_image_of_one_pixel_is_example_enough() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    assert set(trace(model, torch.randn(1, 3, 1, 1)).priors) == {"1", "4"}


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_example_may_be_the_arguments_in_any_form(form: str) -> None:
    class Two(Base):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return self.bn2(self.conv1(F.relu(self.bn1(self.stem(x * scale)))))

    example = {"tensor": EXAMPLE, "tuple": (EXAMPLE, 2.0), "dict": {"scale": 2.0, "x": EXAMPLE}}[form]
    assert set(trace(Two(), example).priors) == {"bn1", "bn2"}


def test_discovery_leaves_no_trace() -> None:
    class Writing(Base):
        def forward(self, x: Tensor) -> Tensor:
            x -= 0.5
            return self.bn2(self.conv1(F.dropout(F.relu(self.bn1(self.stem(x))), 0.5)))

    model = Writing().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    example, state, grad = EXAMPLE.clone(), torch.get_rng_state(), torch.is_grad_enabled()
    trace(model, example)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled() == grad
    assert not any(module.training or module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert torch.equal(example, EXAMPLE), "the example was written into"


def test_exception_of_the_model_is_named_and_leaves_no_mode_behind() -> None:
    class Broken(Base):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("mine")

    with pytest.raises(ConversionError, match=r"the forward of Broken in training mode .*: KeyError: 'mine'") as told:
        trace(Broken(), EXAMPLE)
    assert isinstance(told.value.__cause__, KeyError)
    assert set(trace(Tied(), EXAMPLE).priors) == {"bn1", "bn2", "bn3"}


def test_a_graph_is_plain_data() -> None:
    graph = trace(Residual(), EXAMPLE)
    assert pickle.loads(pickle.dumps(graph)) == copy.deepcopy(graph) == graph
    assert len(pickle.dumps(graph)) < 3000
    assert trace(Residual(), EXAMPLE) == graph
