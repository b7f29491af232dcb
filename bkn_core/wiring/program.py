"""What lies between a model's normalization layers: a straight program of lines, plain data without tensors."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

_LONGEST_WORDS = 160


@dataclasses.dataclass(frozen=True)
class Line:
    """One step: an operation on the results of earlier lines.

    Args:
        operation: name of a rule in `evaluate.RULES`, "unknown" where there is none.
        inputs: numbers of the lines it reads.
        channels: channels of its result.
        name: the module (or parameter) that the rule reads, by its path in the model, or what is computed from
            parameters (`parameters.Call`).
        options: plain values that the rule needs.
        words: how the report calls it; for an unknown line the reason.
    """

    operation: str
    inputs: tuple[int, ...] = ()
    channels: int = 0
    name: Any = ""
    options: tuple[Any, ...] = ()
    words: str = ""


@dataclasses.dataclass(frozen=True)
class Wiring:
    """The program of a model and, for each normalization layer, the line that holds its prior.

    Args:
        lines: in an order in which every line follows what it reads.
        priors: line number of each layer that has a prior, by the layer's name, in forward order.
        reasons: why a layer has none, by name.
    """

    lines: tuple[Line, ...]
    priors: dict[str, int]
    reasons: dict[str, str]

    def __str__(self) -> str:
        """Print as a listing, one line of the program per row."""
        rows = [f"%{i} = {line.operation}({self._arguments(line)})" for i, line in enumerate(self.lines)]
        rows += [f"prior of {name}: %{number}" for name, number in self.priors.items()]
        return "\n".join(rows + [f"no prior for {name}: {reason}" for name, reason in self.reasons.items()])

    @staticmethod
    def _arguments(line: Line) -> str:
        return ", ".join([*(f"%{number}" for number in line.inputs), *([str(line.name)] if line.name else [])])

    def words(self, number: int) -> str:
        """Say what a line computes, such as `relu(bn1) -> conv2`."""
        texts: dict[int, str] = {}
        for i in sorted(self.needed([number])):
            texts[i] = _words(self.lines[i], [texts[j] for j in self.lines[i].inputs])
        return texts[number]

    def needed(self, numbers: Iterable[int]) -> set[int]:
        """Return the numbers of all lines that these lines depend on, themselves included."""
        found: set[int] = set()
        waiting = list(numbers)
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                waiting.extend(self.lines[number].inputs)
        return found

    def only(self, priors: dict[str, int], reasons: dict[str, str]) -> Wiring:
        """Keep these priors and the lines that they need, renumbered."""
        kept = sorted(self.needed(priors.values()))
        new = {old: i for i, old in enumerate(kept)}
        lines = tuple(
            dataclasses.replace(self.lines[old], inputs=tuple(new[i] for i in self.lines[old].inputs)) for old in kept
        )
        return Wiring(lines, {name: new[number] for name, number in priors.items()}, reasons)


def _words(line: Line, inputs: list[str]) -> str:
    if line.operation in ("convolution", "transposed_convolution"):
        text = f"{inputs[0]} -> {line.words}"
    elif line.operation == "add":
        text = " + ".join(inputs)
    elif line.operation == "multiply":
        text = " * ".join(f"({text})" if " + " in text else text for text in inputs)
    elif line.operation == "scale":
        text = f"{line.words} * ({inputs[0]})" if " " in inputs[0] else f"{line.words} * {inputs[0]}"
    elif line.operation == "concatenate":
        text = f"[{', '.join(inputs)}]"
    elif line.operation == "max_pool":
        text = f"max_pool({_function_words(line.options[1], inputs[0])})"
    elif line.operation in ("norm", "patches", "measured"):
        text = line.words
    elif line.operation in ("pass", "average", "gather", "affine", "shift"):
        text = inputs[0]
    else:
        text = f"{line.words}({', '.join(inputs)})"
    if len(text) <= _LONGEST_WORDS:
        return text
    return f"{text[: _LONGEST_WORDS // 2]} ... {text[-_LONGEST_WORDS // 2 :]}"


def _function_words(expression: Any, text: str) -> str:
    """Say what a nested (name, arguments, options) computes of a text; "x" stands for it."""
    if expression == "x":
        return text
    if not isinstance(expression, tuple):
        return str(expression)
    name, args, _ = expression
    return f"{name}({', '.join(_function_words(a, text) for a in args)})"
