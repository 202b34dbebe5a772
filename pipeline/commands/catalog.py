"""Caches and runs under STORE."""

from typing import Any

from pipeline import runs
from pipeline.config import Catalog
from pipeline.show import Show, size
from store import catalog
from store.errors import Damaged, Refused


def run(config: Catalog, show: Show) -> dict[str, Any]:
    """The command `catalog`."""
    if not config.store.is_dir():
        raise Refused(f"there is no store {config.store}; `readcache extract` or `train` makes one")
    document: dict[str, Any] = {"caches": [], "runs": [], "damaged": []}
    for saved in runs.listing(config.store):
        if isinstance(saved, Damaged):
            document["damaged"].append(str(saved))
            continue
        told = saved.told
        split, values = next(iter(told["metrics"].items()))
        metric, value = next(iter(values.items()))
        document["runs"].append(
            {"run": saved.path.name, "task": told["task"], "split": split, "metric": metric, "score": value,
             "linear_probe": told["linear_probe"][split][metric], "trainable_parameters": told["trainable_parameters"],
             "fingerprints": told["fingerprints"]}
        )  # fmt: skip
    for found in catalog.listing(config.store):
        if isinstance(found, Damaged):
            document["damaged"].append(str(found))
            continue
        about, counts, recipe = found.manifest.about, found.manifest.counts, found.manifest.recipe
        fingerprint = found.manifest.fingerprint
        best = max((r["score"] for r in document["runs"] if fingerprint in r["fingerprints"].values()), default=None)
        document["caches"].append(
            {"fingerprint": fingerprint, "task": about["task"], "split": about["split"], "backbone": about["backbone"],
             "tokens": recipe["tokens"], "layers": recipe["layers"], "codec": recipe["codec"], "examples": counts["examples"],
             "rows": counts["rows"], "bytes": found.manifest.bytes, "best_score": best}
        )  # fmt: skip
    document["caches"].sort(key=lambda c: (c["task"], c["backbone"], c["tokens"], c["codec"], c["split"]))
    show.table(
        ["task", "split", "backbone", "tokens", "layers", "codec", "examples", "rows", "size", "best score", "fingerprint"],
        [[c["task"], c["split"], c["backbone"], c["tokens"], c["layers"], c["codec"], c["examples"], c["rows"], size(c["bytes"]),
          c["best_score"], c["fingerprint"][:12]] for c in document["caches"]],
    )  # fmt: skip
    if document["runs"]:
        show.line("")
        show.table(
            ["task", "run", "split", "metric", "score", "linear probe", "parameters"],
            [[r["task"], r["run"], r["split"], r["metric"], r["score"], r["linear_probe"], r["trainable_parameters"]]
             for r in document["runs"]],
        )  # fmt: skip
    for text in document["damaged"]:
        show.line(text)
    return document
