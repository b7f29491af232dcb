"""What a forward computes from parameters alone: expressions of names, evaluated again whenever a prior is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils import _pytree as pytree

from bkn_core.errors import ConversionError
from bkn_core.graph.values import IDENTITY, Step, Value

_PLAIN = (int, float, bool, str, slice, type(None), type(...), torch.dtype, torch.memory_format)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter or buffer, by its path in the model."""

    path: str

    def __str__(self) -> str:
        return self.path


@dataclasses.dataclass(frozen=True)
class Call:
    """A function of parameters.

    Args:
        function: its path from `torch`, such as `torch.Tensor.view`.
        arguments: what it is called with: expressions, numbers and words.
        options: the same by name.
        result: which of its results, where it returns several.
    """

    function: str
    arguments: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...] = ()
    result: int | None = None

    def __str__(self) -> str:
        given = [str(a) for a in self.arguments] + [f"{name}={value}" for name, value in self.options]
        name = self.function.removesuffix(".__get__").rpartition(".")[2].strip("_")
        return f"{name}({', '.join(given)})"


Expression = Parameter | Call


def parameter(model: nn.Module, path: str | Expression) -> Tensor:
    """Return a parameter, buffer, parametrized weight or what is computed from them, in float32 or wider."""
    if isinstance(path, Call):
        given = pytree.tree_map(
            lambda a: parameter(model, a) if isinstance(a, Parameter | Call) else a,
            (path.arguments, dict(path.options)),
        )
        function: Any = functools.reduce(getattr, path.function.split(".")[1:], torch)
        results = function(*given[0], **given[1])
        tensor: Tensor = results if path.result is None else pytree.tree_leaves(results)[path.result]
    else:
        tensor = tensor_of(model, *str(path).rpartition(".")[::2])
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def tensor_of(model: nn.Module, owner: str, name: str) -> Tensor:
    """Return a tensor of a module.

    Raises:
        ConversionError: the model was changed after its conversion.
    """
    try:
        module = functools.reduce(getattr, owner.split(".") if owner else (), model)
        tensor: Tensor = getattr(module, name)
    except AttributeError as error:
        raise ConversionError(
            f"{owner}.{name} predicted a layer at conversion and is not there now",
            "Change the model first, then convert it again.",
        ) from error
    check_own(module, owner, name)
    return tensor


def is_computed_by_hook(module: nn.Module, name: str) -> bool:
    """Whether a tensor is none of a module's own but made by a hook of its forward, which comes after the priors."""
    return isinstance(vars(module).get(name), Tensor) and bool(module._forward_pre_hooks)


def check_own(module: nn.Module, path: str, name: str) -> None:
    """Refuse a tensor that a hook makes.

    Raises:
        ConversionError: for such a tensor.
    """
    if is_computed_by_hook(module, name):
        raise ConversionError(
            f"{path}.{name} is computed by a hook of its layer (torch.nn.utils.prune, weight_norm, spectral_norm), "
            "after the priors that depend on it",
            "Use torch.nn.utils.parametrize or parametrizations, or make it permanent (prune.remove).",
        )


def name_or_call(expression: Expression) -> str | Call:
    """Return the path of a parameter, or the expression itself where it is computed."""
    return expression.path if isinstance(expression, Parameter) else expression


def sources(expression: Expression) -> list[str]:
    """Return the paths of all parameters and buffers that an expression reads."""
    if isinstance(expression, Parameter):
        return [expression.path]
    parts = pytree.tree_leaves((expression.arguments, dict(expression.options)))
    return [path for part in parts if isinstance(part, Parameter | Call) for path in sources(part)]


def applied(function: str, *arguments: Any) -> Call:
    """Return the expression of a function of `torch`, by its bare name."""
    return Call(f"torch.{function}", arguments)


def record(step: Step) -> list[Value]:
    """Return what is known of the results of a function that reads no features."""
    reason = _obstacle(step)
    if reason:
        return [Value(reason=reason)] * len(step.outputs)
    if step.name in IDENTITY:
        return [step.operands[0] or Value()] * len(step.outputs)
    expressions = {id(t): v.parameter for t, v in zip(step.tensors, step.operands, strict=True) if v is not None}
    args, kwargs = pytree.tree_map(lambda a: expressions.get(id(a), a), (tuple(step.arguments[0]), step.arguments[1]))
    several = len(step.outputs) > 1
    call = Call(_path(step.function), _hashable(args), tuple((k, _hashable(v)) for k, v in kwargs.items()))
    return [Value(parameter=dataclasses.replace(call, result=i if several else None)) for i in range(len(step.outputs))]


def _hashable(value: Any) -> Any:
    return tuple(_hashable(v) for v in value) if isinstance(value, list | tuple) else value


def _path(function: Callable[..., Any]) -> str:
    """Name a function by its path from `torch`; "" where it has none."""
    bare = getattr(function, "__name__", "")
    return str(resolve_name(function) or (f"torch.{bare}" if getattr(torch, bare, None) is function else ""))


def _obstacle(step: Step) -> str:
    """Say why a function of parameters cannot be evaluated again later; "" if it can."""
    if any(v is None or v.parameter is None for v in step.operands):
        return f"{step.name} of parameters and other tensors"
    if any(output is given for output in step.outputs for given in step.tensors) or "out" in step.arguments[1]:
        return "a parameter written in the forward" if step.name not in IDENTITY else ""
    if step.name in IDENTITY:
        return ""
    others = [a for a in pytree.tree_leaves(step.arguments) if not isinstance(a, Tensor)]
    if not all(isinstance(a, _PLAIN) for a in others) or not _path(step.function):
        return f"{step.name} of parameters"
    if step.name == "getitem" and isinstance(step.arguments[0][1], list):
        return "a list of positions in a parameter"
    again = pytree.tree_leaves(step.function(*step.arguments[0], **step.arguments[1]))
    same = all(a.is_meta or torch.equal(a, b) for a, b in zip(step.outputs, again, strict=True))
    return "" if same else f"{step.name} of parameters is random"
