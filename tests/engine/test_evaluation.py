"""Measuring a classifier, against scikit-learn and plain NumPy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import litter, training
from torch import Tensor, nn

from bkn_core.data.batches import epoch_order
from bkn_core.data.preprocess import Preprocess
from bkn_core.data.splits import ImageSet
from bkn_core.engine.evaluation import MIXTURES, measure_model, modes, save_predictions
from bkn_core.engine.tasks.classification import Classification, Metrics, measure
from bkn_core.layers.batch_kalman import BatchKalmanNorm2d
from bkn_core.population import statistics

TASK = Classification()
CPU = torch.device("cpu")
HOW: dict[str, Any] = {"task": TASK, "kind": "population", "device": CPU}
CLASSES, IMAGES = 7, 53


def numbered(labels: Tensor) -> ImageSet:
    """Images whose only pixel is their own number."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None]
    return ImageSet(images, labels, tuple("abcdefg"))


def measured(logits: Tensor, labels: Tensor, batch_size: int = 10, topk: tuple[int, ...] = (1, 2, 5, 99)) -> Metrics:
    return measure(lambda x: logits[x.flatten().long()], numbered(labels), batch_size=batch_size, topk=topk)


@pytest.mark.parametrize("batch_size", [1, 10, 53, 1000])
def test_top1_topk_and_loss_are_those_of_scikit_learn(batch_size: int) -> None:
    from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score

    logits, labels = 3 * torch.randn(IMAGES, CLASSES), torch.arange(IMAGES) % CLASSES
    found = measured(logits, labels, batch_size)
    scores, truth, names = logits.double().numpy(), labels.numpy(), list(range(CLASSES))
    assert found.top1 == accuracy_score(truth, scores.argmax(1))
    assert found.topk == {k: top_k_accuracy_score(truth, scores, k=k, labels=names) for k in (2, 5)}
    probabilities = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    assert found.loss == pytest.approx(log_loss(truth, probabilities, labels=names), rel=1e-6)
    assert found.images == IMAGES
    np.testing.assert_array_equal(found.predictions.numpy(), scores.argmax(1))
    np.testing.assert_array_equal(found.correct.numpy(), scores.argmax(1) == truth)
    picked = -np.log(probabilities[np.arange(IMAGES), truth])
    np.testing.assert_allclose(found.losses.numpy(), picked, rtol=1e-5, atol=1e-6)


def test_a_summary_has_the_numbers_alone() -> None:
    logits, labels = torch.eye(CLASSES) * 9, torch.tensor([0, 1, 2, 3, 4, 0, 0])
    summary = measured(logits, labels, topk=(1, 3)).summary()
    assert list(summary) == ["top1", "loss", "top3", "images"]
    assert summary["top1"] == 5 / 7 and summary["images"] == 7


@pytest.mark.parametrize(
    "spoil",
    [
        lambda logits, i, label: logits[i].fill_(torch.nan),
        lambda logits, i, label: logits[i, label].fill_(torch.nan),
        lambda logits, i, label: logits[i].fill_(torch.inf),
        lambda logits, i, label: logits[i, (label + 1) % CLASSES].fill_(torch.nan),
    ],
    ids=["all nan", "nan at the label", "all inf", "nan elsewhere"],
)
def test_images_without_an_answer_are_mistakes(spoil: Callable[[Tensor, int, int], object]) -> None:
    labels = torch.arange(IMAGES) % CLASSES
    logits = 9.0 * nn.functional.one_hot(labels, CLASSES)
    assert measured(logits, labels).top1 == 1
    for i in (0, 11, 52):
        spoil(logits, i, int(labels[i]))
    found = measured(logits, labels)
    assert found.top1 == (IMAGES - 3) / IMAGES
    assert (~found.correct).nonzero().flatten().tolist() == [0, 11, 52]
    assert not np.isfinite(found.loss) and found.losses.isfinite().sum() == IMAGES - 3


def test_images_without_any_answer_are_in_no_top_k() -> None:
    labels = torch.arange(IMAGES) % CLASSES
    logits = 9.0 * nn.functional.one_hot(labels, CLASSES)
    logits[:7] = torch.nan
    assert measured(logits, labels).topk == {2: (IMAGES - 7) / IMAGES, 5: (IMAGES - 7) / IMAGES}


def test_a_model_is_measured_as_it_answers_and_left_as_it_was() -> None:
    run = training("norm.kind=bn")
    run.model.get_submodule("features.1").eval()
    flags = [module.training for module in run.model.modules()]
    state = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    preprocess = run.splits.preprocess
    found = measure_model(run.model, run.splits.test, preprocess, **HOW, batch_size=7)
    assert [module.training for module in run.model.modules()] == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in run.model.state_dict().items())
    images = (run.splits.test.batch(torch.arange(40))[0].float() / 255 - preprocess.mean[0]) / preprocess.std[0]
    with torch.no_grad():
        assert found.predictions.tolist() == run.model.eval()(images).argmax(1).tolist()


