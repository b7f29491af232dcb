"""What can go wrong, in words a user can act on, and the exit code that the command line gives it."""

from __future__ import annotations

import os
from pathlib import Path


class BknError(Exception):
    """A fault that the user can understand and mend: what is wrong (`message`) and what to do (`hint`)."""

    code = "error"
    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message if not hint else f"{message}\n{hint}")
        self.message = message
        self.hint = hint


class RecipeError(BknError, ValueError):
    """A recipe, an override or an argument asks for something that does not exist or does not fit."""

    code = "recipe"
    exit_code = 2


class ConversionError(BknError, ValueError):
    """A model or layer cannot be built or converted as asked."""

    code = "conversion"
    exit_code = 2


class StatisticsError(BknError, ValueError):
    """A layer is asked to normalize by statistics that do not exist, such as the variance of a single value."""

    code = "statistics"
    exit_code = 2


class InputError(BknError):
    """A file or folder that is read (data, run, checkpoint, model) is missing, damaged or unreadable."""

    code = "input"
    exit_code = 3


class OutputError(BknError):
    """A file that is written could not be written."""

    code = "output"
    exit_code = 8


class BusyError(BknError):
    """A folder is in use by another process."""

    code = "busy"
    exit_code = 7


class CheckFailedError(BknError):
    """A result was computed and found wanting, such as an exported file that disagrees with its model."""

    code = "check_failed"
    exit_code = 4


class DeviceError(BknError):
    """A device or an ONNX Runtime provider that was asked for is not available."""

    code = "device"
    exit_code = 5


class DivergedError(BknError):
    """Training met a value that is not finite."""

    code = "diverged"
    exit_code = 6


class InterruptedRun(BknError):
    """A run was stopped by a signal after its last finished step had been saved (130 Ctrl-C, 143 SIGTERM)."""

    code = "interrupted"

    def __init__(self, message: str, hint: str = "", *, exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code


def located(path: str | Path) -> str:
    """Return a path for a message; beside a relative one stands the folder that it is relative to."""
    return str(path) if os.path.isabs(path) else f"{path} (in {os.getcwd()})"
