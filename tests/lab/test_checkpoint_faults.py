"""A kill or a full disk leaves the checkpoint before; a save leaves the process around it as it was.

Kills: the Python-level file operations of a save are the places to die (found with an audit hook; all of the last
ones, where the renames are), and random moments reach those inside Orbax. One process imports everything and forks for
each death, which costs 0.1 s instead of 1.5.
"""

import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_helpers import assert_is_step, names, save_steps, state_of

from jaxprune.lab.checkpoints import checkpoint, orbax_files
from jaxprune.lab.checkpoints.checkpoint import CheckpointError, restore_latest, save

ROOT = Path(__file__).parents[2]


# ---------------------------------------------------------------- full disk


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FULL_AT = [
    (os, "fsync", 0),
    (os, "fsync", 5),
    (os, "replace", 0),
    (Path, "write_text", 0),
    (Path, "mkdir", 1),
    (orbax_files, "save", 0),
    (checkpoint, "write_manifest", 0),
]


@pytest.mark.parametrize(
    ("step", "where", "what", "nth"),
    [(step, *place) for place in FULL_AT for step in (200, 100)] + [(100, os, "replace", 1)],
)
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch, step, where, what, nth):
    save_steps(tmp_path, 100)
    calls, real = itertools.count(), getattr(where, what)

    def fail_at_nth(*args, **kwargs):
        return full_disk() if next(calls) == nth else real(*args, **kwargs)

    with monkeypatch.context() as full:
        full.setattr(where, what, fail_at_nth)
        with pytest.raises(CheckpointError, match=f"{step:08d} could not be written: No space left on device"):
            save(tmp_path, step, state_of(step + 1), {"step": step + 1})
    assert names(tmp_path) == ["00000100"]
    found, rejected = restore_latest(tmp_path, state_of(0))
    assert_is_step(found, 100)
    assert rejected == []


PRELUDE = """
import itertools, os, sys, signal, resource
import numpy as np, jax, orbax.checkpoint
from pathlib import Path
sys.path.insert(0, {root!r})
from jaxprune.lab.checkpoints import checkpoint, orbax_files
def state_of(step):
    return {{"w": np.full((50, 30), step, np.float32), "mask": np.arange(9) % 2 == step % 2, "step": step}}
"""


