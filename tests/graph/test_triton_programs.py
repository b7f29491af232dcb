"""All priors by Triton's kernels, run by its interpreter, against PyTorch node by node in float64."""

from __future__ import annotations

import contextlib
import copy
import pickle
from typing import Literal

import pytest
import torch
from test_kernel_nodes import Between, Mixed, Scaled
from test_kernel_program import IMAGES, assert_equal_to_float64, drawn, gradients, predictions, priors
from torch import Tensor, nn
from torch.nn import functional as F

import bkn_core as bkn
from bkn_core.errors import ConversionError
from bkn_core.graph import instructions, schedule
from bkn_core.graph.instructions import Instruction
from bkn_core.graph.triton_program import TritonProgram
from bkn_core.ops import backend, extension, kernels, track
from bkn_core.ops.cuda import layout
from bkn_core.priors import accumulation
from bkn_core.priors.hooks import find_hooks

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")


@pytest.fixture(autouse=True)
def _by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    assert backend.triton_works("cpu")
    monkeypatch.setattr(backend, "chosen", lambda: "triton")
    monkeypatch.setattr(kernels, "library", lambda: None)
    monkeypatch.setattr(extension, "operations", lambda: None)


def program(model: nn.Module) -> TritonProgram:
    lowered = find_hooks(model)[1].lowered
    assert lowered is not None and isinstance(lowered.last, TritonProgram)
    return lowered.last


class Residual(nn.Module):
    """A stem, a block with a sum of two branches, a grouped convolution, patches of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.first, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.norm3 = nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4)
        self.head, self.norm4 = nn.Linear(4, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        """Wire them."""
        x = F.relu(self.norm1(self.stem(x)))
        y = self.norm3(self.second(F.relu(self.norm2(self.first(x)))))
        return self.norm4(self.head(F.relu(y + x).mean((2, 3))))


class Small(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)
        self.last, self.norm2 = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Wire them."""
        return self.norm2(self.last(F.relu(self.norm1(self.stem(x)))))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_residual_network(memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "ROWS_OF_PART", 3)  # so that there are parts
    model = drawn(Residual()).to(memory_format=memory_format)  # type: ignore[call-overload]
    assert_equal_to_float64(model)
    assert len(program(model).schedule.levels) == 2


def pointwise(x: Tensor, scaled: nn.Module, slope: nn.Module) -> Tensor:
    product = x[:, 1:4] * x[:, 3:]
    pooled = torch.cat((F.max_pool2d(F.relu(x), 3, 1, 1), F.max_pool2d(product, 3, 1, 1)), 1)
    x = torch.cat((slope(x), scaled(x), F.relu6(x), F.leaky_relu(x, 0.2), 0.5 * x - 0.25, pooled), 1)
    return x[:, 1:].view(len(x), 2, 19, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def test_what_works_channel_by_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHANNELS", 16)  # so that there are tiles
    assert_equal_to_float64(drawn(Between(pointwise, scaled=Scaled(), slope=nn.PReLU())))


def test_lines_without_a_kernel_enter_as_they_are() -> None:
    model = drawn(Mixed())
    assert_equal_to_float64(model, is_whole=False)


class Growing(nn.Module):
    """A curve, and a transposed convolution of more channels than a tile takes and more phases than taps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.up, self.norm2 = nn.BatchNorm2d(3), nn.ConvTranspose2d(3, 6, 3, (2, 4)), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        """Wire them."""
        return self.norm2(self.up(F.silu(self.norm1(x))))


def test_a_network_that_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("ROWS", 4), ("COLUMNS", 2), ("ROWS_BACK", 32), ("COLUMNS_BACK", 2)):
        monkeypatch.setattr(layout, name, size)  # so that there are tiles
    assert_equal_to_float64(drawn(Growing()).to(memory_format=torch.channels_last))  # type: ignore[call-overload]


class Twice(nn.Module):
    """A weight that is used twice, weights in a row, and a layer on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.stem, self.norm2 = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False)
        self.norm3 = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        x = self.stem(F.relu(self.norm1(x)))
        return self.norm3(F.relu(self.stem(F.relu(self.norm2(x))) + x))


@pytest.fixture
def model() -> nn.Module:
    return drawn(Twice())


def test_a_weight_used_twice_and_parameters_without_gradient(model: nn.Module) -> None:
    assert_equal_to_float64(model)
    for name in ("norm1.weight", "stem.weight"):
        model.get_parameter(name).requires_grad_(False)
    assert_equal_to_float64(model)


def test_the_table_stays_as_long_as_no_parameter_moves(model: nn.Module) -> None:
    gradients(model, predictions(model)[0])
    table = program(model)._known
    with torch.no_grad():
        model.get_parameter("stem.weight").mul_(1.5)
    before = priors(model)["norm3"].mean
    priors(model)
    assert table is not None and program(model)._known is table
    model.get_parameter("stem.weight").data = 2 * model.get_parameter("stem.weight").data
    assert not torch.equal(priors(model)["norm3"].mean, before) and program(model)._known is not table


def test_a_captured_graph_keeps_its_table_and_begins_with_none(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "is_capturing", lambda: True)
    with pytest.raises(ConversionError, match="captured before the priors' kernels know"):
        priors(model)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "is_capturing", lambda: False)
        expected = priors(model)["norm3"].mean
    assert torch.equal(priors(model)["norm3"].mean, expected)
    known = program(model)._known
    assert known is not None and program(model)._captured[-1] is known.table


