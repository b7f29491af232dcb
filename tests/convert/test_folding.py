"""Folding, and copies of converted models."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from small_models import SmallResNet, assert_same, images, pretrained
from test_conversion import VARIANTS, norms
from torch import nn

from bkn_core.convert import conversion_report, convert, fold
from bkn_core.errors import ConversionError
from bkn_core.layers.baselines import ChannelAffine


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_folding_equals_evaluation(options: dict[str, Any]) -> None:
    x = images()
    converted = convert(pretrained(SmallResNet()), x, input_prior=x, **options)
    converted(x)
    state = {name: value.clone() for name, value in converted.state_dict().items()}
    folded = fold(converted)
    assert not norms(folded) and not folded.training and converted.training
    assert sum(isinstance(m, ChannelAffine) for m in folded.modules()) == 4
    torch.testing.assert_close(folded(x), converted.eval()(x), rtol=1e-5, atol=1e-5)
    assert_same(state, dict(converted.state_dict()))
    assert not folded._forward_pre_hooks and not folded._forward_hooks
    assert not [n for n, _ in folded.named_buffers() if "input_" in n]
    folded.train()(x)  # nothing is left that could warn or track


def test_folding_needs_population_statistics() -> None:
    with pytest.raises(ConversionError, match=r"^1 keeps no population"):
        fold(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)))


@pytest.mark.parametrize("kind", ["brn", "fixed", "bn"])
def test_baselines_fold_too(kind: Any) -> None:
    x = images()
    converted = convert(pretrained(SmallResNet()), x, kind=kind).eval()
    torch.testing.assert_close(fold(converted)(x), converted(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("through", ["deepcopy", "pickle", "state_dict"])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_converted_models_survive_copies_after_a_step(options: dict[str, Any], through: str) -> None:
    x = images()
    converted = convert(pretrained(SmallResNet()), x, input_prior=x, **options)
    converted(x).sum().backward()
    if through == "deepcopy":
        other = copy.deepcopy(converted)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(converted))
    else:
        other = convert(SmallResNet(), x, input_prior=images(), **options)
        other.load_state_dict(converted.state_dict(), strict=True)
    assert_same(dict(converted.state_dict()), dict(other.state_dict()))
    assert conversion_report(other) == conversion_report(converted)
    assert torch.equal(other(x), converted(x))
    assert_same(dict(converted.state_dict()), dict(other.state_dict()))
