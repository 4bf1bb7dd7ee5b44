import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.training import caffe_files
from tests.training.caffe_files import Layer, published_layers, random_weights
from torch import Tensor

from topfive_training.checkpoint import load_model
from topfive_training.importers.cli import import_caffe
from topfive_training.importers.common import WeightsError

Network = Literal["bvlc_alexnet", "bvlc_reference_caffenet"]
MEAN_BGR = (104.0, 117.0, 123.0)
WIDTH = 1 / 4


def caffe_lrn(x: Tensor) -> Tensor:
    """Caffe's LRN across channels, written out: b_i = a_i / (1 + 1e-4 / 5 * sum of squares of i-2 to i+2) ** .75."""
    x = x.double()
    out = torch.empty_like(x)
    for i in range(x.shape[1]):
        window = x[:, max(0, i - 2) : i + 3]
        out[:, i] = x[:, i] / (1 + 1e-4 / 5 * (window**2).sum(1)) ** 0.75
    return out


def caffe_forward(network: Network, weights: dict[str, Any], images_bgr: Tensor) -> Tensor:
    """The published network on BGR inputs with the mean subtracted, in float64, after its prototxt."""
    w = {
        n: (torch.from_numpy(weight).double(), torch.from_numpy(bias).double())
        for n, (weight, bias) in weights.items()
    }

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 3, 2, ceil_mode=True)

    x = images_bgr.double()
    for name, stride, pad, groups in (("conv1", 4, 0, 1), ("conv2", 1, 2, 2)):
        x = F.relu(F.conv2d(x, w[name][0], w[name][1], stride, pad, groups=groups))
        x = pool(caffe_lrn(x)) if network == "bvlc_alexnet" else caffe_lrn(pool(x))
    for name, groups in (("conv3", 1), ("conv4", 2), ("conv5", 2)):
        x = F.relu(F.conv2d(x, w[name][0], w[name][1], padding=1, groups=groups))
    x = pool(x).flatten(1)
    x = F.relu(F.linear(x, *w["fc6"]))
    x = F.relu(F.linear(x, *w["fc7"]))
    return F.linear(x, *w["fc8"])


