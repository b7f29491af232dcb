"""Where Batch Kalman Normalization does not hold: many short trainings, ours beside the references, and what came out.

    python benchmarks/robustness.py --form quick --cifar cifar10.zip --jobs 2        # some minutes
    python benchmarks/robustness.py --form day --cifar cifar10.zip --plan            # how many, how long
    python benchmarks/robustness.py --form day --cifar cifar10.zip --jobs 2          # hours; Ctrl-C, and again to go on
    python benchmarks/robustness.py --form full --only data=glyphs,network=mobile,g=8+2,s=1 --seeds 3
    python benchmarks/robustness.py --form day --report                              # what there is so far

Image sets, networks, optimizers, learning rates and group sizes vary (robustness_data, robustness_networks,
robustness_grid). Each finished training is a line of the file --out; those that are there are not run again, and the
report is of all lines that fit --only. Scores are of 2,000 validation images, 400 scenes; --test scores test images,
which nothing else touches. With one seed a place may be a point or two behind by chance: run it again by itself with
--seeds. After a change of the method give another --out.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from robustness_data import NAMES, VERSION, Sources, missing, prepare
from robustness_grid import FORMS, Settings, chosen, grid
from robustness_report import report
from robustness_training import train

Record = dict[str, Any]


def read(path: Path) -> dict[str, Record]:
    """Read the finished trainings by their keys; the last of a key counts, and a line cut short does not."""
    found: dict[str, Record] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[record["key"]] = record
    return found


def append(path: Path, record: Record) -> None:
    """Write one line to the end of a file, after ending one that was cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record).encode() + b"\n")


def pending(runs: Iterable[Settings], records: dict[str, Record]) -> list[Settings]:
    """Leave out the trainings that are finished; one that stopped with an error is not."""
    return [run for run in runs if run.key not in records or records[run.key].get("error")]


