"""Fingerprints: the same inputs the same key, one changed byte another."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import save_bert

from pipeline import recipe
from pipeline.commands.plan import prepare
from pipeline.config import Extract, Plan
from pipeline.lookup import look
from stages import sources, tasks
from stages.anatomy import Anatomy, Stream
from store import catalog
from store.fingerprint import fingerprint

GOLDEN = "9debfa78013d"


def keys(bert, data, store, **more):
    config = Plan(task="sst2", backbone=str(bert), data=data, store=store, max_length=32, **more)
    return {split: part.fingerprint for split, part in prepare(config).parts.items()}


@pytest.fixture
def copies(tmp_path, bert, reviews):
    """The same backbone and data in another folder."""
    return shutil.copytree(bert, tmp_path / "else" / "tiny-bert"), shutil.copytree(reviews, tmp_path / "data")


def test_the_golden_recipe_has_its_golden_fingerprint():
    """A change here makes every cache of every team a miss: it must be meant."""
    checkpoint = sources.Checkpoint("b", None, "1" * 64, "2" * 64, "3" * 64, "5" * 64)
    known = recipe.known(Plan(task="rte", limit=5, layers="0-2"), tasks.find("rte"), "encoder", "train", "4" * 64, checkpoint)
    known["transformers"] = "5.0"
    anatomy = Anatomy("encoder", {"encoder": Stream("layers", 3, False)}, 16, 64, "sdpa", None)
    whole = recipe.complete(known, anatomy, "float32")
    assert whole == {
        "format": 1,
        "backbone": {"weights": "1" * 64, "config": "2" * 64, "kind": "encoder"},
        "states": ["embedding", "block.1", "block.2", "final"],
        "layers": "0,1,2",
        "tokenizer": {"files": "3" * 64, "truncation": "longest_first"},
        "max_length": 128,
        "data": {"digest": "4" * 64, "split": "train", "template": ["sentence1", "sentence2"]},
        "limit": 5,
        "order_seed": 0,
        "tokens": "mean",
        "compute": {"dtype": "float32", "attention": "sdpa"},
        "transformers": "5.0",
        "codec": "bf16",
        "batching": "longest first, at most 4096 padded tokens, none shorter than 3/4 of its batch's longest",
        "chunk_bytes": 16777216,
    }
    assert fingerprint(whole).startswith(GOLDEN)


CHECKPOINT = sources.Checkpoint("b", None, "1" * 64, "2" * 64, "3" * 64, "5" * 64)


def whole(task, anatomy, **more):
    config = Plan(task=task, **more)
    known = recipe.known(config, tasks.find(task), anatomy.kind, "train", "4" * 64, CHECKPOINT)
    return recipe.complete(known | {"transformers": "5.0"}, anatomy, "float32")


def test_the_recipes_of_the_other_kinds():
    """What a golden encoder's has not; a change here makes caches of these kinds a miss."""
    decoder = whole("rte", Anatomy("decoder", {"decoder": Stream("h", 2, True)}, 16, 64, "sdpa", None))
    assert decoder["states"] == ["embedding", "block.1", "block.2", "final"] and decoder["tokens"] == "last"
    assert decoder["data"]["template"] == "{sentence1}\nQuestion: {sentence2} True or False? Answer:"
    assert decoder["words"] == ["True", "False"] and decoder["tokenizer"]["truncation"] == "left"
    streams = {"encoder": Stream("e", 2, True), "decoder": Stream("d", 1, True)}
    joined = Anatomy("encoder-decoder", streams, 16, 64, "eager", None, start=0)
    both, alone = whole("rte", joined), whole("rte", joined, tokens="last")
    assert (both["tokens"], both["states"]) == ("all", ["embedding", "block.1", "block.2", "final"])
    assert both["decoder_states"] == alone["states"] == ["embedding", "block.1", "final"] and both["decoder_input"] == [0]
    assert "decoder_states" not in alone
    assert recipe.states(both) == {"encoder": both["states"], "decoder": both["decoder_states"]}
    assert recipe.states(alone) == {"decoder": alone["states"]}
    image = whole("digits", Anatomy("image", {"image": Stream("l", 1, True)}, 16, 17, "sdpa", None, None, (3, 16, 16), 1))
    assert image["processor"] == {"files": "5" * 64, "backend": "pil"} and image["image"] == {"pixels": [3, 16, 16], "prefix": 1}
    assert image["tokens"] == "first" and not {"tokenizer", "max_length", "words"} & set(image)
    found = [fingerprint(made)[:12] for made in (decoder, both, alone, image)]
    assert found == ["dd99ac8bba4c", "20ae21df25ad", "2e363e562383", "cdef7a86873d"]