def photographs(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.randint(0, 256, (count, 3, 20, 20), generator=generator).float()
    smooth = F.interpolate(coarse, (227, 227), mode="bilinear")
    return smooth.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def write(
    path: Path, layers: list[Layer], generation: caffe_files.Generation = "layer", **weights: Any
) -> Path:
    path.write_bytes(
        caffe_files.net(layers, random_weights(**{"width": WIDTH, "classes": 7, **weights}), generation)
    )
    return path


@pytest.mark.parametrize("generation", ["layer", "layers"])
@pytest.mark.parametrize("network", ["bvlc_alexnet", "bvlc_reference_caffenet"])
def test_answers_are_those_of_caffe(
    tmp_path: Path, network: Network, generation: caffe_files.Generation
) -> None:
    file = write(tmp_path / "net.caffemodel", published_layers(network), generation)
    import_caffe(file, out=tmp_path / "run", mean_bgr=MEAN_BGR, unnamed_classes=True)
    classifier = load_model(tmp_path / "run")

    images_BHWC = photographs()
    bgr = images_BHWC.flip(3).permute(0, 3, 1, 2).float() - torch.tensor(MEAN_BGR).reshape(3, 1, 1)
    expected = caffe_forward(network, random_weights(width=WIDTH, classes=7), bgr)
    with torch.no_grad():
        logits = classifier(images_BHWC)
    assert expected.std() > 0.1
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (
        classifier.spec.architecture.name
        == {
            "bvlc_alexnet": "alexnet-caffe",
            "bvlc_reference_caffenet": "caffenet",
        }[network]
    )
    assert classifier.spec.preprocessing.mean == (123.0, 117.0, 104.0)
    assert classifier.spec.labels == tuple(f"class {i}" for i in range(7))
    assert classifier.spec.recipe["imported_from"] == "caffe"


def test_the_published_shapes_at_full_width(tmp_path: Path) -> None:
    weights = random_weights()
    file = tmp_path / "bvlc_reference_caffenet.caffemodel"
    file.write_bytes(caffe_files.net(published_layers("bvlc_reference_caffenet"), weights, "layers"))
    words = "\n".join(f"n{i:08d} thing {i}, stuff" for i in range(1000))
    (tmp_path / "synset_words.txt").write_text(words)
    import_caffe(file, out=tmp_path / "run", mean_bgr=MEAN_BGR, labels=tmp_path / "synset_words.txt")

    classifier = load_model(tmp_path / "run")
    assert classifier.spec.architecture.width == 1.0
    assert classifier.spec.labels[999] == "thing 999, stuff"
    state = classifier.network.state_dict()
    np.testing.assert_array_equal(state["conv1.weight"].numpy(), weights["conv1"][0][:, ::-1])
    np.testing.assert_array_equal(state["fc6.weight"].numpy(), weights["fc6"][0])
    np.testing.assert_array_equal(state["fc8.bias"].numpy(), weights["fc8"][1])


@pytest.mark.parametrize("old", [False, True])
def test_the_mean_image_is_turned_to_rgb_and_cropped(tmp_path: Path, old: bool) -> None:
    mean_bgr = np.random.default_rng(0).uniform(80, 150, (3, 256, 256)).astype(np.float32)
    (tmp_path / "mean.binaryproto").write_bytes(caffe_files.blob(mean_bgr[None], old=old))
    file = write(tmp_path / "net.caffemodel", published_layers("bvlc_alexnet"))
    import_caffe(file, out=tmp_path / "run", mean=tmp_path / "mean.binaryproto", unnamed_classes=True)
    classifier = load_model(tmp_path / "run")

    images_BHWC = photographs()
    top = (256 - 227) // 2
    bgr = images_BHWC.numpy()[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32)
    bgr -= mean_bgr[:, top : top + 227, top : top + 227]
    expected = caffe_forward("bvlc_alexnet", random_weights(width=WIDTH, classes=7), torch.from_numpy(bgr))
    with torch.no_grad():
        logits = classifier(images_BHWC)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert classifier.spec.preprocessing.mean == pytest.approx(mean_bgr[::-1].mean(axis=(1, 2)))


def test_the_mean_that_the_file_records_is_used(tmp_path: Path) -> None:
    layers = published_layers("bvlc_alexnet")
    means = b"".join(caffe_files.field_float(5, value) for value in MEAN_BGR)
    layers[0] = layers[0]._replace(options=caffe_files.field_int(3, 227) + means)
    file = write(tmp_path / "net.caffemodel", layers)
    import_caffe(file, out=tmp_path / "run", unnamed_classes=True)
    assert load_model(tmp_path / "run").spec.preprocessing.mean == (123.0, 117.0, 104.0)


def replaced(name: str, **changes: Any) -> list[Layer]:
    return [
        layer._replace(**changes) if layer.name == name else layer
        for layer in published_layers("bvlc_alexnet")
    ]


def swapped(first: str, second: str) -> list[Layer]:
    layers = published_layers("bvlc_alexnet")
    places = {layer.name: i for i, layer in enumerate(layers)}
    i, j = places[first], places[second]
    a, b = layers[i], layers[j]
    # Both keep their place in the flow of data.
    layers[i], layers[j] = b._replace(bottom=a.bottom, top=a.top), a._replace(bottom=b.bottom, top=b.top)
    return layers


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        # The order of the original code, which Caffe can express but not per tower.
        (swapped("relu1", "norm1"), "layer 2 of those that compute is norm1 (LRN), where ReLU belongs"),
        (swapped("relu3", "conv4"), "is conv4 (Convolution), where ReLU belongs"),
        (replaced("conv2", options=caffe_files.convolution(256, 5, pad=2)), "group of layer conv2 is 1; AlexNet's is 2"),
        (replaced("conv1", options=caffe_files.convolution(96, 11, stride=2)), "stride of layer conv1 is (2, 2)"),
        (replaced("conv3", options=caffe_files.convolution(384, 3)), "padding of layer conv3 is (0, 0)"),
        (replaced("norm2", options=caffe_files.LRN + caffe_files.field_float(5, 2.0)), "k of layer norm2 is 2.0"),
        (replaced("norm1", options=caffe_files.field_float(2, 5e-4)), "alpha of layer norm1 is 0.0005"),
        (replaced("pool5", options=caffe_files.POOLING + caffe_files.field_int(1, 1)), "method (0 is the maximum)"),
        (replaced("relu6", options=caffe_files.field_float(1, 0.1)), "negative slope of layer relu6"),
        (replaced("relu2", kind="Concat"), "is relu2 (Concat), where ReLU belongs"),
        (replaced("conv4", bottom="conv2"), "layer conv4 (Convolution) does not follow relu3 alone"),
        (replaced("drop7", options=caffe_files.field_float(1, 0.25)), "dropout layers of different rates"),
        (replaced("data", options=caffe_files.field_float(1, 0.0039)), "layer data scales its input by 0.0039"),
        (replaced("data", options=caffe_files.field_int(3, 224)), "crops to 224 pixels"),
        (published_layers("bvlc_alexnet")[:-3], "is the end, where InnerProduct belongs"),
    ],
)  # fmt: skip
def test_other_networks_are_refused_with_the_reason(
    tmp_path: Path, layers: list[Layer], sentence: str
) -> None:
    file = write(tmp_path / "net.caffemodel", layers)
    with pytest.raises(WeightsError, match=re.escape(sentence)):
        import_caffe(file, out=tmp_path / "run", mean_bgr=MEAN_BGR, unnamed_classes=True)
    assert not (tmp_path / "run").exists()


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    weights = dict(random_weights(width=WIDTH, classes=7))
    weights["fc7"] = (weights["fc7"][0][:-8], weights["fc7"][1][:-8])
    file = tmp_path / "net.caffemodel"
    file.write_bytes(caffe_files.net(published_layers("bvlc_alexnet"), weights))
    with pytest.raises(WeightsError, match=re.escape("fc7.weight is [1016, 1024]")):
        import_caffe(file, out=tmp_path / "run", mean_bgr=MEAN_BGR, unnamed_classes=True)


