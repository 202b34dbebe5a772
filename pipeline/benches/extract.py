"""Stage one beside the bare forward pass over the same batches."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipeline.benches.timing import in_turn, median, ratio
from pipeline.commands import extract as command
from pipeline.commands.plan import check_disk, prepare
from pipeline.config import Bench, Extract
from pipeline.show import Show
from stages import batching
from stages.backbone import Backbone
from stages.device import pick

EXAMPLES = 4096
"""of the train split, a seeded sample, where LIMIT is left out: its chunks are as large as those of the whole"""


def extract(config: Bench, show: Show) -> dict[str, Any]:
    """All tokens and their mean: from token ids that are there to a published cache, and from texts to it."""
    rows: list[dict[str, Any]] = []
    ratios: dict[str, float] = {}
    for rule, name in (("all", "extract_over_forward"), ("mean", "extract_mean_over_forward")):
        row, found = _measured(config, rule, show)
        rows.append(row)
        ratios |= {name: found, f"{name}_with_tokenising": row["with_tokenising"]}
    show.table(
        ["tokens", "examples", "batches", "forward s", "extract s", "whole command s", "extract ÷ forward", "whole ÷ forward"],
        [[r["tokens"], r["examples"], r["batches"], *(f"{r[n]:.2f}" for n in ("forward", "extract", "whole")), r["ratio"],
          r["with_tokenising"]] for r in rows],
    )  # fmt: skip
    return {"rows": rows, "ratios": ratios}


def _measured(config: Bench, rule: str, show: Show) -> tuple[dict[str, Any], float]:
    config.store.home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir=config.store.home) as folder:  # on the disk that would be used
        said = {name: getattr(config, name) for name in Extract.model_fields if hasattr(config, name)}
        changes = {"task": config.tasks("sst2")[0], "tokens": rule, "splits": "train", "limit": config.limit or EXAMPLES}
        asked = Extract(**said | changes | {"store": Path(folder), "dask": None})
        planned = prepare(asked)
        check_disk(asked.store, planned.parts)
        build = planned.parts["train"].build
        assert build is not None
        backbone = Backbone(planned.checkpoint.path, planned.anatomy, pick(config.device))
        first = build.placement.first
        inputs = [
            backbone.arguments(build.examples.collate(group + begin), attentions=False)
            for begin, end in zip(first[:-1].tolist(), first[1:].tolist(), strict=True)
            for group in batching.by_length(build.examples.lengths[begin:end])
        ]

        def forward() -> None:
            with torch.inference_mode():
                for batch in inputs:
                    backbone.model(**batch)
            if backbone.device.type == "cuda":
                torch.cuda.synchronize(backbone.device)

        def clear() -> None:
            shutil.rmtree(asked.store.home / "caches")

        def publish() -> Callable[[], None]:
            command.publish_split(asked, planned, "train", planned.parts["train"], backbone, Show(to_stderr=True))
            return clear

        def whole() -> Callable[[], None]:
            again = prepare(asked)
            command.publish_split(asked, again, "train", again.parts["train"], backbone, Show(to_stderr=True))
            return clear

        seconds = in_turn({"forward": forward, "extract": publish, "whole": whole}, config.repeats)
    found = ratio(seconds["extract"], seconds["forward"])
    show.line(f"{rule}: {', '.join(f'{name} {median(spent):.2f} s' for name, spent in seconds.items())}")
    return {
        "bench": "extract", "tokens": rule, "examples": len(build.examples.source), "batches": len(inputs),
        **{name: median(spent) for name, spent in seconds.items()}, "rounds": seconds, "ratio": found,
        "with_tokenising": ratio(seconds["whole"], seconds["forward"]),
    }, found  # fmt: skip
