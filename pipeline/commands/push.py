"""Copy caches from STORE to another store."""

from typing import Any

from pipeline.copying import copy, other
from pipeline.show import Show
from pipeline.upkeep import Push


def run(config: Push, show: Show) -> dict[str, Any]:
    """The command `push`."""
    return copy(config.store, other(config.to, "TO").target, config.cache, show)
