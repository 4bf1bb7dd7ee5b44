"""From a checkpoint's modules to the modules that are exported: the same network, with everything else around it.

Shapes: B images, H rows, W columns, C colours or maps, K classes, T top answers, F features, V views.
"""

import copy
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from topfive_export.norms import exported_norm
from topfive_export.variant import Variant
from topfive_training.checkpoint import Classifier
from topfive_training.network import AlexNet, LocalResponseNorm, WithinMapNorm

TOP: Final = 5
"""Answers per image; fewer where there are fewer classes."""
INPUT_NAME: Final = "image"
OUTPUT_NAMES: Final = ("probabilities", "classes", "scores", "features")


class Answers(NamedTuple):
    """The outputs of every graph, in the order of `OUTPUT_NAMES`."""

    probabilities_BT: Tensor
    classes_BT: Tensor
    scores_BK: Tensor
    features_BF: Tensor


class FoldedConvolution(nn.Module):
    """The first convolution, taking raw 0-255 pixels: the division is in its weights, the mean in what it adds.

    A convolution is linear, so `conv((x - mean) / std)` is `conv'(x) - conv'(mean)`: a number for each map where the
    mean is one colour and nothing is padded, else a constant map, borders included. Both are exact.
    """

    def __init__(self, network: AlexNet, mean: Tensor, std: Tensor, crop: int) -> None:
        super().__init__()
        conv = network.conv1
        self.stride, self.padding = conv.stride, conv.padding
        weight = conv.weight.detach().double() / std.double().reshape(1, 3, 1, 1)
        # As the network itself pads, before the convolution, images whose side leaves a remainder.
        mean_BCHW = network._padded(mean.double().expand(1, 3, crop, crop))
        padded = mean_BCHW.shape[2:] != (crop, crop) or any(side != 0 for side in conv.padding)
        bias = torch.zeros(conv.out_channels, dtype=torch.float64)
        if conv.bias is not None:
            bias = conv.bias.detach().double()
        if mean.shape[1:] == (1, 1) and not padded:
            bias -= torch.einsum("mchw,c->m", weight, mean.double().flatten())
            offset = None
        else:
            offset = F.conv2d(mean_BCHW, weight, None, conv.stride, self.padding).float()
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())
        self.register_buffer("offset", offset)
        self.weight: Tensor
        self.bias: Tensor
        self.offset: Tensor | None

    def forward(self, pixels_BCHW: Tensor) -> Tensor:
        """Maps of float pixels, 0-255."""
        maps_BCHW = F.conv2d(pixels_BCHW, self.weight, self.bias, self.stride, self.padding)
        return maps_BCHW if self.offset is None else maps_BCHW - self.offset


class CentralResize(nn.Module):
    """uint8 pixels of any size to the central square that `topfive.preprocessing.decode` cuts, within a grey level.

    An antialiased bilinear resample is two matrices, rows and columns, whose entries follow from the size alone.
    ONNX's Resize cannot place the square where it belongs, half a pixel off its own grid, and differs by device.
    """

    def __init__(self, short_side: int, crop: int) -> None:
        super().__init__()
        self.short_side = short_side
        self.crop = crop

    def forward(self, images_BHWC: Tensor) -> Tensor:
        """Float pixels [B, C, crop, crop] with whole values, 0-255."""
        _, height, width, _ = images_BHWC.shape
        shorter = torch.sym_min(height, width)  # type: ignore[no-untyped-call]
        pixels_BCHW = images_BHWC.permute(0, 3, 1, 2).to(torch.float32)
        # Columns first, and whole grey levels after each, as Pillow does: halves are common, and go up.
        pixels_BCHW = (pixels_BCHW @ self._weights(width, shorter).transpose(0, 1) + 0.5).floor()
        return (self._weights(height, shorter) @ pixels_BCHW + 0.5).floor()

    def _weights(self, length: int, shorter: int) -> Tensor:
        """Weight of each source pixel in each pixel of the result, [crop, length], as Pillow computes them."""
        scale = shorter / self.short_side
        reach = torch.sym_max(scale, 1.0)  # type: ignore[no-untyped-call]
        start = (length - scale * self.crop) / 2
        centers = torch.arange(self.crop, dtype=torch.float32) * scale + (start + scale / 2)
        pixels = torch.arange(length, dtype=torch.float32) + 0.5
        weights = (1 - (pixels[None, :] - centers[:, None]).abs() / reach).clamp(min=0)
        normalized: Tensor = weights / weights.sum(dim=1, keepdim=True)
        return normalized


