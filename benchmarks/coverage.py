"""Convert the published architectures and print what share of their normalization layers got a prior.

python benchmarks/coverage.py [--library torchvision|timm] [--family NAME] > table.md
"""

from __future__ import annotations

import argparse
import collections
import itertools
import sys
import time

import torch
from architectures import architectures
from conversion import Coverage, cover


def main() -> None:
    """Print the table, and progress to stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=("torchvision", "timm"))
    parser.add_argument("--family")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    found, started = [], time.perf_counter()
    for architecture in architectures():
        if arguments.library in (None, architecture.library) and arguments.family in (None, architecture.family):
            found.append(cover(architecture))
            print(
                f"{time.perf_counter() - started:4.0f} s {row(architecture.name, found[-1:])}",
                file=sys.stderr,
                flush=True,
            )
    print("| library | family | models | layers after the first | with a prior | largest error | without a prior |")
    print("|---|---|---|---|---|---|---|")
    for (library, family), group in itertools.groupby(found, lambda c: (c.architecture.library, c.architecture.family)):
        print(f"| {library} {row(family, list(group))}")
    for library in dict.fromkeys(c.architecture.library for c in found):
        print(f"| {library} {row('all', [c for c in found if c.architecture.library == library])}")
    print(f"| all {row('all', found)}")


def row(name: str, group: list[Coverage]) -> str:
    """Sum up a group of models in one row of the table."""
    layers, priors = sum(c.after_first for c in group), sum(c.with_prior for c in group)
    reasons: collections.Counter[str] = collections.Counter()
    for coverage in group:
        reasons.update(coverage.reasons)
    errors = [c.error for c in group if c.error is not None]
    error = f"{max(errors):.0e}" if errors else "graph only"
    words = "" if name == "all" else "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common())
    return f"| {name} | {len(group)} | {layers} | {priors} ({priors / layers:.1%}) | {error} | {words} |"


if __name__ == "__main__":
    main()
