"""How the instructions of all priors lie in a GPU's memory: rows of 64-bit integers as in `cpu/program.h`, and the few
fields that mean something else here.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

FIELDS = 23
OUT_MEAN, A_MEAN, B_MEAN, INPUTS, TAPS, GROUPS, IS_LAST = 2, 4, 6, 8, 9, 10, 11
PARTS = 12  # of the rows of a weight, each with sums of its own; phases; how often a channel is gathered at most
PARAMETERS = 13  # four addresses; the last may say where in the table the numbers of an instruction begin
GRADIENTS = 17  # where in the gradients those of each parameter begin, -1 where none is wanted
SCRATCH = 19  # where the sums of the columns of a weight begin, which has two parameters only
NUMBERS = 21  # two doubles

NORM, GIVEN, CONVOLUTION, PATCHES, RELU, ADD, MULTIPLY = range(7)  # as there
AFFINE, GATHER, REFINE, AVERAGE, MAX_POOL, GAIN, CURVE, CLIPPED, LEAKY, TRANSPOSED, SCALE, SHIFT = range(7, 19)
COLLECT = 19  # add up what the columns of a weight give to the channels that it reads

ROWS, COLUMNS = 8, 128  # of a weight, taken at once forward
ROWS_BACK, COLUMNS_BACK = 32, 32
ROWS_OF_PART = 256  # of a weight backward
CHANNELS, WARPS = 256, 8  # of a message, taken at once: a thread for each


class Level(NamedTuple):
    """What is launched together: where in the table the bounds of chains begin and how many chains there are, and so of
    the tiles of weights forward and backward.
    """

    chains: tuple[int, int]
    tiles: tuple[int, int]
    tiles_back: tuple[int, int]


class Table(NamedTuple):
    """The instructions in a GPU's memory.

    Args:
        numbers: rows, what they point into, chains and tiles.
        size: of all gradients of parameters together.
        uses: number of a parameter and where its gradient begins, for each instruction that gives one.
    """

    numbers: Tensor
    size: int
    uses: list[tuple[int, int]]
