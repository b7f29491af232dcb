"""Networks that begin with weights of torchvision or timm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_runs import tiny

from bkn_core.engine.build import build_model, load_splits
from bkn_core.engine.models import (
    build_network,
    pretrained_colours,
)
from bkn_core.errors import InputError, RecipeError
from bkn_core.priors.hooks import find_hooks


def test_pretrained_weights_that_cannot_be_fetched_are_an_input_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(InputError, match=r"pretrained weights of 'resnet18' cannot be read: no route to host"):
        build_network("resnet18", classes=10, pretrained=True)


@pytest.mark.parametrize("classes", [10, 1000])
def test_pretrained_weights_are_kept_but_for_a_head_of_other_classes(
    monkeypatch: pytest.MonkeyPatch, classes: int
) -> None:
    state = {
        name: torch.full_like(tensor, 3)
        for name, tensor in build_network("resnet18", classes=1000).state_dict().items()
    }
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: state)
    found = build_network("resnet18", classes=classes, pretrained=True).state_dict()
    ours = {name for name, tensor in found.items() if not (tensor == 3).all()}
    assert ours == (set() if classes == 1000 else {"fc.weight", "fc.bias"})


@pytest.mark.parametrize("with_images", [True, False])
def test_priors_of_pretrained_weights_begin_at_their_statistics(
    monkeypatch: pytest.MonkeyPatch, with_images: bool
) -> None:
    state = build_network("resnet18", classes=1000).state_dict()
    for name, tensor in state.items():
        if name.endswith(("running_mean", "running_var")):
            tensor.uniform_(0.5, 2)
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda *_, **__: state)
    recipe = tiny("model.name=resnet18", "model.pretrained=true")
    splits = load_splits(recipe)
    assert splits.preprocess.mean == (0.485, 0.456, 0.406) and splits.preprocess.std == (0.229, 0.224, 0.225)
    model = build_model(recipe, splits.preprocess, 10, images=splits.train if with_images else None)
    assert torch.equal(model.get_parameter("layer4.1.conv2.weight"), state["layer4.1.conv2.weight"])
    priors = find_hooks(model)[1].priors(model)
    assert len(priors) == 20
    for name, prior in priors.items():
        torch.testing.assert_close(prior.mean, state[f"{name}.running_mean"], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(prior.variance, state[f"{name}.running_var"], rtol=1e-3, atol=1e-3)


def test_colours_are_those_of_the_pretrained_weights_of_timm() -> None:
    assert pretrained_colours("timm:vit_tiny_patch16_224") == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", ["cifar_resnet8", "cifar_plain"])
def test_pretrained_weights_that_nobody_has_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}' has no pretrained weights"):
        build_network(name, classes=10, pretrained=True)