def test_prompt_and_words_are_another_key():
    anatomy = Anatomy("decoder", {"decoder": Stream("h", 2, True)}, 16, 64, "sdpa", None)
    keys = {fingerprint(whole("rte", anatomy, **more)) for more in ({}, {"prompt": "{sentence1}"}, {"words": "yes,no"})}
    assert len(keys) == 3 and fingerprint(whole("rte", anatomy, words="True, False")) in keys


def test_another_folder_and_another_hash_seed_give_the_same_key(bert, reviews, tmp_path, copies):
    here = keys(bert, reviews, tmp_path / "s")
    assert keys(*copies, tmp_path / "s") == here
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; from test_recipe import keys;"
        f"print(*keys(Path({str(bert)!r}), Path({str(reviews)!r}), Path({str(tmp_path / 's')!r})).values())"
    )
    env = os.environ | {"PYTHONHASHSEED": "123"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.split() == list(here.values())


@pytest.mark.parametrize("victim", ["model.safetensors", "tokenizer.json", "config.json"])
def test_one_changed_byte_of_the_backbone_is_another_key(bert, reviews, tmp_path, copies, victim):
    path = copies[0] / victim
    if victim == "model.safetensors":
        data = path.read_bytes()
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    else:
        path.write_text(path.read_text() + " ")
    here, there = keys(bert, reviews, tmp_path / "s"), keys(*copies, tmp_path / "s")
    assert all(here[split] != there[split] for split in here)


def test_one_changed_byte_of_a_split_is_another_key_for_it_alone(bert, reviews, tmp_path, copies):
    path = copies[1] / "sst2" / "validation.jsonl"
    path.write_text(path.read_text().replace("good", "fine", 1))
    here, there = keys(bert, reviews, tmp_path / "s"), keys(*copies, tmp_path / "s")
    assert {split for split in here if here[split] != there[split]} == {"validation"}


def test_every_choice_that_changes_states_is_another_key_and_no_other(bert, reviews, tmp_path):
    seen = {keys(bert, reviews, tmp_path / "s")["train"]}
    for more in (
        {"tokens": "all"}, {"tokens": "first"}, {"codec": "fp32"}, {"layers": "1-3"}, {"limit": 10}, {"order_seed": 1},
    ):  # fmt: skip
        seen.add(keys(bert, reviews, tmp_path / "s", **more)["train"])
    assert len(seen) == 7
    for more in ({"seed": 5}, {"device": "cpu"}, {"layers": "0-3"}, {"layers": "3,2,1,0"}):
        assert keys(bert, reviews, tmp_path / "s", **more)["train"] in seen


def test_a_label_is_no_part_of_the_key(bert, tmp_path, reviews):
    """Two tasks on the same file share one cache, each reading its own label column."""
    shutil.copytree(reviews / "sst2", tmp_path / "files")
    found = []
    for name, label in (("one", "label"), ("two", "idx")):
        path = tmp_path / f"{name}.yaml"
        kind = "regression" if label == "idx" else "classification"
        path.write_text(
            f"files: {{train: files/train.jsonl, validation: files/validation.jsonl}}\n"
            f"text: sentence\nlabel: {label}\nkind: {kind}\n"
        )
        config = Plan(task=str(path), backbone=str(bert), store=tmp_path / "s", max_length=32)
        found.append({split: part.fingerprint for split, part in prepare(config).parts.items()})
    assert found[0] == found[1]


def test_what_is_known_without_the_backbone_agrees_with_the_whole(extracted):
    for item in catalog.listing(extracted):
        whole = item.recipe
        assert fingerprint(whole) == item.path.name
        task = tasks.find("sst2")
        config = Plan(task="sst2", tokens="all", max_length=32)
        split = whole["data"]["split"]
        assert catalog.agrees(whole, recipe.known(config, task, "encoder", split, None, None))
        other = recipe.known(config.model_copy(update={"tokens": "mean"}), task, "encoder", split, None, None)
        assert catalog.differences(whole, other) == ['tokens: "all", not "mean"']


def wanted(bert, reviews, store, **more):
    from pipeline.config import Train

    return Train(
        **{"task": "sst2", "backbone": str(bert), "data": reviews, "store": store, "tokens": "all", "max_length": 32} | more
    )


def test_stage_two_finds_the_cache_by_the_digests_of_the_files_at_hand(bert, reviews, extracted):
    found = look(wanted(bert, reviews, extracted), tasks.find("sst2"))
    assert set(found.caches) == {"train", "validation"} and found.unchecked == []


def test_a_stale_cache_is_never_served(tmp_path, bert, reviews, extracted, copies):
    path = copies[1] / "sst2" / "train.jsonl"
    path.write_text(path.read_text().replace("good", "fine", 1))
    found = look(wanted(bert, copies[1], extracted), tasks.find("sst2"))
    assert found.caches is None and "differs in data.digest" in found.near[0]
    found = look(wanted(save_bert(tmp_path / "tiny-bert", seed=1), reviews, extracted), tasks.find("sst2"))
    assert found.caches is None and "differs in backbone.weights" in found.near[0]


def test_where_files_are_gone_names_decide_and_the_run_says_so(extracted):
    found = look(wanted("/gone/tiny-bert", None, extracted), tasks.find("sst2"))
    assert set(found.caches) == {"train", "validation"}
    unchecked = [text.split(":")[0] for text in found.unchecked]
    assert unchecked == ["backbone /gone/tiny-bert", "train of sst2", "validation of sst2"]
    assert look(wanted("/gone/other-bert", None, extracted), tasks.find("sst2")).caches is None
    assert look(wanted("/gone/tiny-bert", None, extracted), tasks.find("rte")).caches is None


def test_each_split_is_compared_by_itself(tmp_path, bert, reviews):
    """Train's file is gone, validation's changed: the old validation cache is not served."""
    from pipeline.commands import extract
    from pipeline.show import Show

    shutil.copytree(reviews / "sst2", tmp_path / "files")
    path = tmp_path / "own.yaml"
    path.write_text("files: {train: files/train.jsonl, validation: files/validation.jsonl}\ntext: sentence\nlabel: label\n")
    said = {"task": str(path), "data": None}
    config = wanted(bert, reviews, tmp_path / "s", **said)
    extract.run(Extract.part_of(config, "train,validation"), Show(True))
    (tmp_path / "files" / "train.jsonl").unlink()
    found = look(config, tasks.find(str(path)))
    assert set(found.caches) == {"train", "validation"} and len(found.unchecked) == 1
    changed = tmp_path / "files" / "validation.jsonl"
    changed.write_text(changed.read_text().replace("good", "fine", 1))
    found = look(config, tasks.find(str(path)))
    assert found.caches is None and "differs in data.digest" in found.near[0]


def test_several_matches_are_listed_and_one_is_chosen_by_prefix(tmp_path, bert, reviews, own_store, copies):
    from pipeline.commands import extract
    from pipeline.show import Show
    from store import Refused

    path = copies[1] / "sst2" / "train.jsonl"
    path.write_text(path.read_text().replace("good", "fine", 1))
    other = Extract(task="sst2", backbone=str(bert), data=copies[1], store=own_store, tokens="all", max_length=32)
    made = extract.run(other, Show(True))["splits"]
    assert made["validation"]["hit"] and not made["train"]["hit"]
    blind = wanted("/gone/tiny-bert", None, own_store)
    with pytest.raises(Refused, match="several caches match task sst2; choose one with CACHE="):
        look(blind, tasks.find("sst2"))
    chosen = look(blind.model_copy(update={"cache": made["train"]["fingerprint"][:10]}), tasks.find("sst2"))
    assert chosen.caches["train"].name == made["train"]["fingerprint"]
    for prefix in ("zz", ""):
        with pytest.raises(Refused, match="CACHE=.* there are: "):
            look(blind.model_copy(update={"cache": prefix}), tasks.find("sst2"))
    with pytest.raises(Refused, match="does not serve task sst2"):  # a chosen cache that is stale is refused all the same
        look(wanted(bert, reviews, own_store, cache=made["train"]["fingerprint"][:10]), tasks.find("sst2"))
