"""Stochastic gradient descent with momentum, with the rate where the original has it."""

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from topfive_training.network import LAYERS, AlexNet
from topfive_training.recipe import Recipe
from topfive_training.schedule import Phase


class MomentumSGD(torch.optim.Optimizer):
    """Momentum with the rate inside the velocity (paper section 5), or outside as `torch.optim.SGD` has it.

    Inside: `v = m v - rate (decay w + g); w += v`. Outside: `v = m v + decay w + g; w -= rate v`. They differ for a
    while after each change of the rate. Each group has its own `rate` and `decay`; a group at rate 0 stands still,
    its velocity too.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, momentum: float, rate_inside_velocity: bool
    ) -> None:
        super().__init__(groups, {"rate": 0.0, "decay": 0.0})
        self.momentum = momentum
        self.rate_inside_velocity = rate_inside_velocity

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        assert closure is None, "MomentumSGD takes no closure"
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if group["rate"] == 0 or not weights:
                continue
            gradients: list[Tensor] = [p.grad for p in weights]
            self._move(weights, gradients, [self.velocity(p) for p in weights], group["rate"], group["decay"])
        return None

    def _move(
        self,
        weights: list[Tensor],
        gradients: list[Tensor],
        velocities: list[Tensor],
        rate: float,
        decay: float,
    ) -> None:
        # torch's fused kernel goes through memory once: v = m v + (1 - dampening) (decay w + g); w -= lr v. With a
        # dampening of 1 + rate and an lr of -1 that is the rate inside the velocity.
        inside = self.rate_inside_velocity
        sgd(
            weights,
            # It reads all three in the order of their bytes.
            [_laid_out_as(weight, gradient) for weight, gradient in zip(weights, gradients, strict=True)],
            list[Tensor | None](velocities),
            foreach=False,
            fused=True,
            weight_decay=decay,
            momentum=self.momentum,
            lr=-1.0 if inside else rate,
            dampening=1.0 + rate if inside else 0.0,
            nesterov=False,
            maximize=False,
        )

    def velocity(self, parameter: Tensor) -> Tensor:
        """The parameter's velocity, made of zeros when first asked for."""
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        velocity: Tensor = state["velocity"]
        return velocity


def _laid_out_as(weight: Tensor, gradient: Tensor) -> Tensor:
    return gradient if gradient.stride() == weight.stride() else torch.empty_like(weight).copy_(gradient)


def make_optimizer(network: AlexNet, recipe: Recipe) -> MomentumSGD:
    """One group for each kind of parameter that `set_rates` treats alike."""
    groups: dict[tuple[bool, bool, float], list[Tensor]] = {}
    for name, parameter in network.named_parameters():
        layer = layer_of(name)
        # Vectors are the biases, and batch norm's scales, which are treated as biases are.
        key = (layer == "conv1", parameter.ndim == 1, recipe.layer_rate(layer))
        groups.setdefault(key, []).append(parameter)
    return MomentumSGD(
        (
            {
                "params": parameters,
                "first": first,
                "vector": vector,
                "factor": (recipe.bias_rate_factor if vector else 1.0) * layer_rate,
                "decay": 0.0 if vector and not recipe.decay_biases else recipe.weight_decay,
            }
            for (first, vector, layer_rate), parameters in groups.items()
        ),
        momentum=recipe.momentum,
        rate_inside_velocity=recipe.rate_inside_velocity,
    )


def layer_of(parameter: str) -> str:
    """The layer that a parameter, or the batch norm that it is of, belongs to."""
    module = parameter.partition(".")[0]
    if module.startswith("batch_norm"):
        number = int(module.removeprefix("batch_norm"))
        return LAYERS[number - 1]
    return module


def set_rates(optimizer: MomentumSGD, phase: Phase) -> None:
    """Give every group its rate for the coming step."""
    for group in optimizer.param_groups:
        rate = phase.first_rate if group["first"] else phase.rate
        if group["vector"] and phase.bias_rate is not None and rate > 0:
            rate = phase.bias_rate
        group["rate"] = rate * group["factor"]
