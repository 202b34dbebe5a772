"""Tables that the README shows, measured here and now."""

import os
import platform
from collections.abc import Callable
from importlib import import_module, metadata
from typing import Any

import torch

from pipeline.config import Bench
from pipeline.show import Show
from stages.device import pick
from store.errors import Refused

SPEED = ("extract", "read", "train", "heads", "codec")
"""what `all` measures"""
QUALITY = ("glue", "recipes")
OTHER = ("store",)


def run(config: Bench, show: Show) -> dict[str, Any]:
    """The command `bench`."""
    if config.what not in ("all", *SPEED, *QUALITY, *OTHER):
        raise Refused(f"unknown bench {config.what!r}; known: {', '.join(('all', *SPEED, *QUALITY, *OTHER))}")
    if config.what == "all":
        import_module("pipeline.benches.read").check(config)  # now, not after the benches before it
    about = machine(config.device)
    show.line("  ".join(f"{name}: {value}" for name, value in about.items()))
    document: dict[str, Any] = {"machine": about, "rows": [], "ratios": {}}
    for name in SPEED if config.what == "all" else [config.what]:
        # a peer's library is loaded only where it is measured
        module = import_module(f"pipeline.benches.{'quality' if name in QUALITY else name}")
        measure: Callable[[Bench, Show], dict[str, Any]] = getattr(module, name)
        found = measure(config, show)
        document["rows"] += found.pop("rows")
        document["ratios"] |= found.pop("ratios", {})
        document |= found
    if document["ratios"]:
        show.table(["ratio", "", "target"], [[name, value, TARGETS.get(name, "")] for name, value in document["ratios"].items()])
    return document


TARGETS = {
    "extract_over_forward": "≤ 1.10", "extract_mean_over_forward": "≤ 1.03", "loader_over_memmap": "≥ 0.8",
    "loader_over_zarr": "≥ 5", "loader_over_tensorstore": "≥ 2", "loader_over_hf_datasets": "≥ 2",
    "loader_over_best_other": "≥ 1", "step_over_in_memory": "≤ 1.05", "int8_over_bf16_bytes": "≤ 0.51",
    "int4_over_bf16_bytes": "≤ 0.27", "loss_points_bf16": "≤ 0.1", "loss_points_int8": "≤ 0.3", "loss_points_int4": "≤ 1.0",
    "anon_memory_8x": "≤ 1.05", "heads8_first_over_separate": "≤ 0.35", "heads32_over_one": "≤ 4",
    "heads8_all_over_separate": "≤ 0.6", "memory32_over_one": "≤ 32",
}  # fmt: skip
"""what is aimed at, on an idle CPU machine of two cores"""


def machine(device: str) -> dict[str, Any]:
    """Where it is measured."""
    picked = pick(device)
    return {
        "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(picked) if picked.type == "cuda" else picked.type, "system": platform.system(),
        "python": platform.python_version(), **{name: metadata.version(name) for name in ("torch", "numpy", "zarr")},
    }  # fmt: skip


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.processor() or platform.machine()
