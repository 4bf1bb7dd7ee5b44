"""Response normalisation against loops over the formulas, and its gradient against finite differences."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from topfive_training.network import LocalResponseNorm, WithinMapNorm


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


def within_by_the_formula(
    maps_CHW: npt.NDArray[np.float64], size: int, alpha: float, beta: float, k: float
) -> npt.NDArray[np.float64]:
    """What the original's kernel does, one value after the other: the window ends at the edge, the divisor stays."""
    channels, height, width = maps_CHW.shape
    result = np.zeros_like(maps_CHW)
    for channel in range(channels):
        for y in range(height):
            for x in range(width):
                total = 0.0
                for row in range(max(0, y - size // 2), min(height, y + size // 2 + 1)):
                    for column in range(max(0, x - size // 2), min(width, x + size // 2 + 1)):
                        total += maps_CHW[channel, row, column] ** 2
                result[channel, y, x] = maps_CHW[channel, y, x] / (k + alpha / size**2 * total) ** beta
    return result


def test_the_formula_within_maps() -> None:
    maps = np.random.default_rng(1).normal(0, 100, (2, 3, 8, 7))
    expected = np.stack([within_by_the_formula(one, 5, 1e-3, 0.75, 1.0) for one in maps])
    result = WithinMapNorm()(torch.from_numpy(maps)).numpy()
    np.testing.assert_allclose(result, expected, rtol=1e-12)
    assert np.abs(result / maps - 1).max() > 0.5


@pytest.mark.parametrize(("size", "beta"), [(5, 0.75), (3, 0.5)])
def test_gradient_within_maps(size: int, beta: float) -> None:
    norm = WithinMapNorm(size=size, alpha=0.5, beta=beta)
    maps = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (maps,))


def test_a_window_without_a_center_is_refused() -> None:
    with pytest.raises(ValueError, match="the window of the norm within maps is 4; it must be odd"):
        WithinMapNorm(size=4)


@pytest.mark.parametrize("norm", [LocalResponseNorm(6, towers=2), WithinMapNorm()])
def test_one_norm_serves_other_types_and_goes_from_inference_to_training(norm: torch.nn.Module) -> None:
    """Its weights are kept, one for each device and type: none must reach maps that it does not fit."""
    maps = torch.randn(1, 6, 7, 7, dtype=torch.float64) * 30
    with torch.inference_mode():
        single = norm(maps.float())
    trained = maps.float().requires_grad_()
    norm(trained).sum().backward()
    assert trained.grad is not None
    torch.testing.assert_close(norm(maps).float(), single)
    torch.testing.assert_close(norm(maps.bfloat16()), single, rtol=0.01, atol=0.1)
    assert norm(maps).dtype == torch.float64
