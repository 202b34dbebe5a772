"""Let go of a pin."""

from typing import Any

from pipeline.show import Show
from pipeline.upkeep import Unpin
from store import pins
from store.errors import Refused


def run(config: Unpin, show: Show) -> dict[str, Any]:
    """The command `unpin`."""
    if not config.cache or not config.name:
        raise Refused("give CACHE=<start of a fingerprint> and NAME=<the pin's>; `readcache catalog` lists both")
    held = {root: pins.pinned(root) for root in config.store.check().roots}
    # of a cache that does not read, or is gone, too
    found = {name: root for root in reversed(held) for name, names in held[root].items()
             if name.startswith(config.cache) and config.name in names}  # fmt: skip
    fingerprint = next(iter(found)) if len(found) == 1 else config.store.named(config.cache)
    root = found.get(fingerprint, config.store.target)
    pins.unpin(root, fingerprint, config.name)
    show.line(f"cache {fingerprint[:12]} is held as {config.name!r} no more")
    return {"fingerprint": fingerprint, "pins": pins.pinned(root).get(fingerprint, [])}