def python(code, *args, prelude=PRELUDE, **kwargs):
    env = os.environ | {"PYTHONWARNINGS": "ignore", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-c", prelude.format(root=str(ROOT)) + code, *map(str, args)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def test_a_write_beyond_the_file_size_limit_is_refused_in_one_line(tmp_path):
    save_steps(tmp_path, 100)
    child = python(
        """
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
big = {str(i): np.random.default_rng(i).standard_normal(50_000) for i in range(8)}  # several writes fail at once
try:
    checkpoint.save(folder, 200, big, {})
except checkpoint.CheckpointError as error:
    print(error)
checkpoint.save(folder, 300, state_of(300), {"step": 300})
print("small ones still fit")
""",
        tmp_path,
    )
    out, err = child.communicate(timeout=60)
    assert err == ""
    assert out.splitlines() == [
        f"{tmp_path}/00000200 could not be written: File too large. What was saved before is untouched.",
        "small ones still fit",
    ]
    assert names(tmp_path) == ["00000100", "00000300"]
    assert_is_step(restore_latest(tmp_path, state_of(0))[0], 300)


# ---------------------------------------------------------------- kills

DIE_AT_FILE_OPERATIONS = """
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.listdir", "os.scandir", "shutil.rmtree"}
work = {
    "another step": lambda folder: checkpoint.save(folder, 300, state_of(300), {"step": 300}),
    "the same step": lambda folder: checkpoint.save(folder, 200, state_of(200), {"step": 200}),
}[sys.argv[1]]

def run(folder, die_at):
    # How many file operations the work took, or minus the signal that ended it.
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = itertools.count(1)
    def hook(event, args):
        if event in EVENTS and (str(folder) in str(args[0]) or event in ("os.rmdir", "os.remove")):
            if next(seen) == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    work(folder)
    os._exit(next(seen) - 1)

folders = [Path(line) for line in sys.argv[2:]]
total = run(folders[0], None)
points = [*range(2, total - 24, 5), *range(total - 24, total + 1)]  # the last ones are the renames and the clearing up
deaths = [run(folder, point) for folder, point in zip(folders[1:], points)]
print(total, *deaths)
"""


def make_and_kill(tmp_path, work, prepare):
    """Folders in which a save died at one of its file operations, in the order of these."""
    prepare(tmp_path / "base")
    folders = [tmp_path / f"{n:04d}" for n in range(60)]
    for folder in folders:
        shutil.copytree(tmp_path / "base", folder)
    child = python(DIE_AT_FILE_OPERATIONS, work, *folders)
    out, err = child.communicate(timeout=120)
    assert child.returncode == 0, err
    total, *deaths = map(int, out.split())
    assert total > 50
    assert deaths.count(-signal.SIGKILL) > 30
    return folders[1 : len(deaths) + 1]


@pytest.mark.parametrize("work", ["another step", "the same step"])
def test_a_save_killed_at_any_file_operation(tmp_path, work):
    folders = make_and_kill(tmp_path, work, lambda base: save_steps(base, 100, 200))
    steps = []
    for folder in folders:
        found, rejected = restore_latest(folder, state_of(0))
        assert rejected == []
        assert_is_step(found, found.step)
        steps.append(found.step)
    # Threads of Orbax make the number of operations vary by a few, so only far from the rename is it known who won.
    assert steps[0] == 200
    assert set(steps) == ({200, 300} if work == "another step" else {200})
    save_steps(folders[-20], 300, keep=1)
    assert names(folders[-20]) == ["00000300"]


# For every step that it reads, a child that saves from there on, until it is killed.
SAVE_UNTIL_KILLED = """
folder = Path(sys.argv[1])
for line in sys.stdin:
    start, child = int(line), os.fork()
    if child:
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for step in range(start, start + 10_000):
        checkpoint.save(folder, step, state_of(step), {"step": step})
        if step == start: print(os.getpid(), flush=True)
    os._exit(0)
"""


def test_killed_at_random_moments_it_goes_on_from_a_good_one(tmp_path):
    rng, last = random.Random(0), 0
    parent = python(SAVE_UNTIL_KILLED, tmp_path, stdin=subprocess.PIPE)
    for _ in range(4):
        parent.stdin.write(f"{last + 1}\n")
        parent.stdin.flush()
        child = int(parent.stdout.readline())  # it has saved once
        time.sleep(rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        assert parent.stdout.readline() == f"{-signal.SIGKILL}\n"
        found, rejected = restore_latest(tmp_path, state_of(0))
        assert rejected == []
        assert found.step > last
        assert_is_step(found, found.step)
        last = found.step
        assert len([name for name in names(tmp_path) if not name.startswith(".")]) <= 3
    parent.communicate(timeout=60)


# ---------------------------------------------------------------- manners


def test_orbax_is_imported_when_needed_says_nothing_and_holds_nothing_up(tmp_path):
    code = """
import sys
import jaxprune.lab.checkpoints.checkpoint
print("orbax" in sys.modules, "tensorstore" in sys.modules)
import logging, threading
from pathlib import Path
import numpy as np
import orbax.checkpoint  # which changes settings of its own when it is imported
from jaxprune.lab.checkpoints import checkpoint, orbax_files
def settings():
    loggers = map(logging.getLogger, ("", "absl", "asyncio"))
    return sys.unraisablehook, [(logger.disabled, logger.level, logger.filters) for logger in loggers]
before = settings()
checkpoint.save(Path(sys.argv[1]), 1, {"w": np.ones(3)}, {})
checkpoint.restore_latest(Path(sys.argv[1]), {"w": np.ones(3)})
assert before == settings()
"""
    child = python(code, tmp_path, prelude="", cwd=ROOT)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (0, "False False\n", "")
