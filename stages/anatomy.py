"""What a backbone gives, known from its config alone, before its weights are loaded.

Captured of each stream: the input of the first block (`embedding`, h_0), each block's raw output (`block.1` … `block.L`),
and the stream's last hidden state where it is not the last block's own output (`final`: a norm follows, as in pre-norm
models).
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from stages import depths
from stages.kinds import KINDS
from store.errors import Refused

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]

MOST_BEFORE = 16
"""tokens before an image's patches: class, distillation, registers"""


class Stream(NamedTuple):
    """One run of blocks."""

    blocks: str
    """the name of the module list that holds them"""
    depth: int
    """L: how many"""
    final: bool
    """whether the last hidden state differs from the last block's output"""


@dataclass(frozen=True)
class Anatomy:
    """What a backbone gives."""

    kind: str
    streams: dict[str, Stream]
    width: int
    """D"""
    longest: int
    """tokens that its positions allow; of an image: its tokens"""
    attention: str
    """the attention implementation: transformers' choice; eager where attention probabilities are read"""
    config: PretrainedConfig
    """of the part that is used"""
    start: int | None = None
    """of an encoder-decoder: the token that its decoder begins with"""
    pixels: tuple[int, ...] | None = None
    """of an image: (channels, height, width) that its processor gives"""
    prefix: int = 0
    """of an image: the tokens before its patches (class, distillation, registers)"""

    def states(self, layers: str, tokens: str) -> dict[str, list[str]]:
        """The states kept of each stream that the token rule keeps. Raises Refused for a depth that is not there."""
        kept = list(self.streams) if tokens == "all" else list(self.streams)[-1:]
        return {name: depths.names(layers, self.streams[name].depth, self.streams[name].final) for name in kept}


