"""The norms of the network as they are exported: the same arithmetic, in the form that is fastest on the target.

Shapes: B images, H rows, W columns, C maps.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topfive_export.variant import Variant
from topfive_training.network import LocalResponseNorm, WithinMapNorm

_Attribute: TypeAlias = (
    int | float | str | bool | Sequence[int] | Sequence[float] | Sequence[str] | Sequence[bool]
)


def exported_norm(norm: LocalResponseNorm | WithinMapNorm, variant: Variant) -> nn.Module:
    """What takes the place of `norm` in the graph of `variant`."""
    if isinstance(norm, WithinMapNorm):
        return ChannelsLastWindowNorm(norm) if variant.precision == "int8" else WindowNorm(norm)
    if variant.target == "cuda":
        return OperatorNorm(norm)
    return ChannelsLastBandNorm(norm) if variant.precision == "int8" else BandNorm(norm)


class BandNorm(nn.Module):
    """Response normalisation as a 1x1 convolution of the squares with a band of ones: fast where convolutions are.

    ONNX Runtime's own LRN takes more than half of the network's time on a processor (docs/export.md).
    """

    def __init__(self, norm: LocalResponseNorm) -> None:
        super().__init__()
        self.towers = norm.towers
        self.beta = norm.beta
        weight = _tower_band(norm)
        self.register_buffer("weight", weight.repeat(norm.towers, 1)[:, :, None, None])
        self.register_buffer("k", torch.full((norm.channels,), norm.k))
        self.weight: Tensor
        self.k: Tensor

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Normalised maps of the same shape."""
        scale_BCHW = F.conv2d(maps_BCHW * maps_BCHW, self.weight, self.k, groups=self.towers)
        return _divided(maps_BCHW, scale_BCHW, self.beta)


class WindowNorm(nn.Module):
    """The norm within maps as an average pool of the squares: a convolution of each map by itself is no faster.

    In fp16 nothing overflows: it follows a response norm, whose values stay below 120 whatever goes in.
    """

    def __init__(self, norm: WithinMapNorm) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = norm.size, norm.alpha, norm.beta, norm.k

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Normalised maps of the same shape."""
        # The original divides by the whole window's size at the edges too.
        mean_BCHW = F.avg_pool2d(
            maps_BCHW * maps_BCHW, self.size, stride=1, padding=self.size // 2, count_include_pad=True
        )
        return _divided(maps_BCHW, self.k + self.alpha * mean_BCHW, self.beta)


class ChannelsLastBandNorm(nn.Module):
    """`BandNorm` for int8 graphs: a matrix product over the channels, which stay last.

    ONNX Runtime computes 8-bit convolutions and pools channels last. A 1x1 convolution in fp32 would have the maps
    turned four times, and the pool after it computed in fp32: a sixth of the whole graph's time (docs/export.md).
    """

    def __init__(self, norm: LocalResponseNorm) -> None:
        super().__init__()
        self.beta, self.k = norm.beta, norm.k
        self.register_buffer("weight", _tower_band(norm))
        self.weight: Tensor

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Normalised maps of the same shape."""
        maps_BHWC = _dequantized_once(maps_BCHW).permute(0, 2, 3, 1)
        # Every tower has the same band, so towers are more rows.
        squares = (maps_BHWC * maps_BHWC).reshape(-1, len(self.weight))
        scale_BHWC = (squares @ self.weight).reshape(maps_BHWC.shape) + self.k
        return _divided(maps_BHWC, scale_BHWC, self.beta).permute(0, 3, 1, 2)


class ChannelsLastWindowNorm(nn.Module):
    """`WindowNorm` for int8 graphs: the window's sum as two matrix products, over rows and over columns."""

    def __init__(self, norm: WithinMapNorm) -> None:
        super().__init__()
        self.size, self.alpha, self.beta, self.k = norm.size, norm.alpha, norm.beta, norm.k

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Normalised maps of the same shape."""
        maps_BHWC = _dequantized_once(maps_BCHW).permute(0, 2, 3, 1)
        batch, height, width, channels = maps_BHWC.shape
        rows = _band(height, self.size) * (self.alpha / self.size**2)
        summed_BHWC = _band(width, self.size) @ (maps_BHWC * maps_BHWC)
        scale_BHWC = (rows @ summed_BHWC.reshape(batch, height, width * channels)).reshape(maps_BHWC.shape)
        return _divided(maps_BHWC, scale_BHWC + self.k, self.beta).permute(0, 3, 1, 2)


def _band(length: int, size: int) -> Tensor:
    """Ones where two of `length` places are within the same centred window of `size`, [length, length]."""
    index = torch.arange(length)
    return ((index[:, None] - index[None, :]).abs() <= size // 2).to(torch.float32)


def _tower_band(norm: LocalResponseNorm) -> Tensor:
    """By what each square of one tower counts in each sum."""
    if norm.size % 2 == 0:
        raise ValueError(f"the window of the response norm is {norm.size}; it must be odd")
    return _band(norm.channels // norm.towers, norm.size) * (norm.alpha / norm.size)


def _dequantized_once(maps: Tensor) -> Tensor:
    """The same maps, behind an operator that ONNX Runtime does not look through.

    It gives every reader of a dequantised tensor a dequantisation of its own, and there are three. Clipping at the
    lowest number changes nothing and is done in place.
    """
    return maps.clamp(min=torch.finfo(torch.float32).min)


def _divided(maps_BCHW: Tensor, scale_BCHW: Tensor, beta: float) -> Tensor:
    if beta == 0.75:
        # Square roots are vector instructions, the general power is not: a tenth of the network's time.
        return maps_BCHW / (scale_BCHW * scale_BCHW.sqrt()).sqrt()
    return maps_BCHW / scale_BCHW.pow(beta)


class OperatorNorm(nn.Module):
    """Response normalisation as ONNX's LRN operator, which has a kernel on CUDA. Exists in exported graphs only."""

    def __init__(self, norm: LocalResponseNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Normalised maps of the same shape, by tower."""
        norm = self.norm
        towers = maps_BCHW.chunk(norm.towers, dim=1)
        attributes: dict[str, _Attribute] = {
            "alpha": norm.alpha,
            "beta": norm.beta,
            "bias": norm.k,
            "size": norm.size,
        }
        normed = [
            torch.onnx.ops.symbolic(
                "LRN", (tower,), attributes, dtype=tower.dtype, shape=tower.shape, version=20
            )
            for tower in towers
        ]
        return torch.cat(normed, dim=1)
