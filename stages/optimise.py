"""AdamW on the heads of a stack, each with its own rate, decay and clipping."""

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw

from stages.stack import Stack

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""torch's own defaults"""


class AdamW:
    """torch's fused AdamW (Loshchilov, Hutter, arXiv 1711.05101), a call a head: a head's numbers are one row of its stack."""

    def __init__(self, stack: Stack, decays: Sequence[float], clips: Sequence[float]) -> None:
        """decays: of matrices; norms and biases are not decayed. clips: largest norms of a head's gradient."""
        self.stack, self.decays, self.clips = stack, list(decays), list(clips)
        self.moments = [torch.zeros_like(stack.rows), torch.zeros_like(stack.rows)]
        self.steps = [torch.zeros((), device=stack.rows.device) for _ in range(2 * len(stack))]
        self._cut()

    def _cut(self) -> None:
        """The pieces that a call steps: of each head its matrices, which decay, and the rest."""
        cut = self.stack.matrices
        rows = zip(*(matrix.unbind() for matrix in (self.stack.rows, self.stack.grads, *self.moments)), strict=True)
        self._pieces = [tuple(([v[:cut]], [v[cut:]]) for v in row) for row in rows]
        self._most = torch.tensor(self.clips, device=self.stack.rows.device)

    def keep(self, which: Sequence[int]) -> None:
        """Let go of all heads but these; the stack has done so already."""
        self.moments = [moment[torch.tensor(which, device=moment.device)] for moment in self.moments]
        self.decays, self.clips = [self.decays[head] for head in which], [self.clips[head] for head in which]
        self.steps = [step for head in which for step in self.steps[2 * head : 2 * head + 2]]
        self._cut()

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """One step of each head at its learning rate."""
        norms = torch.linalg.vector_norm(self.stack.grads, dim=1)
        shrink = ((norms + 1e-6) / self._most).clamp_min_(1).unbind()  # as torch's clip_grad_norm_
        for head, (rate, pieces) in enumerate(zip(rates, self._pieces, strict=True)):
            for part, decay in enumerate((self.decays[head], 0.0)):
                values, grads, means, squares = (piece[part] for piece in pieces)
                if len(values[0]):
                    adamw(
                        values, grads, means, squares, [], [self.steps[2 * head + part]], fused=True, grad_scale=shrink[head],
                        amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=rate, weight_decay=decay, eps=EPSILON, maximize=False,
                    )  # fmt: skip
