"""In which order a GPU works through the instructions of all priors: levels, which are launched one after the other.

A level has chains of instructions that work channel by channel, which share no value and so run side by side, and then
the weights that read what these give. Most networks have one level of weights, and chains before and after it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch

from bkn_core.filter.kalman import Gaussian
from bkn_core.filter.propagate import quadrature
from bkn_core.graph.instructions import Instruction
from bkn_core.ops.cuda import layout
from bkn_core.ops.cuda.layout import FIELDS, Level
from bkn_core.ops.kernels import bits_of

_GIVES_GRADIENTS = 2  # of its parameters, the first ones, an instruction gives at most


@dataclasses.dataclass
class Row:
    """An instruction as the kernels read it, the numbers of its tensors, and the numbers that it is told."""

    fields: list[int]
    tensors: tuple[int, ...] = ()
    data: Sequence[int] = ()

    @classmethod
    def of(cls, instruction: Instruction) -> Row:
        """Lay an instruction out."""
        fields = [*instruction.fields, *[0] * (FIELDS - len(instruction.fields))]
        fields[layout.GRADIENTS : layout.GRADIENTS + _GIVES_GRADIENTS] = [-1] * _GIVES_GRADIENTS
        for i, number in enumerate(instruction.numbers):
            fields[layout.NUMBERS + i] = bits_of(number)
        row = cls(fields, instruction.tensors)
        if row.operation == layout.GATHER:
            row.data, fields[layout.PARTS] = _places(instruction.index, fields[layout.INPUTS])
        elif row.operation == layout.MAX_POOL:
            row.data = _masses(instruction.numbers[0])
        elif row.operation == layout.CURVE:
            row.data = [*_masses(1.0), *instruction.index]
        elif row.operation == layout.TRANSPOSED:
            row.data, fields[layout.PARTS] = instruction.index, int(instruction.numbers[0])
        return row

    @property
    def operation(self) -> int:
        """Which it is."""
        return self.fields[0]

    @property
    def is_weight(self) -> bool:
        """Whether it reads a weight of every input for every output."""
        return self.operation in (layout.CONVOLUTION, layout.PATCHES, layout.TRANSPOSED)

    @property
    def result(self) -> slice:
        """Where the means of the result lie."""
        return slice(self.fields[layout.OUT_MEAN], self.fields[layout.OUT_MEAN] + self.fields[1])

    @property
    def operands(self) -> Iterator[slice]:
        """Where the means lie that it reads."""
        first, second, inputs = (self.fields[i] for i in (layout.A_MEAN, layout.B_MEAN, layout.INPUTS))
        if inputs and self.operation != layout.PATCHES:
            yield slice(first, first + inputs)
        if self.operation in (layout.ADD, layout.MULTIPLY):
            yield slice(second, second + self.fields[1])

    def collection(self) -> Row:
        """Return what adds up, on the way back, what the columns of this weight give to what it reads.

        A transposed one gives a sum for each input.
        """
        fields, inputs = list(self.fields), self.fields[layout.INPUTS]
        fields[0], fields[1] = layout.COLLECT, inputs
        fields[layout.OUT_MEAN : layout.OUT_MEAN + 2] = fields[layout.A_MEAN : layout.A_MEAN + 2]
        if self.operation == layout.TRANSPOSED:
            fields[layout.TAPS] = fields[layout.GROUPS] = fields[layout.PARTS] = 1
        return Row(fields, self.tensors)


def _places(index: Sequence[int], inputs: int) -> tuple[list[int], int]:
    """Return an index, where the places of each channel begin, and these places; and how many are most."""
    places: list[list[int]] = [[] for _ in range(inputs)]
    for place, channel in enumerate(index):
        places[channel].append(place)
    starts = itertools.accumulate(map(len, places), initial=0)
    return [*index, *starts, *itertools.chain.from_iterable(places)], max(map(len, places))


def _masses(count: float) -> list[int]:
    """Return the mass of each point of the quadrature of the largest of several, see `spatial.maximum`."""
    _, mass = quadrature(Gaussian(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)))
    below = mass.flatten().cumsum(0).clamp(max=1).pow(count)
    return [bits_of(float(part)) for part in below.diff(prepend=below.new_zeros(1)) / below[-1]]


def levels_of(rows: Iterable[Row], size: int) -> list[tuple[list[Row], list[Row]]]:
    """Group rows by how many weights lie before each: those that work channel by channel, and weights."""
    depths = torch.zeros(size, dtype=torch.int64)
    levels: list[tuple[list[Row], list[Row]]] = []
    for row in rows:
        depth = max((int(depths[part].max()) for part in row.operands), default=0)
        levels += [([], []) for _ in range(depth + 1 - len(levels))]
        levels[depth][row.is_weight].append(row)
        depths[row.result] = depth + row.is_weight
    return levels


def chains_of(rows: Iterable[Row], size: int) -> list[list[Row]]:
    """Divide rows into chains, in their order, so that no two of them read or write the same value."""
    owners = torch.full((size,), -1)
    chains: dict[int, list[tuple[int, Row]]] = {}
    for i, row in enumerate(rows):
        touched = [*row.operands, row.result]
        chains[i] = [(i, row)]
        for other in {owner for part in touched for owner in owners[part].tolist()} - {-1}:
            chains[i] += chains.pop(other)
            owners[owners == other] = i
        for part in touched:
            owners[part] = i
    return [[row for _, row in sorted(chain, key=lambda pair: pair[0])] for chain in chains.values()]


class Schedule:
    """The table that the kernels read, but for where the tensors are, and where in it each level begins.

    `addresses`, `layouts` and `gradients` are pairs of a place in the table and the number of a tensor.

    Args:
        instructions: of a program.
        size: of its arena.
    """

    def __init__(self, instructions: Sequence[Instruction], size: int) -> None:
        self.size = size  # of the arena with what transposed convolutions keep
        self.scratch = 0  # numbers that the sums of columns take
        self.addresses: list[tuple[int, int]] = []
        self.layouts: list[tuple[int, int]] = []
        self.gradients: list[tuple[int, int]] = []
        levels = levels_of(map(Row.of, instructions), size)
        for small, weights in levels:
            convolutions = [row for row in weights if row.operation != layout.PATCHES]
            for row in convolutions:
                self._divide(row)
            small += [row.collection() for row in convolutions]
        cut = [(chains_of(small, size), weights) for small, weights in levels]
        rows = [row for chains, weights in cut for row in (*itertools.chain.from_iterable(chains), *weights)]
        self._numbers: list[int] = [0] * (FIELDS * len(rows))
        for i, row in enumerate(rows):
            self._place(i * FIELDS, row)
        self.levels: list[Level] = []
        first = 0
        for chains, weights in cut:
            bounds = list(itertools.accumulate(map(len, chains), initial=first))
            first = bounds[-1] + len(weights)
            forward = list(itertools.chain.from_iterable(_tiles(bounds[-1], weights)))
            back = list(itertools.chain.from_iterable(_tiles_back(bounds[-1], weights)))
            starts = [self._append(numbers) for numbers in (bounds, forward, back)]
            counts = len(chains), len(forward) // 2, len(back) // 3
            self.levels.append(Level(*zip(starts, counts, strict=True)))
        self.static = torch.tensor(self._numbers)

    def _divide(self, row: Row) -> None:
        fields, columns = row.fields, row.fields[layout.INPUTS]
        fields[layout.SCRATCH] = self.scratch
        if row.operation == layout.TRANSPOSED:
            fields[layout.B_MEAN] = self.size
            self.size += fields[1] * fields[layout.PARTS]
        else:
            fields[layout.PARTS] = -(-(fields[1] // fields[layout.GROUPS]) // layout.ROWS_OF_PART)
            columns *= fields[layout.PARTS] * fields[layout.TAPS]
        self.scratch += 2 * columns

    def _append(self, numbers: Sequence[int]) -> int:
        start = len(self._numbers)
        self._numbers += numbers
        return start

    def _place(self, start: int, row: Row) -> None:
        self._numbers[start : start + FIELDS] = row.fields
        if row.data:
            self._numbers[start + layout.PARAMETERS + 3] = self._append(row.data)
        is_collecting = row.operation == layout.COLLECT
        if row.is_weight or is_collecting:
            self.layouts.append((start + layout.IS_LAST, row.tensors[0]))
        for j, number in enumerate(row.tensors if not is_collecting else ()):
            if number >= 0:
                self.addresses.append((start + layout.PARAMETERS + j, number))
                if j < _GIVES_GRADIENTS and row.operation != layout.GIVEN:
                    self.gradients.append((start + layout.GRADIENTS + j, number))


def _tiles(first: int, weights: Sequence[Row]) -> Iterator[tuple[int, int]]:
    """Return row in the table and first output of each tile, forward."""
    for i, row in enumerate(weights, first):
        step = 1 if row.operation == layout.PATCHES else layout.ROWS
        yield from ((i, start) for start in range(0, row.fields[1], step))


def _tiles_back(first: int, weights: Sequence[Row]) -> Iterator[tuple[int, int, int]]:
    """Return row in the table, first column and part of the outputs of each tile; of patches the first output, of a
    transposed weight the first input.
    """
    for i, row in enumerate(weights, first):
        if row.operation == layout.PATCHES:
            yield from ((i, start, 0) for start in range(row.fields[1]))
        else:
            taps = 1 if row.operation == layout.TRANSPOSED else row.fields[layout.TAPS]
            columns = range(0, row.fields[layout.INPUTS] * taps, layout.COLUMNS_BACK)
            yield from ((i, start, part) for start in columns for part in range(row.fields[layout.PARTS]))
