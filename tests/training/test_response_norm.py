"""Response normalisation against a loop over the paper's formula, and its gradient against finite differences."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from topfive_training.network import LocalResponseNorm


def by_the_formula(
    maps_CHW: npt.NDArray[np.float64],
    towers: int,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 2.0,
) -> npt.NDArray[np.float64]:
    """Paper section 3.3 with the code's alpha / size, one value after the other."""
    channels, height, width = maps_CHW.shape
    per_tower = channels // towers
    result = np.zeros_like(maps_CHW)
    for i in range(channels):
        first, last = i // per_tower * per_tower, (i // per_tower + 1) * per_tower - 1
        for y in range(height):
            for x in range(width):
                total = 0.0
                for j in range(max(first, i - size // 2), min(last, i + size // 2) + 1):
                    total += maps_CHW[j, y, x] ** 2
                result[i, y, x] = maps_CHW[i, y, x] / (k + alpha / size * total) ** beta
    return result


@pytest.mark.parametrize(("channels", "towers"), [(12, 1), (12, 2), (6, 2), (96, 2)])
def test_the_formula(channels: int, towers: int) -> None:
    maps = np.random.default_rng(0).normal(0, 300, (2, channels, 3, 4))
    expected = np.stack([by_the_formula(one, towers) for one in maps])
    norm = LocalResponseNorm(channels, towers=towers)
    result = norm(torch.from_numpy(maps)).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-12)
    # With values of this size the norm does something.
    assert np.abs(result / (maps / 2**0.75) - 1).max() > 0.1


def test_never_across_the_seam() -> None:
    norm = LocalResponseNorm(8, towers=2)
    maps = torch.zeros(1, 8, 1, 1)
    maps[0, 3] = 10.0
    before = norm(maps)[0, 3].item()
    maps[0, 4] = 1e6
    assert norm(maps)[0, 3].item() == before
    maps[0, 2] = 1e6
    assert norm(maps)[0, 3].item() < before / 10


@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_gradient(beta: float) -> None:
    norm = LocalResponseNorm(6, towers=2, alpha=0.5, beta=beta)
    maps = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (maps,))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_torch_agrees_on_even_windows_too(size: int) -> None:
    norm = LocalResponseNorm(9, towers=1, size=size, alpha=0.1)
    maps = torch.randn(2, 9, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(norm(maps), F.local_response_norm(maps, size, 0.1, 0.75, 2.0))


@pytest.mark.parametrize("size", [4, 5])
def test_gradient_agrees_with_torchs(size: int) -> None:
    maps = (torch.randn(2, 9, 3, 3, dtype=torch.float64) * 50).requires_grad_()
    ours, theirs = (
        torch.autograd.grad((norm(maps) * torch.arange(9.0)[:, None, None]).sum(), maps)[0]
        for norm in (
            LocalResponseNorm(9, towers=1, size=size),
            lambda m: F.local_response_norm(m, size, 1e-4, 0.75, 2.0),
        )
    )
    torch.testing.assert_close(ours, theirs)
