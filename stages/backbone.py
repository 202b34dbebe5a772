"""Load one frozen backbone and capture its hidden states with hooks.

The tuple that transformers returns for output_hidden_states replaces the raw last output by the normed one; hooks on the
blocks give both.
"""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModel

from stages.anatomy import Anatomy, first
from store.errors import Refused


class Captured(NamedTuple):
    """One forward pass."""

    states: dict[str, list[Tensor]]
    """stream -> S tensors (B, T, D)"""
    mask: dict[str, Tensor]
    """stream -> (B, T) bool: which positions are real"""
    attention: Tensor | None
    """of an encoder-decoder: (B, T, L) how much of each encoder token the decoder's row takes at each of its blocks,
    averaged over attention heads"""


def _close(one: Tensor, two: Tensor) -> bool:
    """Equal but for rounding in another order."""
    return one.shape == two.shape and bool((one - two).abs().max() <= 1e-4 * one.abs().max())


def _to_the_left(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padding to the right: models count positions from the first column, not from the first real token."""
    if "attention_mask" not in inputs:
        return inputs
    mask = inputs["attention_mask"]  # (B, T)
    order = mask.argsort(dim=1, descending=True, stable=True)
    return {name: value.gather(1, order) if value.shape == mask.shape else value for name, value in inputs.items()}


def _needless(model: nn.Module, weight: str) -> bool:
    """Whether a weight may be missing: no state comes from a pooler, and sinusoids are computed (Marian leaves them out)."""
    return "pooler" in weight or "Sinusoidal" in type(model.get_submodule(weight.rpartition(".")[0])).__name__


class Backbone:
    """A frozen transformer on a device."""

    def __init__(self, path: Path, anatomy: Anatomy, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        """Load the weights. Eval mode, no gradients, never remote code. Raises Refused where weights are missing."""
        try:
            model, told = AutoModel.from_pretrained(
                path,
                config=anatomy.config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=anatomy.attention,
                output_loading_info=True,
            )
        except Exception as error:  # torch, safetensors and transformers have each their own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise Refused(f"backbone {path}: its weights do not load into its config.json ({reason}); get it again") from None
        missing = sorted(name for name in told["missing_keys"] if not _needless(model, name))
        if missing:
            raise Refused(
                f"backbone {path}: {len(missing)} of its weights are not in the checkpoint ({', '.join(missing[:3])}, …): "
                f"they would be random; choose a checkpoint of {anatomy.config.model_type}"
            )
        self.anatomy = anatomy
        self.device = device
        self._one_at_a_time = threading.Lock()
        self.model = model.eval().requires_grad_(False).to(device)
        self._check(path)

    def _check(self, path: Path) -> None:
        """See on a few inputs that the states are what they are called, and that a batch changes no example.

        Raises Refused for a model where hooks on its blocks do not see its hidden states (XLM), or that mixes padding in
        whatever the mask (FNet).
        """
        if self.anatomy.kind == "image":
            seeded = torch.Generator().manual_seed(0)
            assert self.anatomy.pixels
            whole = {"pixel_values": torch.rand(2, *self.anatomy.pixels, generator=seeded)}
            short = {name: value[:1] for name, value in whole.items()}
            padded, kept = whole, (slice(0, 1), slice(None))
        else:
            pad = self.model.config.pad_token_id or 0
            ids = torch.tensor([[token for token in range(5, 12) if token != pad][:6]])  # (1, 6)
            mask = (torch.arange(6) < 3).long()[None]
            whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            short = {name: value[:, :3] for name, value in whole.items()}
            beside = {"input_ids": ids.where(mask.bool(), pad), "attention_mask": mask}
            padded = {name: torch.cat([value, whole[name]]) for name, value in beside.items()}  # (2, 6)
            kept = (slice(0, 1), slice(0, 3))
        names = self.anatomy.states("all", "all")
        seen = self.hidden_states(whole, names).states
        for stream, own in self._own(whole).items():
            depth, blocks = self.anatomy.streams[stream].depth, self.anatomy.streams[stream].blocks
            # theirs are h_0 … h_{L-1} and the last, normed where a norm follows; RWKV's are h_1 … h_L and the normed
            aligned = [all(map(_close, ours[:depth], own)) for ours in (seen[stream], seen[stream][1:])]
            if len(own) != depth + 1 or not any(aligned):
                raise Refused(f"backbone {path}: the outputs of its {blocks} are not its hidden states; choose another")
        alone, among = (self.hidden_states(batch, names).states for batch in (short, padded))
        if not all(_close(one, two[kept]) for stream in alone for one, two in zip(alone[stream], among[stream], strict=True)):
            what = "a batch changes its images" if self.anatomy.kind == "image" else "padding or a batch reaches its real tokens"
            raise Refused(f"backbone {path}: {what}; choose another")

    def _own(self, inputs: dict[str, Tensor]) -> dict[str, tuple[Tensor, ...]]:
        """The hidden states that the model itself reports, by stream."""
        with torch.inference_mode():
            out = self.model(**self.arguments(inputs, False), output_hidden_states=True)
        if self.anatomy.kind == "encoder-decoder":
            return {"encoder": out.encoder_hidden_states or (), "decoder": out.decoder_hidden_states or ()}
        return {next(iter(self.anatomy.streams)): out.hidden_states or ()}

    def arguments(self, inputs: dict[str, Tensor], attentions: bool) -> dict[str, Any]:
        """The arguments of one pass: inputs on the device; a decoder begins with its start token, and keeps no cache."""
        there = {name: value.to(self.device, non_blocking=True) for name, value in inputs.items()}
        moved: dict[str, Any] = dict(_to_the_left(there))
        if self.anatomy.start is not None:
            start = moved["input_ids"].new_full((len(moved["input_ids"]), 1), self.anatomy.start)  # (B, 1)
            moved |= {"decoder_input_ids": start, "output_attentions": attentions}
        return moved | ({"use_cache": False} if "decoder" in self.anatomy.streams else {})

    def hidden_states(self, inputs: dict[str, Tensor], states: dict[str, list[str]]) -> Captured:
        """One forward pass: of each stream the states that are named, padding to the right.

        inputs: input_ids and attention_mask (B, T), padded on either side, token_type_ids where the tokenizer gives them; or
        pixel_values (B, channels, height, width); on any device.
        """
        both = "encoder" in states and "decoder" in states
        arguments = self.arguments(inputs, both)
        # hooks belong to the module, not to the caller: one pass at a time, also where a worker has several threads
        with self._one_at_a_time, torch.inference_mode(), ExitStack() as hooks:
            seen = {stream: hooks.enter_context(self._captured(stream)) for stream in states}
            out = self.model(**arguments)
        found = {}
        for stream, names in states.items():
            assert len(seen[stream]) == self.anatomy.streams[stream].depth + 1, len(seen[stream])
            last = out.encoder_last_hidden_state if stream != list(self.anatomy.streams)[-1] else out.last_hidden_state
            by_name = {"embedding": seen[stream][0], "final": last}
            by_name |= {f"block.{number}": state for number, state in enumerate(seen[stream]) if number}
            found[stream] = [by_name[name] for name in names]
        attention = None
        if both:
            kept = [int(name.removeprefix("block.")) - 1 for name in states["decoder"] if name.startswith("block.")]
            with torch.inference_mode():
                attention = torch.stack([out.cross_attentions[block].mean(1)[:, 0] for block in kept], 2)  # (B, T, L)
        return Captured(found, self._masks(found, arguments), attention)

    def _masks(self, found: dict[str, list[Tensor]], arguments: dict[str, Any]) -> dict[str, Tensor]:
        masks = {}
        for stream, (state, *_) in found.items():
            given = stream == next(iter(self.anatomy.streams)) and "attention_mask" in arguments
            masks[stream] = arguments["attention_mask"].bool() if given else state.new_ones(state.shape[:2], dtype=torch.bool)
        return masks

    @contextmanager
    def _captured(self, stream: str) -> Iterator[list[Tensor]]:
        """h_0 … h_L of the forward pass made inside. Shared blocks (ALBERT) run many times, each run is a depth."""
        seen: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not seen:
                seen.append(args[0] if args else kwargs["hidden_states"])

        def after(_module: nn.Module, _args: tuple[Any, ...], out: Any) -> None:
            seen.append(first(out))

        hooks = []
        blocks = self.model.get_submodule(self.anatomy.streams[stream].blocks)
        assert isinstance(blocks, nn.ModuleList)
        for block in blocks:
            hooks += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()