def read_config(path: Path, name: str) -> tuple[PretrainedConfig, str]:
    """The config of a backbone, and its kind. Raises Refused for a kind that is not known."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise Refused(f"backbone {name}: transformers cannot read {path}: {str(error).splitlines()[0]}") from None
    models = transformers.models.auto.modeling_auto
    if type(config) in models.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING and hasattr(config, "vision_config"):
        config = config.vision_config  # of a text tower and a vision tower
    kinds = {
        # Whisper and the like read sound
        "encoder-decoder": config.is_encoder_decoder and type(config) in models.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        "encoder": type(config) in models.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False),
        "decoder": type(config) in models.MODEL_FOR_CAUSAL_LM_MAPPING and not config.is_encoder_decoder,
        "image": hasattr(config, "image_size") and hasattr(config, "patch_size"),
    }
    for kind, holds in kinds.items():
        if holds:
            # RWKV halves its states every few blocks, for fp16's sake: without that they are what they are called
            if hasattr(config, "rescale_every"):
                config.rescale_every = 0
            return config, kind
    known = "; ".join(f"{kind} ({about.examples})" for kind, about in KINDS.items())
    raise Refused(f"backbone {name} ({config.model_type}) is of no kind that is known; known: {known}")


def describe(path: Path, name: str, pixels: tuple[int, ...] | None = None) -> Anatomy:
    """What the backbone in a folder gives, from its config. Raises Refused for one that does not fit.

    pixels: (channels, height, width) that an image processor gives; only for an image backbone.
    """
    config, kind = read_config(path, name)
    attention = "eager" if kind == "encoder-decoder" else None
    start = getattr(config, "decoder_start_token_id", None) if kind == "encoder-decoder" else None
    if kind == "encoder-decoder" and start is None:
        raise Refused(f"backbone {name}: its config.json has no decoder_start_token_id; add the one it was trained with")
    # shapes alone suffice (`meta`); a few models look at the values of their inputs and need real memory
    for device, masked in (("meta", False), ("meta", True), ("cpu", True)):
        try:
            with torch.device(device), torch.random.fork_rng([]):
                model = AutoModel.from_config(config, attn_implementation=attention).eval()  # type: ignore[no-untyped-call]
                calls, last = _trace(model, _example(kind, masked, start, pixels))
            break
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    else:
        plain = "images" if kind == "image" else "plain input_ids"
        raise Refused(f"backbone {name} ({config.model_type}) does not run on {plain}: {reason}")
    streams = {
        stream: _stream(calls, last[stream], _depth(config, kind, stream), f"{name} ({config.model_type})", stream)
        for stream in KINDS[kind].streams
    }
    widths = {int(state.shape[-1]) for state in last.values()}
    if len(widths) > 1:
        raise Refused(f"backbone {name} ({config.model_type}): its streams have widths {sorted(widths)}, READ needs one")
    tokens = int(last[KINDS[kind].streams[0]].shape[1])
    chosen = attention or config._attn_implementation or "eager"
    longest = tokens if kind == "image" else _longest(model, config)
    prefix = tokens - _patches(config, pixels) if kind == "image" and pixels else 0
    if not 0 <= prefix <= MOST_BEFORE:
        raise Refused(
            f"backbone {name} ({config.model_type}) gives {tokens} tokens for {tokens - prefix} patches, which are no "
            f"patches behind a class token and a few registers; choose another"
        )
    return Anatomy(kind, streams, widths.pop(), longest, chosen, config, start, pixels, prefix)


def _depth(config: PretrainedConfig, kind: str, stream: str) -> int:
    names = ["num_hidden_layers"]
    if (kind, stream) == ("encoder-decoder", "decoder"):
        names = ["num_decoder_layers", "decoder_layers", *names]  # T5's, BART's
    return next(int(getattr(config, name)) for name in names if getattr(config, name, None))


def _example(kind: str, masked: bool, start: int | None, pixels: tuple[int, ...] | None) -> dict[str, Tensor]:
    """Inputs of one short example."""
    if kind == "image":
        assert pixels
        return {"pixel_values": torch.zeros(1, *pixels)}
    ids = torch.ones(1, 4, dtype=torch.long)
    mask = {"attention_mask": torch.ones_like(ids)} if masked else {}
    return {"input_ids": ids} | mask | ({"decoder_input_ids": torch.tensor([[start]])} if kind == "encoder-decoder" else {})


def _trace(model: PreTrainedModel, example: dict[str, Tensor]) -> tuple[list[tuple[str, Any]], dict[str, Tensor]]:
    """Run once: what the members of each module list gave, in order, and the last hidden state of each stream."""
    calls: list[tuple[str, Any]] = []
    hooks = [
        child.register_forward_hook(lambda _m, _a, out, name=name: calls.append((name, first(out))))  # type: ignore[misc]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for child in module
    ]
    try:
        with torch.inference_mode():
            out = model(**example)
    finally:
        for hook in hooks:
            hook.remove()
    last = out.last_hidden_state
    return calls, {"encoder": out.get("encoder_last_hidden_state", last), "decoder": last, "image": last}


def _stream(calls: list[tuple[str, Any]], last: Tensor, depth: int, name: str, stream: str) -> Stream:
    """See which module list holds a stream's blocks, and whether a norm follows them."""
    shaped = Counter(name for name, out in calls if isinstance(out, Tensor) and out.shape == last.shape)
    # in an encoder-decoder both streams may have the same shape: a list then says by its name whose it is
    named = {n: c for n, c in shaped.items() if n.startswith(stream)} or shaped
    blocks = min((name for name, count in named.items() if count == depth), key=len, default="")
    if not blocks:
        raise Refused(
            f"backbone {name}: its blocks were not found; sought for the {stream} stream a ModuleList whose members run {depth} "
            f"times (the layers its config names) and give what its last hidden state is, {tuple(last.shape)}"
        )
    outputs = [out for called, out in calls if called == blocks]
    return Stream(blocks, depth, outputs[-1] is not last)


def _patches(config: PretrainedConfig, pixels: tuple[int, ...]) -> int:
    size = config.patch_size
    high, wide = size if isinstance(size, (tuple, list)) else (size, size)
    return int(pixels[1] // high) * int(pixels[2] // wide)


def _longest(model: PreTrainedModel, config: PretrainedConfig) -> int:
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    for name, module in model.named_modules():
        # RoBERTa's positions begin behind the padding index
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            longest -= module.padding_idx + 1
    return longest


def first(out: Any) -> Any:
    """A block's hidden states, whatever else it returns."""
    return out[0] if isinstance(out, tuple) else out
