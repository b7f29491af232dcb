"""The suite of benchmarks/robustness.py: its images, its keys, going on where it stopped, and what it reports."""

from __future__ import annotations

import dataclasses
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import robustness_data
import torch
from PIL import Image
from robustness import append, pending, read, run_all, work
from robustness_data import Sources, classes, load, missing
from robustness_grid import FORMS, Settings, chosen, grid
from robustness_networks import CLASSIFIERS, SEGMENTER, build
from robustness_report import report
from robustness_training import judge, learning_rate

SETTINGS = Settings("glyphs", "cifar_resnet8", "sgd", 8, 1, "bkn", images=64)
SHAPES = {"cifar": (3, 16, 16), "glyphs": (1, 28, 28), "digits": (1, 28, 28), "scenes": (3, 64, 64)}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    """Few images, and a zip of noise in the place of CIFAR-10."""
    few = {"train": 40, "validation": 20, "test": 20}
    monkeypatch.setattr(robustness_data, "COUNTS", few)
    monkeypatch.setattr(robustness_data, "SCENE_COUNTS", few)
    robustness_data._read.cache_clear()
    robustness_data._standard.cache_clear()
    random = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "cifar.zip", "w") as archive:
        for index in range(60):
            for part in ("train", "test"):
                with archive.open(f"{part}/{index % 10}/{index:02}.png", "w") as file:
                    Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(file, "png")
    return Sources(tmp_path / "data", tmp_path / "cifar.zip")


def record(**changes: Any) -> dict[str, Any]:
    results = {name: changes.pop(name) for name in ("population", "single", "diverged") if name in changes}
    settings = dataclasses.replace(SETTINGS, **changes)
    made = {"loss": 1.0, "population": 80.0, "single": None, "diverged": False, "seconds": 1.0}
    return {"key": settings.key, "settings": dataclasses.asdict(settings), **made, **results}


@pytest.mark.parametrize("name", SHAPES)
def test_images_are_the_same_each_time_and_other_in_each_part(name: str, sources: Sources) -> None:
    make = robustness_data.MAKERS[name]
    first, again = make("train", 20, sources), make("train", 20, sources)
    others = [make(part, 20, sources) for part in ("validation", "test")]
    assert first[0].shape == (20, *SHAPES[name]) and first[0].dtype == np.uint8
    assert all(np.array_equal(*pair) for pair in zip(first, again, strict=True))
    seen = {image.tobytes() for image in first[0]}
    assert all(image.tobytes() not in seen for images, _ in others for image in images)
    assert first[1].min() >= 0 and first[1].max() < classes(name)


def test_textures_are_cut_where_their_photographs_are(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (512, 512), np.uint8))
    monkeypatch.setattr(robustness_data, "_texture", lambda name: picture)
    images, labels = robustness_data.make_textures("test", 20, sources)
    assert images.shape == (20, 1, 24, 24) and set(labels) == {0, 1, 2} and images.std() > 10


def test_a_network_sees_the_contrast_and_not_the_mean_of_each_set(sources: Sources) -> None:
    plain, inverted, faint = (load(f"cifar{kind}", "train", sources)[0] for kind in ("", "-inverted", "-faint"))
    assert plain.mean().abs() < 1e-4 and abs(plain.std() - 1) < 1e-3
    torch.testing.assert_close(inverted - inverted.mean((0, 2, 3), True), -plain, atol=1e-4, rtol=0)
    assert abs(faint.std((0, 2, 3)).mean() - 0.1) < 1e-3


def test_an_image_set_that_cannot_be_made_says_what_it_needs(tmp_path: Path) -> None:
    assert "--cifar" in (missing("cifar-faint", Sources(tmp_path)) or "")
    assert missing("glyphs", Sources(tmp_path)) is None


@pytest.mark.parametrize("name", [*CLASSIFIERS, SEGMENTER])
def test_networks_give_logits_of_an_image_or_a_pixel(name: str) -> None:
    logits = build(name, classes=4, channels=1)(torch.randn(2, 1, 16, 16))
    assert logits.shape == ((2, 4, 16, 16) if name == SEGMENTER else (2, 4))


@pytest.mark.parametrize("form", FORMS)
def test_keys_are_unique(form: str) -> None:
    runs = grid(form)
    assert len({run.key for run in runs}) == len(runs)


def test_another_seed_is_another_run() -> None:
    assert len({run.key for run in grid("quick", seeds=3)}) == 3 * len(grid("quick"))


