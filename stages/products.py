"""What M heads make of rows, as batched matrix products whose gradients are written out.

The gradient of a matrix is written where it belongs, by the product that it is: into the `.grad` that the matrix has. That of
everything else goes autograd's way. Large results come from memory that is used again.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from stages.space import Space

LARGE = 1 << 18
"""numbers from which on a tensor comes from memory that is used again: fresh memory costs as much as what is computed into it"""

SPACE = Space(most=64, pinned=False)
sigmoid_backward, tanh_backward = torch.ops.aten.sigmoid_backward.grad_input, torch.ops.aten.tanh_backward.grad_input
"""(gradient of the output, output) -> of the input: one pass each"""


def room(like: Tensor, *shape: int) -> Tensor:
    """A float32 tensor on the device of another, its numbers anything."""
    return SPACE(shape, "<f4") if like.device.type == "cpu" and math.prod(shape) >= LARGE else like.new_empty(shape)


def room_like(like: Tensor) -> Tensor:
    """The same of its shape."""
    return room(like, *like.shape)


class _Linear(Function):
    """x_m W_mᵀ + b_m."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.into = weight.grad
        out = room(x, len(weight), x.shape[1], weight.shape[1])
        return torch.baddbmm(bias[:, None], x.expand(len(weight), -1, -1), weight.mT, out=out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor]:
        x, weight = ctx.saved_tensors
        torch.bmm(grad.mT, x.expand(len(weight), -1, -1), out=ctx.into)
        of_x = torch.bmm(grad, weight, out=room(grad, *x.shape)) if ctx.needs_input_grad[0] else None
        return of_x, None, grad.sum(1)


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x: (M, n, in), or (1, n, in) that needs no gradient; weight: (M, out, in); bias: (M, out) -> (M, n, out)."""
    return cast(Tensor, _Linear.apply(x, weight, bias))


class _Project(Function):
    """x · norm_m through W_m: the norm is folded into the matrix, so that x stays one for all heads, and needs no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, scale: float, weight: Tensor, bias: Tensor | None, beside: Tensor | None
    ) -> Tensor:
        width = x.shape[1]
        folded = torch.mul(weight[..., :width], (scale * norm)[:, None], out=room(x, *weight.shape[:2], width))  # (M, G, D)
        out = torch.bmm(x.expand(len(weight), -1, -1), folded.mT, out=room(x, len(weight), len(x), weight.shape[1]))  # (M, n, G)
        if beside is not None:
            out += torch.bmm(beside, weight[..., width:].mT)
        if bias is not None:
            out += bias[:, None]
        ctx.save_for_backward(x, norm, weight, beside)
        ctx.scale, ctx.into, ctx.has_bias = scale, weight.grad, bias is not None
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None, Tensor | None, Tensor | None]:
        x, norm, weight, beside = ctx.saved_tensors
        width = x.shape[1]
        into = ctx.into[..., :width]
        torch.bmm(grad.mT, x.expand(len(weight), -1, -1), out=into)  # of the folded matrix
        of_norm = ctx.scale * torch.mul(into, weight[..., :width], out=room(x, *into.shape)).sum(1)
        into.mul_((ctx.scale * norm)[:, None])
        of_beside = None
        if beside is not None:
            torch.bmm(grad.mT, beside, out=ctx.into[..., width:])
            of_beside = torch.bmm(grad, weight[..., width:])
        return None, of_norm, None, None, grad.sum(1) if ctx.has_bias else None, of_beside


def project(
    x: Tensor, norm: Tensor, scale: float, weight: Tensor, bias: Tensor | None = None, beside: Tensor | None = None
) -> Tensor:
    """What all heads make of shared rows, in one product.

    x: (n, D), normed but for the norm's weight (M, D). scale: s_in. weight: (M, G, D), bias: (M, G) -> (M, n, G). beside:
    (M, n, w), of each head its own, where the matrix has so many columns more.
    """
    return cast(Tensor, _Project.apply(x, norm, scale, weight, bias, beside))


class _Attend(Function):
    """corrected = final + gain (a W_oᵀ + b_o); of these the mean over an example's rows by softmax(q · tanh(corrected))."""

    @staticmethod
    def forward(
        ctx: Any, a: Tensor, weight: Tensor, bias: Tensor, final: Tensor, gain: Tensor, query: Tensor, example: Tensor, count: int
    ) -> Tensor:
        rows = torch.arange(len(example), device=a.device)
        corrected = room(a, len(weight), *final.shape[1:])
        torch.baddbmm(bias[:, None], a, weight.mT, out=corrected)
        torch.addcmul(final, gain[:, None], corrected, out=corrected)  # (M, r, D)
        bent = torch.tanh(corrected, out=room_like(corrected))
        shares = a.new_full((len(weight), count, len(example)), -torch.inf)  # (M, B, r)
        shares[:, example, rows] = torch.bmm(bent, query[:, :, None])[..., 0]
        shares = shares.softmax(2)
        ctx.save_for_backward(a, weight, gain, query, example, rows, corrected, bent, shares)
        ctx.into = weight.grad
        return torch.bmm(shares, corrected)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, weight, gain, query, example, rows, corrected, bent, shares = ctx.saved_tensors
        of_shares = torch.bmm(grad, corrected.mT)
        of_scores = (shares * (of_shares - (of_shares * shares).sum(2, keepdim=True)))[:, example, rows]  # (M, r)
        of_query = torch.bmm(bent.mT, of_scores[:, :, None])[..., 0]
        through = torch.bmm(of_scores[:, :, None], query[:, None], out=room_like(bent))
        tanh_backward(through, bent, grad_input=through)
        of_rows = torch.baddbmm(through, shares.mT, grad, out=room_like(bent)).mul_(gain[:, None])  # (M, r, D)
        torch.bmm(of_rows.mT, a, out=ctx.into)
        of_a = torch.bmm(of_rows, weight, out=room_like(a))
        return of_a, None, of_rows.sum(1), None, None, of_query, None, None


def attend(
    a: Tensor, weight: Tensor, bias: Tensor, final: Tensor, gain: Tensor, query: Tensor, example: Tensor, count: int
) -> Tensor:
    """Correct rows, and pool them by attention.

    a: (M, r, H). weight: (M, D, H), bias: (M, D). final: (M, r, D) or (1, r, D) and gain: (M, D) or (1, D), which need no
    gradient. query: (M, D). example: (r,) to which of `count` examples a row belongs -> (M, B, D).
    """
    return cast(Tensor, _Attend.apply(a, weight, bias, final, gain, query, example, count))
