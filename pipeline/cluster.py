"""Map a function over parts on the workers of a dask cluster. Sole home of dask."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from dask.distributed import Client, as_completed

from store.errors import Refused

P = TypeVar("P")
R = TypeVar("R")


def run_parts(build: Callable[[P], R], parts: Iterable[P], scheduler: str) -> Iterator[R]:
    """The results as they come. `build` is a pure function of its part, so where and in which order does not matter.

    scheduler: a dask scheduler's address. Raises Refused where it does not answer.
    """
    try:
        client = Client(scheduler, timeout=10)
    except (OSError, ValueError) as error:
        raise Refused(
            f"dask scheduler {scheduler} does not answer ({type(error).__name__}); start one, or leave DASK out"
        ) from None
    with client:
        for _, result in as_completed(client.map(build, list(parts), pure=False), with_results=True):
            yield result
