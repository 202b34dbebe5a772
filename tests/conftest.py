"""Toy backbones and toy data: small, random, seeded; no network, no GPU."""

import json
import os
import shutil
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="readcache-tests-")  # neither read nor write the user's own

import pytest
import torch
from hypothesis import HealthCheck, settings

# a busy machine is slow, not wrong
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

TEXT = "good bad fine awful great dull film plot actor scene the a of and is was very not quite never"
WORDS = TEXT.split()
GLUE = Path(__file__).parents[2] / "shared" / "data" / "glue"


def save_tokenizer(folder: Path, longest: int = 64) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        model_max_length=longest, model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def save_bert(folder: Path, seed: int = 0, **more) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=30, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, **more,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """A random BERT, 3 blocks of width 16, with a tokenizer of 24 words."""
    return save_bert(tmp_path_factory.mktemp("backbones") / "tiny-bert")


def sentence(number: int) -> tuple[str, int]:
    """A toy review whose label its words give away, 3 to 12 words long."""
    label = number * 7 % 2
    words = [WORDS[(number * 5 + i * 3) % 12 + 6] for i in range(2 + number % 10)]
    words.insert(number % len(words), ["bad", "good"][label])
    return " ".join(words), label


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    """A DATA folder: sst2 with 120 + 40 + 12 unlabelled rows, rte and stsb as pairs."""
    folder = tmp_path_factory.mktemp("data")
    for split, begin, count in (("train", 0, 120), ("validation", 200, 40), ("test", 300, 12)):
        rows = [sentence(n) for n in range(begin, begin + count)]
        write_rows(
            folder / "sst2" / f"{split}.jsonl",
            [{"sentence": text, "label": -1 if split == "test" else y, "idx": n} for n, (text, y) in enumerate(rows)],
        )
        if split != "test":
            pairs = [{"sentence1": text, "sentence2": sentence(y + 7)[0], "idx": n} for n, (text, y) in enumerate(rows)]
            for task, scale in (("rte", 1), ("stsb", 2.5)):
                write_rows(
                    folder / task / f"{split}.jsonl",
                    [pair | {"label": rows[n][1] * scale} for n, pair in enumerate(pairs)],
                )
    return folder


@pytest.fixture(scope="session")
def extracted(tmp_path_factory, bert, reviews) -> Path:
    """A store with sst2 extracted, all tokens; to be read, not written: copy it with `own_store`."""
    from pipeline.commands import extract
    from pipeline.config import Extract
    from pipeline.show import Show

    store = tmp_path_factory.mktemp("extracted")
    extract.run(Extract(task="sst2", backbone=str(bert), data=reviews, store=store, tokens="all", max_length=32), Show(True))
    return store


@pytest.fixture
def own_store(tmp_path, extracted) -> Path:
    """A copy of `extracted` that a test may harm."""
    return Path(shutil.copytree(extracted, tmp_path / "store"))
