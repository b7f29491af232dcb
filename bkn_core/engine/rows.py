"""The rows of metrics.jsonl, which may be damaged: a JSON object a line, checked before anything is made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from bkn_core.engine.files import read_bytes
from bkn_core.errors import InputError


class _Row(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, int | float | None] = Field(init=False)

    kind: Literal["step", "epoch"]
    step: Annotated[int, Field(ge=0, le=2**53)]
    epoch: Annotated[int, Field(ge=1, le=2**53)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl, without a last line that a crash cut short; no rows where there is no file.

    Raises:
        InputError: the file is unreadable, or a line is no row.
    """
    *lines, _ = read_bytes(path).split(b"\n") if path.exists() else [b""]
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(_Row.model_validate_json(line).model_dump())
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            what = ".".join(map(str, (*detail["loc"], detail["msg"])))
            raise InputError(f"{path}:{number} is no row of metrics: {what}", "Remove the line.") from error
    return rows
