"""Random numbers as functions of where they are used, not of who draws them or when.

Order, crops, flips, colour noise and dropout depend on (seed, epoch, image) alone: whatever the number of ranks and
of workers, and after any interruption, they are the same. Nothing here has state to save.

Counter-based: the SplitMix64 finaliser (Steele, Lea, Flood 2014) of key and counter.
Shapes: B images, F numbers for each.
"""

import math

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64


def order(seed: int, epoch: int, images: int) -> Tensor:
    """A permutation of `images` indices for this epoch, int64."""
    # Sorting hashes keeps the order independent of torch's own generators and their versions.
    return torch.argsort(sample_keys(seed, epoch, torch.arange(images)), stable=True)


def sample_keys(seed: int, epoch: int, indices_B: Tensor) -> Tensor:
    """One int64 key for each image of this epoch; numbers drawn from different keys are independent."""
    prefix = mix(mix(torch.tensor(seed) * _GOLDEN) + torch.tensor(epoch) * _GOLDEN)
    return mix(prefix.to(indices_B.device) + indices_B.to(torch.int64) * _GOLDEN)


# Never compiled: torch's compiler works out the wrapping products of indices ahead, and fails where they leave 64 bits.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def uniform(keys_B: Tensor, counters_F: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float32 [B, F], one for each pair of key and counter."""
    bits_BF = mix(keys_B[:, None] + counters_F[None, :] * _GOLDEN)
    return _shift_right(bits_BF, 40).to(torch.float32) * (1 / 2**24)


def normal(keys_B: Tensor, counters_F: Tensor) -> Tensor:
    """Standard normal numbers, float32 [B, F] (Box-Muller); uses the counters and the counters + 2**40."""
    radius_BF = torch.sqrt(-2 * torch.log1p(-uniform(keys_B, counters_F).double()))
    angle_BF = 2 * math.pi * uniform(keys_B, counters_F + 2**40).double()
    return (radius_BF * torch.cos(angle_BF)).float()


def mix(x: Tensor) -> Tensor:
    """The SplitMix64 finaliser, a bijection of int64."""
    x = (x ^ _shift_right(x, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    x = (x ^ _shift_right(x, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of int64; torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
