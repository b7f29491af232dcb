"""An exported file as a classifier: what it knows of itself, who runs it, many threads at once."""

from __future__ import annotations

import json
import threading
from importlib import metadata
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from drawn_models import CLASSES, drawn_images, drawn_model, preprocess_of

from bkn_core.errors import DeviceError, InputError
from bkn_core.export import providers
from bkn_core.export.graph import signed
from bkn_core.export.providers import create_session
from bkn_core.export.sessions import open_session


def test_metadata_comes_back_as_it_was_given(small: Path) -> None:
    model = open_session(small, "cpu")
    assert model.classes == CLASSES
    assert model.preprocess == preprocess_of(drawn_images())
    assert model.norm == {"kind": "bkn", "stats": "population", "folded": "affine", "statistics_batch_size": 2}
    assert model.metadata.source == {"model": "drawn", "weights_sha256": "0" * 64}


def test_metadata_has_the_contracts_keys_as_json(small: Path) -> None:
    entries = {entry.key: json.loads(entry.value) for entry in onnx.load(small).metadata_props}
    keys = {"bkn.schema", "bkn.sha256", "bkn.version", "task", "classes", "preprocess", "norm", "source", "parity"}
    assert set(entries) == keys
    assert entries["task"] == "classify"
    parity = entries["parity"]
    assert set(parity) == {"max_abs", "top1_agreement", "images", "provider"}
    assert 0 <= parity["max_abs"] < 1e-4 and parity["top1_agreement"] == 1 and parity["images"] == 10 + 12


@torch.no_grad()
def test_logits_follow_the_kind_of_images(small: Path) -> None:
    model, images = open_session(small, "cpu"), drawn_images()
    expected = drawn_model()(images)
    found = model.logits(images)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(model.logits(images.numpy()), found.numpy())


def test_images_of_another_shape_are_refused(small: Path) -> None:
    with pytest.raises(InputError, match=r"shape \(12, 3, 20, 20\)"):
        open_session(small, "cpu").logits(drawn_images(size=20))


@pytest.mark.parametrize("seconds", [1.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_eight_threads_on_one_session_get_equal_outputs(small: Path, seconds: float) -> None:
    model, images = open_session(small, "cpu"), drawn_images().numpy()
    expected = model.logits(images)
    outcomes: list[bool] = []
    enough = threading.Event()

    def serve() -> None:
        while not enough.is_set():
            outcomes.append(np.array_equal(model.logits(images), expected))

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    enough.wait(seconds)
    enough.set()
    for thread in threads:
        thread.join()
    print(len(outcomes), "outputs")
    assert len(outcomes) >= 8 and all(outcomes)


def test_what_onnx_runtime_says_comes_without_its_source(small: Path) -> None:
    proto = onnx.load(small)
    proto.opset_import[0].version = 99
    with pytest.raises(InputError, match="refuses the graph") as caught:
        create_session(signed(proto))
    assert "Opset 99" in caught.value.message and "/onnxruntime" not in caught.value.message


def test_unknown_devices_are_refused(small: Path) -> None:
    with pytest.raises(DeviceError, match="device is 'tpu'"):
        open_session(small, "tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
class TestWithoutCuda:
    """What happens where CUDA cannot run."""

    def test_cuda_is_an_error_that_names_versions(self, small: Path) -> None:
        with pytest.raises(DeviceError, match="ONNX Runtime does not run on 'cuda'") as caught:
            open_session(small, "cuda")
        assert torch.__version__ in caught.value.hint and onnxruntime.__version__ in caught.value.hint

    def test_auto_takes_the_cpu_without_a_word(self, small: Path) -> None:
        model = open_session(small, "auto")
        assert (model.provider, model.fell_back) == ("CPUExecutionProvider", None)

    def test_auto_says_why_a_gpu_is_left_idle(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
        monkeypatch.setattr(metadata, "version", lambda _: "1.0")
        model = open_session(small, "auto")
        assert model.provider == "CPUExecutionProvider"
        assert model.fell_back is not None and "it runs on the CPU" in model.fell_back
        assert "onnxruntime and onnxruntime-gpu are both installed" in model.fell_back

    def test_cpu_is_no_fall_back(self, small: Path) -> None:
        assert open_session(small, "cpu").fell_back is None

    def test_a_session_that_silently_chose_the_cpu_is_an_error(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        created = onnxruntime.InferenceSession

        def silent(graph: bytes, options: object, **_: object) -> object:
            return created(graph, options, providers=["CPUExecutionProvider"])

        monkeypatch.setattr(onnxruntime, "InferenceSession", silent)
        monkeypatch.setattr(providers, "_check_cuda", lambda device: None)
        with pytest.raises(DeviceError, match="its session is on CPUExecutionProvider"):
            open_session(small, "cuda:0")

    def test_both_packages_installed_get_the_one_command_that_mends_it(
        self, small: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(metadata, "version", lambda _: "1.0")
        with pytest.raises(DeviceError, match="pip uninstall -y onnxruntime onnxruntime-gpu &&"):
            open_session(small, "cuda")

    def test_different_cuda_majors_are_named(self, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        with pytest.raises(DeviceError, match=r"CUDA 12\.8.*The CUDA majors must agree"):
            open_session(small, "cuda")


@pytest.mark.gpu
def test_cuda_runs_on_cuda_and_agrees_with_the_cpu(small: Path) -> None:
    model, images = open_session(small, "cuda"), drawn_images().numpy()
    assert model.provider == "CUDAExecutionProvider"
    np.testing.assert_allclose(model.logits(images), open_session(small, "cpu").logits(images), rtol=1e-2, atol=1e-2)
