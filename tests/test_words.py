"""Label words: one token each, and the rows that give the model's own logits."""

import families
import pytest
import torch
import transformers

from stages import sources, texts, words
from store import Refused


@pytest.fixture(scope="module")
def tokenizer(bert):
    return texts.tokenizer(sources.checkpoint(str(bert), local=True))


def test_a_word_is_one_token_of_the_vocabulary(tokenizer):
    assert words.token_ids(tokenizer, ("good", "bad")) == [4, 5]
    for asked, said in (
        (("good", "quite never"), r"'quite never' is 2 tokens \(quite, never\); choose words of one token each: WORDS=yes,no"),
        (("good", "terrific"), "'terrific' is not in the backbone's vocabulary"),
        (("good", "good"), "'good' and 'good' are the same token"),
    ):
        with pytest.raises(Refused, match=said):
            words.token_ids(tokenizer, asked)


@pytest.mark.parametrize("name", families.SPEAKING)
def test_the_final_state_times_the_rows_is_the_models_own_logits(tmp_path, name):
    path = families.save(name, tmp_path)
    backbone, _ = families.opened(path)
    rows = torch.from_numpy(words.rows(path, backbone.anatomy, [7, 9, 11]))
    model = families.SPEAKING[name].from_pretrained(path).eval()
    batch = families.examples(path, name).collate(torch.arange(5).numpy())
    stream = list(backbone.anatomy.streams)[-1]
    final = backbone.hidden_states(batch, {stream: [backbone.anatomy.states("all", "all")[stream][-1]]}).states[stream][0]
    with torch.inference_mode():
        own = model(**backbone.arguments(batch, False)).logits[:, :, [7, 9, 11]]
    if name == "gptj":
        own = own - model.lm_head.bias[[7, 9, 11]]  # h' times E[words] has none
    if name == "gemma2":
        own = 30 * torch.atanh(own / 30)  # nor a soft cap
    torch.testing.assert_close(final @ rows.T, own, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_without_an_output_embedding_has_no_rows(tmp_path):
    config = families.CONFIGS["decoder"]["llama"]
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    backbone, _ = families.opened(tmp_path)
    assert words.rows(tmp_path, backbone.anatomy, [7]) is None
