"""Let go of a pin."""

from typing import Any

from pipeline.show import Show
from pipeline.upkeep import Unpin
from store import pins
from store.errors import Refused
from store.stores import root_of


def run(config: Unpin, show: Show) -> dict[str, Any]:
    """The command `unpin`."""
    if not config.cache or not config.name:
        raise Refused("give CACHE=<start of a fingerprint> and NAME=<the pin's>; `readcache catalog` lists both")
    found = config.store.pick(config.cache)
    pins.unpin(root_of(found.path), found.fingerprint, config.name)
    show.line(f"cache {found.fingerprint[:12]} is held as {config.name!r} no more")
    return {"fingerprint": found.fingerprint, "pins": pins.pinned(root_of(found.path)).get(found.fingerprint, [])}
