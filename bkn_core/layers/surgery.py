"""Put other layers in the place of a model's normalization layers, in a copy of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from bkn_core.errors import ConversionError

Model = TypeVar("Model", bound=nn.Module)
Build = Callable[[str, _BatchNorm], nn.Module]

_FROZEN = ("weight", "bias", "running_mean", "running_var")
_FUSED = {"drop", "act"}  # what timm's BatchNormAct2d applies after its normalization
_PLAIN = (_BatchNorm.forward, nn.SyncBatchNorm.forward)


def copied(model: Model) -> Model:
    """Return a deep copy of a model.

    Raises:
        ConversionError: where PyTorch cannot make one, or one that trains.
    """
    wrapped = next((m for m in model.modules() if isinstance(m, nn.parallel.DistributedDataParallel)), None)
    if wrapped is not None:
        raise ConversionError(
            "a DistributedDataParallel model exchanges the gradients of the parameters that it was made with",
            "Convert the model inside it (its .module), then wrap the result.",
        )
    lazy = [name for name, module in model.named_modules() if isinstance(module, LazyModuleMixin)]
    if lazy:
        raise ConversionError(
            f"{lazy[0]} is a lazy layer, whose shape is not known yet", "Run one forward of the model, then convert it."
        )
    groups = [module.process_group for module in model.modules() if getattr(module, "process_group", None) is not None]
    try:
        return copy.deepcopy(model, {id(group): group for group in groups})  # processes are no part of a model
    except RuntimeError as error:
        raise ConversionError(
            f"this {type(model).__name__} cannot be copied: {str(error).splitlines()[0]}",
            "Use torch.nn.utils.parametrizations, not torch.nn.utils.weight_norm, and keep no results on its modules.",
        ) from error


def is_frozen_norm(module: nn.Module) -> bool:
    """Whether a module is a batch normalization of which everything is a constant, as detectors have it."""
    buffers = module._buffers
    return type(module).__name__.endswith("FrozenBatchNorm2d") and {*_FROZEN} <= {
        n for n in buffers if buffers[n] is not None
    }


def thawed(model: Model, names: set[str]) -> Model:
    """Return a model in which the frozen ones of some layers are `nn.BatchNorm2d`, with their γ, β and statistics.

    A layer is trained where another layer of the module that holds it is.

    Args:
        model: left as it is, and returned where no layer is frozen.
        names: the layers' paths.
    """
    frozen = [name for name in names if is_frozen_norm(model.get_submodule(name))]
    replica = copied(model) if frozen else model
    for name in frozen:
        parent = replica.get_submodule(name.rpartition(".")[0])
        old = replica.get_submodule(name)
        beside = [p.requires_grad for child in parent.children() for p in child.parameters(recurse=False)]
        mean: Tensor = old.get_buffer("running_mean")
        new = nn.BatchNorm2d(len(mean), getattr(old, "eps", 1e-5), device=mean.device, dtype=mean.dtype)
        new.load_state_dict({n: old.get_buffer(n) for n in _FROZEN}, strict=False)
        new.requires_grad_(any(beside) or not beside)
        setattr(parent, name.rpartition(".")[2], new.train(old.training))
    return replica


def replaced(model: Model, names: set[str], build: Build) -> Model:
    """Copy a model and put `build(name, norm)` in the place of each named layer, once where it has two names.

    Args:
        model: left as it is.
        names: the layers' paths.
        build: makes the new layer; it may take over the tensors of the old one, which belongs to the copy.
    """
    replica = copied(model)
    built: dict[int, nn.Module] = {}
    for name, module in list(replica.named_modules(remove_duplicate=False)):
        if id(module) in built or (name in names and isinstance(module, _BatchNorm)):
            new = built.get(id(module)) or _dressed(module, build(name, module))
            built[id(module)] = new.train(module.training)
            if not name:
                return new  # type: ignore[return-value]
            parent, _, child = name.rpartition(".")
            setattr(replica.get_submodule(parent), child, new)
    return replica


def _dressed(old: nn.Module, new: nn.Module) -> nn.Module:
    """Keep the dropout and activation that a fused layer applies after its normalization."""
    if "act" not in old._modules or "act" in new._modules:
        return new
    return nn.Sequential(new, *(old._modules[n] for n in ("drop", "act") if old._modules.get(n) is not None))  # type: ignore[arg-type]


def check_replaceable(norms: Mapping[str, nn.Module]) -> None:
    """Refuse layers that do something else than normalize, drop and activate.

    Args:
        norms: the layers, by their paths.

    Raises:
        ConversionError: naming the first such layer.
    """
    for name, norm in norms.items():
        if isinstance(norm, _BatchNorm) and type(norm).forward not in _PLAIN and not _only_normalizes(norm):
            raise ConversionError(
                f"{name} is a {type(norm).__name__}, which does more than batch normalization and an activation",
                f"Leave it as it is: exclude=({name!r},).",
            )


@torch.no_grad()
def _only_normalizes(norm: _BatchNorm) -> bool:
    """Compare a layer with a forward of its own, in evaluation, with what its replacement will do."""
    if not set(norm._modules) <= _FUSED:
        return False
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None or mean.is_meta:
        return True
    norm = copied(norm).eval()
    spatial = {nn.BatchNorm1d: (4,), nn.BatchNorm3d: (2, 2, 2)}
    shape = next((dims for kind, dims in spatial.items() if isinstance(norm, kind)), (2, 2))
    images = torch.linspace(-3, 3, 2 * len(mean) * 8, dtype=mean.dtype, device=mean.device)
    images = images[: 2 * len(mean) * torch.Size(shape).numel()].view(2, len(mean), *shape)
    expected: Tensor = F.batch_norm(images, mean, variance, norm.weight, norm.bias, False, 0.0, norm.eps)
    for after in ("drop", "act"):
        module = norm._modules.get(after)
        expected = expected if module is None else module(expected)
    try:
        actual = norm(images)
    except (TypeError, ValueError, RuntimeError):  # it wants something else than features
        return False
    return isinstance(actual, Tensor) and torch.allclose(actual, expected, rtol=1e-2, atol=1e-2)
