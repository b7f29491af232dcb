"""The folder of a run: its name, its files, and what is written while it goes on."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from bkn_core.engine.environment import environment
from bkn_core.engine.files import finite, read_json, sweep, write_json, write_text
from bkn_core.engine.locks import is_held
from bkn_core.engine.rows import read_rows
from bkn_core.errors import BknError, InputError, OutputError, located
from bkn_core.recipe import Recipe, dump_recipe, load_recipe
from bkn_core.recipe_words import shown

_LONGEST = 40  # letters of a data set or model in the name of a run
_STATUSES = ("running", "finished", "interrupted", "failed")
_DATA = TypeAdapter(dict[str, list[str] | dict[str, int | str]])


def subject(recipe: Recipe) -> str:
    """Return a recipe's name, data and model in words of a file name: `<recipe>-<data>-<model>`."""
    data = recipe.data
    where = Path(data.root).resolve().stem if data.name in ("imagefolder", "npz") else data.name
    words = (re.sub(r"[^\w.]+", "_", word).strip("_.")[:_LONGEST] for word in (where, recipe.model.name))
    return "-".join([recipe.name, *filter(None, words)])


def run_name(recipe: Recipe) -> str:
    """Return the name of a recipe's run: `<recipe>-<data>-<model>-<norm>-g<g>-s<s>-seed<seed>`."""
    batch = recipe.batch
    return f"{subject(recipe)}-{recipe.norm.kind}-g{batch.gradient}-s{batch.statistics}-seed{recipe.train.seed}"


def numbered_folder(path: Path) -> Path:
    """Make a folder, with a number behind its name where that is taken.

    Raises:
        OutputError: it cannot be made.
    """
    number = 1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
            try:
                candidate.mkdir()
                return candidate
            except FileExistsError:
                number += 1
    except OSError as error:
        raise OutputError(f"the folder {path} cannot be made: {error}", "Choose another with --out.") from error


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run on disk."""

    path: Path

    @classmethod
    def create(cls, recipe: Recipe, path: Path) -> RunFolder:
        """Begin a run in a folder, which is made where it is not there.

        Raises:
            InputError: it holds a run already.
            OutputError: it cannot be written to.
        """
        cls.refuse_taken(path)
        write_text(path / "config.yaml", dump_recipe(recipe))
        return cls(path)

    @staticmethod
    def refuse_taken(out: Path) -> None:
        """Refuse a folder that holds a run.

        Raises:
            InputError: it does.
        """
        if (out / "config.yaml").exists():
            raise InputError(
                f"{out} holds a run already",
                f"Continue it with `bkn train --resume {out}`, or name another --out.",
            )

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Open an existing run.

        Raises:
            InputError: there is none.
        """
        if not (path / "config.yaml").is_file():
            raise InputError(
                f"{located(path)} is no run folder: it has no config.yaml", "Give a folder that `bkn train` made."
            )
        return cls(path)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe of the run.

        Raises:
            InputError: config.yaml is missing or damaged.
        """
        try:
            return load_recipe(self.path / "config.yaml")
        except BknError as error:
            raise InputError(error.message, f"Put it back as it was, or remove {self.path} and train again.") from error

    def adopt(self, recipe: Recipe) -> None:
        """Go on by a recipe in the place of the run's own.

        Raises:
            OutputError: it cannot be written.
        """
        if recipe != self.recipe:
            write_text(self.path / "config.yaml", dump_recipe(recipe))

    @property
    def weights(self) -> Path:
        """The weights of the last finished step that was saved."""
        return self.path / "checkpoints" / "last.safetensors"

    @property
    def best(self) -> Path:
        """The weights of the best epoch on the validation images; without any, of the last one."""
        return self.path / "checkpoints" / "best.safetensors"

    @property
    def state(self) -> Path:
        """All that resuming needs."""
        return self.path / "checkpoints" / "last.state.pt"

    def sweep(self) -> None:
        """Remove what killed processes left half written."""
        for folder in (self.path, self.weights.parent, self.path / "plots"):
            sweep(folder)

    def write_environment(self, device: torch.device, data: dict[str, Any]) -> None:
        """Write env.json: what the run goes on with, from versions to the fingerprint of its data."""
        write_json(self.path / "env.json", {**environment(device), "data": data})

    @property
    def data(self) -> dict[str, Any] | None:
        """The fingerprint of the data that the run was trained on, None where it does not say.

        Raises:
            InputError: env.json is damaged.
        """
        path = self.path / "env.json"
        if not path.exists():
            return None
        found = read_json(path).get("data")
        try:
            return None if found is None else _DATA.validate_python(found)
        except ValidationError as error:
            message = f"{path} does not say what data the run was trained on: its data is {shown(found)}"
            raise InputError(message, "Give a folder that `bkn train` made.") from error

    def write_summary(self, status: str, **values: Any) -> None:
        """Write summary.json: status is one of `_STATUSES`."""
        write_json(self.path / "summary.json", {"schema": "bkn.run/1", "status": status, **values})

    def summary(self) -> dict[str, Any]:
        """Read summary.json; where it says "running" and no process is in the folder, the status is "killed".

        Raises:
            InputError: it is missing or damaged.
        """
        path = self.path / "summary.json"
        try:
            value = read_json(path)
            if value.get("status") not in _STATUSES:
                raise InputError(f"{path} does not say how the run ended: its status is {shown(value.get('status'))}")
        except InputError as error:
            raise InputError(error.message, f"`bkn train --resume {self.path}` writes it anew.") from error
        if value["status"] == "running" and not is_held(self.path):
            value["status"] = "killed"
        return value

    @property
    def status(self) -> str:
        """Return running, finished, interrupted, failed or killed.

        Raises:
            InputError: summary.json is missing or damaged.
        """
        return str(self.summary()["status"])

    def log(self, text: str) -> None:
        """Append a line with its time to train.log."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._append("train.log", f"{now} {text}\n")

    def record(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl."""
        self._append("metrics.jsonl", json.dumps(finite(row)) + "\n")

    def _append(self, name: str, text: str) -> None:
        try:
            with open(self.path / name, "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise OutputError(f"{self.path / name} could not be written: {error}", "Free some space.") from error

    def records(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl, leaving out a last line that a crash cut short.

        Raises:
            InputError: another line is damaged.
        """
        return read_rows(self.path / "metrics.jsonl")

    def forget_after(self, step: int, epoch: int) -> None:
        """Drop the records of later steps and epochs than are saved: a resumed run writes them again."""
        rows = self.records()
        kept = [row for row in rows if row["step"] <= step and (row["kind"] != "epoch" or row["epoch"] <= epoch)]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in kept))

    def write_table(self) -> None:
        """Write metrics.csv: one row an epoch."""
        rows = [row for row in self.records() if row["kind"] == "epoch"]
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "kind"))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.path / "metrics.csv", text.getvalue())


def newest_run(root: Path = Path("runs")) -> Path:
    """Return the finished run under `runs/` that ended last.

    Raises:
        InputError: there is none.
    """
    finished = []
    for summary in root.glob("**/summary.json"):
        try:
            if RunFolder(summary.parent).status == "finished":
                finished.append((summary.stat().st_mtime, summary.parent))
        except (InputError, OSError):
            continue
    if not finished:
        raise InputError(f"there is no finished run under {root}/", "Run `bkn train` first, or name a run folder.")
    return max(finished)[1]
