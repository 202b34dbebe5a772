"""Load one frozen backbone and capture its hidden states with hooks.

Captured: the input of the first block (`embedding`, h_0), each block's raw output (`block.1` … `block.L`), and the
model's last hidden state where it is not the last block's own output (`final`: a norm follows, as in pre-norm models).
The tuple that transformers returns for output_hidden_states replaces the raw last output by the normed one.
"""

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel

from stages import depths
from store.errors import Refused

KINDS = {"encoder": "BERT, RoBERTa, DistilBERT, ALBERT, ELECTRA, DeBERTa, ModernBERT, MPNet, …"}
"""kind of backbone -> examples; decoder, encoder-decoder and image are yet to come"""

transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Anatomy:
    """What a backbone gives, known from its config alone, before its weights are loaded."""

    kind: str
    """`encoder`"""
    depth: int
    """L: how many blocks"""
    width: int
    """D"""
    blocks: str
    """the name of the module list that holds the blocks"""
    final: bool
    """whether the last hidden state differs from the last block's output"""
    longest: int
    """tokens that its positions allow"""
    attention: str
    """the attention implementation that transformers chooses"""


def _kind(config: PretrainedConfig, name: str) -> str:
    models = transformers.models.auto.modeling_auto
    if config.is_encoder_decoder:
        kind = "an encoder-decoder"
    elif type(config) in models.MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return "encoder"
    elif type(config) in models.MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = "a decoder"
    elif hasattr(config, "image_size") or hasattr(config, "vision_config"):
        kind = "an image model"
    else:
        kind = "of a kind that is not known"
    raise Refused(f"backbone {name} ({config.model_type}) is {kind}; this version takes encoders: {KINDS['encoder']}")


def describe(path: Path, name: str) -> Anatomy:
    """What the backbone in a folder gives, from its config. Raises Refused for one that does not fit."""
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise Refused(f"backbone {name}: transformers cannot read {path}: {str(error).splitlines()[0]}") from None
    kind = _kind(config, name)
    depth = int(config.num_hidden_layers)
    # shapes alone suffice (`meta`); a few models look at the values of their inputs and need real memory
    for device, masked in (("meta", False), ("meta", True), ("cpu", True)):
        with torch.device(device), torch.random.fork_rng([]):
            model = AutoModel.from_config(config).eval()  # type: ignore[no-untyped-call]
            ids = torch.ones(1, 4, dtype=torch.long)
        try:
            blocks, final, width = _trace(model, ids, torch.ones_like(ids) if masked else None, depth)
            break
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
    else:
        raise Refused(f"backbone {name} ({config.model_type}) does not run on plain input_ids: {reason}")
    if not blocks:
        raise Refused(
            f"backbone {name} ({config.model_type}): its blocks were not found; sought a ModuleList whose members run "
            f"{depth} times (num_hidden_layers) and give (batch, tokens, width)"
        )
    attention = config._attn_implementation or "eager"
    return Anatomy(kind, depth, width, blocks, final, _longest(model, config), attention)


def _longest(model: PreTrainedModel, config: PretrainedConfig) -> int:
    longest = int(getattr(config, "max_position_embeddings", 0) or 1 << 30)
    for name, module in model.named_modules():
        # RoBERTa's positions begin behind the padding index
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            longest -= module.padding_idx + 1
    return longest


def _trace(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, depth: int) -> tuple[str, bool, int]:
    """Run once and see which module list holds the blocks: its name, whether a norm follows, D."""
    calls: list[tuple[str, Any]] = []
    hooks = [
        child.register_forward_hook(lambda _m, _a, out, name=name: calls.append((name, _tensor(out))))  # type: ignore[misc]
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for child in module
    ]
    try:
        with torch.inference_mode():
            last = model(input_ids=ids, **({} if mask is None else {"attention_mask": mask})).last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    shaped = Counter(name for name, out in calls if isinstance(out, Tensor) and out.shape == last.shape)
    blocks = min((name for name, count in shaped.items() if count == depth), key=len, default="")
    outputs = [out for name, out in calls if name == blocks]
    return blocks, bool(outputs) and outputs[-1] is not last, int(last.shape[-1])


