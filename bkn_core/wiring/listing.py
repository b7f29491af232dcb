"""The program while it is being written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bkn_core.wiring.program import Line
from bkn_core.wiring.values import Value

AFFINE = ("affine", "scale", "shift")


class Listing:
    """Lines so far and, for elementwise lines, the line that they are a function of and which function."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self.origins: dict[int, tuple[int, Any]] = {}
        self.read_numbers: set[float] = set()  # that the forward took out of tensors: others the next time

    def write(self, operation: str, inputs: Sequence[int], channels: int, *, dimension: int, **rest: Any) -> Value:
        """Append a line and return the value of its result."""
        self.lines.append(Line(operation, tuple(inputs), channels, **rest))
        return Value(line=len(self.lines) - 1, dimension=dimension)

    def channels(self, value: Value) -> int:
        """Count the channels of a value."""
        return self.lines[value.line].channels

    def passed(self, value: Value) -> Value:
        """Pass the moments on under a new line: the values are others now, which must not cancel in a difference."""
        result = self.write("pass", [value.line], self.channels(value), dimension=value.dimension)
        result.numbers = value.numbers
        return result

    def averaged(self, value: Value, count: float) -> Value:
        """Write the average over `count` positions."""
        if count <= 1:
            return self.passed(value)
        rest: dict[str, Any] = {"dimension": value.dimension, "options": (count,), "words": "average"}
        result = self.write("average", [value.line], self.channels(value), **rest)
        result.numbers = value.numbers
        return result

    def before_passing(self, line: int) -> int:
        """Return the line whose moments a line passes on."""
        while self.lines[line].operation == "pass":
            line = self.lines[line].inputs[0]
        return line

    def origin(self, line: int) -> tuple[int, Any]:
        """Return the line that this one is an elementwise function of, and the function ("x" is the identity)."""
        return self.origins.get(line, (line, "x"))

    def is_gaussian(self, line: int) -> bool:
        """Whether a line is no elementwise function of another, or an affine one."""
        while self.lines[line].operation in AFFINE:
            line = self.lines[line].inputs[0]
        return line not in self.origins
