#!/usr/bin/env bash
# orbax-checkpoint 0.12.8 (jax 0.10.2), CPU, a local disk: what a kill leaves of a step that `CheckpointManager` saves anew.
#
# Guess: a manager whose steps appear by one rename replaces a step in the same way: the old one or the new one.
# Seen:
#   - `save` of a step that is there raises StepAlreadyExistsError, with `force=True` too; `delete` comes first. Killed at
#     any of the file operations in between, the step is gone, or stands under its own name without some of its files.
#   - The steps that the keep policy removes are deleted file by file under their own names as well: killed meanwhile, an
#     older step is listed by `all_steps()` and has lost files. (`todelete_subdir` moves it away first.)
#   - Another step is saved as guessed: killed at any operation, the ones before are whole.
#   - Not shown here, seen with `strace -f -e trace=fsync,rename`: TensorStore syncs its own files; _METADATA,
#     _CHECKPOINT_METADATA, commit_success.txt and the folders that are renamed are never synced, before old steps go.
# What it means: whoever promises "the old checkpoint or the new one" for a step that is saved again, or with one kept
# checkpoint through a power cut, cannot leave it to the manager.
#
# Exits with 1 if any of this changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "orbax-checkpoint==0.12.8" "jax==0.10.2"

cat > "$folder/kills.py" <<'PROGRAM'
import itertools
import logging
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

logging.disable(logging.ERROR)
BASE = Path(sys.argv[1])
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def manager(folder, keep=None):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
    return ocp.CheckpointManager(folder, options=options)


def save(folder, step, keep=None):
    with manager(folder, keep) as steps:
        steps.save(step, args=ocp.args.StandardSave({"w": np.full(1000, step)}), force=True)


def replace(folder):
    with manager(folder) as steps:
        try:
            steps.save(2, args=ocp.args.StandardSave({"w": np.full(1000, 3)}), force=True)
            os._exit(251)  # it replaces now
        except ocp.checkpoint_manager.StepAlreadyExistsError:
            steps.delete(2)
        steps.save(2, args=ocp.args.StandardSave({"w": np.full(1000, 3)}))


def forked(work, die_at=None):
    """Exit code of a child: how many file operations it took, 250 at most, or minus the signal."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = itertools.count(1)

    def hook(event, args):
        if event in EVENTS and next(seen) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()
    os._exit(min(next(seen) - 1, 250))


def files(step):
    return {path.relative_to(step).as_posix() for path in step.rglob("*") if path.is_file()} if step.exists() else set()


def deaths(name, work):
    """Where step 2, and step 1, were whole, torn or gone after a kill: counted."""
    base = BASE / name
    forked(lambda: [save(base, step) for step in (1, 2)])
    shutil.copytree(base, BASE / "all")
    total = forked(lambda: work(BASE / "all"))
    shutil.rmtree(BASE / "all")
    assert 20 < total < 250, total
    found = {1: [], 2: []}
    for die_at in range(1, total, 2):
        folder = BASE / f"{name}{die_at}"
        shutil.copytree(base, folder)
        if forked(lambda: work(folder), die_at) == -signal.SIGKILL:
            for step, seen in found.items():
                left, before = files(folder / str(step)), files(base / str(step))
                seen.append("whole" if len(left) == len(before) else "torn" if (folder / str(step)).exists() else "gone")
        shutil.rmtree(folder)
    counts = {step: {kind: seen.count(kind) for kind in ("whole", "torn", "gone")} for step, seen in found.items()}
    print(name, counts)
    return counts


replaced = deaths("replace step 2", replace)
another = deaths("save step 3, keep 2", lambda folder: save(folder, 3, keep=2))
assert replaced[1]["torn"] == replaced[1]["gone"] == 0
assert replaced[2]["gone"] > 5 and replaced[2]["torn"] > 2
assert another[2]["torn"] == another[2]["gone"] == 0
assert another[1]["torn"] > 2
PROGRAM
JAX_PLATFORMS=cpu PYTHONWARNINGS=ignore "$folder/venv/bin/python" "$folder/kills.py" "$folder/steps"
