"""Zip files that may be damaged or hostile: read in memory, entry by entry, never extracted."""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from pathlib import Path

from bkn_core.errors import InputError

# Bzip2 and LZMA entries are refused: Python cannot bound what a small one of them unpacks to.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
ENCRYPTED = 0x1
# What pictures and labels unpack to lies far below this; a bomb of zeros reaches 1000.
LARGEST_RATIO = 200
HARMLESS = 2**26
ARCHIVE_FAULTS = (OSError, EOFError, ValueError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open a zip file and check what its directory claims.

    Raises:
        InputError: The file is no zip or damaged, or an entry points outside it, is a link or cannot be read safely.
    """
    if not os.path.isfile(path):  # a pipe would be waited for, a device read for ever
        raise InputError(f"{path} is no zip file: it is not a regular file", "Give the path of a folder or a file.")
    try:
        archive = zipfile.ZipFile(path)
    except ARCHIVE_FAULTS as error:
        raise InputError(f"{path} cannot be read as a zip file: {error}", "Copy or download it again.") from error
    for entry in archive.infolist():
        fault = _fault(entry)
        if fault:
            archive.close()
            raise InputError(f"{path}: entry {entry.filename!r} {fault}", "Pack the files again, as plain files.")
    return archive


def entry_parts(entry: zipfile.ZipInfo) -> tuple[str, ...]:
    """Folders and name of an entry; some Windows tools write backslashes."""
    return tuple(part for part in entry.filename.replace("\\", "/").split("/") if part)


def read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    """Read one entry of at most `limit` bytes.

    Raises:
        InputError: The entry claims to be larger, or is damaged.
    """
    name = f"{archive.filename}: entry {entry.filename!r}"
    if entry.file_size > limit:
        raise InputError(f"{name} claims {entry.file_size} bytes; at most {limit} are read", "Remove the entry.")
    try:
        return archive.read(entry)  # never more than the claimed size
    except ARCHIVE_FAULTS as error:
        raise InputError(f"{name} is damaged: {error}", "Copy or download the zip file again.") from error


def _fault(entry: zipfile.ZipInfo) -> str:
    if entry.filename.startswith(("/", "\\")) or ".." in entry_parts(entry):
        return "points outside the archive"
    if stat.S_ISLNK(entry.external_attr >> 16):
        return "is a symbolic link"
    if entry.flag_bits & ENCRYPTED:
        return "is encrypted"
    if entry.compress_type not in METHODS:
        return f"is compressed with method {entry.compress_type}; only stored and deflated entries are read"
    if entry.file_size > max(HARMLESS, LARGEST_RATIO * entry.compress_size):
        return f"claims {entry.file_size} bytes, from {entry.compress_size} in the file"
    return ""
