"""What a user sees: lines, tables, progress with rate and time left. With --json all of it goes to standard error."""

import re
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_SECONDS = 5.0
"""between two lines of progress where there is no terminal, in seconds"""

MANY = 500
"""rows from which a table is plain text"""

PLAIN_WIDTH = 200
"""of a table where there is no terminal, in characters"""

_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class Show:
    """A place to print to."""

    def __init__(self, to_stderr: bool = False) -> None:
        """to_stderr: keep standard output free, for the JSON document."""
        self.console = Console(stderr=to_stderr, soft_wrap=True, highlight=False, markup=False)
        if not self.console.is_terminal:
            self.console.width = PLAIN_WIDTH

    def line(self, text: str) -> None:
        """A line."""
        self.console.print(harmless(text))

    def table(self, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
        """A table; numbers to the right."""
        names, body = list(columns), [[_cell(value) for value in row] for row in rows]
        if len(body) <= MANY:
            self.console.print(_table(names, body))
        else:  # the same, without a layout that takes a millisecond a row
            self.console.out("\n".join(_lines(names, body)), highlight=False)

    @contextmanager
    def progress(self, what: str, total: int, unit: str) -> Iterator["Meter"]:
        """Progress over `total` units: a bar on a terminal, otherwise a plain line now and then."""
        if not self.console.is_terminal:
            yield Meter(self, what, total, unit, None)
            return
        bar = _Bar(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
            TextColumn("{task.fields[unit]} {task.fields[rate]}"), TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        with bar:
            yield Meter(self, what, total, unit, bar)


class _Bar(Progress):
    """A bar with a table below it."""

    below: Table | None = None

    def get_renderables(self) -> Iterable[RenderableType]:
        """The bar, and the table where there is one."""
        yield from super().get_renderables()
        if self.below:
            yield self.below


class Meter:
    """Counts units and says how fast, and how much longer."""

    def __init__(self, show: Show, what: str, total: int, unit: str, bar: _Bar | None) -> None:
        self.show, self.what, self.total, self.unit, self.bar = show, what, total, unit, bar
        self.done, self.skipped = 0, 0
        self.begun = self.told = time.monotonic()
        self.task = bar.add_task(what, total=total, unit=unit, rate="") if bar else None

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.begun

    def beside(self, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
        """A small table with the progress: below the bar, in place of the one before; without a terminal it is printed."""
        if self.bar is None:
            self.show.table(columns, rows)
            return
        self.bar.below = _table(list(columns), [[_cell(value) for value in row] for row in rows])
        self.bar.refresh()

    def skip(self, count: int) -> None:
        """Units that were there already: they count as done, not as speed."""
        self.skipped += count
        self.add(count)

    def add(self, count: int) -> None:
        """More units are done."""
        if not count:
            return
        self.done += count
        spent = max(time.monotonic() - self.begun, 1e-9)
        rate = (self.done - self.skipped) / spent
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=self.done, rate=f"{rate:,.0f}/s")
        elif time.monotonic() - self.told >= PLAIN_SECONDS or self.done >= self.total:
            self.told = time.monotonic()
            left = duration((self.total - self.done) / rate) if rate > 0 else "?"
            self.show.line(f"{self.what}  {self.done:,}/{self.total:,} {self.unit}  {rate:,.0f}/s  {left} left")


def _table(columns: list[str], body: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if _numbers(body, index) else "left", no_wrap=True)
    for row in body:
        table.add_row(*row)
    return table


def _lines(columns: list[str], body: list[list[str]]) -> Iterator[str]:
    """A table as lines of text."""
    widths = [max(len(row[index]) for row in [columns, *body]) for index in range(len(columns))]
    sides = [">" if _numbers(body, index) else "<" for index in range(len(columns))]
    for row in [columns, *body]:
        yield "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)).rstrip()


def _numbers(body: list[list[str]], index: int) -> bool:
    """Whether a column holds numbers."""
    return bool(body) and all(row[index][:1].isdigit() or row[index] in ("", "–") for row in body)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else harmless(str(value))


def harmless(text: str) -> str:
    """Text that others have written, without what a terminal would obey or could not print."""
    return _ODD.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def size(count: int) -> str:
    """Bytes in decimal units."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"


def duration(seconds: float) -> str:
    """Seconds as 0:42, 12:05 or 3:07:21."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}" if hours else f"{rest // 60}:{rest % 60:02}"


def warn(text: str) -> None:
    """A line on standard error."""
    print(harmless(text), file=sys.stderr)