def test_gradients_are_those_of_the_forward_though_inflations_move(model: nn.Module) -> None:
    found, exact = predictions(model)[0], gradients(model, predictions(model)[0])
    for name, buffer in model.named_buffers():
        if name.endswith("innovation"):
            buffer.add_(1.0)
    for name, gradient in gradients(model, found).items():
        assert torch.equal(gradient, exact[name])


def test_weights_changed_before_the_backward_pass_are_refused(model: nn.Module) -> None:
    found, _ = predictions(model)
    with torch.no_grad():
        model.get_parameter("stem.weight").add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(model, found)


def test_saved_tensors_may_be_moved_meanwhile(model: nn.Module) -> None:
    exact = gradients(model, predictions(model)[0])
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.detach().clone(), lambda x: x):
        found, _ = predictions(model)
    for name, gradient in gradients(model, found).items():
        torch.testing.assert_close(gradient, exact[name])


def test_copies_carry_the_program_and_read_their_own_weights(model: nn.Module) -> None:
    before = priors(model)["norm3"].mean
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.get_parameter("stem.weight").mul_(1.5)
        assert not torch.equal(priors(other)["norm3"].mean, before)
    assert torch.equal(priors(model)["norm3"].mean, before)


def test_chains_of_a_level_share_no_value() -> None:
    def row(operation: int, out: int, first: int, second: int = 0) -> schedule.Row:
        return schedule.Row.of(
            Instruction((operation, 2, out, out + 2, first, first + 2, second, second + 2, 2, 1, 1, 0, 0))
        )

    rows = [row(layout.RELU, 8, 0), row(layout.RELU, 12, 4), row(layout.RELU, 16, 4), row(layout.ADD, 20, 8, 24)]
    assert schedule.chains_of(rows, 40) == [[rows[1], rows[2]], [rows[0], rows[3]]]


def test_operations_have_the_numbers_of_the_instructions() -> None:
    names = [name for name in vars(layout) if isinstance(getattr(instructions, name, None), int)]
    assert len(names) == 19
    assert all(getattr(layout, name) == getattr(instructions, name) for name in names)
    assert len(names) == layout.COLLECT


def trained() -> tuple[list[float], dict[str, Tensor]]:
    """The losses of three steps, and the gradients of the last."""
    torch.manual_seed(0)
    model = bkn.convert(Twice(), IMAGES[:1], statistics_batch_size=2, input_prior=IMAGES).train()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(IMAGES) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def _layers_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers have their own tests."""
    monkeypatch.setattr(backend, "triton_takes", lambda *_: False)
    monkeypatch.setattr(track, "_track_by_triton", lambda *_, **__: None)


@pytest.mark.parametrize(("gain", "shares"), [("auto", False), (0.2, False), (0.2, True)])
def test_gains_have_gradients_where_they_are_learned(
    gain: float | Literal["auto"], shares: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bkn.convert(Small(), IMAGES[:1], statistics_batch_size=2, gain=gain).train()
    other = copy.deepcopy(model)
    for each, name in ((model, "triton"), (other, "torch")):
        monkeypatch.setattr(backend, "chosen", lambda name=name: name)
        with bkn.accumulation(each) if shares else contextlib.nullcontext():
            each(IMAGES[:, :, :5, :5]).square().sin().mean().backward()
    assert ("norm2.gain_logit" in dict(model.named_parameters())) == (gain != "auto")
    for (name, parameter), same in zip(model.named_parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None and same.grad is not None, name
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.usefixtures("_layers_by_pytorch")
@pytest.mark.parametrize("is_watched", [False, True])
def test_a_block_of_forwards_adds_the_gradients_of_separate_priors(
    model: nn.Module, is_watched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.get_submodule("norm1").bias = model.get_parameter("stem.bias")  # one parameter in two places
    seen: list[Tensor] = []
    if is_watched:
        model.get_parameter("stem.weight").register_hook(lambda gradient: seen.append(gradient))
    made: list[object] = []
    create = accumulation._by_node
    monkeypatch.setattr(accumulation, "_by_node", lambda *rest: made.append(create(*rest)) or made[-1])
    other = copy.deepcopy(model)
    with bkn.accumulation(model):
        for images in IMAGES.split(2):
            model(images).square().mean().backward()
    assert len(made) == 1 and bool(seen) == is_watched
    monkeypatch.setattr(backend, "chosen", lambda: "torch")
    before = copy.deepcopy(other.state_dict())
    for images in IMAGES.split(2):
        other.load_state_dict(before)  # the memory of a block moves when it ends
        other(images).square().mean().backward()
    for parameter, same in zip(model.parameters(), other.parameters(), strict=True):
        assert parameter.grad is not None and same.grad is not None
        torch.testing.assert_close(parameter.grad, same.grad, rtol=1e-4, atol=1e-5)


def test_parameters_changed_inside_a_block_are_refused(model: nn.Module) -> None:
    with pytest.raises(ConversionError, match="changed inside"), bkn.accumulation(model), torch.no_grad():
        model.get_parameter("stem.weight").add_(1.0)


@pytest.mark.usefixtures("_layers_by_pytorch")
def test_a_network_trains_as_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    losses, found = trained()
    monkeypatch.setattr(backend, "chosen", lambda: "torch")
    expected_losses, expected = trained()
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5)
