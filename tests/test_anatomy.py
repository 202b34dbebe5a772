"""What a backbone gives, from its config alone; and what is refused by it."""

import families
import pytest
import transformers
from families import BOTH, SMALL

from stages import depths
from stages.anatomy import describe, read_config
from stages.kinds import KINDS, pool_of, tokens_of
from store import Refused


@pytest.mark.parametrize("kind", KINDS)
def test_at_least_three_architectures_a_kind(kind):
    assert len(families.CONFIGS[kind]) >= 3


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
        (transformers.WhisperConfig(), "of no kind that is known; known: encoder .BERT"),
        (transformers.SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[2, 2, 2], window_size=2),
         "its blocks were not found; sought for the image stream a ModuleList whose members run"),
        (transformers.T5Config(**families.T5), "has no decoder_start_token_id"),
    ],
)  # fmt: skip
def test_what_cannot_be_captured_is_refused_by_name(tmp_path, config, said):
    config.save_pretrained(tmp_path)
    with pytest.raises(Refused, match=said):
        describe(tmp_path, "tiny", (3, 16, 16))


def test_positions_limit_the_length(tmp_path):
    for name, config, longest in (
        ("bert", transformers.BertConfig(**SMALL), 512),
        # 66 positions, the first behind the padding index 0
        ("roberta", transformers.RobertaConfig(**SMALL, pad_token_id=0, max_position_embeddings=66), 65),
        ("bart", transformers.BartConfig(**BOTH), 64),
    ):
        config.save_pretrained(tmp_path / name)
        assert describe(tmp_path / name, name).longest == longest


def test_the_kind_is_the_configs_not_the_users(tmp_path):
    for name, kind in families.KINDS_OF.items():
        families.CONFIGS[kind][name].save_pretrained(tmp_path / name)
        assert read_config(tmp_path / name, name)[1] == kind


def test_token_rules_and_poolings_are_those_of_the_kind():
    assert [tokens_of(kind, None) for kind in KINDS] == ["mean", "last", "all", "first"]
    with pytest.raises(Refused, match="tokens=first does not go with a decoder backbone: its first token has seen nothing"):
        tokens_of("decoder", "first")
    with pytest.raises(Refused, match="tokens=mean does not go with an encoder-decoder backbone; it allows all, last"):
        tokens_of("encoder-decoder", "mean")
    assert pool_of("encoder", "all", None) == "attention" and pool_of("decoder", "all", None) == "last"
    with pytest.raises(Refused, match="pool 'attention' does not go with tokens=first of an encoder backbone; it allows first"):
        pool_of("encoder", "first", "attention")
