"""The recurrences of M heads at once, with their gradients written out: a step costs a few kernels, whatever M is.

`stages.read` has the cells of a single head as torch's modules; a test pins these here to them. Everything lies as
(M, L, r, …): heads, blocks, rows. Gradients of matrices are written as in `stages.products`.

Each cell: gates (M, L, r, G·H), what the inputs alone say; first (M, r, H) or None for zeros; weight (M, G·H, H) and bias
(M, G·H) of the step from state to state; the order in which blocks are gone through -> states (M, L, r, H).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stages.products import room, room_like, sigmoid_backward, tanh_backward


def _earlier(states: Tensor, first: Tensor | None, order: Sequence[int]) -> Iterator[tuple[int, Tensor | None]]:
    """The blocks from the last to the first, each with the state (M, r, H) from which its step began; None for zeros."""
    for now, before in zip(reversed(order), [*reversed(order[:-1]), None], strict=True):
        yield now, first if before is None else states[:, before]


def _of_matrix(into: Tensor, grads: Tensor, states: Tensor, first: Tensor | None, order: Sequence[int]) -> Tensor:
    """The gradient of a matrix from state to state, summed over blocks and rows; returns that of its bias."""
    later, before = (slice(1, None), slice(None, -1)) if order[0] == 0 else (slice(None, -1), slice(1, None))
    if len(order) > 1:
        torch.bmm(grads[:, later].flatten(1, 2).mT, states[:, before].flatten(1, 2), out=into)
    else:
        into.zero_()
    if first is not None:
        into += torch.bmm(grads[:, order[0]].mT, first)
    return grads.flatten(1, 2).sum(1)


class _RNN(Function):
    """r_l = tanh(gates_l + W r_{l−1} + b)."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, first: Tensor | None, weight: Tensor, bias: Tensor, order: Sequence[int]) -> Tensor:
        states = room_like(gates)
        state = first
        for layer in order:
            from_state = bias[:, None] if state is None else torch.baddbmm(bias[:, None], state, weight.mT)
            state = torch.tanh(gates[:, layer] + from_state)
            states[:, layer] = state
        ctx.save_for_backward(first, weight, states)
        ctx.into, ctx.order = weight.grad, order
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, Tensor, None]:
        first, weight, states = ctx.saved_tensors
        slope = 1 - states.square()
        grads = room_like(states)
        back = torch.zeros_like(states[:, 0])
        for layer, before in _earlier(states, first, ctx.order):
            torch.mul(back.add_(grad[:, layer]), slope[:, layer], out=grads[:, layer])
            if before is not None:
                back = torch.bmm(grads[:, layer], weight)
        of_bias = _of_matrix(ctx.into, grads, states, first, ctx.order)
        return grads, None if first is None else back, None, of_bias, None


