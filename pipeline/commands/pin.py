"""Hold a cache under a name."""

from typing import Any

from pipeline.show import Show
from pipeline.upkeep import Pin
from store import pins
from store.errors import Refused
from store.stores import root_of


def run(config: Pin, show: Show) -> dict[str, Any]:
    """The command `pin`."""
    if not config.cache or not config.name:
        raise Refused("give CACHE=<start of a fingerprint> and NAME=<a name>; `readcache catalog` lists caches")
    found = config.store.pick(config.cache)
    pins.pin(root_of(found.path), found.fingerprint, config.name, config.why)
    show.line(f"cache {found.fingerprint[:12]} is held as {config.name!r}")
    return {"fingerprint": found.fingerprint, "pins": pins.pinned(root_of(found.path))[found.fingerprint]}
