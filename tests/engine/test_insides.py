"""What a run shows inside: measured once, kept with the digest of its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_runs import tiny

from bkn_core.engine import insides
from bkn_core.engine.checkpoint import load_weights, weights_path
from bkn_core.engine.insides import look_inside
from bkn_core.engine.loop import train
from bkn_core.layers.batch_kalman import BatchKalmanNorm
from bkn_core.population import statistics


@pytest.fixture
def run(straight: Path, tmp_path: Path) -> Path:
    """A copy of a finished run, because looking writes into it."""
    return Path(shutil.copytree(straight, tmp_path / "run"))


def test_gains_and_priors_are_those_of_the_model(run: Path) -> None:
    found = look_inside(run, measure=True, trusted=False)
    assert found is not None and found.images > 0
    layers = dict(load_weights(weights_path(run)).model().named_modules())
    assert {gain.name: gain.used for gain in found.gains} == {
        gain.name: pytest.approx(float(layers[gain.name].gain)) for gain in found.gains
    }
    assert [miss.name for miss in found.priors] == [gain.name for gain in found.gains]


def test_variances_are_those_of_each_group_beside_the_moving_one(tmp_path: Path) -> None:
    run = tmp_path / "bn"
    train(tiny("norm.kind=bn", "batch.statistics=4"), out=run)
    found = look_inside(run, measure=True, trusted=False)
    assert found is not None and found.variances is not None and not found.gains
    weights = load_weights(weights_path(run))
    layer = weights.model().get_submodule(found.variances.layer)
    assert np.allclose(found.variances.moving, layer.running_var[:64])
    observed = np.array(found.variances.observed)
    assert observed.shape == (found.images // 4, len(found.variances.moving))
    images = insides._images(weights, trusted=False)
    assert images is not None
    model, seen = weights.model(), []
    model.get_submodule(found.variances.layer).register_forward_pre_hook(
        lambda _, x: seen.append(x[0].double().numpy())
    )
    with torch.no_grad(), statistics(model, "batch", 4):
        model(images)
    groups = seen[0].reshape(len(observed), 4, seen[0].shape[1], -1)
    assert np.allclose(observed, groups.var((1, 3))) and found.variances.used == []


def test_the_posterior_is_the_one_that_normalizes(tmp_path: Path) -> None:
    run = tmp_path / "bkn"
    train(tiny("batch.statistics=2", "norm.gain=0.5", "norm.learn_gain=false"), out=run)
    found = look_inside(run, measure=True, trusted=False)
    assert found is not None and found.variances is not None
    weights = load_weights(weights_path(run))
    images = insides._images(weights, trusted=False)
    layer = (model := weights.model()).get_submodule(found.variances.layer)
    seen: list[torch.Tensor] = []
    layer.register_forward_hook(lambda layer, x, y: seen.extend([x[0], y]))
    assert isinstance(layer, BatchKalmanNorm) and layer.weight is not None and images is not None
    with torch.no_grad(), statistics(model, "batch", 2):
        model(images)
    pairs = (values.double().unflatten(0, (-1, 2)) for values in seen)
    before, after = (values.var((1, 3, 4), correction=0) for values in pairs)
    used = before / (after / layer.weight.double().square()) - layer.eps
    np.testing.assert_allclose(found.variances.used, used.detach()[:, :64], rtol=1e-3)


def test_a_second_look_reads_what_the_first_has_kept(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look_inside(run, measure=False, trusted=False) is None
    first = look_inside(run, measure=True, trusted=False)
    monkeypatch.setattr(insides, "load_weights", None)
    assert look_inside(run, measure=True, trusted=False) == first


@pytest.mark.parametrize("text", ["{", "[]", '{"digest": 5}'])
def test_what_is_damaged_or_of_other_weights_is_measured_anew(run: Path, text: str) -> None:
    first = look_inside(run, measure=True, trusted=False)
    kept = run / "insides.json"
    other = json.dumps({**json.loads(kept.read_text()), "digest": "other", "gains": []})
    for damage in (text, other):
        kept.write_text(damage)
        assert look_inside(run, measure=False, trusted=False) is None
        assert look_inside(run, measure=True, trusted=False) == first


def test_a_run_does_not_choose_data_outside_the_working_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insides, "may_choose", lambda data: False)
    found = look_inside(run, measure=True, trusted=False)
    assert found is not None and (found.images, found.priors, found.variances) == (0, [], None) and found.gains
    trusted = look_inside(run, measure=True, trusted=True)
    assert trusted is not None and trusted.images > 0


def test_a_run_without_weights_shows_nothing(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    assert look_inside(run, measure=True, trusted=True) is None
