"""M heads of one shape as one: what `Head` computes for each of them, as batched matrix products over shared rows.

Every parameter lies as (M, …) in one matrix (M, P), a row a head, so that a head's own optimiser step, its best epoch, and its
leaving are a row each. What reads the states in place of READ (`stages.controls`) is asked head by head.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from stages.cells import RECURRENCES, min_gru
from stages.controls import Reset
from stages.heads import Batch, Head, Verbalizer
from stages.masks import Masks
from stages.products import attend, linear, project
from stages.read import READ, Joined, MinGRU, Recurrence
from stages.shape import Shape


class Stack:
    """M heads of one shape, but for dropout."""

    def __init__(self, heads: Sequence[Head], seeds: Sequence[int]) -> None:
        """heads: fresh, on one device; they are copied. seeds: of their dropout."""
        self.like = heads[0]
        own = list(self.like.named_parameters())
        # matrices first: what decays is one slice
        own = [item for item in own if item[1].ndim > 1] + [item for item in own if item[1].ndim < 2]
        self.places = {name: (value.numel(), value.shape) for name, value in own}
        self.matrices = sum(value.numel() for _, value in own if value.ndim > 1)
        buffers = [dict(head.named_buffers()) for head in heads]
        self.buffers = {name: torch.stack([each[name] for each in buffers]) for name in buffers[0]}
        self.masks = Masks([_dropout(head) for head in heads], seeds, self.like.centre.device)
        parameters = [dict(head.named_parameters()) for head in heads]
        nothing = [self.like.centre.new_empty(0)]
        self._lay(
            torch.stack([torch.cat(nothing + [each[name].detach().flatten() for name in self.places]) for each in parameters])
        )

    def __len__(self) -> int:
        return len(self.rows)

    def _lay(self, rows: Tensor) -> None:
        """Take (M, P) as the parameters, and make room for their gradients."""
        self.shared = {name: _alike(values) for name, values in self.buffers.items()}
        self.rows, self.grads = rows, torch.zeros_like(rows)
        self.values: dict[str, Tensor] = {}
        begin = 0
        for name, (size, shape) in self.places.items():
            value = rows[:, begin : begin + size].unflatten(1, shape) if shape else rows[:, begin]
            grad = self.grads[:, begin : begin + size].unflatten(1, shape) if shape else self.grads[:, begin]
            self.values[name] = value.detach().requires_grad_()
            self.values[name].grad = grad
            begin += size
        # matrices of a READ and of the output layer are used once, and the product that is their gradient writes it
        written = ("read.", "output.") if isinstance(self.like.read, READ | Joined) else ("output.",)
        own = {name for name, (_, shape) in self.places.items() if len(shape) > 1 and name.startswith(written)}
        self._asked = [value for name, value in self.values.items() if name not in own]

    def keep(self, which: Sequence[int]) -> None:
        """Let go of all heads but these."""
        chosen = torch.tensor(which, device=self.rows.device)
        self.buffers = {name: values[chosen] for name, values in self.buffers.items()}
        self.masks.keep(which)
        self._lay(self.rows[chosen])

    def weights(self, head: int) -> dict[str, Tensor]:
        """A head's state_dict as it is now, on the CPU."""
        return {name: values[head].detach().cpu().clone() for name, values in (self.values | self.buffers).items()}

    def backward(self, losses: Tensor) -> None:
        """Gradients of (M,) losses, each of its own head's parameters, in place of those before."""
        if self._asked:
            found = torch.autograd.grad(losses.sum(), self._asked, allow_unused=True, materialize_grads=True)
            for value, grad in zip(self._asked, found, strict=True):
                assert value.grad is not None
                value.grad.copy_(grad)

    def losses(self, batch: Batch, labels: Tensor) -> Tensor:
        """(M,): each head's mean cross-entropy, or mean squared error in units of its labels' variance, in training.

        labels: (M, B), or (1, B) where all learn the same.
        """
        out = self.logits(batch, training=True)  # (M, B, K)
        if self.like.regression:
            return ((out[..., 0] - labels) / self.buffers["scale"][:, None]).square().mean(1)
        return F.cross_entropy(out.mT, labels.expand(len(self), -1), reduction="none").mean(1)

    def logits(self, batch: Batch, training: bool = False) -> Tensor:
        """(M, B, K), or predictions (M, B, 1) in the labels' unit."""
        states = self._states(batch)  # (M, B, D)
        if isinstance(self.like.output, Verbalizer):
            out = torch.bmm(states, self.buffers["output.words"].mT)
        else:
            states = self.masks(states) if training else states
            states = torch.tanh(linear(states, self.values["output.1.weight"], self.values["output.1.bias"]))
            states = self.masks(states) if training else states
            out = linear(states, self.values["output.4.weight"], self.values["output.4.bias"])
        return out * self.buffers["scale"][:, None, None] + self.buffers["offset"][:, None, None]

    def _states(self, batch: Batch) -> Tensor:
        """What the output layer reads: corrected, standardised, pooled. (M, B, D)."""
        read = self.like.read
        if isinstance(read, Joined):
            assert batch.decoder is not None
            return self._corrected("read.decoder", read.decoder, batch.decoder, self._heard(read, batch), batch, pooled=False)
        if isinstance(read, READ):
            rows, picked = self._picked(batch)
            return self._corrected("read", read, rows, None, batch, pooled=not picked)
        own = [
            dict(zip(self.values, values, strict=True))
            for values in zip(*(v.unbind() for v in self.values.values()), strict=True)
        ]
        return torch.stack([self._one(values, head, batch) for head, values in enumerate(own or [{}] * len(self))])

    def _one(self, values: dict[str, Tensor], head: int, batch: Batch) -> Tensor:
        """(B, D) of one head, through its own modules. values: its parameters."""
        read, pool = ({n[5:]: v for n, v in values.items() if n.startswith(part)} for part in ("read.", "pool."))
        states = functional_call(self.like.read, read, (batch.rows, self.like.depths))
        states = (states - self.buffers["centre"][head]) / self.buffers["spread"][head]
        pooled: Tensor = functional_call(self.like.pool, pool, (states, batch))
        return pooled

    def _picked(self, batch: Batch) -> tuple[Tensor, bool]:
        """The rows that the head reads (n, S, D), and whether they are one an example already."""
        if len(batch.rows) == len(batch.start):
            return batch.rows, True
        if self.like.pool.kind == "first":
            return batch.rows[batch.start], True
        if self.like.pool.kind == "last":
            return batch.rows[torch.cat([batch.start[1:], batch.start.new_tensor([len(batch.rows)])]) - 1], True
        return batch.rows, False

    def _corrected(self, name: str, read: READ, rows: Tensor, beside: Tensor | None, batch: Batch, pooled: bool) -> Tensor:
        """(M, B, D). rows: (n, S, D). The mean over rows goes before the correction, since that is linear."""
        states = self._run(name, read, rows, beside)  # (M, L, n, H)
        a = states.sum(1) / states.shape[1] if read.aggregate == "mean" else self._last(read, states)  # (M, n, H)
        centre, spread = self.shared["centre"], self.shared["spread"]
        final = (rows[:, self.like.depths.final] - centre[:, None]) / spread[:, None]  # (1 or M, n, D)
        gain = read.scale_out * self.shared[f"{name}.out.unit"] / spread  # (1 or M, D)
        weight, bias = self.values[f"{name}.out.weight"], self.values[f"{name}.out.bias"]
        if pooled and self.like.pool.query is not None:
            query = self.values["pool.query"]
            return attend(a, weight, bias, final, gain, query, batch.example, len(batch.start))
        if pooled:
            a, final = self._mean(a, batch), self._mean(final, batch)
        return torch.addcmul(final, gain[:, None], linear(a, weight, bias))

    def _heard(self, read: Joined, batch: Batch) -> Tensor:
        """ψ (M, L, B, H): what the decoder's row hears of the encoder's READ at each of its blocks."""
        assert batch.decoder is not None and batch.attention is not None
        depths, count = self.like.depths, len(batch.decoder)
        heard = self._last(read.encoder, self._run("read.encoder", read.encoder, batch.rows, None, read))  # (M, r, H)
        columns = [block - (0 if depths.embedding is None else depths.embedding + 1) for block in depths.blocks]
        from_rows = batch.attention.new_zeros(len(columns), count, len(batch.rows))  # A (L, B, r), zero where it is another's
        from_rows[:, batch.example, torch.arange(len(batch.rows), device=heard.device)] = batch.attention[:, columns].T
        psi = torch.matmul(from_rows.flatten(0, 1), heard)
        return psi.view(len(self), len(columns), count, -1)

    def _run(self, name: str, read: Recurrence, rows: Tensor, beside: Tensor | None, joined: Joined | None = None) -> Tensor:
        """The states of a recurrence: (M, L, n, H), in both directions (M, L, n, 2H). rows: (n, S, D)."""
        depths = joined.encoder_depths if joined else self.like.depths
        cell, value = read.cell, self.values
        count, blocks, hidden = len(rows), len(depths.blocks), read.hidden
        norm = value[f"{name}.norm.weight"]

        def normed(states: Tensor) -> Tensor:
            return F.rms_norm(states, states.shape[-1:], None, read.norm.eps).flatten(0, 1)

        def projected(weight: str, bias: str | None) -> Tensor:
            offset = None if bias is None else value[f"{name}.cell.{bias}"]
            out = project(x, norm, read.scale_in, value[f"{name}.cell.{weight}"], offset, psi)
            return out.view(len(self), blocks, count, -1)  # (M, L, n, G)

        x = normed(rows[:, depths.blocks].transpose(0, 1))  # (L · n, D), the same for all heads
        psi = None if beside is None else beside.flatten(1, 2)
        first = None
        if read.start is not None:
            assert depths.embedding is not None
            weight, bias = value[f"{name}.start.weight"], value[f"{name}.start.bias"]
            first = project(normed(rows[:, depths.embedding][None]), norm, 1.0, weight, bias)  # (M, n, H)
        forth = range(blocks)
        orders = [forth, forth[::-1]][: read.directions]
        if alone := isinstance(read, Reset):  # every block is a row of its own
            first = None if first is None else first.repeat(1, blocks, 1)
            orders = [range(1)] * read.directions

        def as_rows(gates: Tensor) -> Tensor:
            return gates.flatten(1, 2)[:, None] if alone else gates

        if isinstance(cell, MinGRU):
            gates = torch.sigmoid(projected("gate.weight", None)).split(hidden, -1)
            candidates = projected("candidate.weight", None).split(hidden, -1)
            found = [
                min_gru(as_rows(gate), as_rows(candidate), first, order)
                for gate, candidate, order in zip(gates, candidates, orders, strict=True)
            ]
        else:
            recur = RECURRENCES[type(cell).__name__]
            found = []
            for suffix, order in zip(("_l0", "_l0_reverse"), orders, strict=False):
                gates = projected(f"weight_ih{suffix}", f"bias_ih{suffix}")
                weight, bias = value[f"{name}.cell.weight_hh{suffix}"], value[f"{name}.cell.bias_hh{suffix}"]
                found.append(recur(as_rows(gates), first, weight, bias, order))
        states = found[0] if len(found) == 1 else torch.cat(found, -1)
        return states.view(len(self), blocks, count, -1)

    @staticmethod
    def _last(read: Recurrence, states: Tensor) -> Tensor:
        """r_L (M, n, H); in both directions each one's own last state."""
        forth, *back = torch.split(states, read.hidden, 3)
        return torch.cat([forth[:, -1], *(state[:, 0] for state in back)], 2)

    @staticmethod
    def _mean(values: Tensor, batch: Batch) -> Tensor:
        """The mean over an example's rows: (M, r, X) -> (M, B, X)."""
        rows, count = len(batch.rows), len(batch.start)
        mean = values.new_zeros(count, rows)
        each = 1 / torch.bincount(batch.example, minlength=count)
        mean[batch.example, torch.arange(rows, device=values.device)] = each[batch.example]
        return torch.matmul(mean, values)


def stacks(heads: Sequence[Head], shapes: Sequence[Shape], seeds: Sequence[int]) -> list[tuple[list[int], Stack]]:
    """Heads of equal shape, but for dropout, as stacks: of each which heads they are, and the stack."""
    groups: list[tuple[Shape, list[int]]] = []
    for number, shape in enumerate(replace(shape, dropout=0.0) for shape in shapes):
        which = next((which for other, which in groups if other == shape), None)
        if which is None:
            groups.append((shape, [number]))
        else:
            which.append(number)
    return [(which, Stack([heads[n] for n in which], [seeds[n] for n in which])) for _, which in groups]


def _dropout(head: Head) -> float:
    return next((module.p for module in head.output.modules() if isinstance(module, nn.Dropout)), 0.0)


def _alike(values: Tensor) -> Tensor:
    """(1, …) in place of (M, …) where all are the same, as they are where all heads have seen the same sample."""
    return values[:1] if bool((values == values[:1]).all()) else values
