"""Reading metrics.jsonl: what was recorded comes back, what is damaged is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from bkn_core.engine.rows import read_rows
from bkn_core.engine.run_folder import RunFolder
from bkn_core.errors import InputError

ROW = {
    "kind": "epoch",
    "step": 3,
    "epoch": 1,
    "train_loss": 0.1 + 0.2,
    "population_top1": 1.0,
    "gain": None,
    "images": 7,
}
LINE = b'{"kind": "step", "step": 1, "epoch": 1}\n'


def test_rows_come_back_as_they_were_recorded(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.records() == []
    folder.record(ROW)
    (found,) = folder.records()
    assert found == ROW and [type(value) for value in found.values()] == [type(value) for value in ROW.values()]


@pytest.mark.parametrize("cut", range(1, len(LINE), 5))
def test_a_last_line_that_was_cut_short_does_not_count(tmp_path: Path, cut: int) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(LINE + LINE[:-cut])
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"7",
        b"[1]",
        b'{"kind": "step"}',
        b'{"kind": "step", "step": "1", "epoch": 1}',
        b'{"kind": "step", "step": -1, "epoch": 1}',
        b'{"kind": "step", "step": 1e400, "epoch": 1}',
        b'{"kind": "step", "step": 1' + b"0" * 5000 + b', "epoch": 1}',
        b'{"kind": "stop", "step": 1, "epoch": 1}',
        b'{"kind": "step", "step": 1, "epoch": 1, "loss": "low"}',
        b'{"kind": "step", "step": 1, "epoch": 1, "loss": NaN}',
        b'{"kind": "step", "step": 1, "epoch": 1, "loss": ' + b"[" * 100_000 + b"}",
        b'{"kind": "step", "step": 1, "epoch": 1, "\xff": 1}',
        bytes(40),
    ],
    ids=lambda line: repr(line[:50]),
)
def test_a_damaged_line_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(LINE + line + b"\n" + LINE)
    with pytest.raises(InputError, match=r"metrics\.jsonl:2 is no row of metrics"):
        RunFolder(tmp_path).records()
