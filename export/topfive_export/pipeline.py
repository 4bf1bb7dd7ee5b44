"""One export, from checkpoint to published version: trace, write, check, load, answer, compare, time, publish."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from topfive._version import __version__
from topfive.model_spec import Json, ModelSpec
from topfive_export import onnx_file
from topfive_export.corpus import Picture, decoded, drawn_pictures, given_pictures, raw_pixels
from topfive_export.gate import (
    BATCH_SIZES,
    Answered,
    Comparison,
    Disagreement,
    NotFinite,
    accuracy,
    answer_onnx,
    answer_torch,
    compare,
    enforce,
    enforce_accuracy,
)
from topfive_export.graphs import TOP, build_graph, multiply_adds
from topfive_export.quantize import MINIMUM_IMAGES, quantize
from topfive_export.repository import (
    CONFIG_FILE,
    LABELS_FILE,
    REPORT_FILE,
    REPORT_SCHEMA,
    Interface,
    check_compatible,
    check_name,
    choose_version,
    config_text,
    sha256,
    staged,
)
from topfive_export.timing import latencies_ms, machine
from topfive_export.variant import ExportError, Limits, OptionError, Precision, Target, Variant, Views
from topfive_training.checkpoint import WEIGHTS_FILE, Classifier, load_model

WHOLE_BATCHES: Final = (1, 3)
"""Batch sizes at which the whole graph answers each picture (a batch has one size of image)."""


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What to export, and where to."""

    run: Path
    """The checkpoint: a folder with `model.json` and `model.safetensors`."""
    out: Path
    """The model repository; made if it is not there."""
    name: str = "alexnet"
    """Name of the model; variants add to it."""
    version: int | None = None
    """Version number; the next free one by default."""
    images: Path | None = None
    """Folder of images to verify on, besides the drawn ones."""
    max_images: int = 256
    """How many of them at most."""
    precision: Precision = "fp32"
    target: Target = "cpu"
    views: Views = 1

    def __post_init__(self) -> None:
        """Reject nonsense, naming the field."""
        check_name(self.name)
        if self.version is not None and self.version < 1:
            raise OptionError(f"--version is {self.version}; it must be a whole number from 1 on")
        if not 1 <= self.max_images <= 100_000:
            raise OptionError(f"--max-images is {self.max_images}; it must be between 1 and 100,000")

    def variants(self) -> tuple[Variant, ...]:
        """What is published together, the one to be served last: plain fp32 brings its whole graph along."""
        variant = Variant(precision=self.precision, target=self.target, views=self.views)
        return (Variant(graph="image"), variant) if variant == Variant() else (variant,)


@dataclass(frozen=True, kw_only=True)
class Published:
    """One version that has appeared in the repository."""

    path: Path
    report: dict[str, Any]


def run_export(config: ExportConfig, *, say: Callable[[str], None] = lambda _: None) -> list[Published]:
    """Export, verify and publish; `say` gets a line for each stage.

    Raises:
        ExportError: it cannot be done, or the graph is beyond its limits; the repository is as it was.
        topfive_training.checkpoint.CheckpointError: the checkpoint is missing or damaged.
        OSError: the repository cannot be written; it is as it was.
    """
    if config.out.exists() and not config.out.is_dir():
        raise ExportError(f"--out {config.out} is not a folder; give one that is, or that is yet to be made")
    variants = config.variants()
    classifier = load_model(config.run)
    spec = _without_paths(classifier.spec)
    identity = checkpoint_sha256(config.run / WEIGHTS_FILE, spec)
    number = choose_version(config.out, config.name, variants, identity, config.version)
    for variant in variants:
        name = variant.model_name(config.name)
        check_compatible(config.out / name, spec.labels, interface(classifier, variant))
    # The repository first: whether it can be written is known at once, the rest takes a while.
    with staged(config.out) as staging:
        calibration, pictures = _corpus(config, spec.labels, say)
        reports = []
        for variant in variants:
            name = variant.model_name(config.name)
            folder = staging.version(name, number)
            say(f"{name}: exporting")
            try:
                report = _export_one(
                    classifier,
                    variant,
                    folder,
                    spec=spec,
                    family=config.name,
                    pictures=pictures,
                    calibration=calibration,
                    say=say,
                )
            except Disagreement as error:
                raise Disagreement(f"{config.run}: {error}") from error
            report["checkpoint"] = {"sha256": identity}
            report["version"] = number
            say(f"{name}: {_summary(report)}")
            _write_json(folder / REPORT_FILE, report)
            (folder.parent / LABELS_FILE).write_text("".join(f"{label}\n" for label in spec.labels), "utf-8")
            text = config_text(name, interface(classifier, variant), variant)
            (folder.parent / CONFIG_FILE).write_text(text, "utf-8")
            reports.append(report)
        paths = staging.publish()
    return [Published(path=path, report=report) for path, report in zip(paths, reports, strict=True)]


