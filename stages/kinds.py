"""The four kinds of backbone as data: what each reads, which streams it gives, which token rules make sense. No torch."""

from typing import Literal, NamedTuple

from store.errors import Refused


class Kind(NamedTuple):
    """One kind."""

    examples: str
    reads: Literal["text", "image"]
    streams: tuple[str, ...]
    """what its hidden states are called; the head reads the last"""
    tokens: dict[str, tuple[str, ...]]
    """token rule -> poolings that make sense of its rows; of both the first is the default"""
    speaks: bool
    """whether it has an output embedding: texts then go into the task's prompt, and label words can be its answer"""
    standardise: bool = False
    """whether a head reads the states in units of their spread where nobody says"""


KINDS: dict[str, Kind] = {
    "encoder": Kind(
        "BERT, RoBERTa, DistilBERT, ALBERT, ELECTRA, DeBERTa, ModernBERT, MPNet, …",
        "text",
        ("encoder",),
        {
            "mean": ("mean",),
            "all": ("attention", "mean", "first", "last"),
            "first": ("first",),
            "last": ("last",),
            "first+mean": ("attention", "mean", "first"),
        },
        speaks=False,
    ),
    # the first token of a causal model has seen nothing but itself
    "decoder": Kind(
        "GPT-2, GPT-NeoX, Llama, Mistral, Qwen, Gemma, OPT, RWKV, …",
        "text",
        ("decoder",),
        {"last": ("last",), "mean": ("mean",), "all": ("last", "attention", "mean")},
        speaks=True,
    ),
    # the decoder is given its start token only: one row, which all poolings are; `last` keeps that row alone
    "encoder-decoder": Kind(
        "T5, BART, mBART, …", "text", ("encoder", "decoder"), {"all": ("last",), "last": ("last",)}, speaks=True
    ),
    "image": Kind(
        "ViT, DeiT, DINOv2, BEiT, CLIP's and SigLIP's vision tower, …",
        "image",
        ("image",),
        {
            "first": ("first",),
            "mean": ("mean",),
            "all": ("attention", "mean", "first"),
            "first+mean": ("attention", "mean", "first"),
        },
        speaks=False,
        standardise=True,  # measured on held-out training data: images gain by it, texts do not
    ),
}
"""name -> kind"""


def tokens_of(kind: str, rule: str | None) -> str:
    """The token rule for a kind, or its default. Raises Refused with those that the kind allows."""
    check_rule(rule)
    allowed = KINDS[kind].tokens
    if rule is not None and rule not in allowed:
        why = ": its first token has seen nothing of the text" if kind == "decoder" and rule.startswith("first") else ""
        raise Refused(f"tokens={rule} does not go with {article(kind)} backbone{why}; it allows {', '.join(allowed)}")
    return rule or next(iter(allowed))


def check_rule(rule: str | None) -> None:
    """Refuse a token rule that no kind has, with those that there are."""
    known = dict.fromkeys(name for kind in KINDS.values() for name in kind.tokens)
    if rule is not None and rule not in known:
        raise Refused(f"unknown token rule {rule!r}; known: {', '.join(known)}")


def pool_of(kind: str, rule: str, pool: str | None) -> str:
    """The pooling for a token rule, or its default. Raises Refused with those that the rule allows."""
    allowed = KINDS[kind].tokens[rule]
    if pool is not None and pool not in allowed:
        raise Refused(f"pool {pool!r} does not go with tokens={rule} of {article(kind)} backbone; it allows {', '.join(allowed)}")
    return pool or allowed[0]


def article(kind: str) -> str:
    """For messages: an encoder, a decoder."""
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def main_stream(kind: str, rule: str) -> str:
    """The stream whose tokens the rule is about."""
    return KINDS[kind].streams[0 if rule == "all" else -1]
