"""Checkpoints: weights as safetensors that describe themselves, and the whole state of a run as plain tensors.

Each file carries a digest of all that it holds, so a damaged one is refused instead of giving a silently wrong model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from bkn_core.engine.build import build_model
from bkn_core.engine.files import write_with
from bkn_core.engine.preprocess import Preprocess
from bkn_core.errors import InputError
from bkn_core.recipe import Recipe, dump_recipe

_SCHEMA = "bkn.weights/1"
_KEYS = ("schema", "recipe", "classes", "preprocess", "digest")
# What a resumed run may have otherwise.
_FREE: Any = {
    "version": True,
    "name": True,
    "eval": True,
    "log": True,
    "data": {"root", "download"},
    "train": {"device"},
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
            InputError: names or shapes do not fit the recipe's model.
        """
        model = build_model(self.recipe, self.preprocess, len(self.classes))
        load_strictly_(model, self.tensors)
        return model.eval()


def save_weights(
    path: Path, model: nn.Module, recipe: Recipe, classes: tuple[str, ...], preprocess: Preprocess
) -> None:
    """Write a model's tensors and description.

    Raises:
        OutputError: the file could not be written; an older one is untouched.
    """
    from safetensors.torch import save

    tensors = _own_tensors(model.state_dict())
    metadata = {
        "schema": _SCHEMA,
        "recipe": dump_recipe(recipe),
        "classes": json.dumps(list(classes)),
        "preprocess": json.dumps(preprocess.to_dict()),
    }
    metadata["digest"] = digest(tensors, sorted(metadata.items()))
    content = save(tensors, metadata)  # written by us: a full disk is then an OSError and not one of a library's own
    write_with(path, lambda file: file.write(content))


def load_weights(path: Path) -> Weights:
    """Read a weights file.

    Raises:
        InputError: the file is missing, damaged or not one of ours.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path} is not a file", "Give a run folder or a checkpoint that `bkn train` wrote.")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or no safetensors file: {error}", "Use another checkpoint.") from error
    if metadata.get("schema") != _SCHEMA or not all(key in metadata for key in _KEYS):
        raise InputError(f"{path} was not written by `bkn train`", "Give a checkpoint that `bkn train` wrote.")
    described = sorted((k, v) for k, v in metadata.items() if k != "digest")
    if digest(tensors, described) != metadata["digest"]:
        raise InputError(f"{path} is damaged: its content does not have the digest it was saved with", "Use another.")
    try:
        recipe = Recipe.model_validate(yaml.safe_load(metadata["recipe"]))
        preprocess = Preprocess.from_dict(json.loads(metadata["preprocess"]))
        classes = tuple(str(name) for name in json.loads(metadata["classes"]))
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} has a description of another version: {error}", "Train again.") from error
    return Weights(tensors, recipe, classes, preprocess, metadata["digest"])


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write the whole state of a run: nested dicts, lists, numbers, texts and tensors.

    Raises:
        OutputError: the file could not be written; an older one is untouched.
    """
    content = io.BytesIO()
    torch.save({**state, "digest": _state_digest(state)}, content)
    write_with(path, lambda file: file.write(content.getbuffer()))


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; nothing in it can run code.

    Raises:
        InputError: the file is missing, damaged or not one of ours.
    """
    if not path.is_file():
        raise InputError(f"{path} is not there", "Resume a run that has saved a checkpoint.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if state.pop("digest") != _state_digest(state):
            raise ValueError("its content does not have the digest it was saved with")
    except Exception as error:  # a damaged zip or pickle leads torch.load, and what it returned, to any of them
        raise InputError(f"{path} is damaged: {error}", "Resume from another run.") from error
    return state


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
    own = deciding_keys(recipe)
    # A key that came after the state was saved is null there: what it adds was not asked for.
    changed = [f"{name}.{key}" for name, keys in own.items() for key in keys if keys[key] != saved[name].get(key)]
    if changed:
        raise InputError(f"the saved state does not fit the recipe: {', '.join(changed)} changed", "Change it back.")


def load_strictly_(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load tensors into a model, in place, refusing any that is missing, unknown or of another shape.

    Raises:
        InputError: listing all faults.
    """
    own = model.state_dict()
    faults = [f"{name} is missing" for name in own if name not in tensors]
    faults += [f"{name} is unknown" for name in tensors if name not in own]
    for name, tensor in tensors.items():
        if name in own and tensor.shape != own[name].shape:
            faults.append(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}")
    if faults:
        raise InputError(f"the checkpoint does not fit the recipe's model: {'; '.join(faults)}", "Was one changed?")
    model.load_state_dict(tensors)


def digest(tensors: dict[str, Tensor], texts: Iterable[tuple[str, str]] = ()) -> str:
    """Return a SHA-256 over names, types, shapes and bytes, in the order of names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for key, text in texts:
        total.update(f"{key}|{text}|".encode())
    return total.hexdigest()


def _state_digest(state: dict[str, Any]) -> str:
    leaves = list(_leaves("", state))
    tensors = {path: value for path, value in leaves if isinstance(value, Tensor)}
    for path, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path} claims {tensor.nbytes} bytes and has {tensor.untyped_storage().nbytes()}")
    return digest(tensors, [(path, repr(value)) for path, value in leaves if not isinstance(value, Tensor)])


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield every tensor, number and text with its path, and for every container its type and length."""
    if not isinstance(value, (dict, list, tuple)):
        yield path, value
        return
    yield path, f"{type(value).__name__} of {len(value)}"
    for key in sorted(value, key=str) if isinstance(value, dict) else range(len(value)):
        yield from _leaves(f"{path}.{key!r}", value[key])


def _own_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every name a contiguous tensor of its own: safetensors stores no shared memory."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}


def weights_path(target: Path) -> Path:
    """Return the weights file of a run folder (the last one, else the best), or the file itself.

    Raises:
        InputError: there is none.
    """
    if not target.exists():
        raise InputError(f"{target} does not exist", "Give a run folder, a checkpoint or an .onnx file.")
    if target.is_file():
        return target
    for name in ("last", "best"):  # without data.validation the best was chosen on the test images
        path = target / "checkpoints" / f"{name}.safetensors"
        if path.is_file():
            return path
    raise InputError(f"{target} holds no checkpoint", "Give a run folder of `bkn train`.")


def find_run(digest: str, root: Path = Path("runs")) -> Path | None:
    """Return the weights file under `runs/` that has a digest, if there is one."""
    from safetensors import SafetensorError, safe_open

    for path in filter(Path.is_file, root.glob("**/checkpoints/*.safetensors")):
        try:
            with safe_open(str(path), "pt") as file:
                if (file.metadata() or {}).get("digest") == digest:
                    return path
        except (SafetensorError, OSError):
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
