"""Exported files against the models they come from, run here in ONNX Runtime and PyTorch once more."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from drawn_models import drawn_images, drawn_model, perceptron
from torch import Tensor, nn

from bkn_core.errors import ConversionError, OutputError
from bkn_core.export import onnx_file
from bkn_core.export.onnx_file import ExportResult
from bkn_core.export.sessions import open_session
from bkn_core.population import statistics

Exporter = Callable[..., ExportResult]


def run(path: Path, images: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"input": images.numpy()})[0]


@torch.no_grad()
def check(path: Path, model: nn.Module, images: Tensor, tolerance: float = 1e-4) -> None:
    """Batches of 1, 2 and 7 images give the model's logits."""
    for size in (1, 2, 7):
        expected = model(images[:size]).numpy()
        np.testing.assert_allclose(run(path, images[:size]), expected, rtol=tolerance, atol=tolerance)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["bkn", "brn", "gn", *map(slow, ("bn", "ln", "in", "fixed", "none"))])
def test_population_file_gives_the_unfolded_models_logits_for_every_kind(export: Exporter, kind: str) -> None:
    model, images = drawn_model(kind=kind), drawn_images()
    result = export(model, images)
    check(result.path, model, images)
    assert result.stats == "population"
    assert result.fold == ("affine" if kind in ("bkn", "bn", "brn", "fixed") else None)


def test_population_makes_one_mul_and_one_add_of_every_norm(export: Exporter) -> None:
    images = drawn_images()
    path = export(drawn_model("cifar_resnet8"), images).path
    found = operators(path)
    assert (found["Conv"], found["Mul"], found["Add"]) == (9, 9, 9 + 3)
    assert "BatchNormalization" not in found and "Reshape" not in found


def test_fold_conv_leaves_no_norm_behind_a_convolution(export: Exporter) -> None:
    model, images = drawn_model(), drawn_images()
    path = export(model, images, fold="conv").path
    assert operators(path) == {"Conv": 2, "Relu": 2, "ReduceMean": 1, "Gemm": 1}
    check(path, model, images)


def test_fold_conv_keeps_norms_that_follow_no_convolution(export: Exporter) -> None:
    model, images = drawn_model("cifar_preact_resnet8"), drawn_images()
    path = export(model, images, fold="conv").path
    assert operators(path)["Mul"] == 4  # the first norm of each block reads a sum, and so does the last norm
    check(path, model, images)


def test_fold_conv_reaches_norms_behind_linear_layers(export: Exporter) -> None:
    images = drawn_images(size=8, channels=1)
    model = drawn_model(perceptron(), images)
    path = export(model, images, fold="conv").path
    assert operators(path) == {"Reshape": 1, "Gemm": 3, "Relu": 2}
    check(path, model, images)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gain": 0.3, "learn_gain": False, "input_prior": drawn_images(40)},
        {"message": "raw"},
        slow({"transition": "learned"}),
        slow({"kind": "bn"}),
        slow({"transition": "learned", "covariance": "full"}),
    ],
    ids=lambda options: "-".join(map(str, options)) or "default",
)
def test_batch_file_normalizes_each_image_by_itself_as_the_model_does(
    export: Exporter, options: dict[str, Any]
) -> None:
    model, images = drawn_model(**options), drawn_images()
    result = export(model, images, stats="batch")
    assert result.stats == "batch" and result.fold is None
    assert "BatchNormalization" not in operators(result.path)
    with statistics(model, "batch", 1):
        check(result.path, model, images)
    together = run(result.path, images)
    alone = np.concatenate([run(result.path, image[None]) for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["brn", slow("fixed")])
def test_batch_export_of_a_norm_without_a_prior_of_its_own_says_population(export: Exporter, kind: str) -> None:
    model, images = drawn_model(kind=kind), drawn_images()
    result = export(model, images, stats="batch")
    assert (result.stats, result.fold) == ("population", "affine")
    check(result.path, model, images)


def test_batch_mode_of_a_perceptron_needs_priors(export: Exporter, tmp_path: Path) -> None:
    images = drawn_images(size=8, channels=1)
    with pytest.raises(ConversionError, match="2 has one value per channel in each image and no prior"):
        export(drawn_model(perceptron(), images), images, tmp_path / "model.onnx", stats="batch")
    assert os.listdir(tmp_path) == []
    model = drawn_model(perceptron(), images, input_prior=drawn_images(200, size=8, channels=1))
    path = export(model, images, stats="batch").path
    with statistics(model, "batch", 1):
        check(path, model, images)


@pytest.mark.parametrize("stats", ["population", "batch"])
def test_half_precision_keeps_float32_ends_and_its_statistics_in_range(export: Exporter, stats: str) -> None:
    model, images = drawn_model(), drawn_images()
    if stats == "batch":
        images = images * 1000  # the squares leave float16
    result = export(model, images, stats=stats, precision="fp16")
    proto = onnx.load(result.path)
    ends = [value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)]
    types = {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    assert ends == [onnx.TensorProto.FLOAT] * 2
    assert types["conv1.weight"] == types["head.weight"] == onnx.TensorProto.FLOAT16
    with statistics(model, stats, 1):
        check(result.path, model, images, tolerance=1e-2)


@pytest.mark.parametrize("stats", ["population", "batch"])
def test_two_exports_are_byte_equal_and_name_no_place(export: Exporter, small: Path, stats: str) -> None:
    options = {"stats": stats, "statistics_batch_size": 2}
    first = small if stats == "population" else export(drawn_model(), drawn_images(), **options).path
    first, second = first.read_bytes(), export(drawn_model(), drawn_images(), **options).path.read_bytes()
    assert first == second
    for word in (str(Path(torch.__file__).parent), str(Path(onnx_file.__file__).parent), "stack_trace", "pkg.torch"):
        assert word.encode() not in first


def test_the_files_ends_and_its_maker_have_the_contracts_names(small: Path) -> None:
    proto = onnx.load(small)
    ends = (*proto.graph.input, *proto.graph.output)
    assert [value.name for value in ends] == ["input", "logits"]
    assert [value.type.tensor_type.shape.dim[0].dim_param for value in ends] == ["batch", "batch"]
    assert proto.producer_name == "bkn"
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 18)]


