"""All priors of a model: programs for the CPU kernels, and between them the lines that PyTorch evaluates.

A line that the kernels do not know costs its own evaluation. What it reads comes from a program of the lines before it,
what it gives enters the next program as a tensor, and autograd passes the gradients from one to the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from bkn_core.norm.kalman import Gaussian
from bkn_core.wiring.evaluate import RULES
from bkn_core.wiring.native_program import NativeProgram
from bkn_core.wiring.program import Line, Wiring
from bkn_core.wiring.rows import NoKernel, Place, Rows
from bkn_core.wiring.writers import write


class _Stage(NamedTuple):
    """Lines that PyTorch evaluates, none of which reads another, and the program of what they read."""

    program: NativeProgram
    numbers: list[int]


class Stages:
    """The programs of a wiring and the lines between them.

    Args:
        wiring: which layers feed which.
        names: all layers, of which each gets its gain.
        model: gives the shapes.
    """

    def __init__(self, wiring: Wiring, names: Sequence[str], model: nn.Module) -> None:
        unknown = _unknown(wiring, model)
        self.lines = {i: wiring.lines[i] for i in unknown}
        known = tuple(_given(line, i) if i in unknown else line for i, line in enumerate(wiring.lines))
        wiring = dataclasses.replace(wiring, lines=known)
        self.stages: list[_Stage] = []
        for numbers in _by_depth(self.lines, known):
            read = {i: None for number in numbers for i in self.lines[number].inputs if i not in unknown}
            program = NativeProgram(wiring.only({str(i): i for i in read}, {}), (), model)
            self.stages.append(_Stage(program, numbers))
        self.last = NativeProgram(wiring.only(wiring.priors, {}), names, model)

    @property
    def is_whole(self) -> bool:
        """Whether the last program is all there is."""
        return not self.stages

    def predictions(self, model: nn.Module) -> tuple[dict[str, Gaussian], list[Tensor]] | None:
        """Return all priors by their names and the gains of all layers, None where the kernels cannot take the model's
        tensors.
        """
        messages: dict[int, Gaussian] = {}
        for program, numbers in self.stages:
            found = program.predictions(model, messages)
            if found is None:
                return None
            messages |= {int(name): message for name, message in found[0].items()}
            for number in numbers:
                line = self.lines[number]
                messages[number] = RULES[line.operation](line, [messages[i] for i in line.inputs], model)
        return self.last.predictions(model, messages)


def _given(line: Line, number: int) -> Line:
    return Line("given", (), line.channels, name=number)


def _unknown(wiring: Wiring, model: nn.Module) -> list[int]:
    """Return the numbers of the lines that the kernels do not know."""
    rows, unknown = Rows(model, 0), []
    places: list[Place] = []
    for i, line in enumerate(wiring.lines):
        try:
            places.append(write(rows, line, [places[j] for j in line.inputs]))
        except NoKernel:
            unknown.append(i)
            places.append(rows.room(line.channels))
    return unknown


def _by_depth(unknown: Mapping[int, Line], lines: Sequence[Line]) -> list[list[int]]:
    """Group lines by how many others of them lie before each."""
    depths: list[int] = []
    groups: list[list[int]] = []
    for i, line in enumerate(lines):
        depth = max((depths[j] for j in unknown.get(i, line).inputs), default=0)
        depths.append(depth + (i in unknown))
        if i in unknown:
            groups += [[]] if depth == len(groups) else []
            groups[depth].append(i)
    return groups
