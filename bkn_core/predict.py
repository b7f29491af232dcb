"""The verb `predict`: the class of each picture, by a run, a checkpoint or an ONNX file."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bkn_core.data.batches import normalize
from bkn_core.data.named_pictures import listed, pixels_or_fault
from bkn_core.data.preprocess import Preprocess
from bkn_core.engine.checkpoint import load_weights, weights_path
from bkn_core.engine.device import choose_device
from bkn_core.engine.evaluation import modes
from bkn_core.engine.files import write_json, write_text
from bkn_core.errors import CheckFailedError, InputError, RecipeError
from bkn_core.export.sessions import open_session
from bkn_core.kinds import check_statistics
from bkn_core.population import statistics

_BATCH = 64  # pictures of a forward pass, where nobody says how many
_FORMATS = (".csv", ".json")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """What a model takes a picture for.

    Args:
        file: the picture.
        top: the likeliest classes with their probabilities, the first the prediction; nothing where it cannot be read.
        error: why it cannot be read, or "".
    """

    file: str
    top: tuple[tuple[str, float], ...]
    error: str = ""


@dataclasses.dataclass(frozen=True)
class PredictionResult:
    """What `predict` gave.

    Args:
        target: the model.
        predictions: in the order of the pictures.
        provider: "PyTorch" or the ONNX Runtime provider, with the device.
        stats: by which statistics.
        warnings: what the user should know.
    """

    target: Path
    predictions: tuple[Prediction, ...]
    provider: str
    stats: str
    warnings: tuple[str, ...] = ()

    @property
    def unreadable(self) -> tuple[Prediction, ...]:
        """The pictures that could not be read."""
        return tuple(prediction for prediction in self.predictions if prediction.error)


class _Classifier(NamedTuple):
    logits: Callable[[Tensor], Tensor]  # of uint8 images
    preprocess: Preprocess
    classes: tuple[str, ...]
    provider: str
    stats: str
    warnings: tuple[str, ...] = ()


def predict(
    target: str | Path,
    images: Sequence[str | Path],
    *,
    stats: str | None = None,
    top: int = 1,
    batch_size: int = _BATCH,
    device: str = "auto",
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> PredictionResult:
    """Classify pictures: softmax of the logits, in the order in which the pictures are named.

    Args:
        target: a run folder, a .safetensors checkpoint or an .onnx file.
        images: pictures, folders and zip files of them at any depth, and patterns such as `photos/*.png`.
        stats: "population" or "batch" (each image by itself); default the recipe's, for a file its own.
        top: how many of the likeliest classes of each picture.
        batch_size: images per forward pass.
        device: auto, cpu, cuda, cuda:N or mps.
        progress: is told how many of how many pictures are done.

    Returns:
        One prediction a picture; of one that cannot be read, why.

    Raises:
        InputError: the target is missing or damaged, or there is no such picture.
        RecipeError: a number or kind of statistics does not fit.
        DeviceError: the device is not there.
        CheckFailedError: the model gives values that are not finite.
    """
    if stats not in (None, "population", "batch"):
        raise RecipeError(f"stats is {stats!r}", "Choose population or batch.")
    for name, value in (("top", top), ("batch_size", batch_size)):
        if value < 1:
            raise RecipeError(f"{name} is {value}", "Give at least 1.")
    pictures = listed([str(name) for name in images])
    path = Path(target)
    found: list[Prediction] = []
    with contextlib.ExitStack() as stack:
        load = _file if path.suffix.lower() == ".onnx" else _weights
        model = stack.enter_context(load(path, stats, device))
        readers = stack.enter_context(ThreadPoolExecutor())
        for start in range(0, len(pictures), batch_size):
            part = pictures[start : start + batch_size]
            read = readers.map(lambda picture: pixels_or_fault(picture, model.preprocess), part)
            found += _classified(model, [picture.name for picture in part], list(read), top, path)
            progress(len(found), len(pictures))
    return PredictionResult(path, tuple(found), model.provider, model.stats, model.warnings)


def save(path: Path, result: PredictionResult) -> None:
    """Write predictions as a table (.csv) or as JSON: file, class, probability, further classes, error.

    Raises:
        RecipeError: another kind of file.
        OutputError: it cannot be written.
    """
    check_format(path)
    if path.suffix.lower() == ".json":
        write_json(path, [row(prediction) for prediction in result.predictions])
        return
    most = max((len(prediction.top) for prediction in result.predictions), default=1)
    heads = [f"{name}{'' if i == 1 else f'_{i}'}" for i in range(1, most + 1) for name in ("class", "probability")]
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["file", *heads, "error"])
    for prediction in result.predictions:
        cells = [cell for name, probability in prediction.top for cell in (name, f"{probability:.6f}")]
        table.writerow([prediction.file, *cells, *[""] * (2 * most - len(cells)), prediction.error])
    write_text(path, text.getvalue())


def check_format(path: Path) -> None:
    """Refuse a file that predictions are not written to.

    Raises:
        RecipeError: it is neither .csv nor .json.
    """
    if path.suffix.lower() not in _FORMATS:
        raise RecipeError(
            f"predictions are not written as {path}", f"Name a file that ends in {' or '.join(_FORMATS)}."
        )


def row(prediction: Prediction) -> dict[str, Any]:
    """Return a prediction for JSON."""
    top = [{"class": name, "probability": probability} for name, probability in prediction.top]
    first = top[0] if top else {"class": None, "probability": None}
    return {"file": prediction.file, **first, "top": top, "error": prediction.error or None}


def _classified(
    model: _Classifier, names: Sequence[str], read: Sequence[Tensor | InputError], top: int, target: Path
) -> Iterator[Prediction]:
    """Yield the predictions of a batch, of which some pictures may not have been read."""
    images = [pixels for pixels in read if isinstance(pixels, Tensor)]
    logits = model.logits(torch.stack(images)).float().cpu() if images else torch.empty(0, len(model.classes))
    if not logits.isfinite().all():
        raise CheckFailedError(
            f"{target} gives values that are not finite", "Train it again, or take an earlier checkpoint."
        )
    best = zip(*logits.softmax(1).topk(min(top, logits.shape[1])), strict=True)
    for name, pixels in zip(names, read, strict=True):
        if isinstance(pixels, InputError):
            yield Prediction(name, (), pixels.message)
        else:
            probabilities, numbers = next(best)
            classes = [model.classes[number] for number in numbers.tolist()]
            yield Prediction(name, tuple(zip(classes, probabilities.tolist(), strict=True)))


@contextlib.contextmanager
def _weights(path: Path, stats: str | None, device: str) -> Iterator[_Classifier]:
    """Open a run or checkpoint."""
    chosen = choose_device(device)
    weights = load_weights(weights_path(path))
    if weights.recipe.task != "classification":
        raise RecipeError(
            f"{path} was trained for {weights.recipe.task}; pictures are predicted by classifiers only", "Name another."
        )
    check_statistics(weights.recipe.norm.kind, stats, asked="stats")
    kind = stats or modes(weights.recipe.eval_stats)[0]
    model = weights.model().to(chosen)

    def logits(images: Tensor) -> Tensor:
        values: Tensor = model(normalize(images.to(chosen), weights.preprocess))
        return values

    with statistics(model, kind, 1), torch.inference_mode():  # type: ignore[arg-type]
        yield _Classifier(logits, weights.preprocess, weights.classes, f"PyTorch on {chosen}", kind)


@contextlib.contextmanager
def _file(path: Path, stats: str | None, device: str) -> Iterator[_Classifier]:
    """Open an exported file."""
    model = open_session(path, device=device)
    own = model.norm["stats"]
    if stats not in (None, own):
        raise RecipeError(
            f"{path} normalizes by {own} statistics, not by {stats}",
            f"Export another with `bkn export --stats {stats}`.",
        )

    def logits(images: Tensor) -> Tensor:
        return torch.as_tensor(model.logits(normalize(images, model.preprocess).numpy()))

    warnings = (model.fell_back,) if model.fell_back else ()
    yield _Classifier(logits, model.preprocess, model.classes, model.provider, own, warnings)
