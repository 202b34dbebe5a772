"""In what the recipes of two caches differ."""

from typing import Any

from pipeline.show import Show
from pipeline.upkeep import Explain
from store.errors import Refused


def run(config: Explain, show: Show) -> dict[str, Any]:
    """The command `explain`."""
    if not config.a or not config.b:
        raise Refused(
            "give the starts of two fingerprints: `readcache explain 3f2a 91bc`, or A=3f2a B=91bc; `catalog` lists them"
        )
    one, other = config.store.pick(config.a), config.store.pick(config.b)
    mine, theirs = _flat(one.recipe), _flat(other.recipe)
    differ = [name for name in sorted(mine.keys() | theirs.keys()) if mine.get(name) != theirs.get(name)]
    rows = [{"field": name, "a": mine.get(name), "b": theirs.get(name)} for name in differ]
    names = [
        f"{item.fingerprint[:12]} {item.about['task']}/{item.about['split']} on {item.about['backbone']}" for item in (one, other)
    ]
    show.line(f"a  {names[0]}\nb  {names[1]}")
    if rows:
        show.table(["field", "a", "b"], [[row["field"], _short(row["a"]), _short(row["b"])] for row in rows])
    else:
        show.line("their recipes are the same: they are one cache")
    return {"a": one.fingerprint, "b": other.fingerprint, "differences": rows}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """A recipe's fields by their whole names."""
    if not isinstance(value, dict):
        return {name: value}
    return {path: leaf for key, inner in value.items() for path, leaf in _flat(inner, f"{name}.{key}".lstrip(".")).items()}


def _short(value: Any) -> str:
    text = "–" if value is None else str(value)
    return text if len(text) <= 60 else text[:59] + "…"
