"""`bkn train`: words on screen, the values it hands on, its JSON object."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import TINY, call
from PIL import Image

import bkn_core


def test_json_is_one_object_with_the_promised_facts(answer: dict[str, Any], run: Path) -> None:
    assert (answer["schema"], answer["ok"], answer["warnings"]) == ("bkn.train/1", True, [])
    result = answer["result"]
    assert result["run"] == str(run)
    assert result["steps"] == 4
    assert 0 <= result["top1"] <= 1
    assert result["loss"] > 0
    assert result["seconds"] > 0
    assert result["images_per_second"] == pytest.approx(64 / result["seconds"])
    assert answer["versions"]["bkn"] == "0.1.0"


def test_every_artifact_exists(answer: dict[str, Any]) -> None:
    assert set(answer["artifacts"]) == {"weights", "best_weights", "metrics", "predictions"}
    assert all(Path(path).is_file() for path in answer["artifacts"].values())


def test_the_weights_of_the_answer_are_those_that_its_metrics_were_measured_on(answer: dict[str, Any]) -> None:
    weights = Path(answer["artifacts"]["weights"])
    measured = bkn_core.evaluate(weights.parents[1]).metrics["population"]
    assert weights.name == "last.safetensors"
    assert (measured.top1, measured.loss) == (answer["result"]["top1"], answer["result"]["loss"])


def test_paths_with_brackets_stay_whole_on_one_line(trained: tuple[Path, Any]) -> None:
    folder, result = trained
    assert f"run folder: {folder}\n" in result.stderr
    assert f"bkn eval '{folder}'\n" in result.stderr


def test_results_go_to_standard_output_and_the_rest_to_standard_error(inside: Path) -> None:
    result = call("train", *TINY)
    assert result.exit_code == 0
    assert "population" in result.stdout
    assert "4 steps in" in result.stdout
    assert "epoch   1/1" in result.stderr
    assert [path.name for path in (inside / "runs").iterdir()] == ["digits_micro-digits-cifar_resnet8-bkn-g16-s2-seed0"]


def test_words_and_flags_become_the_recipe(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def train(recipe: bkn_core.Recipe, **options: Any) -> None:
        seen.update(options, recipe=recipe)
        raise bkn_core.errors.DivergedError("enough")

    monkeypatch.setattr(bkn_core, "train", train)
    result = call("train", "digits_micro", "norm.kind=bn", "train.device=mps", "--device", "cpu", "--out", "here")
    assert result.exit_code == 6
    assert (seen["recipe"].norm.kind, seen["recipe"].train.device) == ("bn", "cpu")
    assert (seen["out"], seen["resume"]) == (Path("here"), None)


def test_dry_run_describes_and_writes_nothing(inside: Path) -> None:
    result = call("train", *TINY, "--dry-run")
    assert result.exit_code == 0
    assert "steps: 4\ndevice: cpu\ninput size: 1 x 8 x 8\nlearning rate: 0.1\nschedule: onecycle\n" in result.stdout
    assert "input -> conv1" in result.stdout
    assert "log(v/v')" in result.stdout and "-0.00" not in result.stdout
    assert list(inside.iterdir()) == []


def test_dry_run_refuses_what_the_run_could_not_write(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = call("train", *TINY, "log.tensorboard=true", "--dry-run")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "TensorBoard cannot be imported" in result.stderr


def test_dry_run_counts_the_images_that_are_held_out(inside: Path) -> None:
    result = call("train", *TINY, "data.validation=0.2", "--dry-run")
    assert "train images: 64\nvalidation images: 287\ntest images: 32\n" in result.stdout


def test_what_is_measured_on_validation_images_is_called_so(inside: Path) -> None:
    result = call("train", *TINY, "data.validation=0.2")
    assert "64 training, 287 validation and 32 test images" in result.stderr
    assert "  validation top-1 " in result.stderr
    assert "last epoch on the test images:" in result.stdout
    assert "best epoch 1: validation top-1 " in result.stdout


def test_the_json_of_a_run_with_validation_holds_the_test_figures(inside: Path) -> None:
    result = json.loads(call("train", *TINY, "data.validation=0.2", "--json").stdout)["result"]
    summary = json.loads((Path(result["run"]) / "summary.json").read_text())
    assert result["images"] == 32
    assert (result["top1"], result["best_top1"]) == (summary["results"]["population"]["top1"], summary["best"]["top1"])


def test_dry_run_json_holds_recipe_and_layers(inside: Path) -> None:
    result = json.loads(call("train", *TINY, "--dry-run", "--json").stdout)["result"]
    assert result["recipe"]["train"]["epochs"] == 1
    assert result["layers"][0] == {"name": "bn1", "channels": 16, "prior": "input -> conv1", "reason": ""}
    first, second, *_ = result["initial_priors"]
    assert first["name"] == "bn1" and abs(first["refined"]["log_variance_ratio"]) < 1e-3
    assert second["name"] == result["layers"][1]["name"] and second["refined"]["spread"] > 1e-2


def test_a_finished_run_resumes_to_the_same_result(answer: dict[str, Any], run: Path) -> None:
    result = call("train", "--resume", str(run), "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["result"]["steps"] == answer["result"]["steps"]


def test_no_color_and_no_terminal_mean_no_escape_codes(trained: tuple[Path, Any]) -> None:
    assert "\x1b" not in trained[1].output


def test_what_libraries_print_stays_out_of_the_json(inside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(recipe: bkn_core.Recipe, **options: Any) -> None:
        print("Files already downloaded and verified")
        raise bkn_core.errors.DivergedError("enough")

    monkeypatch.setattr(bkn_core, "train", train)
    result = call("train", "--json")
    assert json.loads(result.stdout)["error"]["code"] == "diverged"
    assert "already downloaded" in result.stderr


def write_pictures(root: Path, *suffixes: str) -> Path:
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for index in range(10):
            pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
        for suffix in suffixes:
            (root / name / f"photo{suffix}").touch()
    return root


PHOTOS = (
    "batch.gradient=4",
    "train.epochs=1",
    "model.name=cifar_plain",
    "log.plots=false",
    "--device",
    "cpu",
    "--json",
)


@pytest.mark.parametrize("kind", ["folder", "zip", "npz"])
def test_a_named_place_of_data_is_trained_on(inside: Path, kind: str) -> None:
    place = write_pictures(inside / "photos", ".heic")
    if kind == "zip":
        place = Path(shutil.make_archive("photos", "zip", place))
    if kind == "npz":
        place, images = Path("photos.npz"), np.zeros((16, 8, 8, 3), np.uint8)
        labels = np.arange(16) % 2
        np.savez(place, train_images=images, train_labels=labels, test_images=images[:4], test_labels=labels[:4])
    answer = json.loads(call("train", place.name, *PHOTOS).stdout)
    assert answer["result"]["images"] == 4
    assert answer["result"]["steps"] == 4
    if kind != "npz":
        left_out, held_out = answer["warnings"]
        assert left_out == (
            f"{place.name}: left out are 2 .heic (no format that is read): cat/photo.heic, dog/photo.heic"
        )
        assert f"{place.name} has no folder of test images: 4 of its 20 images" in held_out


def test_a_run_whose_data_moved_goes_on_where_they_are_named(inside: Path) -> None:
    place = write_pictures(inside / "photos")
    assert call("train", "photos", *PHOTOS, "--out", "run").exit_code == 0
    place.rename(inside / "moved")
    refused = call("train", "--resume", "run")
    assert refused.exit_code == 3
    assert f"data.root photos (in {inside}) does not exist" in refused.stderr
    assert "bkn train --resume RUN data.root=PLACE" in refused.stderr
    assert call("train", "--resume", "run", "data.root=moved", "train.epochs=2").exit_code == 0
    assert call("train", "--resume", "run").exit_code == 0
    changed = call("train", "--resume", "run", "optim.lr=1")
    assert changed.exit_code == 3
    assert "optim.lr changed" in changed.stderr


def test_the_folder_of_a_run_is_no_place_of_data(inside: Path, run: Path) -> None:
    result = call("train", str(run))
    assert result.exit_code == 2
    assert "is the folder of a run" in result.stderr
    assert "--resume" in result.stderr
