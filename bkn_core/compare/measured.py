"""What a finished run measured; its files may be damaged, and are checked before anything is made of them."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from bkn_core.compare.predictions import check_predictions
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import InputError

# null stands for a number that was not finite.
_Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class _Result(BaseModel):
    model_config = ConfigDict(strict=True)

    top1: _Number
    loss: _Number


class Measured(BaseModel):
    """The part of a summary.json that a comparison reads; runs of earlier versions do not say all of it."""

    model_config = ConfigDict(strict=True)

    results: Annotated[dict[Literal["population", "batch"], _Result], Field(min_length=1)]
    images_per_second: _Number
    seconds: _Number
    step: int | None = None
    parameters: int | None = None
    peak_memory: int | None = None


def read_measured(folder: RunFolder) -> Measured:
    """Return what a finished run measured.

    Raises:
        InputError: its summary or its predictions are damaged.
    """
    try:
        measured = Measured.model_validate(folder.summary())
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        what = ".".join(map(str, detail["loc"]))
        raise InputError(
            f"{folder.path / 'summary.json'} cannot be read: {what}: {detail['msg']}",
            "Leave this run out, or train it again.",
        ) from error
    check_predictions(folder.path, [*measured.results])
    return measured
