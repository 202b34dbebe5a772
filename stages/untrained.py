"""A backbone of the same shape with random weights: what a READ reaches without anything that was learned before."""

import os
import secrets
import shutil
from pathlib import Path

import torch
from transformers import AutoModel

from stages.anatomy import read_config
from stages.sources import BESIDE_WEIGHTS, Checkpoint


def save(checkpoint: Checkpoint, root: Path) -> Path:
    """Write the untrained twin of a checkpoint under a root, once; returns its folder.

    Seed 0, transformers' own initialisation.
    """
    folder = root / f"untrained-{Path(checkpoint.name).name}-{checkpoint.config[:8]}"
    if folder.is_dir():
        return folder
    config, _ = read_config(checkpoint.path, checkpoint.name)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    beside = root / f".{secrets.token_hex(4)}"
    model.save_pretrained(beside)
    for name in BESIDE_WEIGHTS:
        if (checkpoint.path / name).is_file():
            shutil.copyfile(checkpoint.path / name, beside / name)
    try:
        os.rename(beside, folder)
    except OSError:
        shutil.rmtree(beside)  # another one was faster
    return folder
