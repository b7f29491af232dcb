"""Checkpoints: weights that describe themselves, and the whole state of a run, both as safetensors.

Nothing in them can run code, and no file is read that is larger than its model can need.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor, nn

from bkn_core.data.preprocess import Preprocess
from bkn_core.engine.build import build_model, build_outline
from bkn_core.engine.tensor_files import check_size, opened, read_tensors, write_tensors
from bkn_core.errors import BknError, InputError, located
from bkn_core.recipe import Recipe, dump_recipe, parse_recipe

_SCHEMA = "bkn.weights/1"
_REFERENCE = "$tensor"
_NAMES = TypeAdapter(tuple[str, ...])
_LEAST_LIMIT = 2**26  # bytes that are read without asking what they are for
# What the values of a tensor can be, by the last part of its name; any finite ones where it is not here.
_RANGES = {
    "running_var": (0.0, math.inf),
    "exp_avg_sq": (0.0, math.inf),
    "num_batches_tracked": (0, 2**62),
    "n_averaged": (0, 2**62),
    "step": (0, 2**24),
    "fixed_gain": (0.0, 1.0),
    "gain_factor": (0.0, 1.0),
}
_ANY = (-math.inf, math.inf)
_KEYS = ("schema", "recipe", "classes", "preprocess", "digest")
# What a resumed run may have otherwise.
_FREE: Any = {
    "version": True,
    "name": True,
    "task": True,
    "eval": True,
    "log": True,
    "compare": True,
    "data": {"root", "download"},
    "train": {"device", "workers", "patience"},
}


@dataclasses.dataclass(frozen=True)
class Weights:
    """A weights file: tensors, and what rebuilds the model around them."""

    tensors: dict[str, Tensor]
    recipe: Recipe
    classes: tuple[str, ...]
    preprocess: Preprocess
    digest: str

    def model(self) -> nn.Module:
        """Build the model and load the tensors, all of them.

        Raises:
            InputError: names, types, shapes or values do not fit the recipe's model.
        """
        held = sum(tensor.nbytes for tensor in self.tensors.values())
        needed = sum(p.nbytes for p in build_outline(self.recipe, self.preprocess, self.classes).parameters())
        if needed > 2 * held + _LEAST_LIMIT:
            raise InputError(f"the checkpoint holds {held} bytes, its recipe's model has {needed}", "Was one changed?")
        model = build_model(self.recipe, self.preprocess, len(self.classes), pretrained=False)
        load_strictly_(model, self.tensors)
        return model.eval()


def save_weights(
    path: Path, model: nn.Module, recipe: Recipe, classes: tuple[str, ...], preprocess: Preprocess
) -> None:
    """Write a model's tensors and description.

    Raises:
        OutputError: the file could not be written; an older one is untouched.
    """
    metadata = {
        "schema": _SCHEMA,
        "recipe": dump_recipe(recipe),
        "classes": json.dumps(list(classes)),
        "preprocess": json.dumps(preprocess.to_dict()),
    }
    write_tensors(path, model.state_dict(), metadata)


def load_weights(path: Path) -> Weights:
    """Read a weights file.

    Raises:
        InputError: the file is missing, damaged or not one of ours.
    """
    with opened(path, "Give a run folder or a checkpoint that `bkn train` wrote.") as (file, metadata):
        if metadata.get("schema") != _SCHEMA or not all(key in metadata for key in _KEYS):
            raise InputError(f"{path} was not written by `bkn train`", "Give a checkpoint that `bkn train` wrote.")
        if path.stat().st_size > _LEAST_LIMIT:  # a small one is read, and its digest checked, before it is believed
            check_size(path, largest_file(build_outline(*_description(path, metadata))))
        tensors = read_tensors(path, file, metadata)
    recipe, preprocess, classes = _description(path, metadata)
    if recipe.norm.kind == "fixed" and not any(name.endswith("reference_images") for name in tensors):
        # of an earlier version, which called so what is "frozen" now
        recipe = recipe.model_copy(update={"norm": recipe.norm.model_copy(update={"kind": "frozen"})})
    return Weights(tensors, recipe, classes, preprocess, metadata["digest"])


def _description(path: Path, metadata: dict[str, str]) -> tuple[Recipe, Preprocess, tuple[str, ...]]:
    try:
        recipe = parse_recipe(metadata["recipe"], "its recipe")
        preprocess = Preprocess.from_dict(json.loads(metadata["preprocess"]))
        return recipe, preprocess, _names(metadata["classes"])
    except (BknError, ValueError, TypeError, RecursionError) as error:
        what = error.message if isinstance(error, BknError) else error
        raise InputError(f"{path} cannot be loaded: {what}", "Is it of another version?") from error


def _names(text: str) -> tuple[str, ...]:
    try:
        return _NAMES.validate_json(text)
    except ValueError:
        raise InputError(f"its classes are {text:.80}; expected is a list of names") from None


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the whole state of a run: nested dicts, lists, numbers, texts and tensors.

    Raises:
        OutputError: the file could not be written; an older one is untouched.
    """
    tensors: dict[str, Tensor] = {}
    values = json.dumps(_without_tensors("", state, tensors))
    write_tensors(path, tensors, {"state": values})


