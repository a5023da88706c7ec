"""Killed at any moment, inside a checkpoint write too, the same command ends bit-identical to a run never killed.

Real processes and SIGKILL. A kill at a random moment is sent from here, so long after the run has made its folder; a
kill inside a write comes from the process itself: before the n-th `os.replace` or `os.fsync` of its saves, or some
milliseconds into the n-th, where TensorStore writes from threads of its own.
"""

import random
import signal
import time

import pytest
from lab_helpers import STAGES, TINY, assert_same_run, checkpoints, finish, spawn, write_config

OFTEN = TINY.replace('"9 steps"', '"3 steps"').replace('"2 epochs"', '"3 epochs"')


class Runs:
    """The same command again and again; what it should come to; and what it was seen to do."""

    def __init__(self, folder, text=TINY):
        self.folder, self.cache, self.log, self.compared = folder, folder / "programs", [], 0
        self.config = write_config(folder, text)
        self.reference = folder / "reference"
        process = self.start(self.reference)  # fills the cache: the next ones do not write to it
        self.wait_for(self.reference, process)
        ready = time.monotonic()
        code, _, err = finish(process)
        assert code == 0, err
        self.life = time.monotonic() - ready  # with compiling, which the next ones do not

    def start(self, run, how="none", argument="0"):
        return spawn(["run", self.config, "--out", run, "--quiet"], self.cache, how, argument)

    def wait_for(self, run, process):
        """Until the run has written its metrics, the last thing before training."""
        seen = (run / "metrics.jsonl").stat().st_mtime_ns if (run / "metrics.jsonl").exists() else 0
        while process.poll() is None:
            if (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_mtime_ns != seen:
                return
            time.sleep(0.002)

    def kill_after(self, run, delay):
        """SIGKILL so many seconds after start-up; True if that came before the end."""
        process = self.start(run)
        self.wait_for(run, process)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        return self.note(run, process, f"{delay:.2f} s")

    def kill_inside(self, run, how, argument):
        """SIGKILL by itself inside a save; True if the run came that far."""
        return self.note(run, self.start(run, how, argument), f"{how} {argument}")

    def note(self, run, process, what):
        code, _, err = finish(process)
        killed = code == -signal.SIGKILL
        assert killed or code == 0, err
        saved = {stage: [int(p.name) for p in checkpoints(run / "seed_0" / stage)] for stage in STAGES}
        torn = sorted(path.name for path in run.glob("seed_*/*/.tmp-*"))
        self.log.append(f"{'killed' if killed else 'ended'} at {what}: saved {saved}, torn {torn}")
        return killed

    def end(self, run):
        code, _, err = finish(self.start(run))
        assert code == 0, err
        assert "Traceback" not in err
        assert_same_run(run, self.reference)

    def survive(self, rng, plan):
        """Kill as planned, a save's accident or None for a random moment, until all have hit.

        A run that ends before its kill is compared and begun anew.
        """
        run = self.folder / "run_0"
        for n, kill in enumerate(plan, 1):
            killed = False
            while not killed:
                if (run / "results.json").exists():
                    assert_same_run(run, self.reference)
                    self.compared, run = self.compared + 1, self.folder / f"run_{n}_{self.compared}"
                delay = rng.uniform(0, self.life * rng.choice([0.15, 0.15, 0.5]))  # mostly early: killed many times
                killed = self.kill_inside(run, *kill) if kill else self.kill_after(run, delay)
        self.end(run)


@pytest.mark.slow
def test_three_kills_one_inside_a_write(tmp_path):
    rng, runs = random.Random(1), Runs(tmp_path)
    runs.survive(rng, [None, ("fsync", rng.randrange(1, 40)), None])
    inside = [line for line in runs.log if line.startswith("killed at fsync")]
    assert len(inside) == 1
    assert ".tmp-0" in inside[0]  # a checkpoint that was begun and not finished


@pytest.mark.slow
def test_twenty_kills_and_more(tmp_path, capsys):
    rng, began, runs = random.Random(20), time.monotonic(), Runs(tmp_path, OFTEN)
    plan = [("fsync", rng.randrange(1, 60)) for _ in range(3)] + [("replace", rng.randrange(1, 6)) for _ in range(2)]
    plan += [("arrays", f"{rng.randrange(1, 5)}@{rng.uniform(0, 40):.1f}") for _ in range(3)] + [None] * 16
    rng.shuffle(plan)
    runs.survive(rng, plan)
    killed = [line for line in runs.log if line.startswith("killed")]
    assert len(killed) == 24
    assert sum(" s:" not in line for line in killed) == 8
    with capsys.disabled():
        seconds = time.monotonic() - began
        print(f"\n{len(killed)} kills, {runs.compared + 1} runs compared, {seconds:.0f} s", *runs.log, sep="\n  ")
