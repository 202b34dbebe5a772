"""The loader beside other ways to read the same random examples, from a warm cache: stored bytes a second."""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import store
from pipeline.benches.peers import PEERS, Read
from pipeline.benches.timing import in_turn, median
from pipeline.commands import extract
from pipeline.config import Bench, Extract
from pipeline.show import Show
from stages.access import Access
from stages.device import pick
from stages.loader import Loader
from store.errors import Refused
from store.order import windows

EXAMPLES = 8192
"""of the train split, a seeded sample, where LIMIT is left out"""
SECONDS = 2.0
"""of a round, at most: a peer that is slower reads fewer batches"""


def read(config: Bench, show: Show) -> dict[str, Any]:
    """Random batches of B examples with all their tokens: what each gives is rows as stored, in a tensor on the CPU."""
    check(config)
    cache = _cache(config, show)
    batches = _batches(cache, config.batch)
    left_out = {"annbatch": "not compared: it loads AnnData by blocks, not any examples at random, and needs Python 3.12"}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=config.store.home) as folder:
        ways: dict[str, Callable[[], object]] = {
            f"loader, {how}": _loader(cache, config.batch, how, config.reading.readers) for how in ("random", "windows")
        }
        ways["loader, one reader"] = _loader(cache, config.batch, "random", 1)  # peers but TensorStore have one thread too
        bytes_of = dict.fromkeys(ways, _bytes(cache, batches))
        for name, peer in PEERS.items():
            place = Path(folder) / name
            place.mkdir()
            try:
                one = peer(cache, place)
            except ModuleNotFoundError as error:
                left_out[name] = f"{error.name} is not installed: pip install readcache[bench]"
                continue
            _same(cache, one, batches[0], name)
            alone = in_turn({name: lambda one=one: one(batches[-1])}, 1)[name][0]  # type: ignore[misc]
            some = batches[: max(1, min(len(batches), int(SECONDS / alone)))]
            bytes_of[name], ways[name] = _bytes(cache, some), _all(one, some)
        seconds = in_turn(ways, config.repeats)
    speed = {name: [bytes_of[name] / spent / 1e9 for spent in told] for name, told in seconds.items()}
    rows: list[dict[str, Any]] = [
        {"bench": "read", "way": name, "gigabytes_a_second": median(told), "rounds": told} for name, told in speed.items()
    ]
    each = _bytes(cache, batches) / len(batches) / 1e6
    show.line(f"{len(batches)} random batches of {config.batch}, {each:.1f} MB each; medians of {config.repeats} rounds")
    show.table(["way", "GB/s", "loader ÷ it"], [[r["way"], r["gigabytes_a_second"], _over(speed, r["way"])] for r in rows])
    for name, why in left_out.items():
        show.line(f"without {name}: {why}")
    return {"rows": rows, "ratios": _ratios(speed), "left_out": left_out}


def check(config: Bench) -> None:
    """Refuse a codec whose states are not one array as it is."""
    if config.codec not in ("fp32", "bf16"):
        raise Refused(f"bench read: peers read one array as it is, and CODEC={config.codec} is more; give CODEC=bf16 or fp32")


def _ratios(speed: dict[str, list[float]]) -> dict[str, float]:
    """Of the peers with several ways the fastest counts."""
    over = {name: _over(speed, name) for name in speed if name in PEERS}
    arrow = [value for name, value in over.items() if name.startswith("hf_datasets")]
    others = [value for name, value in over.items() if name != "memmap"]
    named = {f"loader_over_{name}": value for name, value in over.items() if not name.startswith("hf_datasets")}
    named |= {"loader_over_hf_datasets": min(arrow)} if arrow else {}
    return named | ({"loader_over_best_other": min(others)} if others else {})


def _over(speed: dict[str, list[float]], name: str) -> float:
    """The loader's speed ÷ another's, the median over rounds."""
    return statistics.median(a / b for a, b in zip(speed["loader, random"], speed[name], strict=True))


def _cache(config: Bench, show: Show) -> store.Cache:
    said = {name: getattr(config, name) for name in Extract.model_fields if hasattr(config, name)}
    changes = {"task": config.tasks("sst2")[0], "tokens": "all", "splits": "train", "limit": config.limit or EXAMPLES}
    made = extract.run(Extract(**said | changes), show)["splits"]["train"]
    cache = store.open(config.store.home / "caches" / made["fingerprint"])
    if len(cache.stored(cache.main)) > 1:
        raise Refused(f"bench read: peers read one array, and a cache of {config.backbone} has its attention too; choose another")
    cache.check()  # now, not while it is timed
    return cache


def _batches(cache: store.Cache, size: int) -> list[np.ndarray]:
    (order,) = windows(cache.chunk_of, np.arange(len(cache.length)), cache.chunks, 0, 1)
    return [order[begin : begin + size] for begin in range(0, len(order), size)]


def _loader(cache: store.Cache, batch: int, how: Any, readers: int) -> Callable[[], None]:
    """An epoch of the loader up to where rows would be decoded on the device."""
    loader = Loader(cache, np.arange(len(cache.length)), cache.length, batch, pick("cpu"), access=Access(how, readers=readers))

    def epoch() -> None:
        seen = 0
        for part in loader.stored(0, 1):
            seen += len(part.examples)
        assert seen == len(cache.length)

    return epoch


def _all(one: Read, batches: list[np.ndarray]) -> Callable[[], None]:
    def go() -> None:
        for batch in batches:
            one(batch)

    return go


def _bytes(cache: store.Cache, batches: list[np.ndarray]) -> int:
    """Of all rows of some batches as they are stored, in bytes."""
    (array,) = cache.stored(cache.main).values()
    row = int(np.prod(array.chunks[1:])) * np.dtype(array.dtype).itemsize
    return row * sum(int(cache.length[batch].sum()) for batch in batches)


def _same(cache: store.Cache, one: Read, batch: np.ndarray, name: str) -> None:
    expected = cache.gather(batch, cache.main)["values"]
    found = one(batch).numpy()
    assert found.tobytes() == expected.tobytes(), name