@pytest.mark.slow
def test_a_newer_operator_set_is_written(export: Exporter) -> None:
    model, images = drawn_model(), drawn_images()
    result = export(model, images, opset=21)
    assert [(entry.domain, entry.version) for entry in onnx.load(result.path).opset_import] == [("", 21)]
    check(result.path, model, images)


def test_benchmark_reports_latency_by_batch_size(export: Exporter) -> None:
    latency = export(drawn_model(), drawn_images(), benchmark=True).latency
    assert latency is not None and latency["provider"] == "CPUExecutionProvider" and latency["runs"] >= 50
    for size in (1, 32):
        assert 0 < latency[f"batch_{size}"]["p50_ms"] <= latency[f"batch_{size}"]["p90_ms"]


def test_export_is_silent_and_leaves_model_and_random_state_alone(
    export: Exporter, capfd: pytest.CaptureFixture[str]
) -> None:
    model, images = drawn_model().train(), drawn_images()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    export(model, images)
    export(model, images, stats="batch")
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("stats", ["population", "batch"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "cifar_plain", "cifar_resnet20", "cifar_preact_resnet14"])
def test_larger_models_agree(export: Exporter, name: str, stats: str) -> None:
    images = drawn_images(size=32 if name.startswith("cifar") else 64)
    model = drawn_model(name, images)
    path = export(model, images, stats=stats).path
    with statistics(model, stats, 1):
        check(path, model, images)


_SCRIPT = """
import sys
from drawn_models import CLASSES, drawn_images, drawn_model, preprocess_of
from bkn_core.export.onnx_file import export_model
images = drawn_images()
print(export_model(drawn_model(), sys.argv[1], example=images[:2], images=images, classes=CLASSES, source={},
                   preprocess=preprocess_of(images), stats=sys.argv[2]).sha256)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stats", ["population", "batch"])
def test_two_processes_write_the_same_bytes(tmp_path: Path, stats: str) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent.parent)])
    found = []
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        command = [sys.executable, "-c", _SCRIPT, str(tmp_path / "model.onnx"), stats]
        found.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True))
    assert found[0].stdout == found[1].stdout and len(found[0].stdout) == 65
    assert found[0].stderr == ""


def test_a_link_stays_one_and_leads_to_the_new_file(export: Exporter, tmp_path: Path) -> None:
    (tmp_path / "link.onnx").symlink_to("new.onnx")
    export(drawn_model(), drawn_images(), tmp_path / "link.onnx")
    assert (tmp_path / "link.onnx").is_symlink() and not (tmp_path / "new.onnx").is_symlink()
    assert open_session(tmp_path / "link.onnx", "cpu").classes


def test_a_name_that_is_too_long_is_refused_before_the_work(export: Exporter, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is too long\nGive one of at most 230 bytes"):
        export(drawn_model(), drawn_images(), tmp_path / f"{'x' * 245}.onnx")