def _export_one(
    classifier: Classifier,
    variant: Variant,
    folder: Path,
    *,
    spec: ModelSpec,
    family: str,
    pictures: Sequence[Picture],
    calibration: Sequence[Picture],
    say: Callable[[str], None],
) -> dict[str, Any]:
    side = input_side(spec, variant)
    model = onnx_file.trace(build_graph(classifier, variant), variant=variant, side=side)
    quantization: dict[str, Any] = {}
    if variant.precision == "int8":
        model, quantization = _quantized(model, classifier, variant, calibration, say)
    onnx_file.finish(model, spec=spec, variant=variant, family=family)
    path = onnx_file.write(model, folder)
    onnx_file.check(path)
    session = onnx_file.load(path)
    verified = (_verify_whole if variant.graph == "image" else _verify_hot)(
        session, classifier, variant, pictures
    )
    return {
        "schema_version": REPORT_SCHEMA,
        "variant": variant.as_json(family),
        "interface": interface(classifier, variant).as_json(),
        "multiply_adds": multiply_adds(classifier, views=variant.views),
        "file": {
            "sha256": sha256(path),
            "bytes": sum(file.stat().st_size for file in folder.iterdir()),
            "opset": onnx_file.OPSET,
        },
        **verified,
        **quantization,
        "latency_ms": {"provider": session.get_providers()[0], "batch": latencies_ms(session, side)},
        "made_with": {
            "topfive": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "system": platform.system(),
            **machine(),
        },
    }


def _corpus(
    config: ExportConfig, labels: Sequence[str], say: Callable[[str], None]
) -> tuple[list[Picture], list[Picture]]:
    """Pictures to calibrate int8 on, and those to measure on.

    int8 calibrates on every other one of those given, by name, and is measured on the rest. Drawn ones serve neither: an
    int8 graph is made for what it was calibrated on.

    Raises:
        ExportError: none can be read, or too few were given.
    """
    given = []
    if config.images is not None:
        given = given_pictures(config.images, labels, limit=config.max_images, say=say)
    if config.precision != "int8":
        drawn = drawn_pictures()
        say(f"verifying on {len(drawn) + len(given)} images ({len(given)} given, the others drawn)")
        return [], drawn + given
    if len(given) < MINIMUM_IMAGES:
        raise ExportError(
            f"int8 needs at least {MINIMUM_IMAGES} photographs of the kind it will see, half to calibrate on and half to "
            f"measure on; {len(given)} were given (--images FOLDER)"
        )
    say(f"calibrating on {len(given[::2])} images, verifying on {len(given[1::2])} others")
    return given[::2], given[1::2]