def work(settings: Settings, sources: Sources) -> Record:
    """Train once and return the record; what goes wrong is a part of it."""
    record: Record = {"key": settings.key, "settings": dataclasses.asdict(settings)}
    try:
        return record | train(settings, sources)
    except Exception as error:  # one training that cannot run does not end the others
        return record | {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    torch.set_num_threads(1)


def run_all(runs: Sequence[Settings], sources: Sources, path: Path, *, jobs: int) -> None:
    """Run trainings in several processes and write each as it ends, with a line of progress.

    Raises:
        KeyboardInterrupt: after the workers are ended; what was finished is written.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers, which read it when they start
    progress = Progress(runs)
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=_start_worker)
    try:
        futures = {pool.submit(work, run, sources): run for run in runs}
        for future in concurrent.futures.as_completed(futures):
            record = future.result()
            append(path, record)
            progress.tell(futures[future], record)
    finally:
        if sys.exc_info()[0] is not None:
            for child in multiprocessing.active_children():
                child.terminate()
        pool.shutdown(cancel_futures=True)


class Progress:
    """Counts finished trainings and tells when the rest may be.

    Args:
        runs: all that will run.
    """

    def __init__(self, runs: Sequence[Settings]) -> None:
        self.started, self.count, self.done = time.perf_counter(), len(runs), 0
        self.all, self.expected = sum(run.seconds for run in runs), 0.0

    def tell(self, run: Settings, record: Record) -> None:
        """Print a line about one that ended."""
        self.done, self.expected = self.done + 1, self.expected + run.seconds
        elapsed = time.perf_counter() - self.started
        left = elapsed * (self.all - self.expected) / self.expected
        place = f"{run.data} {run.network} {run.optimizer}×{run.factor:g} g={run.g} s={run.s} {run.norm} #{run.seed}"
        what = record.get("error") or ("diverged" if record["diverged"] else f"loss {record['loss']:.3f}")
        figures = "".join(f" {record[n]:.1f}" for n in ("population", "single") if record.get(n) is not None)
        time_left = f"{left / 3600:.1f} h" if left > 5400 else f"{left / 60:.1f} min"
        head = f"[{self.done}/{self.count}, {elapsed / 60:.1f} min, {time_left} left]"
        print(f"{head} {place}: {what}{figures}", file=sys.stderr, flush=True)


def select(options: argparse.Namespace) -> list[Settings]:
    """List the trainings that the options ask for."""
    part = "test" if options.test else "validation"
    made = grid(options.form, seeds=options.seeds, part=part, images=options.images, weights=options.weights)
    return chosen(made, options.only)


def possible(runs: Sequence[Settings], sources: Sources) -> list[Settings]:
    """Leave out image sets that cannot be made here, with one line for each."""
    lacking = {name: missing(name, sources) for name in NAMES if any(run.data == name for run in runs)}
    for name, reason in lacking.items():
        if reason:
            print(f"{name} is skipped: it {reason}", file=sys.stderr)
    return [run for run in runs if lacking[run.data] is None]


def plan(runs: Sequence[Settings], left: Sequence[Settings], jobs: int) -> str:
    """Say how many trainings there are on each image set and about how long the unfinished ones take."""
    lines = ["| data | trainings | left | hours |", "|---|---|---|---|"]
    for name in (*NAMES, "all"):
        here, open_ = ([run for run in part if name in (run.data, "all")] for part in (runs, left))
        if here:
            lines.append(f"| {name} | {len(here)} | {len(open_)} | {sum(r.seconds for r in open_) / 3600 / jobs:.2f} |")
    return "\n".join([*lines, "", f"Hours are with --jobs {jobs} on as many cores that do nothing else."])


def summary(records: dict[str, Record], only: str) -> str:
    """Report all finished trainings that fit a filter, of the image sets as they are drawn now."""
    current = (record for record in records.values() if record["settings"]["version"] == VERSION)
    finished = {Settings(**record["settings"]): record for record in current}
    return report(finished[run] for run in chosen(finished, only))


def parser() -> argparse.ArgumentParser:
    """Describe the options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--form", choices=FORMS, default="quick")
    made.add_argument("--only", default="", metavar="NAME=VALUE,...", help="filter; VALUE+VALUE for either")
    made.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    made.add_argument("--images", type=int, help="seen in each training, instead of the form's")
    made.add_argument("--weights", choices=("plain", "centred"), default="plain", help="those that norm layers read")
    made.add_argument("--cifar", type=Path, help="a zip of train/CLASS/* and test/CLASS/*")
    made.add_argument("--cache", type=Path, default=Path("runs/robustness/data"), help="empty it for another zip")
    made.add_argument("--out", type=Path, help="default: runs/robustness/FORM.jsonl")
    made.add_argument("--jobs", type=int, default=1, help="processes, of one thread each")
    made.add_argument("--test", action="store_true", help="score test images instead of validation images")
    made.add_argument("--plan", action="store_true", help="say how many trainings and how long, and run nothing")
    made.add_argument("--report", action="store_true", help="report what is finished, and run nothing")
    return made


def main() -> int:
    """Run what is not finished and print the report; 130 after Ctrl-C."""
    options = parser().parse_args()
    path: Path = options.out or Path(f"runs/robustness/{options.form}.jsonl")
    if not options.report:
        sources = Sources(options.cache, options.cifar)
        runs = possible(select(options), sources)
        left = pending(runs, read(path))
        if options.plan:
            print(plan(runs, left, options.jobs))
            return 0
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for name, part in sorted({(run.data, part) for run in left for part in ("train", run.part)}):
                prepare(name, part, sources)
            run_all(left, sources, path, jobs=options.jobs)
        except KeyboardInterrupt:
            print(f"stopped; what is finished is in {path}, the same command goes on", file=sys.stderr)
            return 130
    print(summary(read(path), options.only))
    return 0


if __name__ == "__main__":
    sys.exit(main())