def test_centred_weights_have_keys_and_lines_of_their_own() -> None:
    plain, centred = grid("quick"), grid("quick", weights="centred")
    assert not {run.key for run in plain} & {run.key for run in centred}
    assert "weights" not in plain[0].key and centred[0].key == f"{plain[0].key},weights=centred"
    lines = report([record(), record(weights="centred", population=81.0)]).splitlines()
    assert any("cifar_resnet8, centred weights | sgd" in line and "81.0" in line for line in lines)


def test_filters_keep_what_is_compared() -> None:
    kept = chosen(grid("day"), "data=glyphs+scenes,g=128,s=1,factor=1,optimizer=sgd")
    assert {(run.norm, run.s) for run in kept} == {("bkn", 1), ("bn", 128), ("gn", 128), ("in", 128)}
    assert {run.data for run in kept} == {"glyphs", "scenes"}
    with pytest.raises(ValueError, match="NAME=VALUE"):
        chosen(kept, "sizes=2")


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    path, runs = tmp_path / "out.jsonl", [dataclasses.replace(SETTINGS, seed=seed) for seed in range(3)]
    append(path, record(seed=0))
    path.write_bytes(path.read_bytes() + json.dumps(record(seed=1)).encode()[:50])  # cut short
    assert pending(runs, read(path)) == runs[1:]
    append(path, record(seed=2))
    append(path, record(seed=0) | {"error": "MemoryError: "})
    assert [run.seed for run in pending(runs, read(path))] == [0, 1]
    run_all([], Sources(tmp_path), path, jobs=1)


@pytest.mark.parametrize("settings", [SETTINGS, Settings("scenes", SEGMENTER, "adamw", 8, 8, "gn", images=8)])
def test_a_training_ends_in_one_record(settings: Settings, sources: Sources) -> None:
    made = json.loads(json.dumps(work(settings, sources)))
    assert "error" not in made and made["diverged"] is False and made["key"] == settings.key
    assert all(0 <= made[name] <= 100 for name in ("population", "single") if made[name] is not None)
    assert (made["single"] is not None) == (settings.norm == "bkn")


def test_a_training_that_cannot_run_says_so(sources: Sources) -> None:
    made = work(dataclasses.replace(SETTINGS, network="nothing"), sources)
    assert made["error"].startswith("RecipeError") and "nothing" in report([made])


def test_losses_diverge_by_growing_or_by_not_being_finite() -> None:
    assert judge([2.0] * 90 + [7.0] * 10) == (7.0, True) and judge([2.0] * 90 + [5.0] * 10) == (5.0, False)
    assert judge([2.0, math.nan]) == (None, True)


def test_the_learning_rate_rises_for_a_fifth_and_falls_to_nothing() -> None:
    rates = [learning_rate(1.0, part) for part in (0.0, 0.2, 0.6, 1.0)]
    assert rates == pytest.approx([1 / 25, 1.0, 0.5, 0.0])


def test_the_report_names_each_place_that_is_behind_apart_or_diverged() -> None:
    records = [
        record(norm="bn", s=8),
        record(population=78.5, single=78.6),
        record(norm="bn", s=8, factor=4.0),
        record(population=79.5, single=78.9, factor=4.0),
        record(norm="gn", s=8, factor=2.0, population=None, diverged=True),
    ]
    text = report(records)
    behind, apart, failed = text.split("\n- ")[1:]
    assert "| cifar_resnet8 | sgd | 64 images | 8 | 1 | BKN | 78.5 / 78.6 |  | 79.5 / 78.9 |" in text
    assert "BKN more than 1 point behind BN with s = g: 1 of 2 places" in text
    assert behind.startswith("glyphs, cifar_resnet8, sgd × 1, g = 8, s = 1") and "78.5 against 80.0 (-1.5" in behind
    assert "more than 0.5 apart: 1 of 2 places" in text
    assert "sgd × 4" in apart and "79.5 by population, 78.9 by each image (-0.6)" in apart
    assert "divergences and errors: 1 of 5 trainings" in text
    assert failed.startswith("GN: glyphs, cifar_resnet8, sgd × 2, g = 8") and failed.endswith("diverged")


def test_a_place_is_behind_by_the_mean_of_the_seeds_that_both_have() -> None:
    ours = [record(seed=seed, population=value) for seed, value in enumerate((77.0, 79.0, 10.0))]
    text = report([*ours, record(norm="bn", s=8, seed=0), record(norm="bn", s=8, seed=1)])
    assert "78.0 against 80.0 (-2.0 ± 1.0; seeds: 2)" in text
