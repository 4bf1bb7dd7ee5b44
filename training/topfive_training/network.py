"""AlexNet as a `torch.nn.Module`, from an `Architecture`.

`alexnet-2012` is the published two-GPU network on one device: its two towers are groups of channels, the first half
being tower a. `alexnet-2014` is the single tower of "One weird trick for parallelizing convolutional neural networks",
as torchvision publishes it. `alexnet-caffe` and `caffenet` are the two networks that Caffe published as
`bvlc_alexnet` and `bvlc_reference_caffenet`, in case such weights are imported.

Shapes: B images, C channels, H rows, W columns, F units, K classes.
"""

import dataclasses
import math
from typing import Final, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topfive.model_spec import Architecture, ArchitectureName
from topfive_training.randomness import uniform
from topfive_training.response_norm import across_maps, normalize_response, within_maps

LAYERS: Final = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
"""The layers with weights, from image to answer."""
TORCHVISION_NAMES: Final = {
    "features.0": "conv1",
    "features.3": "conv2",
    "features.6": "conv3",
    "features.8": "conv4",
    "features.10": "conv5",
    "classifier.1": "fc6",
    "classifier.4": "fc7",
    "classifier.6": "fc8",
}
"""Layer names of torchvision's `alexnet` -> ours, in `alexnet-2014`; `.weight` and `.bias` follow either."""

_GRID: Final = 6
"""Side of the last feature map: 227 -> 55 -> 27 -> 13 -> 6."""