def test_batch_statistics_measure_each_image_by_itself() -> None:
    run = training()
    options = {"task": TASK, "kind": "batch", "device": CPU}
    alone, together = (
        measure_model(run.model, run.splits.test, run.splits.preprocess, batch_size=n, **options) for n in (1, 40)
    )
    torch.testing.assert_close(alone.losses, together.losses, rtol=1e-4, atol=1e-5)
    inputs = torch.randn(3, 1, 8, 8)
    with statistics(run.model.eval(), "batch", 1), torch.no_grad():
        torch.testing.assert_close(run.model(inputs)[:1], run.model(inputs[:1]), rtol=1e-4, atol=1e-5)


def test_groups_of_mixtures_are_drawn_and_every_image_keeps_its_place() -> None:
    labels = torch.arange(IMAGES).sort().values % CLASSES
    images = ImageSet(torch.randint(256, (IMAGES, 1, 3, 3), dtype=torch.uint8), labels, tuple("abcdefg"))
    norm = BatchKalmanNorm2d(1, statistics_batch_size=4)
    norm.running_mean, norm.running_var = torch.tensor([0.4]), torch.tensor([0.2])
    model = nn.Sequential(norm, nn.Flatten(), nn.Linear(9, CLASSES)).eval()
    preprocess = Preprocess("L", (3, 3), (0.0,), (1.0,))
    options = {"task": TASK, "device": CPU, "batch_size": 10, "statistics_batch_size": 4}
    found = {kind: measure_model(model, images, preprocess, kind=kind, **options) for kind in ("population", *MIXTURES)}
    weight, bias = (p.detach().double().numpy() for p in model[2].parameters())
    pixels, order = images.images.double().numpy() / 255, epoch_order(IMAGES, 0, 0).numpy()
    assert sorted(order) != order.tolist(), "images of one class lie side by side"
    for kind, (mean, variance) in {"population": ("population",) * 2, **MIXTURES}.items():
        losses = np.empty(IMAGES)
        for start in range(0, IMAGES, 4):  # also across the 10 images of a forward
            x = pixels[order[start : start + 4]]
            m = 0.4 if mean == "population" else x.mean()
            v = 0.2 if variance == "population" else x.var()
            logits = ((x - m) / np.sqrt(v + norm.eps)).reshape(len(x), 9) @ weight.T + bias
            picked = logits[range(len(x)), labels[order[start : start + 4]]]
            losses[order[start : start + 4]] = np.log(np.exp(logits).sum(1)) - picked
        np.testing.assert_allclose(found[kind].losses.numpy(), losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_measure_that_is_broken_off_leaves_the_model_as_it_was(error: type[BaseException]) -> None:
    run = training()
    calls = iter([False, True])

    def stop() -> None:
        if next(calls):
            raise error

    with pytest.raises(error):
        measure_model(
            run.model,
            run.splits.test,
            run.splits.preprocess,
            task=TASK,
            kind="batch",
            device=CPU,
            batch_size=9,
            stop=stop,
        )
    assert run.model.training and not torch.is_inference_mode_enabled()
    layers = [module for module in run.model.modules() if hasattr(module, "statistics")]
    assert layers and all(layer.statistics is None for layer in layers)


def test_predictions_of_every_image_are_saved(tmp_path: Path) -> None:
    labels = torch.arange(IMAGES) % CLASSES
    metrics = {kind: measured(torch.randn(IMAGES, CLASSES), labels) for kind in ("population", "batch")}
    save_predictions(tmp_path / "predictions.npz", numbered(labels), metrics)
    with np.load(tmp_path / "predictions.npz") as arrays:
        assert set(arrays.files) == {"labels", *(f"{k}_{n}" for k in metrics for n in ("predictions", "losses"))}
        np.testing.assert_array_equal(arrays["labels"], labels.numpy())
        for kind, one in metrics.items():
            assert (arrays[f"{kind}_predictions"] == labels.numpy()).mean() == one.top1
            assert arrays[f"{kind}_losses"].mean() == pytest.approx(one.loss, rel=1e-6)
    assert not litter(tmp_path)


def test_both_means_each_kind_once() -> None:
    assert modes("both") == ("population", "batch")
    assert (modes("population"), modes("batch")) == (("population",), ("batch",))


def test_a_measure_reads_bytes_and_not_what_the_model_sees() -> None:
    seen: list[torch.dtype] = []
    images = ImageSet(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), ("a", "b"))
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    model.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    measure_model(model, images, Preprocess("L", (2, 2), (0.0,), (1.0,)), task=TASK, kind="population", device=CPU)
    assert seen == [torch.float32]
