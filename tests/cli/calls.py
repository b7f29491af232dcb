"""Calling the program."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from bkn_cli.app import app

TINY = ("train.epochs=1", "data.train_images=64", "data.test_images=32", "data.image_size=8", "batch.gradient=16")
TINY = (*TINY, "log.plots=false", "train.device=cpu")


def call(*words: str) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(app, list(words))
