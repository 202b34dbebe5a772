"""A recipe's hash, which is its cache's folder name. Knows canonical JSON, not what a field means."""

import hashlib
import json
from typing import Any


def canonical(value: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, ASCII.

    Takes dict (string keys), list, str, int, bool and None. Floats raise TypeError: their text depends on the printer.
    """

    def check(part: Any) -> None:
        if isinstance(part, dict):
            for key, inner in part.items():
                if not isinstance(key, str):
                    raise TypeError(f"a recipe's keys are strings, not {key!r}")
                check(inner)
        elif isinstance(part, list):
            for inner in part:
                check(inner)
        elif not (part is None or isinstance(part, str | int)):
            raise TypeError(f"a recipe holds no {type(part).__name__}: {part!r}")

    check(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def parse(text: bytes) -> Any:
    """The value of a JSON text. Raises ValueError where a key is there twice: readers would differ in which one they believe."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a key is there twice among {', '.join(sorted(found))[:80]}")
        return found

    return json.loads(text, object_pairs_hook=once)


def fingerprint(recipe: dict[str, Any]) -> str:
    """sha256 of the recipe's canonical JSON, 64 hex digits."""
    return hashlib.sha256(canonical(recipe)).hexdigest()
