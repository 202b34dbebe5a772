"""Many heads in one pass beside one after another: seconds, and what is kept for the gradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline import fitting
from pipeline.benches.timing import in_turn, median, ratio
from pipeline.config import Bench, Train
from pipeline.opening import check, open_caches, shape_of
from pipeline.show import Show, size
from stages.device import pick
from stages.loader import Loader
from stages.stack import stacks
from stages.train import Learner, train

EXAMPLES = 4096
"""of the train split, where LIMIT is left out"""
STEPS = 64
"""of a round"""


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
        if case.separate == 1:
            kept = [_kept(learners[:count], fit) for count in (1, case.heads)]
            ratios[f"activations{case.heads}_over_one"] = kept[1] / kept[0]
            rows.append({"bench": "activations", "heads": [1, case.heads], "bytes": kept})
            show.line(f"kept for the gradients of a step: {size(kept[0])} of one head, {size(kept[1])} of {case.heads}")
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


def _kept(learners: Sequence[Learner], fit: Loader) -> int:
    """Bytes that a step keeps from its losses to their gradients, beside the parameters."""
    ((_, stack),) = stacks([each.head for each in learners], [each.shape for each in learners], [0] * len(learners))
    own = {value.untyped_storage().data_ptr() for value in (stack.rows, stack.grads, *stack.buffers.values())}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            found[tensor.data_ptr()] = max(found.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
        return tensor

    batch = next(iter(fit.epoch(0, 1)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        stack.losses(batch, batch.labels[None])
    return sum(found.values())


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
