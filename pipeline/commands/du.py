"""What lies under STORE, and how large it is."""

import shutil
from pathlib import Path
from typing import Any

from pipeline.show import Show, size
from pipeline.upkeep import Du
from store import catalog
from store.catalog import Found
from store.objects import root_at
from store.stores import Root

FOLDERS = ("building", "objects", "trash", "runs", "logs", "sweeps", "tensorboard", "training")
"""of a store, beside its caches, where they are there; in an object store a cache's bytes are among `objects`"""


def run(config: Du, show: Show) -> dict[str, Any]:
    """The command `du`."""
    document: dict[str, Any] = {"stores": [_of(root) for root in config.store.check().roots]}
    for held in document["stores"]:
        rows = [[g["backbone"], g["task"], g["tokens"], g["codec"], g["caches"], size(g["bytes"])] for g in held["caches"]]
        show.line(held["store"])
        show.table(["backbone", "task", "tokens", "codec", "caches", "size"], rows)
        beside = ", ".join(f"{name} {size(held[name])}" for name in FOLDERS if held.get(name))
        free = f"; free {size(held['free_bytes'])}" if held["free_bytes"] is not None else ""
        show.line(f"{len(rows)} kinds, caches {size(held['bytes'])}{'; ' + beside if beside else ''}{free}")
    return document


def _of(root: Root) -> dict[str, Any]:
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for found in catalog.listing(root):
        if isinstance(found, Found):
            told = {"backbone": str(found.about["backbone"]), "task": str(found.about["task"]),
                    "tokens": str(found.recipe["tokens"]), "codec": str(found.recipe["codec"])}  # fmt: skip
            group = groups.setdefault(tuple(told.values()), told | {"caches": 0, "bytes": 0})
            group["caches"], group["bytes"] = group["caches"] + 1, group["bytes"] + found.bytes
    objects = root_at(root)
    beside = {name: sum(about.size for about in objects.listing(f"{name}/").values()) for name in FOLDERS}
    return {
        "store": str(root), "caches": sorted(groups.values(), key=lambda group: -group["bytes"]),
        "bytes": sum(group["bytes"] for group in groups.values()), **beside,
        "free_bytes": shutil.disk_usage(root).free if isinstance(root, Path) and root.is_dir() else None,
    }  # fmt: skip
