"""Libraries are compiled once, whole, by one process; only what this user's compiler wrote is taken."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bkn_core.ops import kernels, library_cache
from bkn_core.ops.compiler import Building, Source

MAKE = 'echo x >> "$COUNT"; echo made > "$3"'  # a compiler gets the source, -o and the output


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of this test, and COUNT, a file with a line for each time that a compiler ran."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COUNT", str(tmp_path / "count"))
    return tmp_path / "cache" / "bkn"


@pytest.fixture
def begin(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Building]:
    """Begin to compile by a shell script."""
    compiler, file = tmp_path / "compiler", tmp_path / "node.c"
    file.touch()
    monkeypatch.setenv("CC", str(compiler))

    def begun(body: str = MAKE, limit: float = 20.0) -> Building:
        if not compiler.exists():
            compiler.touch(0o755)
        compiler.write_text(f"#!/bin/sh\n{body}\n")
        return Building(Source("node", "CC", (), [file]), limit)

    return begun


def runs(tmp_path: Path) -> int:
    return len((tmp_path / "count").read_text().split())


def kinds(folder: Path) -> list[str]:
    return sorted(file.suffix for file in folder.iterdir())


def ended(pid: int) -> bool:
    """Whether a process has ended, within some seconds."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_library_is_compiled_beside_the_program_by_one_process(
    begin: Callable[..., Building], cache: Path, tmp_path: Path
) -> None:
    first, second = begin(f"sleep 0.3; {MAKE}"), begin(f"sleep 0.3; {MAKE}")
    assert first.path() is None and second.path() is None
    library = first.wait()
    assert library is not None and library.read_text() == "made\n" and second.wait() == library
    assert begin().process is None and begin().path() == library
    assert runs(tmp_path) == 1
    assert kinds(cache) == [".sha256", ".so"]  # nothing else is left behind
    assert cache.stat().st_mode & 0o777 == 0o700


def test_a_failure_is_told_and_remembered_for_a_while(
    begin: Callable[..., Building], cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    body = 'echo x >> "$COUNT"; echo half > "$3"; echo "node.c:1: error: no such thing" >&2; exit 3'
    assert begin(body).wait() is None
    assert "ended with 3: node.c:1: error: no such thing" in caplog.text
    caplog.clear()
    again = begin(body)
    assert again.process is None and again.wait() is None and runs(tmp_path) == 1
    assert caplog.text.count("no such thing") == 1
    assert kinds(cache) == [".failed"]
    before = time.time() - library_cache.REMEMBERED - 1
    os.utime(next(cache.iterdir()), (before, before))
    assert begin().wait() is not None and kinds(cache) == [".sha256", ".so"]


def test_a_compiler_that_hangs_is_killed_with_its_children(
    begin: Callable[..., Building], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert begin(f'sleep 60 & echo $! > "{tmp_path}/child"; wait', limit=1.0).wait(60) is None
    assert "did not end within 1 seconds" in caplog.text
    assert ended(int((tmp_path / "child").read_text()))


def test_a_compilation_that_was_killed_is_begun_again(begin: Callable[..., Building], cache: Path) -> None:
    killed = begin('echo half > "$3"; sleep 3')
    while not list(cache.glob("*.making/*.so")):
        time.sleep(0.02)
    assert killed.process is not None
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    assert kinds(cache) == [".making"]
    library = begin().wait()
    assert library is not None and library.read_text() == "made\n"
    assert kinds(cache) == [".sha256", ".so"]


def give_away(library: Path) -> None:
    os.chown(library, 65534, 65534)


def replace_by_link(library: Path) -> None:
    library.rename(library.parent.parent / "elsewhere")
    library.symlink_to(library.parent.parent / "elsewhere")


SPOILS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda library: os.truncate(library, 2),
    "other content": lambda library: library.write_text("evil\n"),
    "no digest": lambda library: library.with_suffix(".sha256").unlink(),
    "digest of junk": lambda library: library.with_suffix(".sha256").write_bytes(b"\xff\x00"),
    "anybody may write": lambda library: library.chmod(0o666),
    "a link": replace_by_link,
    "another owner": give_away,
}


@pytest.mark.parametrize("name", SPOILS)
def test_a_library_that_is_not_as_it_was_written_is_compiled_anew(
    name: str, begin: Callable[..., Building], tmp_path: Path
) -> None:
    if name == "another owner" and os.geteuid():
        pytest.skip("only root can give files away")
    library = begin().wait()
    assert library is not None
    SPOILS[name](library)
    building = begin()
    assert not building.is_made and building.wait() == library
    assert library.read_text() == "made\n" and library_cache.is_whole(library) and runs(tmp_path) == 2


def test_the_folder_of_somebody_else_is_not_used(
    begin: Callable[..., Building], cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache.mkdir(parents=True)
    somebody = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: somebody)
    assert begin().wait() is None and not list(cache.iterdir())
    assert f"{cache} is not a folder of user {somebody}" in caplog.text and "XDG_CACHE_HOME" in caplog.text


def test_a_folder_that_is_a_link_is_not_used(begin: Callable[..., Building], cache: Path, tmp_path: Path) -> None:
    cache.parent.mkdir()
    (tmp_path / "target").mkdir(0o755)
    cache.symlink_to(tmp_path / "target")
    assert begin().wait() is None
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755


def test_a_folder_that_others_can_enter_is_closed(begin: Callable[..., Building], cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    assert begin().wait() is not None
    assert cache.stat().st_mode & 0o777 == 0o700


def test_what_was_not_used_for_long_is_swept(begin: Callable[..., Building], cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    (cache / "tmpold").mkdir()
    (cache / "native-old.so").touch()
    (cache / "native-new.so").touch()
    before = time.time() - 31 * 86400
    for name in ("tmpold", "native-old.so"):
        os.utime(cache / name, (before, before))
    library = begin().wait()
    assert library is not None
    assert {file.name for file in cache.iterdir()} == {
        "native-new.so",
        library.name,
        library.with_suffix(".sha256").name,
    }
    os.utime(library, (before, before))
    assert begin().path() == library and library.stat().st_mtime > before + 86400  # used, so it stays


@pytest.mark.parametrize(
    ("command", "told"),
    [('gcc "', "CC is 'gcc \"': no closing quotation"), ("true", "true ended with 0: it wrote no library")],
)
def test_a_compiler_that_makes_nothing_is_told(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, command: str, told: str
) -> None:
    monkeypatch.setenv("CC", command)
    kernels.library.cache_clear()
    assert kernels.library() is None
    kernels.library.cache_clear()
    assert told in caplog.text


@pytest.mark.usefixtures("cache")
def test_no_compiler_is_no_fault(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("CC", raising=False)
    with caplog.at_level(logging.INFO, logger="bkn"):
        assert Building(Source("node", "CC", ("nonexistent-cc",), []), 1.0).wait() is None
    assert [record.levelname for record in caplog.records] == ["INFO"] and "no nonexistent-cc" in caplog.text
