"""How long a store of ten thousand caches takes to be looked through: listed anew and again, collected, asked for one."""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.benches.timing import in_turn, median
from pipeline.commands import catalog as catalog_command
from pipeline.commands import du as du_command
from pipeline.commands import gc as gc_command
from pipeline.config import Bench, Catalog
from pipeline.show import Show
from pipeline.upkeep import Du, Gc
from store import catalog, files, manifest, pins
from store.files import Receipt
from store.manifest import Manifest
from store.stores import Stores

CACHES = 10_000
CHUNKS = 24
"""of each, so that its manifest is of a usual size"""


def store(config: Bench, show: Show) -> dict[str, Any]:
    """Seconds of each, in a store of caches that have a manifest and nothing else: none of these reads more."""
    config.store.home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=config.store.home) as folder:
        root = Path(folder)
        with show.progress("writing manifests", CACHES, "caches") as meter:
            names = [_cache(root, number, meter) for number in range(CACHES)]
        for name in names[:100]:
            pins.pin(root, name, "paper")
        stores, quiet = Stores((root,)), Show(to_stderr=True)
        quiet.console.quiet = True

        def forgotten() -> list[Any]:
            for memo in files.remembered("listings").glob("*.jsonl"):
                if memo.stat().st_size > 1 << 20:
                    memo.unlink()
            return list(catalog.listing(root))

        ways: dict[str, Callable[[], object]] = {
            "listing, nothing remembered": forgotten,
            "listing": lambda: list(catalog.listing(root)),
            "one by the start of its name": lambda: stores.pick(names[7][:16]) and None,
            "catalog": lambda: catalog_command.run(Catalog(store=stores), quiet) and None,
            "du": lambda: du_command.run(Du(store=stores), quiet) and None,
            "gc, dry run": lambda: gc_command.run(Gc(store=stores), quiet) and None,
        }
        seconds = in_turn(ways, config.repeats)
    rows = [{"bench": "store", "way": way, "caches": CACHES, "seconds": median(spent)} for way, spent in seconds.items()]
    show.table(["of 10,000 caches", "seconds"], [[row["way"], row["seconds"]] for row in rows])
    return {"rows": rows}


def _cache(root: Path, number: int, meter: Any) -> str:
    states = ["embedding", *(f"block.{block}" for block in range(1, 13))]
    recipe = {
        "codec": "bf16", "tokens": "mean", "layers": "all", "format": 1, "chunk_bytes": 16 << 20, "max_length": 128,
        "limit": None, "order_seed": number, "states": states,
        "backbone": {"weights": hashlib.sha256(b"w").hexdigest(), "config": hashlib.sha256(b"c").hexdigest()},
        "data": {"split": "train", "digest": hashlib.sha256(str(number).encode()).hexdigest(), "template": ["sentence"]},
    }  # fmt: skip
    digests = [hashlib.sha256(bytes([chunk])).hexdigest() for chunk in range(CHUNKS)]
    objects = {f"encoder/values/c.{chunk}.0.0": Receipt(16 << 20, digest) for chunk, digest in enumerate(digests)}
    about = {"task": "sst2", "split": "train", "backbone": "bert", "versions": {"torch": "2.13"}}
    made = Manifest(recipe, about, {"examples": 1000, "rows": 1000, "tokens": 9, "width": 768}, objects)
    folder = root / "caches" / made.fingerprint
    files.put(folder / manifest.NAME, manifest.dump(made), sync=False)
    meter.add(1)
    return made.fingerprint