def load_state(path: Path, largest: int | None = None) -> dict[str, Any]:
    """Read what `save_state` wrote, with texts for all keys and lists for tuples.

    Args:
        path: the file.
        largest: bytes that it may have, see `largest_file`.

    Raises:
        InputError: the file is missing, damaged or not one of ours.
    """
    with opened(path, "Resume a run that this version has saved.") as (file, metadata):
        if "state" not in metadata:
            raise InputError(f"{path} is damaged or of another version", "Resume from another run.")
        if largest is not None:
            check_size(path, largest)
        tensors = read_tensors(path, file, metadata)
    try:
        state: dict[str, Any] = _with_tensors(json.loads(metadata["state"]), tensors)
        if tensors or not isinstance(state, dict):
            raise ValueError("its tensors are not those that it names")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}", "Resume from another run.") from error
    return state


def largest_file(model: nn.Module) -> int:
    """Return the bytes that no checkpoint of a model exceeds: the model, its average and two moments, and as much."""
    tensors: dict[str, Tensor] = model.state_dict()
    return _LEAST_LIMIT + 8 * sum(tensor.nbytes for tensor in tensors.values())


def deciding_keys(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Return the sections and keys of a recipe that decide the weights: a resumed run has them unchanged."""
    keys: dict[str, dict[str, Any]] = recipe.model_dump(mode="json", exclude=_FREE)
    if isinstance(recipe.data.validation, str):
        keys["data"]["validation"] = "folder"  # it may lie elsewhere, as data.root may
    return keys


def check_recipe(saved: dict[str, dict[str, Any]], recipe: Recipe) -> None:
    """Refuse to go on from a state with a recipe that decides otherwise.

    Raises:
        InputError: naming every key that changed.
    """
    own, defaults = deciding_keys(recipe), deciding_keys(Recipe())
    before = saved.get("train", {}).get("epochs")
    if type(before) is int and own["train"]["epochs"] > before:  # training goes on for longer
        own["train"]["epochs"] = before
    # A key that came after the state was saved has its default there: what it adds was not asked for.
    known = {name: defaults[name] | saved[name] for name in own if name in saved}
    changed = [
        f"{name}.{key}" for name, keys in own.items() for key in keys if known.get(name, {}).get(key) != keys[key]
    ]
    if changed:
        raise InputError(
            f"the saved state does not fit the recipe: {', '.join(changed)} changed",
            "Change it back; data.root, eval.*, log.*, train.device, workers and patience may change, epochs grow.",
        )


def load_strictly_(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load tensors into a model, in place, refusing any that its own could not have become.

    Raises:
        InputError: listing all faults.
    """
    if faults := tensor_faults(model.state_dict(), tensors):
        raise InputError(f"the checkpoint does not fit the recipe's model: {'; '.join(faults)}", "Was one changed?")
    model.load_state_dict(tensors)


def tensor_faults(own: dict[str, Tensor], saved: dict[str, Tensor]) -> list[str]:
    """Say which of the saved tensors are missing, unknown, or such as their own counterpart could not have become."""
    faults = [f"{name} is missing" for name in own if name not in saved]
    faults += [f"{name} is unknown" for name in saved if name not in own]
    both = [(name, _fault(name, own[name], saved[name])) for name in own if name in saved]
    return faults + [f"{name} {text}" for name, text in both if text]


def _fault(name: str, own: Tensor, saved: Tensor) -> str:
    if saved.shape != own.shape:
        return f"has the shape {tuple(saved.shape)}, not {tuple(own.shape)}"
    if saved.dtype != own.dtype:
        return f"has the type {saved.dtype}, not {own.dtype}"
    if not saved.isfinite().all() and own.isfinite().all():
        return "has values that are not finite"
    lowest, highest = _RANGES.get(name.rpartition(".")[2], _ANY)
    outside = (lowest, highest) != _ANY and bool(((saved < lowest) | (saved > highest)).any())
    return f"has values outside {lowest} to {highest}" if outside else ""


def _without_tensors(path: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a nested value with a reference in the place of every tensor, which is put among the tensors."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_REFERENCE: path}
    if isinstance(value, dict):
        return {str(key): _without_tensors(f"{path}/{key}", item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(f"{path}/{i}", item, tensors) for i, item in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return a nested value with every tensor in its place; each is taken out of the tensors, so it has one place."""
    if isinstance(value, dict):
        if value.keys() == {_REFERENCE}:
            return tensors.pop(value[_REFERENCE])
        return {key: _with_tensors(item, tensors) for key, item in value.items()}
    return [_with_tensors(item, tensors) for item in value] if isinstance(value, list) else value


def weights_path(target: Path) -> Path:
    """Return the weights file of a run folder (the last one, else the best), or the file itself.

    Raises:
        InputError: there is none.
    """
    if not target.exists():
        raise InputError(f"{located(target)} does not exist", "Give a run folder, a checkpoint or an .onnx file.")
    if target.is_file():
        return target
    for name in ("last", "best"):  # what a run reports is of its last weights
        path = target / "checkpoints" / f"{name}.safetensors"
        if path.is_file():
            return path
    raise InputError(f"{target} holds no checkpoint", "Give a run folder of `bkn train`.")


def find_run(digest: str, root: Path = Path("runs")) -> Path | None:
    """Return the weights file under `runs/` that has a digest, if there is one."""
    for path in root.glob("**/checkpoints/*.safetensors"):
        try:
            with opened(path, "") as (_, metadata):
                if metadata.get("digest") == digest:
                    return path
        except InputError:
            continue
    return None


def load_run(path: str | Path) -> nn.Module:
    """Return the trained model of a run folder or checkpoint, in evaluation mode.

    Args:
        path: a run folder (its last weights) or a .safetensors file of one.

    Raises:
        InputError: it is missing, damaged or does not fit.
    """
    return load_weights(weights_path(Path(path))).model()
