"""The networks: published sizes and counts, and the groups against two explicit towers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from topfive.model_spec import Architecture, ArchitectureName
from topfive_training.network import AlexNet, Dropout, published_architecture, scaled
from topfive_training.randomness import sample_keys


@pytest.mark.parametrize(("name", "parameters"), [("alexnet-2012", 60_965_224), ("alexnet-2014", 61_100_840)])
def test_published_parameter_counts(name: ArchitectureName, parameters: int) -> None:
    with torch.device("meta"):
        network = AlexNet(published_architecture(name))
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize(
    ("side", "overlapping", "expected"),
    [
        #            conv1 pool1 conv2 pool2 conv3 pool5
        (227, True, [55, 27, 27, 13, 13, 6]),
        (224, True, [55, 27, 27, 13, 13, 6]),
        (227, False, [55, 27, 27, 13, 13, 6]),
        # Here every division leaves a remainder: ceil((200 - 11) / 4) + 1 = 49, ceil((49 - 3) / 2) + 1 = 24, ...
        (200, True, [49, 24, 24, 12, 12, 6]),
    ],
)
def test_sizes_round_up_as_in_the_original(side: int, overlapping: bool, expected: list[int]) -> None:
    network = AlexNet(Architecture(classes=3, width=0.02, overlapping_pooling=overlapping))
    sizes: list[int] = []
    for module in (network.conv1, network.pool, network.conv2, network.conv3):
        module.register_forward_hook(lambda _module, _inputs, output: sizes.append(output.shape[-1]))
    network(torch.zeros(1, 3, side, side))
    assert sizes == expected


def test_224_is_227_with_zeros_at_the_right_and_bottom() -> None:
    network = AlexNet(Architecture(classes=3, width=0.02)).eval()
    images = torch.randn(2, 3, 224, 224)
    torch.testing.assert_close(network(images), network(F.pad(images, (0, 3, 0, 3))))


def test_a_size_that_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"images of 300 x 300 pixels .* 227"):
        AlexNet(Architecture(classes=3, width=0.02))(torch.zeros(1, 3, 300, 300))


def two_towers(network: AlexNet, images: Tensor) -> Tensor:
    """The paper's figure 2, tower by tower, from the weights of the network with groups. Slow and explicit."""

    def half(tensor: Tensor, tower: int) -> Tensor:
        return tensor.chunk(2, 0)[tower]

    def conv(layer: torch.nn.Conv2d, maps: Tensor, tower: int, **options: int) -> Tensor:
        assert layer.bias is not None
        return F.conv2d(maps, half(layer.weight, tower), half(layer.bias, tower), **options)

    def norm(maps: Tensor) -> Tensor:
        return F.local_response_norm(maps, 5, 1e-4, 0.75, 2.0)

    def within(maps: Tensor) -> Tensor:
        if not network.architecture.within_map_norm:
            return maps
        return maps / (1 + 1e-3 * F.avg_pool2d(maps**2, 5, 1, 2, count_include_pad=True)) ** 0.75

    def pool(maps: Tensor) -> Tensor:
        return F.max_pool2d(maps, 3, 2, ceil_mode=True)

    first = []
    for tower in (0, 1):
        maps = torch.relu(pool(norm(conv(network.conv1, images, tower, stride=4))))
        first.append(pool(within(norm(torch.relu(conv(network.conv2, maps, tower, padding=2))))))
    both = torch.cat(first, 1)  # the first exchange
    second = []
    for tower in (0, 1):
        maps = torch.relu(conv(network.conv3, both, tower, padding=1))
        maps = torch.relu(conv(network.conv4, maps, tower, padding=1))
        second.append(pool(torch.relu(conv(network.conv5, maps, tower, padding=1))))
    units = torch.cat(second, 1).flatten(1)
    for layer in (network.fc6, network.fc7):
        halves = [F.linear(units, half(layer.weight, t), half(layer.bias, t)) for t in (0, 1)]
        units = torch.relu(torch.cat(halves, 1)) * 0.5
    return F.linear(units, network.fc8.weight, network.fc8.bias)


@pytest.mark.parametrize("within", [False, True])
def test_groups_equal_two_explicit_towers(within: bool) -> None:
    torch.manual_seed(0)
    network = AlexNet(Architecture(classes=7, width=0.1, within_map_norm=within)).double().eval()
    with torch.no_grad():
        network.conv2.weight.mul_(20)  # values of a size at which the norms do something
    images = torch.randn(2, 3, 227, 227, dtype=torch.float64) * 60
    torch.testing.assert_close(network(images), two_towers(network, images))
    parameters = list(network.parameters())
    ours = torch.autograd.grad(network(images).square().sum(), parameters)
    theirs = torch.autograd.grad(two_towers(network, images).square().sum(), parameters)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_features_and_head_are_the_network() -> None:
    network = AlexNet(Architecture(classes=7, width=0.05)).eval()
    images = torch.randn(2, 3, 227, 227)
    features = network.features(images)
    assert features.shape == (2, scaled(4096, 0.05))
    torch.testing.assert_close(network.head(features), network(images))


@pytest.mark.parametrize("width", [0.01, 0.1, 0.25, 0.33, 1.0, 1.5])
def test_every_width_keeps_the_towers_equal(width: float) -> None:
    with torch.device("meta"):
        network = AlexNet(Architecture(classes=3, width=width))
    for layer in (network.conv1, network.conv2, network.conv3, network.conv4, network.conv5):
        assert layer.out_channels % 2 == 0


def test_dropout_of_2012_scales_at_evaluation() -> None:
    dropout, units = Dropout(0.3, scaling="evaluation", layer=6), torch.full((200, 300), 2.0)
    dropped = dropout(units)
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert dropped.mean().item() == pytest.approx(1.4, rel=0.02)
    torch.testing.assert_close(dropout.eval()(units), units * 0.7)


def test_inverted_dropout_scales_in_training() -> None:
    dropout, units = Dropout(0.3, scaling="training", layer=6), torch.full((200, 300), 2.0)
    dropped = dropout(units)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0.0, 2 / 0.7])
    assert dropped.mean().item() == pytest.approx(2.0, rel=0.02)
    torch.testing.assert_close(dropout.eval()(units), units)


def test_dropout_follows_the_key_of_the_image_not_its_place() -> None:
    keys, units = sample_keys(1, 2, torch.arange(6)), torch.ones(6, 64)
    dropout = Dropout(0.5, scaling="evaluation", layer=6)
    whole = dropout(units, keys)
    torch.testing.assert_close(dropout(units[3:], keys[3:]), whole[3:])
    second_half = Dropout(0.5, scaling="evaluation", layer=6)
    second_half.first_unit = 32
    torch.testing.assert_close(second_half(units[:, 32:], keys), whole[:, 32:])
    assert not torch.equal(Dropout(0.5, scaling="evaluation", layer=7)(units, keys), whole)
    assert not torch.equal(dropout(units, sample_keys(1, 3, torch.arange(6))), whole)
