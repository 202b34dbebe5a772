"""Work that runs ahead of who wants its results, or behind who hands it over, in threads, never further than it may."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(function: Callable[[T], R], items: Iterable[T], threads: int = 1, depth: int = 2) -> Iterator[R]:
    """function(item) for each item, in their order; up to `depth` results are made before they are asked for."""
    coming: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, "ahead") as pool:
        try:
            for item in items:
                coming.append(pool.submit(function, item))
                if len(coming) > depth:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:  # who stops early waits for what has begun only
            for future in coming:
                future.cancel()


@contextmanager
def behind(limit: int) -> Iterator[Callable[..., None]]:
    """Gives `do(cost, function, *arguments)`, which has one thread run functions in order, and returns at once.

    It waits where what is still to be done would cost more than `limit`, in the callers' unit. What a function raises is
    raised by a later `do`, or at the end, which waits for all of them. Once a function has failed, or the caller has, no other
    is run: what comes later may build on what was not done.
    """
    waiting: deque[tuple[int, Future[Any]]] = deque()
    over = threading.Event()

    def run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if over.is_set():
            return
        try:
            function(*arguments)
        except BaseException:
            over.set()
            raise

    def do(cost: int, function: Callable[..., Any], *arguments: Any) -> None:
        while waiting and (waiting[0][1].done() or cost + sum(other for other, _ in waiting) > limit):
            waiting.popleft()[1].result()
        waiting.append((cost, pool.submit(run, function, arguments)))

    with ThreadPoolExecutor(1, "behind") as pool:
        try:
            yield do
            while waiting:
                waiting.popleft()[1].result()
        finally:
            over.set()
