"""What a checkpoint or an exported file may choose of the machine that it is opened on: data in the working folder."""

from __future__ import annotations

import os
from pathlib import Path

from bkn_core.recipe import DataConfig


def may_choose(data: DataConfig) -> bool:
    """Whether a file may name these data: their path does not lead out of the working folder, as it is written.

    A link inside it may, because no file that is opened has made it.
    """
    if data.name == "digits":
        return True
    try:
        root = os.path.abspath(Path(data.root).expanduser())
    except RuntimeError:  # the home of nobody
        return False
    return Path(root).is_relative_to(Path.cwd())
