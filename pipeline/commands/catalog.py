"""Caches and runs under STORE."""

from typing import Any

from pipeline import runs
from pipeline.config import Catalog
from pipeline.runs import Run
from pipeline.show import Show, size
from store import pins
from store.errors import Damaged
from store.stores import root_of


def run(config: Catalog, show: Show) -> dict[str, Any]:
    """The command `catalog`."""
    config.store.check()
    document: dict[str, Any] = {"caches": [], "runs": [], "damaged": []}
    for saved in runs.listing(config.store.home):
        if isinstance(saved, Damaged):
            document["damaged"].append(str(saved))
            continue
        try:
            document["runs"].append(_row(saved))
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            document["damaged"].append(f"run {saved.path}: run.json lacks something ({error!r}); train again")
    best: dict[str, float] = {}
    for saved_run in document["runs"]:
        for fingerprint in saved_run["fingerprints"].values():
            best[fingerprint] = max(saved_run["score"], best.get(fingerprint, saved_run["score"]))
    pinned = {name: names for root in reversed(config.store.roots) for name, names in pins.pinned(root).items()}
    for found in config.store.listing():
        if isinstance(found, Damaged):
            document["damaged"].append(str(found))
            continue
        about, counts, recipe, fingerprint = found.about, found.counts, found.recipe, found.fingerprint
        document["caches"].append(
            {"fingerprint": fingerprint, "task": about["task"], "split": about["split"], "backbone": about["backbone"],
             "tokens": recipe["tokens"], "layers": recipe["layers"], "codec": recipe["codec"], "examples": counts["examples"],
             "rows": counts["rows"], "bytes": found.bytes, "best_score": best.get(fingerprint), "store": str(root_of(found.path)),
             "pins": pinned.get(fingerprint, [])}
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


def _row(saved: Run) -> dict[str, Any]:
    told = saved.told
    split, values = next(iter(told["metrics"].items()))
    metric, value = next(iter(values.items()))
    return {
        "run": saved.path.name, "task": str(told["task"]), "split": split, "metric": metric, "score": float(value),
        "linear_probe": float(told["linear_probe"][split][metric]), "trainable_parameters": int(told["trainable_parameters"]),
        "fingerprints": told["fingerprints"],
    }  # fmt: skip
