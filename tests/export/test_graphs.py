"""Each replaced part of the network against a plain, independent version of it."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tests.export.conftest import make_classifier

from topfive.model_spec import ArchitectureName, Preprocessing
from topfive.preprocessing import decode
from topfive_export.graphs import CentralResize, FoldedConvolution, build_graph
from topfive_export.norms import BandNorm, ChannelsLastBandNorm, ChannelsLastWindowNorm, WindowNorm
from topfive_export.variant import Variant
from topfive_training.network import LocalResponseNorm, WithinMapNorm


@pytest.mark.parametrize("form", [BandNorm, ChannelsLastBandNorm])
@pytest.mark.parametrize(
    ("towers", "beta", "k", "size"), [(2, 0.75, 2.0, 5), (1, 0.5, 1.0, 3), (1, 0.75, 1.0, 5)]
)
def test_band_norm_is_the_response_norm(
    towers: int, beta: float, k: float, size: int, form: type[BandNorm | ChannelsLastBandNorm]
) -> None:
    channels = 16
    norm = LocalResponseNorm(channels, towers=towers, size=size, alpha=0.3, beta=beta, k=k)
    maps = torch.randn(2, channels, 4, 3, generator=torch.Generator().manual_seed(0)) * 5
    expected = np.empty_like(maps.numpy())
    per_tower = channels // towers
    for channel in range(channels):
        tower = channel // per_tower
        low = max(tower * per_tower, channel - size // 2)
        high = min((tower + 1) * per_tower, channel + size // 2 + 1)
        squares = (maps[:, low:high].double() ** 2).sum(dim=1)
        expected[:, channel] = maps[:, channel].double() / (k + 0.3 / size * squares) ** beta
    assert np.allclose(form(norm)(maps).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", [WindowNorm, ChannelsLastWindowNorm])
@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_window_norm_is_the_norm_within_maps(
    beta: float, form: type[WindowNorm | ChannelsLastWindowNorm]
) -> None:
    norm = WithinMapNorm(size=3, alpha=0.4, beta=beta, k=1.5)
    maps = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0)) * 5
    padded = np.pad(maps.double().numpy() ** 2, ((0, 0), (0, 0), (1, 1), (1, 1)))
    sums = sum(padded[:, :, y : y + 6, x : x + 5] for y in range(3) for x in range(3))
    expected = maps.double().numpy() / (1.5 + 0.4 / 9 * sums) ** beta
    assert np.allclose(form(norm)(maps).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_after_a_response_norm_the_squares_fit_into_fp16() -> None:
    """So the norm within maps needs no fp32 of its own: no value, however large, leaves a response norm above 120."""
    maps = torch.zeros(1, 8, 400, 1)
    maps[0, 3, :, 0] = torch.logspace(-3, 6, 400)
    assert float(LocalResponseNorm(8, towers=1)(maps).max()) < 120 < 65504**0.5


@pytest.mark.parametrize("form", [BandNorm, ChannelsLastBandNorm])
def test_a_window_without_a_center_is_refused(form: type[BandNorm | ChannelsLastBandNorm]) -> None:
    with pytest.raises(ValueError, match="must be odd"):
        form(LocalResponseNorm(8, towers=1, size=4))


@pytest.mark.parametrize(
    ("name", "mean_image", "normalization"),
    [
        ("alexnet-2012", False, None),
        ("alexnet-2012", True, None),
        ("alexnet-2014", False, None),
        ("alexnet-2012", False, "batch"),
    ],
)
def test_the_folded_first_layer_takes_raw_pixels(
    name: ArchitectureName, mean_image: bool, normalization: str | None
) -> None:
    classifier = make_classifier(name, mean_image=mean_image, normalization=normalization)
    side = classifier.spec.preprocessing.crop
    network = classifier.network
    folded = FoldedConvolution(network, classifier.mean, classifier.std, side)
    pixels = torch.randint(
        0, 256, (2, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        expected = network.conv1(network._padded(classifier.normalize(pixels)))
        actual = folded(network._padded(pixels.permute(0, 3, 1, 2).float()))
    assert torch.allclose(actual, expected, atol=1e-4 * float(expected.abs().max()))
    assert (folded.offset is None) == (name == "alexnet-2012" and not mean_image)


def test_folding_knows_the_padding_of_sizes_that_leave_a_remainder() -> None:
    classifier = make_classifier()
    folded = FoldedConvolution(classifier.network, classifier.mean, classifier.std, 224)
    pixels = torch.randint(0, 256, (1, 3, 224, 224), generator=torch.Generator().manual_seed(2)).float()
    with torch.no_grad():
        expected = classifier.network.conv1(
            classifier.network._padded((pixels - classifier.mean) / classifier.std)
        )
        actual = folded(classifier.network._padded(pixels))
    assert torch.allclose(actual, expected, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("width", "height"),
    [(500, 375), (375, 500), (256, 256), (227, 227), (100, 50), (1, 1), (1, 300), (700, 3), (1200, 900)],
)
def test_the_resize_is_the_one_preprocessing(width: int, height: int) -> None:
    rng = np.random.default_rng(width)
    coarse = rng.integers(0, 256, (max(1, height // 6), max(1, width // 6), 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    expected = np.asarray(decode(file.getvalue(), Preprocessing()).image).astype(np.float32)
    actual = CentralResize(256, 227)(torch.from_numpy(pixels.copy())[None])[0].permute(1, 2, 0).numpy()
    assert np.abs(actual - expected).max() <= 1
    assert (actual != expected).mean() < 0.01


def test_the_classifier_stays_as_it_is() -> None:
    classifier = make_classifier(mean_image=True)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    build_graph(classifier, Variant())
    build_graph(classifier, Variant(precision="fp16", target="cuda"))
    after = classifier.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert isinstance(classifier.network.norm1, LocalResponseNorm)