def _tensor(out: Any) -> Any:
    return out[0] if isinstance(out, tuple) else out


def _close(one: Tensor, two: Tensor) -> bool:
    """Equal but for rounding in another order."""
    return bool((one - two).abs().max() <= 1e-4 * one.abs().max())


class Backbone:
    """A frozen transformer on a device."""

    def __init__(self, path: Path, anatomy: Anatomy, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Load the weights. Eval mode, no gradients, never remote code."""
        model = AutoModel.from_pretrained(
            path, dtype=dtype, use_safetensors=True, trust_remote_code=False, attn_implementation=anatomy.attention
        )
        self.anatomy = anatomy
        self.device = device
        self._one_at_a_time = threading.Lock()
        self.model = model.eval().requires_grad_(False).to(device)
        self._check(path)

    def _check(self, path: Path) -> None:
        """See on a few tokens that the states are what they are called, and that padding does not reach real tokens.

        Raises Refused for a model where hooks on its blocks do not see its hidden states (XLM), or that mixes padding in
        whatever the mask (FNet).
        """
        pad = self.model.config.pad_token_id or 0
        ids = torch.tensor([[token for token in range(5, 12) if token != pad][:6]])  # (1, 6)
        names = depths.names("all", self.anatomy.depth, self.anatomy.final)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        seen = self.hidden_states(whole, names)["encoder"]
        with torch.inference_mode():
            own = self.model(**{k: v.to(self.device) for k, v in whole.items()}, output_hidden_states=True).hidden_states
        # the last of theirs is normed where a norm follows
        if (
            own is None
            or len(own) != self.anatomy.depth + 1
            or any(not _close(one, two) for one, two in zip(seen[: self.anatomy.depth], own, strict=False))
        ):
            raise Refused(f"backbone {path}: the outputs of its {self.anatomy.blocks} are not its hidden states; choose another")
        short = {name: value[:, :3] for name, value in whole.items()}
        padded = {"input_ids": ids.where(torch.arange(6) < 3, pad), "attention_mask": (torch.arange(6) < 3).long()[None]}
        alone, beside = (self.hidden_states(batch, names)["encoder"] for batch in (short, padded))
        if not all(_close(one, two[:, :3]) for one, two in zip(alone, beside, strict=True)):
            raise Refused(f"backbone {path}: padding reaches its real tokens in spite of the mask; choose another")

    def hidden_states(self, inputs: dict[str, Tensor], states: list[str]) -> dict[str, list[Tensor]]:
        """One forward pass: {stream: S tensors (B, T, D)}, those named.

        inputs: input_ids and attention_mask (B, T), token_type_ids where the tokenizer gives them; on any device.
        """
        moved = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
        # hooks belong to the module, not to the caller: one pass at a time, also where a worker has several threads
        with self._one_at_a_time, torch.inference_mode(), self._captured() as seen:
            last = self.model(**moved).last_hidden_state
        assert len(seen) == self.anatomy.depth + 1, len(seen)
        by_name = {"embedding": seen[0], "final": last}
        by_name |= {f"block.{number}": state for number, state in enumerate(seen) if number}
        return {"encoder": [by_name[name] for name in states]}

    @contextmanager
    def _captured(self) -> Iterator[list[Tensor]]:
        """h_0 … h_L of the forward pass made inside. Shared blocks (ALBERT) run many times, each run is a depth."""
        seen: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not seen:
                seen.append(args[0] if args else kwargs["hidden_states"])

        def after(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
            seen.append(_tensor(out))

        hooks = []
        blocks = self.model.get_submodule(self.anatomy.blocks)
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            hooks += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
