"""Many heads in one pass beside one after another: seconds, and memory."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline import fitting
from pipeline.benches.timing import in_turn, median, ratio
from pipeline.config import Bench, Train
from pipeline.opening import check, open_caches, shape_of
from pipeline.show import Show, size
from stages.device import pick
from stages.loader import Loader
from stages.optimise import AdamW
from stages.stack import stacks
from stages.train import Learner, train

EXAMPLES = 4096
"""of the train split, where LIMIT is left out"""
STEPS = 64
"""of a round"""
MANY, NARROW = 32, 32
"""heads, and their width, whose memory is held against that of one"""


class Case(NamedTuple):
    """What is compared."""

    ratio: str
    tokens: str
    hidden: int
    heads: int
    separate: int
    """how many heads one after another it is held against"""


CASES = (
    Case("heads8_first_over_separate", "first", 256, 8, 8),
    Case("heads32_over_one", "first", 32, 32, 1),
    Case("heads8_all_over_separate", "all", 64, 8, 8),
)


def heads(config: Bench, show: Show) -> dict[str, Any]:
    """An epoch of so many steps, loading and the choosing part included; each head with a seed and a learning rate of its own."""
    task, rows, ratios = config.tasks("mnli")[0], [], {}
    for case in CASES:
        own = config.training(task, tokens=case.tokens, hidden=case.hidden, limit=config.limit or EXAMPLES, epochs=1)
        fit, choose, learners = _learners(own, case.heads, show)

        def together(learners: Sequence[Learner] = learners, fit: Loader = fit, choose: Loader = choose) -> None:
            train(learners, fit, choose, config.seed)
            _finished(fit.device)

        def separately(count: int = case.separate, run: Callable[..., None] = together, learners: Any = learners) -> None:
            for learner in learners[:count]:
                run([learner])

        seconds = in_turn({"together": together, "separately": separately}, config.repeats)
        ratios[case.ratio] = ratio(seconds["together"], seconds["separately"])
        rows.append(
            {"bench": "heads", "ratio": case.ratio, "task": task, "tokens": case.tokens, "cell": own.cell, "hidden": case.hidden,
             "heads": case.heads, "separate": case.separate, "steps": STEPS, "seconds": median(seconds["together"]),
             "seconds_separate": median(seconds["separately"]), "rounds": seconds}
        )  # fmt: skip
        show.line(
            f"{case.heads} heads ({own.cell} {case.hidden}, TOKENS={case.tokens}): {rows[-1]['seconds']:.2f} s in one pass, "
            f"{rows[-1]['seconds_separate']:.2f} s for {case.separate} one after another"
        )
    if Path("/proc/self/clear_refs").exists():
        beyond = [_apart(_beyond, config, task, count) for count in (1, MANY)]
        ratios[f"memory{MANY}_over_one"] = beyond[1] / beyond[0]
        rows.append({"bench": "heads_memory", "heads": [1, MANY], "bytes": beyond})
        show.line(f"beyond parameters, gradients and moments, all tokens, gru {NARROW}: {size(beyond[0])} of one head, "
                  f"{size(beyond[1])} of {MANY}")  # fmt: skip
    else:
        show.line("the most memory of a step cannot be told on this system")
    return {"rows": rows, "ratios": ratios}


def _learners(config: Train, count: int, show: Show) -> tuple[Loader, Loader, list[Learner]]:
    opened = open_caches(config, check(config), show)
    shape = shape_of(config, opened.task, opened.recipe, opened.caches[opened.task.train].width)
    loaded = fitting.loaders(config, opened, config.seed, list(shape.states), pick(config.device))
    some = loaded.fit.examples[: STEPS * config.batch]
    fit = Loader(
        loaded.fit.cache, some, loaded.fit.labels, config.batch, loaded.fit.device, loaded.fit.streams, loaded.fit.access
    )
    learners = []
    for seed in range(count):
        own = config.model_copy(update={"lr": config.lr * (0.5 + seed / count)})
        learners.append(fitting.learner(own, opened, shape, None, fit, seed))
    return fit, loaded.choose, learners


def _beyond(config: Bench, task: str, heads: int) -> int:
    """The most that a process grows by in its first steps, beside parameters, gradients and moments, in bytes."""
    own = config.training(task, tokens="all", hidden=NARROW, limit=config.limit or EXAMPLES, epochs=1, device="cpu")
    fit, _, learners = _learners(own, heads, Show(to_stderr=True))
    (_, small), *_ = stacks([learners[0].head], [learners[0].shape], [0])
    batches = [batch for batch, _ in zip(fit.epoch(own.seed, 1), range(4), strict=False)]
    few = batches[0]
    one = few._replace(rows=few.rows[:1], example=few.example[:1], start=few.start[:1], labels=few.labels[:1])
    small.backward(small.losses(one, one.labels[None]))  # what a process takes once, for its libraries
    ((_, stack),) = stacks([each.head for each in learners], [each.shape for each in learners], [0] * heads)
    optimiser = AdamW(stack, [0.01] * heads, [1.0] * heads)
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most begins anew
    for batch in batches:
        stack.backward(stack.losses(batch, batch.labels[None]))
        optimiser.step([own.lr] * heads)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    """A line of /proc/self/status, in bytes."""
    return next(int(s.split()[1]) * 1024 for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(name))


def _apart(function: Callable[..., int], *arguments: Any) -> int:
    """What a function says in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
