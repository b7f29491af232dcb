"""What each function of a forward makes of the channels it reads: lines of the program, or a reason why not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bkn_core.wiring.operations import CONVOLUTIONS, ELEMENTWISE, IDENTITY, OVER_POSITIONS, REARRANGING, SHAPE_ONLY
from bkn_core.wiring.program import Line
from bkn_core.wiring.values import Arguments, Running, Value, argument, find_channels, number_channels, tensors

_SCALAR = (int, float)
_BINARY = frozenset(("add", "sub", "mul", "div", "truediv", "multiply", "subtract", "divide", "rsub", "reversed_sub"))
_WITHOUT_OPTIONS = ("relu", "relu6", "silu", "hardswish", "mish", "selu")  # their only option is `inplace`


class Interpreter:
    """Writes the program.

    Args:
        model: the model whose forward runs; its tensors are known by identity.
        stack: the modules that are running, by name, outermost first.
    """

    def __init__(self, model: nn.Module, stack: list[Running]) -> None:
        self.stack = stack
        self.parameters = {id(p): n for n, p in model.named_parameters(remove_duplicate=False)}
        self.buffers = {id(b): n for n, b in model.named_buffers(remove_duplicate=False)}
        self.lines: list[Line] = []
        self.origins: dict[int, tuple[int, Any]] = {}  # elementwise lines: the line they are a function of, and which

    def interpret(
        self,
        name: str,
        func: Callable[..., Any],
        arguments: Arguments,
        operands: list[Value | None],
        outputs: list[Tensor],
    ) -> list[Value]:
        """Return the value of each result of a function.

        Args:
            name: its bare name.
            func: itself.
            arguments: what it was called with.
            operands: what is known of each tensor among them; None for parameters and buffers.
            outputs: the tensors that it returned.
        """
        is_linear_map = name in CONVOLUTIONS or name == "linear"
        values = [v for v in (operands[:1] if is_linear_map else operands) if v is not None]
        unknown = next((v for v in values if v.reason), None)
        if unknown is not None or not values:
            reason = unknown.reason if unknown is not None else f"{name} of parameters"
            return [Value(reason=reason)] * len(outputs)
        if is_linear_map:
            results = [self._linear_map(name, arguments, values[0], outputs[0])]
        elif all(v.is_input for v in values):
            plain = not any(id(t) in self.parameters for t in tensors(arguments))
            reason = "" if plain else f"{name} of the network input with parameters"
            results = [Value(is_input=plain, reason=reason)] * len(outputs)
        elif any(v.is_input for v in values):
            results = [Value(reason=f"{name} mixes the network input with features")] * len(outputs)
        elif name in SHAPE_ONLY:
            results = self._moved(name, func, arguments, values[0], len(outputs))
        else:
            results = [self._one_result(name, arguments, values, outputs[0])] * len(outputs)
        return [self._checked(name, value, tensor) for value, tensor in zip(results, outputs, strict=True)]

    def _one_result(self, name: str, arguments: Arguments, values: list[Value], output: Tensor) -> Value:
        first = values[0]
        if name in IDENTITY:
            return first
        if first.numbers is not None:
            return Value(reason=f"{name} of channels that lie along several dimensions")
        if name in OVER_POSITIONS:
            return self._over_positions(name, arguments, first, output)
        if name == "mean":
            return self._mean(arguments, first)
        if name in ("cat", "concat", "concatenate"):
            return self._concatenate(arguments, values)
        if name == "prelu":
            return self._prelu(arguments, first)
        if name in ELEMENTWISE and len(values) == 1 and len(tensors(arguments)) == 1:
            options = (tuple(arguments[0][1:]), tuple((k, v) for k, v in arguments[1].items() if k != "inplace"))
            return self._elementwise(name, ((), ()) if name in _WITHOUT_OPTIONS else options, first)
        if name in _BINARY:
            return self._binary(name, arguments, values, output)
        return Value(reason=f"{name} has no rule")

    def _over_positions(self, name: str, arguments: Arguments, value: Value, output: Tensor) -> Value:
        """Pass the moments on under a new line: the values are others now, which must not cancel in a difference."""
        rank = output.dim()
        acted = OVER_POSITIONS[name]
        if name == "pad":
            acted = len(argument(arguments, 1, "pad")) // 2
        elif acted is None:
            acted = rank - 2
        if value.tensor is None or rank != value.tensor.dim() or value.dimension >= rank - acted:
            return Value(reason=f"{name} across channels")
        return self._passed(value)

    def _before_passing(self, line: int) -> int:
        while self.lines[line].operation == "pass":
            line = self.lines[line].inputs[0]
        return line

    def _passed(self, value: Value) -> Value:
        channels = self.lines[value.line].channels
        return self.write("pass", [value.line], channels, dimension=value.dimension)

    def write(self, operation: str, inputs: Sequence[int], channels: int, *, dimension: int, **rest: Any) -> Value:
        """Append a line and return the value of its result."""
        self.lines.append(Line(operation, tuple(inputs), channels, **rest))
        return Value(line=len(self.lines) - 1, dimension=dimension)

    def _checked(self, name: str, value: Value, tensor: Tensor) -> Value:
        if value.line < 0 or value.numbers is not None:
            return value
        fits = value.dimension < tensor.dim() and tensor.shape[value.dimension] == self.lines[value.line].channels
        return value if fits else Value(reason=f"{name} with a result of unexpected shape")

    def _linear_map(self, name: str, arguments: Arguments, value: Value, output: Tensor) -> Value:
        x: Tensor
        x, weight, bias = (argument(arguments, i, n) for i, n in enumerate(("input", "weight", "bias")))
        groups = int(argument(arguments, 6, "groups") or 1) if name in CONVOLUTIONS else 1
        dimension = output.dim() - 1 if name == "linear" else 1
        path, bias_path = self._path(weight, "weight"), ("" if bias is None else self._path(bias, "bias"))
        if path is None or bias_path is None or value.tensor is not x:
            return Value(reason=f"{name} whose weight is not a parameter")
        words = path.removesuffix(".weight")
        if value.is_input:
            if groups > 1 or not self._is_own_layer(path, x):
                return Value(reason=f"{name} of the network input in a form that is not measured")
            options = (bias_path, self.stack[-1].name)
            rest: dict[str, Any] = {"name": path, "options": options, "words": f"input -> {words}"}
            return self.write("patches", [], weight.shape[0], dimension=dimension, **rest)
        expected = x.dim() - 1 if name == "linear" else 1
        if value.numbers is not None or value.dimension != expected or x.dim() != output.dim():
            return Value(reason=f"{name} across something else than channels")
        rest = {"name": path, "options": (bias_path, groups), "words": words}
        return self.write("convolution", [value.line], weight.shape[0], dimension=dimension, **rest)

    def _is_own_layer(self, path: str, x: Tensor) -> bool:
        """Whether a convolution or linear layer applies its own weight to the very tensor that it was called with."""
        if not self.stack:
            return False
        name, module, given = self.stack[-1]
        known = isinstance(module, nn.modules.conv._ConvNd) or (isinstance(module, nn.Linear) and x.dim() == 2)
        pads_itself = type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)  # in a way that measuring repeats
        return known and (given is x or pads_itself) and path == f"{name}.weight".lstrip(".")

    def _path(self, tensor: Tensor, attribute: str) -> str | None:
        """Name a weight: its parameter or buffer, or the attribute of the running module that computes it."""
        known = self.parameters.get(id(tensor)) or self.buffers.get(id(tensor))
        if known is not None:
            return known
        if self.stack and nn.utils.parametrize.is_parametrized(self.stack[-1].module, attribute):
            return f"{self.stack[-1].name}.{attribute}".lstrip(".")
        return None

    def _elementwise(self, name: str, options: tuple[Any, ...], value: Value) -> Value:
        root, expression = self._origin(value.line)
        expression = (name, (expression, *options[0]), options[1])
        channels = self.lines[value.line].channels
        rest: dict[str, Any] = {"dimension": value.dimension, "words": name}
        if self.is_gaussian(value.line):
            result = self.write("elementwise", [value.line], channels, options=(name, *options), **rest)
        else:  # a function of a function of a Gaussian is one function of it
            result = self.write("fused", [root], channels, options=(expression,), **rest)
        self.origins[result.line] = (root, expression)
        return result

    def is_gaussian(self, line: int) -> bool:
        """Whether a line is no elementwise function of another, or an affine one."""
        while self.lines[line].operation == "affine":
            line = self.lines[line].inputs[0]
        return line not in self.origins

    def _origin(self, line: int) -> tuple[int, Any]:
        """Return the line that this one is an elementwise function of, and the function ("x" is the identity)."""
        return self.origins.get(line, (line, "x"))

    def _prelu(self, arguments: Arguments, value: Value) -> Value:
        path = self._path(argument(arguments, 1, "weight"), "weight")
        if path is None:
            return Value(reason="prelu whose slope is not a parameter")
        channels = self.lines[value.line].channels
        return self.write("prelu", [value.line], channels, dimension=value.dimension, name=path, words="prelu")

    def _binary(self, name: str, arguments: Arguments, values: list[Value], output: Tensor) -> Value:
        left, right = argument(arguments, 0, "input"), argument(arguments, 1, "other")
        if arguments[1].get("alpha", 1) != 1 or arguments[1].get("rounding_mode") is not None:
            return Value(reason=f"{name} with a factor or rounding")
        if name in ("rsub", "reversed_sub"):
            name, left, right = "sub", right, left
        name = {"multiply": "mul", "subtract": "sub", "divide": "div", "truediv": "div"}.get(name, name)
        if isinstance(left, _SCALAR) or isinstance(right, _SCALAR):
            return self._with_scalar(name, left, right, values[0])
        if len(values) == 2 and name in ("add", "sub", "mul"):
            return self._with_tensor(name, values, output)
        return Value(
            reason=f"{name} with a parameter or constant tensor" if len(values) == 1 else f"{name} has no rule"
        )

    def _with_scalar(self, name: str, left: Any, right: Any, value: Value) -> Value:
        if isinstance(left, _SCALAR):
            pairs = {"add": (1.0, left), "mul": (left, 0.0), "sub": (-1.0, left)}
        else:
            pairs = {"add": (1.0, right), "mul": (right, 0.0), "sub": (1.0, -right), "div": (1 / (right or 1), 0.0)}
        if name not in pairs:
            return Value(reason=f"{name} of a number by a tensor")
        scale, shift = (float(number) for number in pairs[name])
        channels = self.lines[value.line].channels
        result = self.write("affine", [value.line], channels, dimension=value.dimension, options=(scale, shift))
        root, expression = self._origin(value.line)
        self.origins[result.line] = (root, ("add", (("mul", (expression, scale), ()), shift), ()))
        return result

    def _with_tensor(self, name: str, values: list[Value], output: Tensor) -> Value:
        first, second = values
        assert first.tensor is not None and second.tensor is not None
        if any(v.numbers is not None for v in values):
            return Value(reason=f"{name} of channels that lie along several dimensions")
        if first.dimension - first.tensor.dim() != second.dimension - second.tensor.dim():
            return Value(reason=f"{name} of tensors whose channels are not aligned")
        dimension = output.dim() + first.dimension - first.tensor.dim()
        channels = max(self.lines[v.line].channels for v in values)
        (root, left), (other, right) = self._origin(first.line), self._origin(second.line)
        if root == other:  # both are functions of one tensor, as in x * sigmoid(x): not independent, so one function
            expression = (name, (left, right), ())
            result = self.write("fused", [root], channels, dimension=dimension, options=(expression,), words=name)
            self.origins[result.line] = (root, expression)
            return result
        lines = [first.line, second.line]
        if name == "sub":
            lines[1] = self.write("affine", [second.line], channels, dimension=dimension, options=(-1.0, 0.0)).line
        return self.write("multiply" if name == "mul" else "add", lines, channels, dimension=dimension)

    def _mean(self, arguments: Arguments, value: Value) -> Value:
        dims = argument(arguments, 1, "dim")
        assert value.tensor is not None
        if dims is None:
            return Value(reason="mean over everything")
        rank = value.tensor.dim()
        gone = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
        if value.dimension in gone or 0 in gone:
            return Value(reason="mean over channels or images")
        kept = argument(arguments, 2, "keepdim") or False
        dimension = value.dimension - (0 if kept else sum(d < value.dimension for d in gone))
        return dataclasses.replace(self._passed(value), dimension=dimension)

    def _concatenate(self, arguments: Arguments, values: list[Value]) -> Value:
        dim = argument(arguments, 1, "dim")
        assert values[0].tensor is not None
        dim = (0 if dim is None else dim) % values[0].tensor.dim()
        if len(values) != len(tensors(arguments)) or any(v.numbers is not None or v.is_input for v in values):
            return Value(reason="cat with tensors that are not features")
        if all(v.dimension == dim for v in values):
            channels = sum(self.lines[v.line].channels for v in values)
            return self.write("concatenate", [v.line for v in values], channels, dimension=dim)
        if len({(self._before_passing(v.line), v.dimension) for v in values}) == 1:
            return self._passed(values[0])
        return Value(reason="cat along another dimension than the channels")

    def _moved(
        self, name: str, func: Callable[..., Any], arguments: Arguments, value: Value, count: int
    ) -> list[Value]:
        """Replay a shape-only function on channel numbers and read off where each channel went."""
        assert value.tensor is not None
        if not arguments[0] or arguments[0][0] is not value.tensor:
            return [Value(reason=f"{name} of something else than features")] * count
        numbers = number_channels(value, self.lines[value.line].channels)
        results = pytree.tree_leaves(func(numbers, *arguments[0][1:], **arguments[1]))
        placed = [self._placed(value, result) for result in results if isinstance(result, Tensor)]
        return placed if name in REARRANGING else [self._elsewhere(value, result) for result in placed]

    def _elsewhere(self, before: Value, after: Value) -> Value:
        """Give values that were picked by position a line of their own."""
        return self._passed(after) if after.line == before.line and after.numbers is None else after

    def _placed(self, value: Value, numbers: Tensor) -> Value:
        """Read off where a function put the channels of a value."""
        place = find_channels(numbers, self.lines[value.line].channels)
        if isinstance(place, str):
            return Value(reason=place)
        if place is None:
            return Value(line=value.line, numbers=numbers)
        dimension, index = place
        if index == tuple(range(self.lines[value.line].channels)):
            return Value(line=value.line, dimension=dimension)
        return self.write("gather", [value.line], len(index), dimension=dimension, options=(index,))
