"""The optimiser against the paper's update, one number after the other in float64; schedule and initial weights."""

import dataclasses

import numpy as np
import pytest
import torch

from topfive_training.initialization import initialize
from topfive_training.network import LAYERS, AlexNet
from topfive_training.optimizer import make_optimizer, set_rates
from topfive_training.recipe import Recipe
from topfive_training.schedule import Phase, phase

SMALL = Recipe(width=0.02, seed=3)


def make(recipe: Recipe) -> AlexNet:
    network = AlexNet(recipe.network(classes=3)).double()
    initialize(network, recipe)
    return network


@pytest.mark.parametrize("bias_rate", [None, 0.02])
@pytest.mark.parametrize("inside", [True, False])
def test_ten_steps_by_hand(inside: bool, bias_rate: float | None) -> None:
    recipe = dataclasses.replace(SMALL, rate_inside_velocity=inside, weight_decay=0.05)
    network = make(recipe)
    optimizer = make_optimizer(network, recipe)
    weights = {name: p.detach().numpy().copy() for name, p in network.named_parameters()}
    velocities = {name: np.zeros_like(w) for name, w in weights.items()}
    generator = np.random.default_rng(0)
    for step in range(10):
        # The rate drops in between: that is where the two ways differ.
        rate, first_rate = (0.01, 0.01) if step < 4 else (0.001, 0.0)
        now = Phase(rate=rate, first_rate=first_rate, color_noise=0, bias_rate=bias_rate)
        set_rates(optimizer, now)
        for name, parameter in network.named_parameters():
            gradient = generator.normal(size=weights[name].shape)
            parameter.grad = torch.from_numpy(gradient)
            epsilon = first_rate if name.startswith("conv1.") else rate
            decay = 0.05
            if name.endswith(".bias"):
                held = bias_rate is not None and epsilon > 0
                epsilon, decay = 2 * (0.02 if held else epsilon), 0.0
            if epsilon == 0:
                continue  # frozen, and its velocity with it
            if inside:
                velocities[name] = (
                    0.9 * velocities[name] - decay * epsilon * weights[name] - epsilon * gradient
                )
                weights[name] = weights[name] + velocities[name]
            else:
                velocities[name] = 0.9 * velocities[name] + decay * weights[name] + gradient
                weights[name] = weights[name] - epsilon * velocities[name]
        optimizer.step()
    for name, parameter in network.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("inside", [True, False])
def test_layouts_of_memory_may_differ(inside: bool) -> None:
    """The weights lie with their channels last in a run; a gradient from elsewhere may not."""
    recipe = dataclasses.replace(SMALL, rate_inside_velocity=inside)
    ours, other = make(recipe), make(recipe).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert not other.conv2.weight.is_contiguous()
    for network in (ours, other):
        optimizer = make_optimizer(network, recipe)
        set_rates(optimizer, Phase(rate=0.1, first_rate=0.1, color_noise=0))
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for parameter in network.parameters():
                parameter.grad = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
    for one, two in zip(ours.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_outside_is_torchs_own() -> None:
    recipe = dataclasses.replace(SMALL, rate_inside_velocity=False, bias_rate_factor=1, decay_biases=True)
    ours, theirs = make(recipe), make(recipe)
    optimizer = make_optimizer(ours, recipe)
    set_rates(optimizer, Phase(rate=0.1, first_rate=0.1, color_noise=0))
    torchs = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=recipe.weight_decay)
    for step in range(3):
        for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            one.grad = torch.full_like(one, 0.1 * step)
            other.grad = torch.full_like(other, 0.1 * step)
        optimizer.step()
        torchs.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_run_145_at_its_own_length() -> None:
    """`layer-params-145*.cfg`, epoch by epoch."""
    expected = [
        (0, 0.01, 0.01, 0.1),
        (24, 0.01, 0.01, 0.1),
        (25, 0.001, 0.001, 0.1),
        (50, 0.001, 0.001, 0.1),
        (51, 1e-4, 1e-4, 0.1),
        (66, 1e-4, 1e-4, 0.1),
        (67, 1e-4, 1e-5, 0.0),
        (71, 1e-4, 1e-5, 0.0),
        (72, 1e-4, 0.0, 0.0),
        (78, 1e-4, 0.0, 0.0),
        (79, 1e-5, 0.0, 0.0),
        (90, 1e-5, 0.0, 0.0),
    ]
    for epoch, rate, first_rate, noise in expected:
        for step in (epoch * 10, epoch * 10 + 9):
            now = phase(Recipe(), step, 910)
            assert (now.rate, now.first_rate, now.color_noise) == pytest.approx((rate, first_rate, noise))