def test_a_blob_that_lies_about_its_size_is_refused(tmp_path: Path) -> None:
    body = caffe_files.field_bytes(5, b"\0" * 8) + caffe_files.field_bytes(
        7, caffe_files.field_bytes(1, b"\x03")
    )
    (tmp_path / "mean.binaryproto").write_bytes(body)
    file = write(tmp_path / "net.caffemodel", published_layers("bvlc_alexnet"))
    with pytest.raises(WeightsError, match=re.escape("holds 2 values, but says that its shape is [3]")):
        import_caffe(file, out=tmp_path / "run", mean=tmp_path / "mean.binaryproto", unnamed_classes=True)


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        (b"\xff" * 100, "is damaged or not a Caffe NetParameter"),
        (b"", "is not a .caffemodel: it holds no layers"),
        (caffe_files.field_bytes(2, caffe_files.field_bytes(1, b"")), "Caffe's first format (V0)"),
    ],
)
def test_files_of_other_kinds_are_refused(tmp_path: Path, contents: bytes, sentence: str) -> None:
    (tmp_path / "net.caffemodel").write_bytes(contents)
    with pytest.raises(WeightsError, match=re.escape(sentence)):
        import_caffe(
            tmp_path / "net.caffemodel", out=tmp_path / "run", mean_bgr=MEAN_BGR, unnamed_classes=True
        )


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "net.caffemodel", published_layers("bvlc_alexnet"))
    file.write_bytes(file.read_bytes()[:-100_000])
    with pytest.raises(WeightsError, match="damaged"):
        import_caffe(file, out=tmp_path / "run", mean_bgr=MEAN_BGR, unnamed_classes=True)


def test_what_is_missing_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "net.caffemodel", published_layers("bvlc_alexnet"))
    with pytest.raises(WeightsError, match="--mean-bgr 104"):
        import_caffe(file, out=tmp_path / "run", unnamed_classes=True)
    with pytest.raises(WeightsError, match="--unnamed-classes to do without"):
        import_caffe(file, out=tmp_path / "run", mean_bgr=MEAN_BGR)
    with pytest.raises(WeightsError, match=r"nowhere\.caffemodel cannot be read: No such file"):
        import_caffe(
            tmp_path / "nowhere.caffemodel", out=tmp_path / "run", mean_bgr=MEAN_BGR, unnamed_classes=True
        )
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    with pytest.raises(WeightsError, match="are 2 names; the weights have 7 classes"):
        import_caffe(file, out=tmp_path / "run", mean_bgr=MEAN_BGR, labels=tmp_path / "labels.txt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").touch()
    with pytest.raises(WeightsError, match="not an empty folder"):
        import_caffe(file, out=tmp_path / "run", mean_bgr=MEAN_BGR, unnamed_classes=True)
