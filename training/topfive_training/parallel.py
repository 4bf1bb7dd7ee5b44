"""Three ways to train one network on several ranks: `--parallel data`, `hybrid` or `towers`.

* `data`: every rank holds the network and takes a share of each batch; the gradients of all weights are summed.
* `hybrid`: "One weird trick for parallelizing convolutional neural networks" (Krizhevsky 2014). The convolutions, with
  92 % of the arithmetic and 4 % of the weights, are data-parallel; the fully-connected layers, the other way round, are
  divided among the same ranks. Activations travel instead of the gradients of 58 million weights.
* `towers`: the paper's two GPUs (section 3.2). Each rank holds one tower and sees the whole batch; they exchange their
  maps before conv3, fc6 and fc7, and add up their halves of fc8's sums.

Each computes what one process computes, to rounding, and weights travel between them in the layout of one process.
Shapes: B images of all ranks, b of this one, F units, K classes.
"""

import copy
from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from topfive.errors import TopfiveError
from topfive.model_spec import Architecture
from topfive_training.collectives import Kind, Links
from topfive_training.network import AlexNet, LocalResponseNorm

Mode: TypeAlias = Literal["data", "hybrid", "towers"]

_FIRST: Final = -1
"""In the tables below: the first rank alone holds it."""
_HYBRID: Final[Mapping[str, int]] = {
    "fc6.weight": 0,
    "fc6.bias": 0,
    "batch_norm6": 0,
    "fc7.weight": 1,
    "fc7.bias": _FIRST,
    "batch_norm7": 0,
    "fc8.weight": 1,
    "fc8.bias": _FIRST,
}
_TOWERS: Final[Mapping[str, int]] = {
    **{f"conv{i}": 0 for i in range(1, 6)},
    **{f"batch_norm{i}": 0 for i in range(1, 8)},
    "fc6": 0,
    "fc7": 0,
    "fc8.weight": 1,
    "fc8.bias": _FIRST,
}
_SPLITS: Final[Mapping[Mode, Mapping[str, int]]] = {"data": {}, "hybrid": _HYBRID, "towers": _TOWERS}
"""Tensor, or layer -> the dimension along which the ranks divide it; what is not here is whole on every rank."""


class ParallelError(TopfiveError, ValueError):
    """A way of working together that this network, batch or number of ranks does not allow."""


def check_parallel(mode: Mode, architecture: Architecture, *, batch: int, ranks: int) -> None:
    """See that so many ranks can train this network on batches of so many images in this way.

    Raises:
        ParallelError: they cannot; the message says what would do.
    """
    if mode not in get_args(Mode):
        raise ParallelError(f"--parallel is {mode!r}; it must be {' or '.join(get_args(Mode))}")
    if mode == "towers":
        if ranks != 2:
            raise ParallelError(
                f"--parallel towers needs 2 processes, one for each tower, and there are {ranks}"
            )
        if architecture.name != "alexnet-2012":
            raise ParallelError(
                f"--parallel towers needs two towers that normalise apart, as in alexnet-2012; {architecture.name} does "
                "not have them: use --parallel hybrid"
            )
    if mode == "hybrid":
        with torch.device("meta"):
            units = AlexNet(architecture).fc6.out_features
        if units % ranks:
            raise ParallelError(
                f"--parallel hybrid divides the {units} units of fc6 among the ranks, and {ranks} does not divide them; "
                "use another number of processes"
            )
        if batch % ranks:
            raise ParallelError(
                f"--parallel hybrid needs as many images on every rank, and {ranks} does not divide a batch of {batch}; "
                "use another batch size or number of processes"
            )


