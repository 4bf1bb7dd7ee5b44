"""`topfive export`."""

import sys
from pathlib import Path

from topfive_export.pipeline import ExportConfig, run_export
from topfive_export.variant import Precision, Target, Views


def export(
    run: Path,
    *,
    out: Path = Path("models"),
    name: str = "alexnet",
    version: int | None = None,
    images: Path | None = None,
    max_images: int = 256,
    precision: Precision = "fp32",
    target: Target = "cpu",
    views: Views = 1,
) -> None:
    """Turn a checkpoint into a verified model repository that `topfive serve` and Triton load.

    The export is refused, and the repository left as it was, unless ONNX Runtime's answers agree with the trained
    network's on a corpus of awkward images. Limits and findings are in the version's report.json.

    Args:
        run: the checkpoint, a folder that `topfive train` or `topfive import` has written.
        out: the model repository; made if it is not there.
        name: name of the model.
        version: version number; by default the next free one, or that of the same weights' other variants.
        images: folder of photographs to verify on besides the drawn ones; class folders measure accuracy as well.
            int8 calibrates on half of them.
        max_images: how many of them at most, spread evenly.
        precision: fp32 is the reference; fp16 is for --target cuda, int8 for --target cpu.
        target: the device that the graph is written for.
        views: 10 averages corners, centre and their mirror images, from the 256-pixel square.
    """
    config = ExportConfig(
        run=run,
        out=out,
        name=name,
        version=version,
        images=images,
        max_images=max_images,
        precision=precision,
        target=target,
        views=views,
    )
    for published in run_export(config, say=_say):
        print(published.path)  # noqa: T201  the answer, for scripts


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201  progress
