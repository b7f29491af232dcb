"""Forwards that begin elsewhere than at the converted model, and forwards that run at the same time."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from small_models import (
    LABELS,
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
from torchvision.models.feature_extraction import create_feature_extractor

from bkn_core.convert import conversion_report, convert, to_batch_norm
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.priors.hooks import find_hooks

OUTSIDE = "outside the forward of its converted model"


class Tower(SmallResNet):
    """With a method beside `forward` that gives features, as timm's models have."""

    def forward_features(self, x: Tensor) -> Tensor:
        h: Tensor = self.layer(F.relu(self.bn1(self.conv1(x))))
        return h


ENTRIES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a method of the model": lambda model, x: model.forward_features(x),
    "forward called directly": lambda model, x: model.forward(x),
    "a submodule": lambda model, x: model.layer(F.relu(model.conv1(x))),
    "a feature extractor": lambda model, x: create_feature_extractor(model, {"layer": "h"}).train()(x)["h"],
}


@pytest.mark.parametrize("is_trained", [False, True], ids=["fresh", "after a step"])
@pytest.mark.parametrize("name", ENTRIES)
def test_other_entries_say_so_and_are_batch_norm(name: str, is_trained: bool) -> None:
    plain, x = pretrained(Tower()), images()
    model = convert(plain, x, statistics_batch_size=None, gain=0.3).train()
    if is_trained:
        step(model, x)
    with pytest.warns(UserWarning, match=OUTSIDE):
        y = ENTRIES[name](model, x)
    torch.testing.assert_close(y, ENTRIES[name](plain, x), rtol=1e-4, atol=1e-5)
    y.square().sum().backward()
    assert all(g.isfinite().all() for g in gradients(model).values())
    assert is_trained or model.layer.bn2.gain_logit.grad is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # evaluation needs no prior and says nothing
        torch.testing.assert_close(ENTRIES["forward called directly"](model.eval(), x), model(x))
    step(model.train(), x)  # and the model still works


def test_feature_extractors_evaluate_as_the_model_does_and_convert_with_priors() -> None:
    x = images()
    model = pretrained(SmallResNet())
    extractor = create_feature_extractor(convert(model, x).eval(), {"layer": "h", "out": "logits"})
    torch.testing.assert_close(extractor(x)["logits"], model.eval()(x))
    for before in (create_feature_extractor(model, {"out": "logits"}), extractor):
        again = convert(before, x).train()
        assert [r.prior for r in conversion_report(again)] == [r.prior for r in conversion_report(convert(model, x))]
        again(x)["logits"].sum().backward()


def test_symbolic_tracing_takes_a_layer_as_one_step() -> None:
    model, x = converted({}).eval(), images()
    traced = torch.fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module" and "bn" in str(n.target)] == [
        "bn1",
        "layer.bn2",
        "layer.bn3",
        "bn4",
    ]
    assert torch.equal(traced(x), model(x))


def test_features_of_timm_models() -> None:
    x = torch.randn(2, 3, 64, 64)
    model = convert(timm.create_model("resnet10t"), x, exclude=("layer4*",)).train()
    with pytest.warns(UserWarning, match=OUTSIDE):
        model.forward_features(x).sum().backward()
    features = convert(timm.create_model("resnet10t", features_only=True), x).train()
    reports = conversion_report(features)
    assert sum(r.prior is None for r in reports) == 1  # the one that reads the input
    sum(y.sum() for y in features(x)).backward()


def test_slices_of_a_sequence() -> None:
    model = convert(
        nn.Sequential(
            *(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()) for _ in range(3)), nn.Flatten()
        ),
        images(),
    ).train()
    for part in (model[:2], model[1:]):
        with pytest.warns(UserWarning, match=OUTSIDE):
            part(images()).sum().backward()
    model(images()).sum().backward()


def test_a_converted_model_inside_a_larger_one_is_found_and_converted_again() -> None:
    model, x = converted({}), images()
    wrapper = nn.Sequential(nn.Conv2d(3, 3, 1), model, nn.Linear(4, 2)).train()
    wrapper(x).sum().backward()
    assert find_hooks(wrapper)[0] is model
    again = convert(wrapper, x)
    assert sum(len(m._forward_pre_hooks) for m in again.modules()) == 1
    assert {r.name: r.prior for r in conversion_report(again)}["1.layer.bn2"] == "relu(1.bn1) -> 1.layer.conv2"
    assert not any(isinstance(m, BatchKalmanNorm) for m in to_batch_norm(wrapper).modules())


def test_averaged_models_and_replicas_work() -> None:
    model, x = converted({}), images()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    step(model, x)
    averaged.update_parameters(model)
    other = copy.deepcopy(averaged.module)
    torch.testing.assert_close(step(averaged, x), step(other, x))
    nn.DataParallel(model)(x).sum().backward()