class ExportGraph(nn.Module):
    """What all graphs share: a network on normalised (or raw, if folded) pixels, and the answers from its logits."""

    def __init__(self, classifier: Classifier, variant: Variant) -> None:
        super().__init__()
        self.classes = classifier.spec.architecture.classes
        self.in_half = variant.precision == "fp16"
        preprocessing = classifier.spec.preprocessing
        self.resize = (
            CentralResize(preprocessing.short_side, preprocessing.crop) if variant.graph == "image" else None
        )
        self.network = copy.deepcopy(classifier.network)
        for name, module in list(self.network.named_children()):
            if isinstance(module, LocalResponseNorm | WithinMapNorm):
                setattr(self.network, name, exported_norm(module, variant))
        self.folded = (
            variant.precision != "fp16" and variant.views == 1 and not self._loses_range(classifier, variant)
        )
        if self.folded:
            folded = FoldedConvolution(
                classifier.network, classifier.mean, classifier.std, preprocessing.crop
            )
            self.network.conv1 = folded  # type: ignore[assignment]  # it is called as the convolution is
        if self.in_half:
            self.network.half()
        self.register_buffer("mean", classifier.mean)
        self.register_buffer("std", classifier.std)
        self.mean: Tensor
        self.std: Tensor

    @staticmethod
    def _loses_range(classifier: Classifier, variant: Variant) -> bool:
        """Whether folding would put a large constant into maps that are rounded to 8 bits before it is taken away."""
        return variant.precision == "int8" and (
            classifier.mean.shape[1:] != (1, 1) or classifier.network.shape.first_padding != 0
        )

    def forward(self, image: Tensor) -> Answers:
        """Answers for uint8 RGB images [B, H, W, C]; the argument's name is the input's."""
        if self.resize is not None:
            pixels_BCHW = self.resize(image)
        else:
            pixels_BCHW = image.permute(0, 3, 1, 2).to(torch.float32)
        if not self.folded:
            pixels_BCHW = (pixels_BCHW - self.mean) / self.std
        scores_BK, features_BF = self.classify(pixels_BCHW)
        probabilities_BT, classes_BT = scores_BK.topk(min(TOP, self.classes), dim=1)
        return Answers(probabilities_BT, classes_BT, scores_BK, features_BF)

    def classify(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Softmax over all classes, in fp32 whatever the network's own precision; and the features."""
        if self.in_half:
            pixels_BCHW = pixels_BCHW.half()
        features_BF = self.network.features(pixels_BCHW)
        logits_BK = self.network.head(features_BF)
        return logits_BK.float().softmax(dim=1), features_BF.float()


class TenViewGraph(ExportGraph):
    """Corners, centre and their mirror images of the `short_side` square: softmax and features averaged.

    Krizhevsky et al. 2012, section 4.1.
    """

    def __init__(self, classifier: Classifier, variant: Variant) -> None:
        super().__init__(classifier, variant)
        preprocessing = classifier.spec.preprocessing
        self.crop = preprocessing.crop
        edge = preprocessing.short_side - preprocessing.crop
        self.corners = ((0, 0), (0, edge), (edge, 0), (edge, edge), (edge // 2, edge // 2))
        if classifier.mean_image is not None:
            self.mean = classifier.mean_image

    def classify(self, pixels_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The averages over the ten views."""
        crop = self.crop
        views = [pixels_BCHW[:, :, top : top + crop, left : left + crop] for top, left in self.corners]
        views += [view.flip(3) for view in views]
        stacked = torch.stack(views, dim=1).flatten(0, 1)
        scores, features = super().classify(stacked)
        scores_BVK = scores.reshape(-1, len(views), scores.shape[1])
        features_BVF = features.reshape(-1, len(views), features.shape[1])
        return scores_BVK.mean(dim=1), features_BVF.mean(dim=1)


def build_graph(classifier: Classifier, variant: Variant) -> ExportGraph:
    """The module to export, in evaluation mode; the classifier itself stays as it is."""
    kind = ExportGraph if variant.views == 1 else TenViewGraph
    return kind(classifier, variant).eval()


def multiply_adds(classifier: Classifier, *, views: int = 1) -> int:
    """Multiply-adds of the convolutions and fully-connected layers for one image; biases and norms are not counted."""
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        if isinstance(module.weight, Tensor):
            total += output.numel() * module.weight[0].numel()

    layers = [layer for layer in classifier.network.children() if isinstance(layer, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    crop = classifier.spec.preprocessing.crop
    try:
        with torch.no_grad():
            classifier.network(torch.zeros(1, 3, crop, crop))
    finally:
        for handle in handles:
            handle.remove()
    return views * total