class Parallelism:
    """One network on several ranks; a rank's part of it, and the way back to the whole.

    The gradients after a backward of `sum of losses / images of the global batch` are those of the mean loss.
    """

    def __init__(self, mode: Mode, whole: AlexNet, *, rank: int, ranks: int) -> None:
        """Divide `whole`, which must be equal on all ranks and on the device of this one.

        Args:
            mode: the way; `check_parallel` has allowed it.
            whole: stays as it is with `hybrid` and `towers` until `collect`; with `data` it is what is trained.
            rank: number of this rank.
            ranks: how many there are; with one, nothing is divided.
        """
        self.mode = mode if ranks > 1 else "data"
        self.whole = whole
        self.links = Links(rank, ranks)
        self.part: AlexNet = whole if self.mode == "data" else self._divide()
        """What this rank trains: give its parameters to the optimiser."""
        self.model: nn.Module = self.part
        """What a step calls with this rank's images and their dropout keys, for their logits."""
        if ranks > 1 and self.mode == "data":
            self.model = _summing_ddp(whole, self.links)
        elif self.mode == "hybrid":
            self.model = _Hybrid(self.part, self.links)

    @property
    def share(self) -> tuple[int, int]:
        """Which share of the batch this rank takes, of how many; the towers take it all."""
        return (0, 1) if self.mode == "towers" else (self.links.rank, self.links.size)

    def collect(self) -> None:
        """Bring `whole` up to date with what the ranks have trained; every rank must ask."""
        if self.part is not self.whole:
            self.whole.load_state_dict(self.gather(self.part.state_dict(), self.whole.state_dict()))

    @torch.no_grad()
    def distribute(self) -> None:
        """The other way: take this rank's part of `whole`."""
        if self.part is not self.whole:
            whole = self.whole.state_dict()
            self.part.load_state_dict(
                {name: self.slice(name, whole[name]) for name in self.part.state_dict()}
            )

    def slice(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that is shaped like the parameter or buffer `name`."""
        dim = self._split(name, whole)
        return whole if dim is None or dim == _FIRST else whole.chunk(self.links.size, dim)[self.links.rank]

    @torch.no_grad()
    def gather(self, parts: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The ranks' parts put together; every rank must ask.

        Args:
            parts: this rank's, by the names of parameters or buffers; perhaps not those that another rank holds alone.
            like: tensors of all the names and of the whole's shapes.
        """
        quiet = Links(self.links.rank, self.links.size)  # saving is no part of the traffic of training
        wholes = {}
        for name, example in like.items():
            dim = self._split(name, example)
            if dim is None:
                wholes[name] = parts[name]
            elif dim == _FIRST:
                whole = parts[name].clone() if self.links.rank == 0 else torch.empty_like(example)
                dist.broadcast(whole, 0)
                wholes[name] = whole
            else:
                wholes[name] = quiet.raw_gather(parts[name], dim)
        return wholes

    def _split(self, name: str, whole: Tensor) -> int | None:
        splits = _SPLITS[self.mode]
        if whole.ndim == 0:  # batch norm's count of batches
            return None
        return splits.get(name, splits.get(name.partition(".")[0]))

    def _divide(self) -> AlexNet:
        """A network of this rank's layers, which exchange what each needs of the others."""
        part = copy.deepcopy(self.whole)
        state = part.state_dict()
        first, size = self.links.rank == 0, self.links.size
        for layer, batch_norm in part.named_children():
            if isinstance(batch_norm, nn.BatchNorm1d | nn.BatchNorm2d) and layer in _SPLITS[self.mode]:
                setattr(part, layer, type(batch_norm)(batch_norm.num_features // size))
        if self.mode == "hybrid":
            part.fc6 = _linear(nn.Linear, part.fc6, outputs=size)
            part.fc7 = _linear(_ScatteredUnits, part.fc7, inputs=size, bias=first).joined(self.links)
            part.fc8 = _linear(_ScatteredImages, part.fc8, inputs=size, bias=first).joined(self.links)
        else:
            for layer in ("conv1", "conv2", "conv3", "conv4", "conv5"):
                both = layer == "conv3"
                setattr(part, layer, _tower_convolution(getattr(part, layer), self.links if both else None))
            part.fc6 = _linear(_BothTowers, part.fc6, outputs=size).joined(self.links)
            part.fc7 = _linear(_BothTowers, part.fc7, outputs=size).joined(self.links)
            part.fc8 = _linear(_SummedTowers, part.fc8, inputs=size, bias=first).joined(self.links)
            part.norm1, part.norm2 = _tower_norm(part.norm1), _tower_norm(part.norm2)
        part.to(self.whole.fc8.weight).train(self.whole.training)  # device and type
        if self.whole.conv2.weight.is_contiguous(memory_format=torch.channels_last):
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        part.load_state_dict({name: self.slice(name, state[name]) for name in part.state_dict()})
        after_fc6, after_fc7 = part.fc6.out_features, self.whole.fc7.out_features // size
        if part.shape.dropout_before:
            # The first dropout sees what is still whole.
            part.dropout7.first_unit = self.links.rank * after_fc6
        else:
            part.dropout6.first_unit = self.links.rank * after_fc6
            part.dropout7.first_unit = self.links.rank * after_fc7
        return part


def _summing_ddp(module: nn.Module, links: Links) -> DistributedDataParallel:
    ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
    ddp.register_comm_hook(None, links.sum_bucket)
    return ddp


class _Convolutions(nn.Module):
    """The layers below fc6, as a module of their own for `DistributedDataParallel`."""

    def __init__(self, network: AlexNet) -> None:
        super().__init__()
        for name, child in network.named_children():
            if name not in {"fc6", "fc7", "fc8", "batch_norm6", "batch_norm7"}:
                self.add_module(name, child)
        self.run = network.convolutional

    def forward(self, images_bCHW: Tensor) -> Tensor:
        return self.run(images_bCHW)


class _Hybrid(nn.Module):
    """Convolutions on this rank's images, a slice of the fully-connected layers on everybody's."""

    def __init__(self, part: AlexNet, links: Links) -> None:
        super().__init__()
        self.convolutions = _summing_ddp(_Convolutions(part), links)
        self.part = part
        self.links = links

    def forward(self, images_bCHW: Tensor, dropout_keys_b: Tensor | None = None) -> Tensor:
        """Logits [b, K]."""
        units_BF = self.links.gather(self.convolutions(images_bCHW), 0)
        keys_B = None if dropout_keys_b is None else self.links.raw_gather(dropout_keys_b, 0)
        return self.part.head(self.part.fully_connected(units_BF, keys_B))


class _Joined(nn.Linear):
    """A slice of a fully-connected layer that exchanges with the other ranks."""

    links: Links

    def joined(self, links: Links) -> "_Joined":
        self.links = links
        return self


class _ScatteredUnits(_Joined):
    """Holds some of the inputs' columns; the sum over the ranks is divided by units."""

    def forward(self, part_BF: Tensor) -> Tensor:
        return self.links.sum_scatter(super().forward(part_BF), 1)


class _ScatteredImages(_Joined):
    """Holds some of the inputs' columns; the sum over the ranks is divided by images."""

    def forward(self, part_BF: Tensor) -> Tensor:
        return self.links.sum_scatter(super().forward(part_BF), 0)


class _BothTowers(_Joined):
    """Holds some of the units; sees those of both towers."""

    def forward(self, part_BF: Tensor) -> Tensor:
        return super().forward(self.links.gather(part_BF, 1))


class _SummedTowers(_Joined):
    """Holds the columns of one tower; both get the sum."""

    def forward(self, part_BF: Tensor) -> Tensor:
        return self.links.sum_shared(super().forward(part_BF))


class _BothTowersConvolution(nn.Conv2d):
    """Holds the maps of one tower; sees those of both."""

    links: Links

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        return super().forward(self.links.gather(input, 1))


def _linear(
    kind: type[Any], whole: nn.Linear, *, inputs: int = 1, outputs: int = 1, bias: bool = True
) -> Any:
    """An empty layer of `kind` with a fraction of the inputs or outputs of `whole`."""
    return kind(
        whole.in_features // inputs, whole.out_features // outputs, bias=bias and whole.bias is not None
    )


def _tower_convolution(whole: nn.Conv2d, links: Links | None) -> nn.Conv2d:
    """An empty layer with the filters of one tower; with `links` it sees both towers' maps."""
    kind = nn.Conv2d if links is None else _BothTowersConvolution
    layer = kind(
        whole.in_channels // whole.groups,
        whole.out_channels // 2,
        whole.kernel_size,  # type: ignore[arg-type]
        whole.stride,  # type: ignore[arg-type]
        whole.padding,  # type: ignore[arg-type]
        bias=whole.bias is not None,
    )
    if isinstance(layer, _BothTowersConvolution) and links is not None:
        layer.links = links
    return layer


def _tower_norm(whole: nn.Module) -> nn.Module:
    if not isinstance(whole, LocalResponseNorm):
        return whole
    return LocalResponseNorm(
        whole.channels // 2, towers=1, size=whole.size, alpha=whole.alpha, beta=whole.beta, k=whole.k
    )


def expected_traffic(
    mode: Mode, architecture: Architecture, *, batch: int, value_bytes: int = 4
) -> dict[Kind, int]:
    """Bytes of one step as `Traffic.payload` counts them, from the architecture alone.

    Args:
        mode: the way.
        architecture: without batch norm, whose running statistics travel besides.
        batch: images of all ranks together.
        value_bytes: of one weight or activation.
    """
    with torch.device("meta"):
        network = AlexNet(architecture)
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    convolutions = sum(size for name, size in sizes.items() if name.startswith("conv"))
    maps, units = network.fc6.in_features, network.fc7.out_features
    classes = network.fc8.out_features
    if mode == "data":
        return {"all-reduce": sum(sizes.values()) * value_bytes}
    if mode == "hybrid":
        # Forward: the maps are gathered, fc7's and fc8's sums scattered; backward is the reverse of each.
        activations = batch * (maps + units + classes) * value_bytes
        keys = batch * 8
        return {
            "all-reduce": convolutions * value_bytes,
            "all-gather": activations + keys,
            "reduce-scatter": activations,
        }
    after_pool2 = network.conv2.out_channels * 13 * 13
    exchanged = batch * (after_pool2 + maps + units) * value_bytes
    return {
        "all-gather": exchanged,
        "reduce-scatter": exchanged,
        "all-reduce": batch * classes * value_bytes,
    }