class _GRU(Function):
    """r, z = sigmoid(gates + W r_{l−1} + b); n = tanh(gates_n + r (W_n r_{l−1} + b_n)); r_l = n + z (r_{l−1} − n)."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, first: Tensor | None, weight: Tensor, bias: Tensor, order: Sequence[int]) -> Tensor:
        hidden = weight.shape[2]
        doors, new = room_like(gates), room(gates, *gates.shape[:3], hidden)  # r, z, W_n r_{l−1} + b_n; n
        states = room_like(new)
        state = first
        for layer in order:
            door, arriving = doors[:, layer], gates[:, layer]
            if state is None:
                door.copy_(bias[:, None].expand_as(door))
                state = torch.zeros_like(states[:, 0])
            else:
                torch.baddbmm(bias[:, None], state, weight.mT, out=door)
            door[..., : 2 * hidden].add_(arriving[..., : 2 * hidden]).sigmoid_()
            reset, update, inner = door.split(hidden, -1)
            candidate = torch.addcmul(arriving[..., 2 * hidden :], reset, inner, out=new[:, layer]).tanh_()
            state = torch.lerp(candidate, state, update, out=states[:, layer])
        ctx.save_for_backward(first, weight, states, doors, new)
        ctx.into, ctx.order = weight.grad, order
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, Tensor, None]:
        first, weight, states, doors, new = ctx.saved_tensors
        hidden = weight.shape[2]
        of_gates = room_like(doors)
        of_state = room_like(doors)  # the same but for n, which hears the state through r
        back = torch.zeros_like(states[:, 0])
        for layer, before in _earlier(states, first, ctx.order):
            reset, update, inner = doors[:, layer].split(hidden, -1)
            to_reset, to_update, to_inner = of_state[:, layer].split(hidden, -1)
            arriving = back.add_(grad[:, layer])
            fresh = of_gates[:, layer, :, 2 * hidden :]
            tanh_backward(torch.addcmul(arriving, arriving, update, value=-1), new[:, layer], grad_input=fresh)
            sigmoid_backward(fresh * inner, reset, grad_input=to_reset)
            change = -new[:, layer] if before is None else before - new[:, layer]
            sigmoid_backward(change.mul_(arriving), update, grad_input=to_update)
            torch.mul(fresh, reset, out=to_inner)
            if before is not None:
                back = torch.baddbmm(arriving.mul_(update), of_state[:, layer], weight)
        of_gates[..., : 2 * hidden] = of_state[..., : 2 * hidden]
        of_bias = _of_matrix(ctx.into, of_state, states, first, ctx.order)
        return of_gates, None if first is None else back, None, of_bias, None


class _LSTM(Function):
    """i, f, o = sigmoid, g = tanh of gates + W r_{l−1} + b; c_l = f c_{l−1} + i g; r_l = o tanh(c_l); c_0 = 0."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, first: Tensor | None, weight: Tensor, bias: Tensor, order: Sequence[int]) -> Tensor:
        hidden = weight.shape[2]
        opened = room_like(gates)
        states = room(gates, *gates.shape[:3], hidden)
        held, bent = room_like(states), room_like(states)  # c and tanh(c)
        state, memory = first, torch.zeros_like(states[:, 0])
        for layer in order:
            from_state = bias[:, None] if state is None else torch.baddbmm(bias[:, None], state, weight.mT)
            doors = gates[:, layer] + from_state
            doors[..., : 2 * hidden].sigmoid_()
            doors[..., 2 * hidden : 3 * hidden].tanh_()
            doors[..., 3 * hidden :].sigmoid_()
            enter, stay, candidate, leave = doors.split(hidden, -1)
            memory = torch.addcmul(stay * memory, enter, candidate)
            curved = torch.tanh(memory)
            state = leave * curved
            opened[:, layer], held[:, layer], bent[:, layer], states[:, layer] = doors, memory, curved, state
        ctx.save_for_backward(first, weight, states, opened, held, bent)
        ctx.into, ctx.order = weight.grad, order
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, Tensor, None]:
        first, weight, states, opened, held, bent = ctx.saved_tensors
        hidden = weight.shape[2]
        enter, stay, candidate, leave = opened.split(hidden, -1)
        to_memory = (1 - bent.square()).mul_(leave)
        to_enter = (1 - enter).mul_(enter).mul_(candidate)
        to_stay = (1 - stay).mul_(stay)
        for layer, memory in _earlier(held, None, ctx.order):
            to_stay[:, layer].mul_(0 if memory is None else memory)
        to_candidate = (1 - candidate.square()).mul_(enter)
        to_leave = (1 - leave).mul_(leave).mul_(bent)
        grads = room_like(opened)
        back, kept = torch.zeros_like(states[:, 0]), torch.zeros_like(states[:, 0])
        for layer, before in _earlier(states, first, ctx.order):
            arriving = back + grad[:, layer]
            kept = torch.addcmul(kept, arriving, to_memory[:, layer])
            step = grads[:, layer]
            for place, (one, other) in enumerate(((kept, to_enter), (kept, to_stay), (kept, to_candidate), (arriving, to_leave))):
                torch.mul(one, other[:, layer], out=step[..., place * hidden : (place + 1) * hidden])
            kept = kept * stay[:, layer]
            if before is not None:
                back = torch.bmm(step, weight)
        of_bias = _of_matrix(ctx.into, grads, states, first, ctx.order)
        return grads, None if first is None else back, None, of_bias, None


class _MinGRU(Function):
    """r_l = r_{l−1} + g_l (c_l − r_{l−1})."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, candidate: Tensor, first: Tensor | None, order: Sequence[int]) -> Tensor:
        states = room_like(candidate)
        state = torch.zeros_like(candidate[:, 0]) if first is None else first
        for layer in order:
            state = torch.lerp(state, candidate[:, layer], gate[:, layer])
            states[:, layer] = state
        ctx.save_for_backward(first, gate, candidate, states)
        ctx.order = order
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        first, gate, candidate, states = ctx.saved_tensors
        arrived = room_like(grad)
        left = 1 - gate
        back = torch.zeros_like(states[:, 0])
        for layer in reversed(ctx.order):
            torch.add(back, grad[:, layer], out=arrived[:, layer])
            back = arrived[:, layer] * left[:, layer]
        of_gate = candidate * arrived
        for layer, before in _earlier(states, first, ctx.order):
            if before is not None:
                of_gate[:, layer].addcmul_(before, arrived[:, layer], value=-1)
        return of_gate, arrived.mul_(gate), None if first is None else back, None


RECURRENCES: dict[str, Callable[[Tensor, Tensor | None, Tensor, Tensor, Sequence[int]], Tensor]] = {
    "RNN": _RNN.apply, "GRU": _GRU.apply, "LSTM": _LSTM.apply
}  # fmt: skip
"""by the name of torch's module"""


def min_gru(gate: Tensor, candidate: Tensor, first: Tensor | None, order: Sequence[int]) -> Tensor:
    """gate: (M, L, r, H) between 0 and 1, candidate: (M, L, r, H) -> (M, L, r, H)."""
    return cast(Tensor, _MinGRU.apply(gate, candidate, first, order))
