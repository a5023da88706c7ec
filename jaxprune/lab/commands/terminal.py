"""Progress on the terminal: a bar a stage, with rate and time left."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from jaxprune.lab.runs.run import Watcher


class _Rate(ProgressColumn):
    """Steps a second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "", style="progress.data.speed")


def _bars(console: Console, *, quiet: bool) -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), _Rate())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet)


class _BarWatcher(Watcher):
    """Shows what a run tells as bars on standard error."""

    def __init__(self, bars: Progress, console: Console):
        self.bars, self.console, self.task = bars, console, None

    def stage(self, seed: int, name: str, steps: int) -> None:
        self.bars.start()
        self.task = self.bars.add_task(f"seed {seed} {name:<8}", total=steps)

    def step(self, step: int) -> None:
        if self.task is not None:
            self.bars.update(self.task, completed=step)

    def note(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def watcher(*, quiet: bool = False) -> Iterator[Watcher]:
    """A watcher for `jaxprune.lab.runs.run.run`; notes are shown even if `quiet`, bars are not."""
    console = Console(stderr=True)
    bars = _bars(console, quiet=quiet)
    try:
        yield _BarWatcher(bars, console)
    finally:
        if bars.tasks:  # it ends with an empty line, also where nothing was shown
            bars.stop()


def note(line: str) -> None:
    """A line on standard error."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def steps(description: str) -> Iterator[Callable[[int, int, str], None]]:
    """Told (done, total, what was done): a bar, or a line each where there is no terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total, what: note(f"{description} {done}/{total}: {what}")
        return
    with _bars(console, quiet=False) as bars:
        task = bars.add_task(description, total=None)
        yield lambda done, total, what: bars.update(task, completed=done, total=total, description=what)


@contextlib.contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A bar told (done, total)."""
    with _bars(Console(stderr=True), quiet=False) as bars:
        task = bars.add_task(description, total=None)
        yield lambda done, total: bars.update(task, completed=done, total=total)
