"""Copy caches from another store to the first of STORE."""

from typing import Any

from pipeline.copying import copy, other
from pipeline.show import Show
from pipeline.upkeep import Pull


def run(config: Pull, show: Show) -> dict[str, Any]:
    """The command `pull`."""
    return copy(other(config.source, "SOURCE"), config.store.target, config.cache, show)
