"""Converted models inside what people put models into: compilers, checkpoints, wrappers, functional calls."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from small_models import (
    LABELS,
    VARIANTS,
    SmallResNet,
    assert_same,
    converted,
    every_variant,
    gradients,
    images,
    pretrained,
    step,
)
from torch import Tensor, nn
from torch.nn import functional as F

from bkn_core.convert import convert
from bkn_core.errors import ConversionError
from bkn_core.layers.batch_kalman import BatchKalmanNorm


@every_variant
def test_every_parameter_receives_a_finite_gradient(options: dict[str, Any]) -> None:
    model = converted(options)
    step(model, images())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        # pooled features vary so little that the guard drops what an identity predicts of them
        dropped = options.get("transition") == "learned" and name in ("bn4.gain_logit", "bn4.transition")
        assert dropped or parameter.grad.abs().max() > 0, name


@every_variant
def test_gradients_equal_finite_differences(options: dict[str, Any]) -> None:
    if "transition" not in options:
        options = {**options, "innovation": False}  # whose gradient is not that of this forward alone
    model, x = converted(options, statistics_batch_size=2).double(), images(4).double()
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def loss() -> Tensor:
        model.load_state_dict(buffers, strict=False)  # the inflation moves with every forward
        return F.cross_entropy(model(x), LABELS[:4])

    loss().backward()
    for name, parameter in model.named_parameters():
        direction, values = torch.randn_like(parameter), []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(float(loss()))
                parameter.sub_(direction, alpha=sign * 1e-6)
        assert parameter.grad is not None
        actual = float((parameter.grad * direction).sum())
        assert actual == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3, abs=1e-6), name


@every_variant
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_train(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = converted(options)
    x = images()
    expected = F.cross_entropy(copy.deepcopy(model)(x), LABELS)
    loss = step(model.to(dtype), x.to(dtype))
    torch.testing.assert_close(loss.float(), expected.detach(), rtol=1e-5 if dtype == torch.float64 else 0.1, atol=1e-5)
    assert all(g.isfinite().all() for g in gradients(model).values())
    assert all(b.isfinite().all() for b in model.buffers())


@every_variant
def test_mixed_precision_keeps_statistics_in_float32(options: dict[str, Any]) -> None:
    model, x = converted(options), images()
    expected = F.cross_entropy(copy.deepcopy(model)(x), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(x), LABELS)
    loss.backward()
    torch.testing.assert_close(loss.float(), expected, rtol=0.05, atol=0.02)
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(model).values())
    if options == {}:
        assert model.layer.bn2.context.forward.prior("layer.bn2").variance.dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{}, *(pytest.param(variant, marks=pytest.mark.slow) for variant in VARIANTS[1:])], ids=str
)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler looks at last forward's priors
def test_compiled_model_equals_the_eager_one(options: dict[str, Any]) -> None:
    model, x = converted(options), images(7)
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    # Messages that depend on this forward's posteriors may break the graph; those of parameters may not.
    compiled = torch.compile(other, backend="eager", fullgraph=options == {})
    for _ in range(2):
        torch.testing.assert_close(step(compiled, x), step(model, x), rtol=1e-6, atol=1e-6)
    assert_same(gradients(model), gradients(other), 1e-5)
    assert_same(dict(model.named_buffers()), dict(other.named_buffers()), 1e-5)
    torch.testing.assert_close(compiled.eval()(x), model.eval()(x), rtol=1e-5, atol=1e-5)


@every_variant
def test_distributed_wrapper_changes_nothing(options: dict[str, Any], process_group: None) -> None:
    model, x = converted(options), images()
    other = copy.deepcopy(model)
    wrapped = nn.parallel.DistributedDataParallel(other)
    for _ in range(2):
        torch.testing.assert_close(step(wrapped, x), step(model, x))
    assert_same(gradients(model), gradients(other), 1e-6)
    assert_same(dict(model.named_buffers()), dict(other.named_buffers()), 1e-6)


def test_distributed_wrapper_is_refused_where_its_model_is_not(process_group: None) -> None:
    with pytest.raises(ConversionError, match="DistributedDataParallel"):
        convert(nn.parallel.DistributedDataParallel(SmallResNet()), images())


@every_variant
def test_functional_call_and_grad(options: dict[str, Any]) -> None:
    model, x = converted(options), images()
    other = copy.deepcopy(model)
    step(model, x)
    parameters = {n: p.detach() for n, p in other.named_parameters()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        buffers = {n: b.clone() for n, b in other.named_buffers()}
        return F.cross_entropy(torch.func.functional_call(other, (values, buffers), (x,)), LABELS)

    assert_same(gradients(model), torch.func.grad(loss)(parameters), 1e-5)


@every_variant
def test_two_forwards_before_one_backward(options: dict[str, Any]) -> None:
    model = converted(options)
    other, x, y = copy.deepcopy(model), images(), images()
    (F.cross_entropy(model(x), LABELS) + F.cross_entropy(model(y), LABELS)).backward()
    step(other, x)
    for name, buffer in other.named_buffers():
        if name.endswith("gathered_sensitivity"):
            buffer.zero_()  # which a forward uses that comes after the backward pass
    step(other, y)
    assert_same(gradients(other), gradients(model), 1e-5)


@every_variant
def test_backward_may_run_twice_over_a_kept_graph(options: dict[str, Any]) -> None:
    model = converted(options)
    loss = F.cross_entropy(model(images()), LABELS)
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert_same({n: 2 * g for n, g in once.items()}, gradients(model), 1e-6)


@every_variant
def test_exception_in_a_forward_harms_no_later_one(options: dict[str, Any]) -> None:
    model = converted(options)
    other, x = copy.deepcopy(model), images()
    with pytest.raises(RuntimeError):
        model(torch.randn(8, 3, 8, 8, dtype=torch.complex64))
    handle = model.layer.conv3.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyError("mid")))
    state = {n: b.clone() for n, b in model.named_buffers()}
    with pytest.raises(KeyError, match="mid"):
        model(x)
    assert not any(m.slots.own.forward.is_open for m in model.modules() if isinstance(m, BatchKalmanNorm))
    handle.remove()
    model.load_state_dict(state, strict=False)
    step(model, x), step(other, x)
    assert_same(gradients(other), gradients(model))


@every_variant
def test_submodule_called_alone_warns_and_is_batch_norm(options: dict[str, Any]) -> None:
    model = converted(options, statistics_batch_size=None)
    step(model, images())
    reference = copy.deepcopy(pretrained(SmallResNet()).layer)
    for name in ("conv2", "conv3", "bn2", "bn3"):
        reference.get_submodule(name).load_state_dict(model.layer.get_submodule(name).state_dict(), strict=False)
    h = torch.randn(8, 6, 5, 5)
    with pytest.warns(UserWarning, match="outside the forward of its converted model"):
        y = model.layer(h)
    torch.testing.assert_close(y, reference(h), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    model.eval().layer(h)  # evaluation needs no prior and says nothing
    step(model.train(), images())  # and the model still works


def test_wrapped_models_find_their_priors() -> None:
    model = converted({})
    other = copy.deepcopy(model)
    wrapper = nn.Sequential(nn.Identity(), other)
    x = images()
    torch.testing.assert_close(wrapper(x), model(x))


def test_evaluation_under_no_grad_and_training_under_no_grad() -> None:
    model, x = converted({}), images()
    with torch.no_grad():
        assert not model(x).requires_grad
    with torch.inference_mode():
        model(x)
        model.eval()(x)
    step(model.train(), x)


@every_variant
def test_export_in_training_mode_is_refused(options: dict[str, Any]) -> None:
    model, x = converted(options), images(2)
    with pytest.raises(ConversionError, match="in training mode, cannot be exported"):
        torch.export.export(model, (x,))
    exported = torch.export.export(model.eval(), (x,))
    torch.testing.assert_close(exported.module()(x), model(x))
