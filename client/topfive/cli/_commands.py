"""The commands by name.

A command names its function as `"module:function"`; cyclopts imports the module when that command runs, so
`topfive --help` loads no part.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command, and what it takes to run it."""

    name: str
    """As typed; two words for a command of a sub-command group (`import caffe`)."""
    target: str
    """`"module:function"`; the function's annotations and docstring are the command's options and help."""
    summary: str
    """The line that `topfive --help` shows."""
    extra: str = ""
    """The optional dependencies that it needs, or empty when the base install is enough."""
    extra_for: str = ""
    """What needs the extra; empty: all of it does."""
    usage: str = ""
    """The words after its name in the line of usage, where cyclopts would call one that may be left out `[ARGS]`."""

    @property
    def module(self) -> str:
        """Name of the module that holds the function."""
        return self.target.partition(":")[0]

    def is_named_by(self, tokens: Sequence[str]) -> bool:
        """Whether a command line of these words runs this command."""
        words = self.name.split()
        return list(tokens[: len(words)]) == words


COMMANDS = (
    Command(
        name="prepare",
        target="topfive_training.prepare:prepare",
        summary="Turn folders or archives of photographs into shards for training.",
        extra="training",
    ),
    Command(
        name="train",
        target="topfive_training.cli:train",
        summary="Train AlexNet on class folders or shards.",
        extra="training",
    ),
    Command(
        name="evaluate",
        target="topfive_training.cli:evaluate",
        summary="Measure a checkpoint's top-1 and top-5 error.",
        extra="training",
    ),
    Command(
        name="report",
        target="topfive_training.report:report",
        summary="Write one HTML page about a training run: curves, filters, answers.",
        extra="training",
        usage="[OPTIONS] RUN [DATA]",
    ),
    Command(
        name="demo-images",
        target="topfive_training.demo_images:demo_images",
        summary="Draw a small ten-class picture set to try everything on.",
        extra="training",
    ),
    Command(
        name="import torchvision",
        target="topfive_training.importers.cli:import_torchvision",
        summary="Make a checkpoint of torchvision's published AlexNet weights.",
        extra="training",
        usage="--out PATH [OPTIONS] [FILE]",
    ),
    Command(
        name="import caffe",
        target="topfive_training.importers.cli:import_caffe",
        summary="Make a checkpoint of a Caffe model (.caffemodel).",
        extra="training",
    ),
    Command(
        name="export",
        target="topfive_export.cli:export",
        summary="Turn a checkpoint into a verified ONNX model repository.",
        extra="export",
    ),
    Command(
        name="benchmark",
        target="topfive_export.benchmark:benchmark",
        summary="Time every variant of a model on this machine, and say which to serve.",
        extra="server",
        usage="[OPTIONS] [MODELS]",
    ),
    Command(
        name="serve",
        target="topfive_server.cli:serve",
        summary="Serve a model repository over HTTP.",
        extra="server",
    ),
    Command(
        name="classify",
        target="topfive.cli.classify:classify",
        summary="Send images to a server and print their labels.",
    ),
    Command(
        name="score",
        target="topfive.cli.score:score",
        summary="Label a whole folder into a JSON lines, CSV or Parquet file.",
        extra="scoring",
        extra_for="`--model`, a Parquet file and a folder at a URL",
    ),
    Command(
        name="load-test",
        target="topfive.cli.load_test:load_test",
        summary="Find out how much a server can take, and how long its answers then need.",
    ),
    Command(
        name="doctor",
        target="topfive.cli.doctor:doctor",
        summary="Say what is installed, what is missing and how to get it.",
    ),
    Command(
        name="completion",
        target="topfive.cli.completion:completion",
        summary="Print the script that completes this command in bash, zsh or fish.",
    ),
)
GROUPS = {"import": "Make a checkpoint of weights published elsewhere."}
