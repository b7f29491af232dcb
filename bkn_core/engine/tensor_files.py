"""Files of named tensors with a text for each of a few keys: safetensors with a digest of all that they hold.

A damaged file is refused instead of giving silently wrong tensors, and sizes are compared before a tensor is read.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bkn_core.engine.files import write_with
from bkn_core.errors import InputError


def write_tensors(path: Path, named: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors, texts and their digest.

    Raises:
        OutputError: the file could not be written; an older one is untouched.
    """
    from safetensors.torch import save

    tensors = _own_tensors(named)
    content = save(tensors, metadata | {"digest": digest(tensors, sorted(metadata.items()))})
    write_with(path, lambda file: file.write(content))  # by us: a full disk is an OSError, not one of a library's own


@contextlib.contextmanager
def opened(path: Path, hint: str) -> Iterator[tuple[Any, dict[str, str]]]:
    """Give a file of which the header alone was read, and its texts.

    Raises:
        InputError: it is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise InputError(f"{path} is not a file", hint)
    try:
        with safe_open(str(path), "pt") as file:
            yield file, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{path} is damaged or no checkpoint: {error}", hint) from error


def read_tensors(path: Path, file: Any, metadata: dict[str, str]) -> dict[str, Tensor]:
    """Read all tensors of an opened file.

    Raises:
        InputError: they or the texts are not what was saved.
    """
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    described = sorted((key, text) for key, text in metadata.items() if key != "digest")
    if digest(tensors, described) != metadata.get("digest"):
        raise InputError(f"{path} is damaged: its content does not have the digest it was saved with", "Use another.")
    return tensors


def check_size(path: Path, largest: int) -> None:
    """Refuse a file before any of its tensors is read.

    Raises:
        InputError: it has more bytes than its model can need.
    """
    if (size := path.stat().st_size) > largest:
        raise InputError(f"{path} has {size} bytes; a model of its recipe has at most {largest}", "Use another.")


def digest(tensors: dict[str, Tensor], texts: Iterable[tuple[str, str]] = ()) -> str:
    """Return a SHA-256 over names, types, shapes and bytes, in the order of names."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    for key, text in texts:
        total.update(f"{key}|{text}|".encode())
    return total.hexdigest()


def _own_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give every name a contiguous tensor of its own: safetensors stores no shared memory."""
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in state.items():
        found = tensor.detach().cpu().contiguous()
        place = found.untyped_storage().data_ptr()
        own[name] = found.clone() if place in seen else found
        seen.add(place)
    return own