def _quantized(
    model: onnx.ModelProto,
    classifier: Classifier,
    variant: Variant,
    calibration: Sequence[Picture],
    say: Callable[[str], None],
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The int8 model, and what the report says of it."""
    images_MHWC = decoded(calibration, classifier.spec.preprocessing, input_side(classifier.spec, variant))
    reference = answer_torch(classifier, images_MHWC, views=variant.views)
    names = [picture.name for picture in calibration]
    quantized = quantize(model, images_MHWC, reference, variant.limits, names=names, say=say)
    return quantized.model, {
        "quantization": {
            **dataclasses.asdict(quantized.scheme),
            "relative_difference_by_scheme": quantized.tried,
            "calibration_sha256": [picture.sha256 for picture in calibration],
        }
    }


def _verify_hot(
    session: onnxruntime.InferenceSession,
    classifier: Classifier,
    variant: Variant,
    pictures: Sequence[Picture],
) -> dict[str, Any]:
    """The graph against the network, both on the pixels that evaluation sees."""
    side = input_side(classifier.spec, variant)
    images_MHWC = decoded(pictures, classifier.spec.preprocessing, side)
    reference = answer_torch(classifier, images_MHWC, views=variant.views)
    try:
        answers = {size: answer_onnx(session, images_MHWC, size) for size in BATCH_SIZES}
    except NotFinite as error:
        if variant.precision == "fp16":
            raise NotFinite(
                f"{error}: fp16 ends at 65,504, and something within this network is larger; export it in fp32"
            ) from error
        raise
    return _judge(session.get_providers()[0], variant, pictures, reference, answers)


def _verify_whole(
    session: onnxruntime.InferenceSession,
    classifier: Classifier,
    variant: Variant,
    pictures: Sequence[Picture],
) -> dict[str, Any]:
    """The graph on pixels of full size, against the network on what the one preprocessing makes of them."""
    pairs = raw_pixels(pictures)
    lossless = [picture for picture, _ in pairs]
    images_MHWC = decoded(lossless, classifier.spec.preprocessing, classifier.spec.preprocessing.crop)
    reference = answer_torch(classifier, images_MHWC)
    answers = {}
    for size in WHOLE_BATCHES:
        each = [answer_onnx(session, _beside_mirrored(pixels_HWC, size), size) for _, pixels_HWC in pairs]
        # The picture itself is the last of its batch.
        answers[size] = Answered(
            np.concatenate([answer.scores_MK[-1:] for answer in each]),
            np.concatenate([answer.features_MF[-1:] for answer in each]),
        )
    return _judge(session.get_providers()[0], variant, lossless, reference, answers)


def _beside_mirrored(pixels_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """A batch of `size`: the picture, after others of the same size that are not the same."""
    others = [255 - pixels_HWC] * (size - 1)
    return np.stack([*others, pixels_HWC])


def _judge(
    provider: str,
    variant: Variant,
    pictures: Sequence[Picture],
    reference: Answered,
    answers: Mapping[int, Answered],
) -> dict[str, Any]:
    """Compare (`answers` by batch size), refuse what is beyond the limits, and report what was found."""
    what = f"the exported graph ({variant.graph}, {variant.precision}, {variant.views} view(s))"
    limits: Limits = variant.limits
    comparison: Comparison = compare(
        reference, list(answers.values()), [picture.name for picture in pictures], limits
    )
    enforce(comparison, limits, what)
    labels = [picture.label for picture in pictures]
    before, after = (
        accuracy(answered.scores_MK, labels) for answered in (reference, list(answers.values())[-1])
    )
    enforce_accuracy(before, after, limits, what)
    fingerprint = hashlib.sha256("".join(sorted(picture.sha256 for picture in pictures)).encode())
    return {
        "passed": True,
        "reference": "the checkpoint's network in PyTorch, fp32, after topfive.preprocessing.decode",
        "provider": provider,
        "corpus": {
            "drawn": sum(picture.drawn for picture in pictures),
            "given": sum(not picture.drawn for picture in pictures),
            "labelled": sum(label is not None for label in labels),
            "sha256": fingerprint.hexdigest(),
        },
        "batch_sizes": list(answers),
        "limits": dataclasses.asdict(limits),
        "agreement": dataclasses.asdict(comparison),
        "accuracy": None
        if before is None or after is None
        else {"reference": before._asdict(), "graph": after._asdict()},
    }


def interface(classifier: Classifier, variant: Variant) -> Interface:
    """Shapes of what `variant` takes and gives."""
    classes = classifier.spec.architecture.classes
    side = -1 if variant.graph == "image" else input_side(classifier.spec, variant)
    features = classifier.network.fc8.in_features
    return Interface(input=(side, side, 3), top=min(TOP, classes), classes=classes, features=features)


def input_side(spec: ModelSpec, variant: Variant) -> int:
    """Height and width of what the graph is fed in verification and timing, in pixels."""
    return spec.preprocessing.crop if variant.views == 1 else spec.preprocessing.short_side


def checkpoint_sha256(weights: Path, spec: ModelSpec) -> str:
    """Hash of all that decides answers: weights, architecture, preprocessing, labels (not metrics or notes)."""
    record = dataclasses.asdict(spec)
    decisive = {key: record[key] for key in ("architecture", "preprocessing", "labels")}
    text = json.dumps(decisive, sort_keys=True)
    return hashlib.sha256(f"{sha256(weights)}\n{text}".encode()).hexdigest()


def _without_paths(spec: ModelSpec) -> ModelSpec:
    """The description without folders of the machine that trained it: the last part of each path remains."""

    def bare(value: Json) -> Json:
        if isinstance(value, str) and Path(value).is_absolute():
            return Path(value).name
        if isinstance(value, list):
            return [bare(item) for item in value]
        if isinstance(value, dict):
            return {key: bare(item) for key, item in value.items()}
        return value

    return dataclasses.replace(spec, recipe={key: bare(value) for key, value in spec.recipe.items()})


def _summary(report: dict[str, Any]) -> str:
    agreement = report["agreement"]
    # The share that the gate has judged by.
    if report["limits"]["near_ties_excused"]:
        same = f"{agreement['top1_agreement']:.1%} of {agreement['decided_top1']} decided"
    else:
        same = f"{agreement['top1_agreement_all']:.1%} of {agreement['images']}"
    times = ", ".join(f"{ms:.1f} ms for {size}" for size, ms in report["latency_ms"]["batch"].items())
    return (
        f"agrees (largest probability difference {agreement['probability_difference']:.1g}, "
        f"top-1 {same}); "
        f"{report['file']['bytes'] / 1e6:.0f} MB; {times}"
    )


def _write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
