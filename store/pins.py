"""Names that hold a cache, so that `gc` leaves it: a person's, or a run's that lies in another store.

<root>/pins/<fingerprint>/<name>.json
"""

import json

from store import leases
from store.errors import Refused
from store.layout import PLAIN_NAME
from store.objects import root_at
from store.stores import Root


def pin(root: Root, fingerprint: str, name: str, why: str = "") -> None:
    """Hold a cache under a name. Raises Refused for a name that is none."""
    told = {"who": leases.me()["who"], "why": why}
    root_at(root).put(_place(fingerprint, name), (json.dumps(told) + "\n").encode())


def unpin(root: Root, fingerprint: str, name: str) -> None:
    """Let go of it. Raises Refused where it is not held under that name."""
    place, names = _place(fingerprint, name), pinned(root).get(fingerprint, [])
    if name not in names:
        raise Refused(f"cache {fingerprint[:12]} has no pin {name!r}; its pins: {', '.join(names) or 'none'}")
    root_at(root).delete([place])


def pinned(root: Root) -> dict[str, list[str]]:
    """Fingerprint -> the names under which it is held."""
    found: dict[str, list[str]] = {}
    for place in sorted(root_at(root).listing("pins/")):
        _, fingerprint, name = (*place.split("/"), "", "")[:3]
        found.setdefault(fingerprint, []).append(name.removesuffix(".json"))
    return found


def _place(fingerprint: str, name: str) -> str:
    if not PLAIN_NAME.fullmatch(name):
        raise Refused(f"pin {name!r} is not a name (letters, digits, _ . -)")
    return f"pins/{fingerprint}/{name}.json"
