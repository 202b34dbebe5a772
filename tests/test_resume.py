"""Training that is killed goes on, and ends in the weights that it would have had."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_commands import FAST, call, said  # noqa: F401

import pipeline
from pipeline import resume, runs
from pipeline.resume import Resume
from stages.standing import Standing
from store import files, leases
from store.objects import Folder

ROOT = Path(pipeline.__file__).parents[1]

DOOMED = """
import os, signal, sys
import pipeline.__main__ as cli
from pipeline import resume
from stages.loader import Loader

resume.SECONDS = 0
epoch = Loader.epoch

def doomed(self, seed, number):
    for count, batch in enumerate(epoch(self, seed, number)):
        if (number, count) == (4, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

Loader.epoch = doomed
cli.main(sys.argv[1:])
"""

VARIANTS = {
    "one head": {},
    "several": {"seeds": 3},
    "several of which some stop early": {"seeds": 4, "set": "schedule.patience=1"},
    "all tokens, read by windows": {"tokens": "all", "set": "reading.access=windows"},
}


def weights(store, document):
    runs = document.get("runs", [document])
    folders = [store / "runs" / "sst2" / run["run"] for run in runs]
    curves = [[json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()] for folder in folders]
    scores = [[{name: line[name] for name in ("epoch", "loss", "choose")} for line in curve] for curve in curves]
    return [(folder / "read_model.safetensors").read_bytes() for folder in folders], scores


@pytest.mark.parametrize("variant", VARIANTS)
def test_training_that_was_killed_in_an_epoch_goes_on_to_the_same_weights(capfd, said, tmp_path, variant):  # noqa: F811
    said |= {"epochs": 6, "hidden": 8, "lr": 0.01, "batch": 16} | VARIANTS[variant]
    undisturbed = weights(said["store"], call(capfd, "train", **said))
    argv = [word for name, value in said.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run(
        [sys.executable, "-c", DOOMED, "train", *argv], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == -9, done.stderr
    assert len(list((said["store"] / "training").iterdir())) == 1
    assert len(list((said["store"] / "runs" / "sst2").glob("[!.]*"))) == len(undisturbed[0])
    from stages.loader import Loader

    epochs, original = [], Loader.epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loader, "epoch", lambda self, seed, epoch: epochs.append(epoch) or original(self, seed, epoch))
        again = weights(said["store"], call(capfd, "train", **said))
    assert min(epochs) == 4, "epochs that were kept are not trained again"
    assert again == undisturbed
    assert list((said["store"] / "training").iterdir()) == []


@pytest.mark.parametrize("harm", ["truncated", "flipped", "a bit of a number", "empty", "other"])
def test_what_was_kept_and_is_torn_is_not_believed(tmp_path, harm):
    import torch

    kept = Resume(tmp_path, "key", print)
    kept.save(Standing({"epoch": 3}, {"a": torch.ones(3)}))
    assert kept.load().numbers == {"epoch": 3}
    data = kept.path.read_bytes()
    kept.path.write_bytes(
        {
            "truncated": data[:-1],
            "flipped": b"\xff" + data[1:],
            "a bit of a number": data[:-1] + b"\x01",
            "empty": b"",
            "other": b"{}",
        }[harm]
    )
    assert kept.load() is None


def test_a_full_disk_does_not_end_a_training_that_could_not_be_kept(capfd, said, monkeypatch):  # noqa: F811
    write = files.write

    def full(path, data):
        if path.parent.name == "training":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    undisturbed = weights(said["store"], call(capfd, "train", **said, **FAST))
    monkeypatch.setattr(resume, "SECONDS", 0)
    monkeypatch.setattr(files, "write", full)
    assert weights(said["store"], call(capfd, "train", **said, **FAST)) == undisturbed


def test_caches_are_held_until_the_run_that_needs_them_is_saved(capfd, said, monkeypatch):  # noqa: F811
    held, save = [], runs.save

    def saves(*arguments):
        held.append(leases.held(said["store"], Folder(said["store"]).now()))
        return save(*arguments)

    monkeypatch.setattr(runs, "save", saves)
    trained = call(capfd, "train", **said, **FAST)
    assert set(trained["fingerprints"].values()) == held[0].keys()
    assert leases.held(said["store"], Folder(said["store"]).now()) == {}