@every_variant
def test_copies_made_in_the_middle_of_a_forward_work(options: dict[str, Any]) -> None:
    model, x = converted(options), images()
    copies: list[nn.Module] = []

    def make(*_: Any) -> None:
        if not copies:
            handle.remove()
            copies.append(copy.deepcopy(model))
            copies.append(pickle.loads(pickle.dumps(model)))
            torch.save(model, stored := io.BytesIO())
            stored.seek(0)
            copies.append(torch.load(stored, weights_only=False))

    handle = model.layer.bn2.register_forward_hook(make)
    step(model, x)
    expected = gradients_of(copies[0], x)
    for other in copies[1:]:
        assert_same(expected, gradients_of(other, x))


def gradients_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    step(model, x)
    return gradients(model)


def at_rest(model: nn.Module) -> nn.Module:
    """Keep still what moves with every forward, in an order that threads do not keep."""
    for module in model.modules():
        if isinstance(module, BatchKalmanNorm):
            module.on_posterior = lambda *_: None
    return model


@every_variant
def test_forwards_of_one_model_at_the_same_time_do_not_mix(options: dict[str, Any]) -> None:
    batches = [images(), 3 * images() - 1]
    models = [converted(options) for _ in batches]
    model = models[0]
    models[1].load_state_dict(model.state_dict())
    at_rest(model)
    expected = [gradients_of(at_rest(copy.deepcopy(model)), x) for x in batches]
    model.zero_grad()
    meeting = threading.Barrier(2, timeout=20)

    def meet(*_: Any) -> None:
        meeting.wait()

    for module in (model.layer.conv2, model.layer.bn2, model.linear):  # where both are in the middle
        module.register_forward_hook(meet)
    found: list[dict[str, Tensor] | None] = [None, None]

    def run(number: int) -> None:
        loss = F.cross_entropy(model(batches[number]), LABELS)
        meeting.wait()
        named = dict(model.named_parameters())
        values = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        found[number] = {n: g for n, g in zip(named, values, strict=True) if g is not None}

    run_together(run)
    for number in (0, 1):
        assert found[number] is not None
        assert_same(expected[number], found[number] or {}, 1e-6)


def test_forwards_of_two_models_at_the_same_time() -> None:
    x = images()
    models = [converted({}) for _ in range(2)]
    others = [copy.deepcopy(model) for model in models]

    def run(number: int) -> None:
        for _ in range(5):
            step(models[number], x)

    run_together(run)
    for model, other in zip(models, others, strict=True):
        for _ in range(5):
            step(other, x)
        assert_same(gradients(other), gradients(model), 1e-6)


def run_together(run: Callable[[int], None]) -> None:
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            run(number)
        except BaseException as error:  # whatever it is, the test that waits must see it
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in (0, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def test_models_without_memory_are_converted_and_run() -> None:
    with torch.device("meta"):
        model, x = SmallResNet(), torch.randn(8, 3, 8, 8)
    made = convert(model, x)
    assert [r.prior for r in conversion_report(made)][1:] == [
        "relu(bn1) -> layer.conv2",
        "relu(layer.bn2) -> layer.conv3",
        "relu(layer.bn3 + relu(bn1)) -> linear",
    ]
    assert made.train()(x).shape == (8, 4)
    real = made.to_empty(device="cpu")
    real.load_state_dict(convert(pretrained(SmallResNet()), images()).state_dict())
    step(real, images())


def assert_one_graph(model: nn.Module, x: Tensor) -> None:
    torch._dynamo.reset()
    explained = torch._dynamo.explain(lambda x: model(x))(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons


def test_compiled_model_is_one_graph() -> None:
    assert_one_graph(convert(SmallResNet(), images()).train(), images())


@pytest.mark.slow
def test_compiled_torchvision_resnet_equals_the_eager_one() -> None:
    x = torch.randn(4, 3, 32, 32)
    model = convert(torchvision.models.resnet18(num_classes=4), x, input_prior=x).train()
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler looks at what the last forward left
        compiled = torch.compile(lambda x: other(x), backend="aot_eager", fullgraph=True)
        for _ in range(2):
            F.cross_entropy(compiled(x), LABELS[:4]).backward()
            F.cross_entropy(model(x), LABELS[:4]).backward()
        assert_same(gradients(model), gradients(other), 1e-5)
        other.eval()
        torch.testing.assert_close(compiled(x), model.eval()(x), rtol=1e-5, atol=1e-5)
        for mode in (True, False):
            assert_one_graph(model.train(mode), x)
