"""Things that are compared are timed in turn, so that a machine that is slower for a while is slower for all of them."""

import statistics
import time
from collections.abc import Callable


def in_turn(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender, one a round; a first round, which warms up, is not counted.

    What a contender returns, if it can be called, is called when its clock has stopped: to clear away.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(repeats + 1):
        for name, work in contenders.items():
            begun = time.perf_counter()
            after = work()
            if number:
                seconds[name].append(time.perf_counter() - begun)
            if callable(after):
                after()
    return seconds


def ratio(one: list[float], other: list[float]) -> float:
    """The median over rounds of one ÷ other."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def median(values: list[float]) -> float:
    """The median."""
    return statistics.median(values)