_Block: TypeAlias = Literal["norm-pool-relu", "relu-norm-pool", "relu-pool-norm"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shape:
    """What the published networks fix beyond the number of channels."""

    convolutions: tuple[int, int, int, int, int]
    towers: int
    first_padding: int
    blocks: tuple[_Block, _Block]
    """What follows conv1 and conv2, in order."""
    norm_k: float
    norm_towers: int
    """Into how many groups of maps the response norm is divided: Caffe's crosses the seam between the towers."""
    dropout_before: bool


_SHAPES: Final[dict[ArchitectureName, _Shape]] = {
    "alexnet-2012": _Shape(
        convolutions=(96, 256, 384, 384, 256),
        towers=2,
        first_padding=0,
        blocks=("norm-pool-relu", "relu-norm-pool"),
        norm_k=2.0,
        norm_towers=2,
        dropout_before=False,
    ),
    "alexnet-2014": _Shape(
        convolutions=(64, 192, 384, 256, 256),
        towers=1,
        first_padding=2,
        blocks=("relu-norm-pool", "relu-norm-pool"),
        norm_k=2.0,
        norm_towers=1,
        dropout_before=True,
    ),
    "alexnet-caffe": _Shape(
        convolutions=(96, 256, 384, 384, 256),
        towers=2,
        first_padding=0,
        blocks=("relu-norm-pool", "relu-norm-pool"),
        norm_k=1.0,
        norm_towers=1,
        dropout_before=False,
    ),
    "caffenet": _Shape(
        convolutions=(96, 256, 384, 384, 256),
        towers=2,
        first_padding=0,
        blocks=("relu-pool-norm", "relu-pool-norm"),
        norm_k=1.0,
        norm_towers=1,
        dropout_before=False,
    ),
}


def published_architecture(name: ArchitectureName, *, classes: int = 1000) -> Architecture:
    """The named network with every decision as its paper has it (2014: no normalisation; all but 2012: inverted dropout)."""
    if name == "alexnet-2014":
        return Architecture(name=name, classes=classes, normalization="none", dropout_scaling="training")
    scaling: Literal["evaluation", "training"] = "evaluation" if name == "alexnet-2012" else "training"
    return Architecture(name=name, classes=classes, dropout_scaling=scaling)


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to a positive multiple of 8: both towers stay equal, and vector units full."""
    return max(8, 8 * round(channels * width / 8))


class _ResponseNorm(nn.Module):
    """What the two response norms share: `b = a / (k + weighted sum of squares) ** beta`, in fp32 at least."""

    beta: float
    k: float

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def make_weight(self, maps_BCHW: Tensor) -> Tensor:
        """The weights of the sum, on the device and in the type of these maps."""
        raise NotImplementedError

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        """Normalised maps of the same shape."""
        # Sums of squares in bf16 would lose the small ones.
        with torch.autocast(maps_BCHW.device.type, enabled=False):
            maps_BCHW = maps_BCHW.float() if maps_BCHW.dtype == torch.bfloat16 else maps_BCHW
            return normalize_response(maps_BCHW, self._weight(maps_BCHW), beta=self.beta, k=self.k)

    def _weight(self, maps_BCHW: Tensor) -> Tensor:
        """Made once: a dozen small kernels would cost a GPU more than the norm itself.

        No buffer, which `DistributedDataParallel` would send around in every step, and a network that is made without
        data and then given its weights would be left without.
        """
        if torch.compiler.is_compiling():
            return self.make_weight(maps_BCHW)
        key = maps_BCHW.shape[1], maps_BCHW.device, maps_BCHW.dtype
        if key not in self._made:
            with torch.inference_mode(mode=False):  # or training after it could not use it
                self._made[key] = self.make_weight(maps_BCHW)
        return self._made[key]


class LocalResponseNorm(_ResponseNorm):
    """Response normalisation across neighbouring maps of the same tower (paper section 3.3).

    `b_i = a_i / (k + alpha / size * sum_j a_j^2) ** beta` over the `size` maps j centred on i, never across the seam
    between towers. Dividing alpha by the window's size is what the original *code* did; the paper's formula, read
    literally, does not.
    """

    def __init__(
        self,
        channels: int,
        *,
        towers: int,
        size: int = 5,
        alpha: float = 1e-4,
        beta: float = 0.75,
        k: float = 2.0,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.towers = towers
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def make_weight(self, maps_BCHW: Tensor) -> Tensor:
        """A band, in each tower by itself."""
        return across_maps(self.channels, maps_BCHW, towers=self.towers, size=self.size, alpha=self.alpha)

    def extra_repr(self) -> str:
        """The constants."""
        return (
            f"{self.channels}, towers={self.towers}, size={self.size}, alpha={self.alpha}, "
            f"beta={self.beta}, k={self.k}"
        )


class WithinMapNorm(_ResponseNorm):
    """Response normalisation within each map: `cnorm2` of the original code, which the paper does not mention.

    `b = a / (k + alpha / size^2 * sum a^2) ** beta` over the `size` x `size` window centred on each value, with zeros
    beyond the map's edge. The constants are those of cuda-convnet's run 145: `layers-145.cfg` has `type=rnorm, size=5`,
    `layer-params-145.cfg` has `scale=0.001, pow=0.75`; `layer.py` divides the scale by the size squared and takes
    `minDiv=1`, here k, where none is given; the kernel cuts the window off at the edge and divides by no count.
    """

    def __init__(self, *, size: int = 5, alpha: float = 1e-3, beta: float = 0.75, k: float = 1.0) -> None:
        super().__init__()
        if size % 2 == 0:
            raise ValueError(f"the window of the norm within maps is {size}; it must be odd")
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def make_weight(self, maps_BCHW: Tensor) -> Tensor:
        """A square, for each map by itself."""
        return within_maps(maps_BCHW.shape[1], maps_BCHW, size=self.size, alpha=self.alpha)

    def extra_repr(self) -> str:
        """The constants."""
        return f"size={self.size}, alpha={self.alpha}, beta={self.beta}, k={self.k}"


class Dropout(nn.Module):
    """Dropout with the original's scaling or today's, and masks that can be tied to the image.

    `scaling="evaluation"` (2012): training multiplies by the 0/1 mask alone, evaluation by (1 - p). With
    `scaling="training"` the mask is 0 or 1/(1 - p) and evaluation leaves everything as it is.

    With a key for each image, its mask is a function of key, layer and unit alone: the same on however many ranks,
    and after a resume. Without keys it comes from torch's global generator.
    """

    def __init__(self, p: float, *, scaling: str, layer: int) -> None:
        super().__init__()
        self.p = p
        self.scaling = scaling
        self.layer = layer
        self.first_unit = 0
        """Index of the first unit that arrives here; a rank that holds a slice of the layer sets it."""

    def forward(self, units_BF: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """The units, some dropped; `keys_B` is int64."""
        if self.p == 0:
            return units_BF
        if not self.training:
            return units_BF * (1 - self.p) if self.scaling == "evaluation" else units_BF
        if keys_B is None:
            kept_BF = torch.rand_like(units_BF, dtype=torch.float32) >= self.p
        else:
            last = self.first_unit + units_BF.shape[1]
            units_F = torch.arange(self.first_unit, last, device=keys_B.device)
            kept_BF = uniform(keys_B, units_F + (self.layer << 32)) >= self.p
        mask_BF = kept_BF.to(units_BF.dtype)
        return units_BF * (mask_BF if self.scaling == "evaluation" else mask_BF / (1 - self.p))

    def extra_repr(self) -> str:
        """Probability and scaling."""
        return f"p={self.p}, scaling={self.scaling}"


class AlexNet(nn.Module):
    """The network alone: images with the mean already subtracted in, logits out.

    Order in `alexnet-2012`, as the original code has it: conv1, norm, pool, ReLU; conv2, ReLU, norm, pool; conv3, ReLU;
    conv4, ReLU; conv5, pool, ReLU; fc6, ReLU, dropout; fc7, ReLU, dropout; fc8. Sizes round up as there
    (227 -> 55 -> 27 -> 13 -> 6; a 224 image is padded by three zeros at its right and bottom). With `within_map_norm` the
    code's undocumented `cnorm2` stands between norm2 and its pool.

    With `normalization="batch"` a batch norm stands between every layer but fc8 and its ReLU, and no response norm.

    The weights start as torch starts them; `topfive_training.initialization` sets them as a recipe asks.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.shape = shape = _SHAPES[architecture.name]
        c1, c2, c3, c4, c5 = (scaled(c, architecture.width) for c in shape.convolutions)
        units, towers, batch = (
            scaled(4096, architecture.width),
            shape.towers,
            architecture.normalization == "batch",
        )
        conv3_towers = 1  # the only convolution that sees both towers

        def convolution(
            inputs: int, outputs: int, size: int, groups: int, *, stride: int = 1, padding: int
        ) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=not batch)

        self.conv1 = convolution(3, c1, 11, 1, stride=4, padding=shape.first_padding)
        self.conv2 = convolution(c1, c2, 5, towers, padding=2)
        self.conv3 = convolution(c2, c3, 3, conv3_towers, padding=1)
        self.conv4 = convolution(c3, c4, 3, towers, padding=1)
        self.conv5 = convolution(c4, c5, 3, towers, padding=1)
        self.fc6 = nn.Linear(c5 * _GRID * _GRID, units, bias=not batch)
        self.fc7 = nn.Linear(units, units, bias=not batch)
        self.fc8 = nn.Linear(units, architecture.classes)

        lrn = architecture.normalization == "lrn"

        def response_norm(channels: int) -> nn.Module:
            if not lrn:
                return nn.Identity()
            return LocalResponseNorm(channels, towers=shape.norm_towers, k=shape.norm_k)

        self.norm1 = response_norm(c1)
        self.norm2 = response_norm(c2)
        self.cnorm2 = WithinMapNorm() if architecture.within_map_norm else nn.Identity()
        self.batch_norm1 = _batch_norm2d(batch, c1)
        self.batch_norm2 = _batch_norm2d(batch, c2)
        self.batch_norm3 = _batch_norm2d(batch, c3)
        self.batch_norm4 = _batch_norm2d(batch, c4)
        self.batch_norm5 = _batch_norm2d(batch, c5)
        self.batch_norm6 = nn.BatchNorm1d(units) if batch else nn.Identity()
        self.batch_norm7 = nn.BatchNorm1d(units) if batch else nn.Identity()
        overlapping = architecture.overlapping_pooling
        # 3x3 rounds up as the original does; 2x2 rounds down, which gives the same sizes (paper section 3.4).
        self.pool = nn.MaxPool2d(3 if overlapping else 2, 2, ceil_mode=overlapping)
        scaling = architecture.dropout_scaling
        self.dropout6 = Dropout(architecture.dropout, scaling=scaling, layer=6)
        self.dropout7 = Dropout(architecture.dropout, scaling=scaling, layer=7)

    def forward(self, images_BCHW: Tensor, dropout_keys_B: Tensor | None = None) -> Tensor:
        """Logits [B, K] of float images, the mean already subtracted; the keys tie dropout to the image."""
        units_BF = self.fully_connected(self.convolutional(images_BCHW), dropout_keys_B)
        return self.head(units_BF)

    def features(self, images_BCHW: Tensor) -> Tensor:
        """What fc8 sees [B, F]: fc7 after its ReLU, scaled as at evaluation (a network in evaluation mode)."""
        return self.fully_connected(self.convolutional(images_BCHW))

    def head(self, features_BF: Tensor) -> Tensor:
        """Logits [B, K] of `features`."""
        logits_BK: Tensor = self.fc8(features_BF)
        return logits_BK

    def convolutional(self, images_BCHW: Tensor) -> Tensor:
        """conv1 to pool5, flattened [B, C * 6 * 6]."""
        first, second = self.shape.blocks
        maps = self._block(first, self.batch_norm1(self.conv1(self._padded(images_BCHW))), self.norm1)
        maps = self._block(second, self.batch_norm2(self.conv2(maps)), self.norm2, self.cnorm2)
        maps = F.relu(self.batch_norm3(self.conv3(maps)))
        maps = F.relu(self.batch_norm4(self.conv4(maps)))
        # ReLU after the pool is the same as before it, on a quarter of the values.
        maps = F.relu(self.pool(self.batch_norm5(self.conv5(maps))))
        if maps.shape[2:] != (_GRID, _GRID):
            height, width = images_BCHW.shape[2:]
            raise ValueError(
                f"images of {height} x {width} pixels leave a last feature map of {maps.shape[2]} x {maps.shape[3]}; "
                f"it must be {_GRID} x {_GRID}, as crops of 227 (alexnet-2012) and 224 (alexnet-2014) leave"
            )
        return maps.flatten(1)

    def fully_connected(self, units_BF: Tensor, dropout_keys_B: Tensor | None = None) -> Tensor:
        """fc6 and fc7, of the flattened maps."""
        if self.shape.dropout_before:
            units_BF = self.dropout6(units_BF, dropout_keys_B)
            units_BF = F.relu(self.batch_norm6(self.fc6(units_BF)))
            units_BF = self.dropout7(units_BF, dropout_keys_B)
            return F.relu(self.batch_norm7(self.fc7(units_BF)))
        units_BF = self.dropout6(F.relu(self.batch_norm6(self.fc6(units_BF))), dropout_keys_B)
        dropped_BF: Tensor = self.dropout7(F.relu(self.batch_norm7(self.fc7(units_BF))), dropout_keys_B)
        return dropped_BF

    def _block(self, order: _Block, maps: Tensor, *norms: nn.Module) -> Tensor:
        def norm(maps: Tensor) -> Tensor:
            for one in norms:
                maps = one(maps)
            return maps

        if order == "norm-pool-relu":
            return F.relu(self.pool(norm(maps)))
        maps = F.relu(maps)
        result: Tensor = norm(self.pool(maps)) if order == "relu-pool-norm" else self.pool(norm(maps))
        return result

    def _padded(self, images_BCHW: Tensor) -> Tensor:
        """Zeros at the right and bottom where conv1 would not cover the image: the original's sizes round up."""
        if self.shape.towers == 1:
            return images_BCHW
        height, width = images_BCHW.shape[2:]
        bottom, right = (math.ceil((side - 11) / 4) * 4 + 11 - side for side in (height, width))
        return F.pad(images_BCHW, (0, right, 0, bottom)) if bottom or right else images_BCHW


def _batch_norm2d(wanted: bool, channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels) if wanted else nn.Identity()
