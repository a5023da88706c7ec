"""Progress of a benchmark on the terminal: cases done, time taken and left, and which case runs."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxprune.lab.bench import layers


@contextlib.contextmanager
def bar(*, quiet: bool) -> Iterator[layers.Progress]:
    """A bar on standard error, told (done, total, what comes)."""
    words = TextColumn("{task.description}", markup=False)
    columns = (words, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Redrawn twice a second only: the machine is being measured.
    with Progress(*columns, console=Console(stderr=True), disable=quiet, refresh_per_second=2) as bars:
        task = bars.add_task("", total=None)
        yield lambda done, total, what: bars.update(task, completed=done, total=total, description=what)
