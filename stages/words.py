"""Label words: their token ids, and their rows of a backbone's frozen output embedding, for the verbalizer head."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerBase

from stages.anatomy import Anatomy
from store.errors import Refused


def token_ids(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...]) -> list[int]:
    """The one token of each word, as it follows other text (behind a space) or else by itself.

    Raises Refused for a word of several tokens, one that is not in the vocabulary, and two words with the same token.
    """
    found: list[int] = []
    for word in words:
        spellings = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word)]
        single = next((ids[0] for ids in spellings if len(ids) == 1), None)
        if single is None:
            pieces = ", ".join(tokenizer.convert_ids_to_tokens(min(spellings, key=len)))
            raise Refused(f"label word {word!r} is {len(min(spellings, key=len))} tokens ({pieces}); {_CHOOSE}")
        if single == tokenizer.unk_token_id:
            raise Refused(f"label word {word!r} is not in the backbone's vocabulary; {_CHOOSE}")
        if single in found:
            raise Refused(f"label words {words[found.index(single)]!r} and {word!r} are the same token; {_CHOOSE}")
        found.append(single)
    return found


_CHOOSE = "choose words of one token each: WORDS=yes,no, or `words:` in the task file, in the order of the classes"


def rows(path: Path, anatomy: Anatomy, ids: list[int]) -> np.ndarray | None:
    """The rows of the frozen output embedding (K, D) float32, times the factor that the model puts before its logits.

    A model may scale its last state before the output embedding (T5 by D^-1/2 where the two embeddings are tied). Its bias and
    its soft cap on logits are left out: the verbalizer is h' · E[words]. None where the checkpoint has no output embedding,
    or where the model's logits are no such product.
    """
    auto = AutoModelForSeq2SeqLM if anatomy.kind == "encoder-decoder" else AutoModelForCausalLM
    opened: Any = auto.from_pretrained(
        path, config=anatomy.config, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
    )
    model, told = opened
    if told["missing_keys"]:
        return None
    if hasattr(model.config, "final_logit_softcapping"):
        model.config.final_logit_softcapping = None
    output = model.eval().get_output_embeddings()
    embedding = output.weight[ids].detach()  # (K, D)
    biases = [
        bias.detach().reshape(-1)[ids] for bias in (output.bias, getattr(model, "final_logits_bias", None)) if bias is not None
    ]
    sample = torch.arange(4, 10)[None]  # (1, 6)
    more = {"decoder_input_ids": torch.tensor([[anatomy.start]])} if anatomy.start is not None else {}
    with torch.inference_mode():
        out = model(input_ids=sample, **more, output_hidden_states=True)
    final = out.get("decoder_hidden_states", out.get("hidden_states"))[-1][0]  # (T, D): after the last norm
    own, plain = out.logits[0][:, ids] - sum(biases), final @ embedding.T  # (T, K)
    factor = float((own * plain).sum() / (plain * plain).sum())
    if not torch.allclose(own, factor * plain, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        return None
    found: np.ndarray = (embedding * float(f"{factor:.6g}")).numpy()
    return found
