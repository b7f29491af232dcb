"""Runs that are killed without warning, within a save and between: what is on the disk loads and resumes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_runs import STEPS, assert_same_run, assert_sound, litter, tiny

from bkn_core.engine.loop import train
from bkn_core.engine.run_folder import RunFolder

# One process imports and then forks a run for every kill, so that a kill costs no import.
STORM = '''
import json, os, random, signal, sys, time
from pathlib import Path
import torch
sys.path.insert(0, sys.argv[1])
from tiny_runs import tiny
from bkn_core.engine import loop
from bkn_core.engine.loop import train

torch.set_num_threads(1)
folder, kills, draw = Path(sys.argv[2]), json.loads(sys.argv[3]), random.Random(0)
loop._SAVE_SECONDS = 0.0  # save after every step


def run(kill):
    """Train or go on; `kill` is the number of a disk call that never comes back, or a time that is up to the parent."""
    calls = 0

    def deadly(call):
        def counted(*arguments):
            nonlocal calls
            calls += 1
            if calls == kill:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)
        return counted

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    there = (folder / "config.yaml").exists()
    train(tiny(), **({"resume": folder} if there else {"out": folder}))


deaths = []
for kill in kills:
    child = os.fork()
    if child == 0:
        run(kill)
        os._exit(0)
    if isinstance(kill, float):
        time.sleep(kill)
        os.kill(child, signal.SIGKILL)
    deaths.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(deaths))
'''


def storm(folder: Path, kills: list[int | float]) -> list[int]:
    """Kill the run that trains into a folder again and again, and return how each part ended."""
    command = [sys.executable, "-c", STORM, str(Path(__file__).parent), str(folder), json.dumps(kills)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    deaths: list[int] = json.loads(done.stdout.splitlines()[-1])
    return deaths


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_ends_as_the_one_that_never_was(tmp_path: Path) -> None:
    """Before the weights of step 1 have their name, at some moment if it still runs, before the state has its."""
    first, _, last = storm(tmp_path / "run", [14, 0.5, 14])
    assert (first, last) == (-9, -9)
    assert_sound_but_for_litter(tmp_path / "run")
    assert litter(tmp_path / "run")
    train(tiny(), resume=tmp_path / "run")
    assert not litter(tmp_path / "run")
    train(tiny(), out=tmp_path / "straight")
    assert_same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
@pytest.mark.parametrize("kill", range(4, 40))
def test_a_kill_at_any_disk_call_leaves_a_run_that_goes_on(tmp_path: Path, straight_plain: Path, kill: int) -> None:
    assert storm(tmp_path / "run", [kill, 0.5])[0] == -9
    assert_sound_but_for_litter(tmp_path / "run")
    assert train(tiny(), resume=tmp_path / "run").steps == STEPS
    assert_same_run(tmp_path / "run", straight_plain)


@pytest.fixture(scope="module")
def straight_plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "run"
    train(tiny(), out=folder)
    return folder


def assert_sound_but_for_litter(folder: Path) -> None:
    """A killed process cannot tidy up; what it left aside is never read."""
    copy = folder.with_name("copy")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.part"))
    assert_sound(copy)
    assert RunFolder.open(folder).recipe == tiny()
