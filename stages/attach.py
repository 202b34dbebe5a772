"""READ in the loop: a head on a live backbone, for inference and as the yardstick of what is trained from a cache."""

import torch
from torch import Tensor, nn

from stages.backbone import Backbone
from stages.extract import rows
from stages.heads import Batch, Head
from stages.packing import unpack
from store.errors import Refused


class Attached(nn.Module):
    """A frozen backbone with a head on it. Its parameters are the head's alone: no gradient enters the backbone."""

    def __init__(self, backbone: Backbone, head: Head, states: dict[str, list[str]], tokens: str, codec: str) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head
        self.states, self.tokens, self.codec = states, tokens, codec

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        """Logits (B, K), or predictions (B, 1), of a padded batch as the tokenizer or the image processor gives it."""
        return self.head(self.batch(inputs))  # type: ignore[no-any-return]

    def loss(self, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The head's loss on labels (B,)."""
        return self.head.loss(self.batch(inputs)._replace(labels=labels.to(self.backbone.device)))

    def batch(self, inputs: dict[str, Tensor]) -> Batch:
        """What a cache would give of these inputs: states selected, stored and read again.

        Raises Refused where a state is NaN or infinite.
        """
        kept = rows(self.backbone, inputs, self.states, self.tokens, self.codec)
        if not kept.finite:
            raise Refused("a state of these inputs is not finite: the backbone overflows on them")
        streams = {
            stream: unpack(
                {path.split("/")[1]: v for path, v in kept.arrays.items() if path.startswith(f"{stream}/")},
                self.codec,
                self.backbone.anatomy.width,
            )
            for stream in self.states
        }
        lengths = next(iter(kept.lengths.values()))  # (B,)
        number = torch.arange(len(lengths), device=lengths.device)
        return Batch(
            rows=next(iter(streams.values())),
            example=number.repeat_interleave(lengths),
            start=lengths.cumsum(0) - lengths,
            labels=torch.full_like(number, -1),
            place=number.cpu(),
            decoder=streams["decoder"] if len(streams) > 1 else None,
            attention=kept.attention,
        )


def attach(backbone: Backbone, head: Head, states: dict[str, list[str]], tokens: str, codec: str = "fp32") -> Attached:
    """Put a head on a live backbone.

    states: of each stream those that the head was built for (`Shape.states`). tokens: the token rule. codec: what states go
    through on their way, so that a head meets in use what it met in training; fp32 leaves them as they are.
    """
    return Attached(backbone, head, states, tokens, codec)
