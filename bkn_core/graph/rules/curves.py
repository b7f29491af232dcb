"""Functions of each value by itself as code for the kernel of `curve.c`: pairs of an operation and a number.

At a kink each has PyTorch's slope, which decides where a point of the quadrature lies on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from bkn_core.ops.kernels import bits_of

Code = list[tuple[int, float]]

_POINT, _NUMBER, _COPY, _SWAP, _PLUS, _TIMES, _FACTOR, _TERM = range(8)  # as in `curve.c`
_ABOVE, _BELOW, _FROM, _UPTO, _SIGMOID, _EXP, _CDF, _RECIPROCAL = range(8, 16)
_DEEPEST = 6  # levels of its stack
_GROWTH = {_POINT: 1, _NUMBER: 1, _COPY: 1, _PLUS: -1, _TIMES: -1}
_FAR = 87.0  # how far from zero an exponential may be asked for

_COPIED, _SUM, _PRODUCT, _EXPONENTIAL = (_COPY, 0.0), (_PLUS, 0.0), (_TIMES, 0.0), (_EXP, _FAR)
_LOGISTIC: Code = [(_SIGMOID, _FAR)]
_SQUARE: Code = [_COPIED, _PRODUCT]
_HYPERBOLIC: Code = [(_FACTOR, 2.0), *_LOGISTIC, (_FACTOR, 2.0), (_TERM, -1.0)]
_HARD: Code = [(_TERM, 3.0), (_ABOVE, 0.0), (_BELOW, 6.0), (_FACTOR, 1 / 6)]


def _gated(gate: Code) -> Code:
    return [_COPIED, *gate, _PRODUCT]


def _gelu(approximate: str = "none") -> Code:
    if approximate == "none":
        return _gated([(_CDF, _FAR)])
    scale = 2 * math.sqrt(2 / math.pi)  # x σ(2 √(2/π) x (1 + 0.044715 x²))
    return _gated([*_gated([*_SQUARE, (_FACTOR, 0.044715), (_TERM, 1.0)]), (_FACTOR, scale), *_LOGISTIC])


def _leaky(negative_slope: float = 0.01) -> Code:
    return [_COPIED, (_FACTOR, negative_slope), (_SWAP, 0.0), (_ABOVE, 0.0), (_FACTOR, 1 - negative_slope), _SUM]


def _exponential_unit(alpha: float, scale: float = 1.0, steepness: float = 1.0) -> Code:
    below = [(_UPTO, 0.0), (_FACTOR, steepness), _EXPONENTIAL, (_TERM, -1.0), (_FACTOR, alpha * scale)]
    return [_COPIED, *below, (_SWAP, 0.0), (_ABOVE, 0.0), (_FACTOR, scale), _SUM]


def _clamp(min: float | None = None, max: float | None = None) -> Code:
    return [(code, float(bound)) for code, bound in ((_FROM, min), (_UPTO, max)) if bound is not None]


# x tanh(softplus(x)) = x (1 - u) / (1 + u), u = σ(-x)²
_MISH = [(_FACTOR, -1.0), *_LOGISTIC, *_SQUARE, (_TERM, 1.0), (_RECIPROCAL, 0.0), (_FACTOR, 2.0), (_TERM, -1.0)]

FUNCTIONS: dict[str, Callable[..., Code]] = {
    "relu": lambda: [(_ABOVE, 0.0)],
    "relu6": lambda: [(_ABOVE, 0.0), (_BELOW, 6.0)],
    "hardtanh": lambda min_val=-1.0, max_val=1.0: [(_ABOVE, float(min_val)), (_BELOW, float(max_val))],
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": lambda min: _clamp(min),
    "clamp_max": lambda max: _clamp(None, max),
    "leaky_relu": _leaky,
    "elu": lambda alpha=1.0: _exponential_unit(alpha),
    "selu": lambda: _exponential_unit(1.6732632423543772, 1.0507009873554805),
    "celu": lambda alpha=1.0: _exponential_unit(alpha, steepness=1 / alpha),
    "sigmoid": lambda: _LOGISTIC,
    "silu": lambda: _gated(_LOGISTIC),
    "tanh": lambda: _HYPERBOLIC,
    "hardsigmoid": lambda: _HARD,
    "hardswish": lambda: _gated(_HARD),
    "gelu": _gelu,
    "mish": lambda: _gated(_MISH),
    "exp": lambda: [_EXPONENTIAL],
    "square": lambda: _SQUARE,
    "neg": lambda: [(_FACTOR, -1.0)],
    "negative": lambda: [(_FACTOR, -1.0)],
}


def code_of(expression: Any) -> tuple[int, ...] | None:
    """Return the code of a nested (name, arguments, options) of "x", None where the kernel does not know a part."""
    code = _code(expression)
    if code is None or max(itertools.accumulate(_GROWTH.get(what, 0) for what, _ in code)) > _DEEPEST:
        return None
    return len(code), *itertools.chain.from_iterable((what, bits_of(float(number))) for what, number in code)


def _code(expression: Any) -> Code | None:
    if isinstance(expression, int | float):
        return [(_NUMBER, float(expression))]
    if not isinstance(expression, tuple):  # parameters
        return [(_POINT, 0.0)] if expression == "x" else None
    name, (inner, *arguments), options = expression
    code = _code(inner)
    if code is None:
        return None
    if name in ("add", "sub", "mul"):
        return _joined(name, code, *arguments)
    try:
        return [*code, *FUNCTIONS[name](*arguments, **dict(options))]
    except (KeyError, TypeError):  # a function or an option of it that is not here
        return None


def _joined(name: str, left: Code, other: Any) -> Code | None:
    if isinstance(other, int | float):
        code, number = (_FACTOR, other) if name == "mul" else (_TERM, -other if name == "sub" else other)
        return [*left, (code, float(number))]
    right = _code(other)
    if right is None:
        return None
    minus = [(_FACTOR, -1.0)] if name == "sub" else []
    return [*left, *right, *minus, _PRODUCT if name == "mul" else _SUM]
