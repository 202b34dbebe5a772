"""Stage two: a step with loading beside the same step on tensors in memory, and what memory a larger cache takes."""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import store
from pipeline import fitting
from pipeline.benches.timing import in_turn, median, ratio
from pipeline.commands import extract
from pipeline.config import Bench, Extract, Train
from pipeline.opening import Opened, check, open_caches, shape_of
from pipeline.show import Show, size
from stages.access import Access
from stages.device import pick
from stages.heads import Batch, Head
from stages.loader import Loader
from stages.optimise import AdamW
from stages.stack import Stack
from store.errors import Refused

EXAMPLES = 4096
"""of the train split, where LIMIT is left out; and 8 times as many"""
STEPS = 64
"""that are timed in a round"""
TICK = 0.002
"""between two looks at a process's memory, in seconds"""


def train(config: Bench, show: Show) -> dict[str, Any]:
    """READ with the settings that are asked for, on all tokens."""
    step, rows = _step(config, show)
    memory, more = _memory(config, show)
    return {"rows": [*rows, *more], "ratios": {"step_over_in_memory": step} | memory}


def _step(config: Bench, show: Show) -> tuple[float, list[dict[str, Any]]]:
    task, device = config.tasks("sst2")[0], pick(config.device)
    own = config.training(task, tokens="all", limit=config.limit or EXAMPLES)
    opened = open_caches(own, check(own), show)
    cache, labels = opened.caches[opened.task.train], opened.labels[opened.task.train]
    examples = np.flatnonzero(labels >= 0 if labels.dtype.kind == "i" else np.isfinite(labels))
    loaders = {
        how: Loader(cache, examples, labels, own.batch, device, access=Access(how, readers=own.reading.readers))
        for how in ("random", "windows")
    }
    # the very batches that the loader gives, read and decoded before any clock runs
    kept = [batch for batch, _ in zip(loaders["random"].epoch(own.seed, 1), range(STEPS), strict=False)]
    ways: dict[str, Callable[[], Iterable[Batch]]] = {"in memory": lambda: kept}
    ways |= {how: lambda loader=loader: loader.epoch(own.seed, 1) for how, loader in loaders.items()}  # type: ignore[misc]
    stack = Stack([_head(own, opened, loaders["random"])], [own.seed])
    optimiser = AdamW(stack, [own.schedule.weight_decay], [own.schedule.clip])

    def steps(batches: Callable[[], Iterable[Batch]]) -> Callable[[], None]:
        def go() -> None:
            for batch, _ in zip(batches(), range(len(kept)), strict=False):
                stack.backward(stack.losses(batch, batch.labels[None]))
                optimiser.step([own.lr])
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return go

    seconds = in_turn({how: steps(batches) for how, batches in ways.items()}, config.repeats)
    over = {how: ratio(spent, seconds["in memory"]) for how, spent in seconds.items()}
    show.line(f"{len(kept)} steps of {own.batch} examples of {task}, all tokens; READ({own.cell} {own.hidden})")
    show.table(
        ["batches come", "milliseconds a step", "÷ in memory"],
        [[how, 1000 * median(spent) / len(kept), over[how]] for how, spent in seconds.items()],
    )
    rows = [{"bench": "train", "way": how, "milliseconds": 1000 * median(spent) / len(kept), "rounds": spent, "ratio": over[how]}
            for how, spent in seconds.items()]  # fmt: skip
    return over["random"], rows


def _head(config: Train, opened: Opened, loader: Loader) -> Head:
    shape = shape_of(config, opened.task, opened.recipe, loader.cache.width)
    return fitting.fresh(opened, shape, None, loader, config.seed)


def _memory(config: Bench, show: Show) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The most anonymous memory of `readcache train` on a cache and on one that is 8 times as large, neither kept in memory."""
    if not Path("/proc/self/status").is_file():
        show.line("anonymous memory cannot be told apart on this system")
        return {}, []
    task, limit = config.tasks("sst2")[0], config.limit or EXAMPLES
    rows: list[dict[str, Any]] = []
    for how in ("random", "windows"):
        most_there = _examples(config, task, 8 * limit, show)
        for count in (most_there // 8, most_there):
            own = config.training(task, tokens="all", limit=count)
            made = extract.run(Extract.part_of(own, "train,validation"), show)["splits"]["train"]
            cache = store.open(own.store.home / "caches" / made["fingerprint"])
            most = _most_anonymous(own, how)
            rows.append(
                {
                    "bench": "memory",
                    "access": how,
                    "examples": len(cache.length),
                    "cache_bytes": made["bytes"],
                    "anonymous_bytes": most,
                }
            )
            show.line(f"{how}: cache of {size(made['bytes'])}, at most {size(most)} of anonymous memory")
    found = {how: [row["anonymous_bytes"] for row in rows if row["access"] == how] for how in ("random", "windows")}
    over = {how: larger / smaller for how, (smaller, larger) in found.items()}
    return {"anon_memory_8x": over["random"], "anon_memory_8x_windows": over["windows"]}, rows


def _examples(config: Bench, task: str, limit: int, show: Show) -> int:
    """How many training examples there are, at most `limit`: what is 8 times as large must be so in truth."""
    made = extract.run(Extract.part_of(config.training(task, tokens="all", limit=limit), "train,validation"), show)
    count = int(made["splits"]["train"]["examples"])
    if count < 8:
        raise Refused(f"bench train: task {task} has {count} training examples, and 8 are the least")
    return count


def _most_anonymous(config: Train, how: str) -> int:
    """Run `readcache train` for one epoch; the most that it held beside files, RssAnon and RssShmem, in bytes."""
    # windows that are smaller than the smaller cache, so that both are read by several
    reading = {"access": how, "memory_bytes": 0, "window_bytes": 32 << 20}
    said = config.model_dump(mode="json", exclude_none=True) | {"hidden": 16, "epochs": 1, "no_extract": True, "reading": reading}
    said.pop("dask", None)
    most = 0
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(tempfile.NamedTemporaryFile("w", suffix=".yaml"))
        json.dump(said, file)  # which is YAML too
        file.flush()
        told = stack.enter_context(tempfile.TemporaryFile())
        command = [sys.executable, "-m", "pipeline", "train", "--json", "--config", file.name]
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=told))
        while process.poll() is None:
            with contextlib.suppress(OSError):  # it may be gone by now
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                most = max(most, sum(int(s.split()[1]) * 1024 for s in status if s.startswith(("RssAnon", "RssShmem"))))
            time.sleep(TICK)
        told.seek(0)
        if process.returncode:
            raise RuntimeError(told.read().decode()[-2000:])
    return most
