"""The arithmetic of response normalisation, forward and backward.

A sum of squares over neighbouring channels is a 1 x 1 convolution with a banded weight, one over a window of each map a
convolution of every map by itself. That, and a backward pass that keeps what the forward pass has computed, makes a
training step of the network about a third faster on a CPU than `torch.nn.functional.local_response_norm`.

Shapes: B images, C channels, c the channels that one output sees, H rows, W columns, S side of the window.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize_response(maps_BCHW: Tensor, weight_CcSS: Tensor, *, beta: float, k: float) -> Tensor:
    """`a / (k + s) ** beta`, where the convolution of the squares with `weight_CcSS`, zeros around them, gives s."""
    if maps_BCHW.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Normalize.apply(maps_BCHW, weight_CcSS, beta, k)  # type: ignore[no-untyped-call]
        return result
    return maps_BCHW * _scale(_sums(maps_BCHW * maps_BCHW, weight_CcSS) + k, beta)


def across_maps(channels: int, like: Tensor, *, towers: int, size: int, alpha: float) -> Tensor:
    """`alpha / size` for the `size` channels of the same tower that are centred on each: weight [C, C, 1, 1]."""
    # Half the window on each side; an even window has its odd one below, as in torch.
    places_C = torch.arange(channels, device=like.device)
    offset_CC = places_C[None, :] - places_C[:, None]
    tower_C = places_C // (channels // towers)
    near_CC = (
        (offset_CC >= -(size // 2)) & (offset_CC <= (size - 1) // 2) & (tower_C[:, None] == tower_C[None, :])
    )
    return (near_CC.to(like.dtype) * (alpha / size))[:, :, None, None]


def within_maps(channels: int, like: Tensor, *, size: int, alpha: float) -> Tensor:
    """`alpha / size ** 2` for the square window, of odd `size`, of each map by itself: weight [C, 1, S, S]."""
    return torch.full((channels, 1, size, size), alpha / size**2, device=like.device, dtype=like.dtype)


def _sums(values_BCHW: Tensor, weight_CcSS: Tensor) -> Tensor:
    channels, seen, side, _ = weight_CcSS.shape
    return F.conv2d(values_BCHW, weight_CcSS, padding=side // 2, groups=channels // seen)


def _transposed(weight_CcSS: Tensor) -> Tensor:
    """What gathers from everywhere a value went to; a window of odd size is its own."""
    return weight_CcSS if weight_CcSS.shape[1] == 1 else weight_CcSS.transpose(0, 1)


def _scale(denominator_BCHW: Tensor, beta: float) -> Tensor:
    """The denominator to the power of -beta; square roots are several times faster than a power."""
    if beta == 0.75:
        root = denominator_BCHW.rsqrt()
        return root * root.sqrt()
    return denominator_BCHW.pow(-beta)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps_BCHW: Tensor, weight_CcSS: Tensor, beta: float, k: float) -> Tensor:
        denominator = _sums(maps_BCHW * maps_BCHW, weight_CcSS) + k
        scale = _scale(denominator, beta)
        ctx.save_for_backward(maps_BCHW, denominator, scale, weight_CcSS)
        ctx.beta = beta
        return maps_BCHW * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        maps_BCHW, denominator, scale, weight_CcSS = ctx.saved_tensors
        direct = gradient * scale
        # Value i also appears in the denominators of its neighbours j: the transposed weight gathers them.
        shared = _sums((direct * maps_BCHW).div_(denominator), _transposed(weight_CcSS))
        return direct.addcmul_(maps_BCHW, shared, value=-2 * ctx.beta), None, None, None