def test_run_145_leaves_the_biases_their_rate_until_their_layer_is_frozen() -> None:
    """`layer-params-145.cfg` as it ended: epsB .02 everywhere beside epsW 1e-5, but 0 and 0 in conv1."""
    network = make(SMALL)
    rates: dict[tuple[bool, float], dict[bool, float]] = {}
    for drops in (False, True):
        recipe = dataclasses.replace(SMALL, bias_rate_drops=drops)
        for epoch in (0, 51, 90):
            optimizer = make_optimizer(network, recipe)
            set_rates(optimizer, phase(recipe, epoch, 91))
            for name, layer in (("conv1", network.conv1), ("fc7", network.fc7)):
                assert layer.bias is not None
                (rate,) = (
                    group["rate"]
                    for group in optimizer.param_groups
                    if any(parameter is layer.bias for parameter in group["params"])
                )
                rates.setdefault((drops, epoch), {})[name == "conv1"] = rate
    assert [rates[False, epoch][False] for epoch in (0, 51, 90)] == pytest.approx([0.02, 0.02, 0.02])
    assert [rates[False, epoch][True] for epoch in (0, 51, 90)] == pytest.approx([0.02, 0.02, 0.0])
    assert [rates[True, epoch][False] for epoch in (0, 51, 90)] == pytest.approx([0.02, 2e-4, 2e-5])


def test_run_145_scales_to_short_runs() -> None:
    rates = {phase(Recipe(epochs=2), step, 50).rate for step in range(50)}
    assert sorted(rates) == pytest.approx([1e-5, 1e-4, 1e-3, 1e-2])


def test_cosine_warms_up_and_ends_near_zero() -> None:
    recipe = Recipe(schedule="cosine", rate=1.0, epochs=10, warmup_epochs=2)
    rates = [phase(recipe, step, 100).rate for step in range(100)]
    assert rates[0] < 0.06
    assert max(rates) == rates[19] or max(rates) == rates[20]
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] < 0.001


def test_initial_weights_are_the_table_of_the_original() -> None:
    network = AlexNet(Recipe(width=0.5).network(classes=10))
    initialize(network, Recipe(width=0.5, std_follows_width=False))
    stds = dict(zip(LAYERS, (0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01), strict=True))
    biases = dict(zip(LAYERS, (0, 1, 0, 1, 1, 1, 1, 0), strict=True))
    for name in LAYERS:
        layer = network.get_submodule(name)
        assert isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
        assert layer.bias is not None
        assert layer.weight.std().item() == pytest.approx(stds[name], rel=0.05), name
        assert set(layer.bias.tolist()) == {biases[name]}, name


def test_narrow_networks_keep_the_size_of_signals() -> None:
    """Half the inputs with deviations larger by the root of two: the sums keep their variance."""
    network = AlexNet(Recipe(width=0.5).network(classes=10))
    initialize(network, Recipe(width=0.5))
    assert network.conv1.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert network.fc7.weight.std().item() == pytest.approx(0.01 * 2**0.5, rel=0.02)


def test_the_seed_decides_the_weights() -> None:
    first, again, other = (make(Recipe(width=0.02, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first.fc7.weight, again.fc7.weight)
    assert not torch.equal(first.fc7.weight, other.fc7.weight)
