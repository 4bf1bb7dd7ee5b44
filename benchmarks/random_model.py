"""A checkpoint with random weights: its arithmetic, and so its speed, is that of a trained network.

    python benchmarks/random_model.py runs/random [--classes 1000] [--width 1] [--architecture alexnet-2012]
    topfive export runs/random --out models_full --images PHOTOGRAPHS                      # alexnet: fp32
    topfive export runs/random --out models_full --images PHOTOGRAPHS --precision int8     # alexnet_int8

The weights are those that training starts from, which quantize well enough for int8's limits.
"""

import argparse
from pathlib import Path

from topfive.model_spec import ModelSpec, Preprocessing
from topfive_training.checkpoint import Classifier, save_model
from topfive_training.initialization import initialize
from topfive_training.network import AlexNet
from topfive_training.recipe import make_recipe


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder of the checkpoint")
    parser.add_argument("--architecture", default="alexnet-2012")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--width", type=float, default=1.0)
    options = parser.parse_args()
    overrides = {"architecture": options.architecture, "width": options.width}
    recipe = make_recipe("2012", overrides)
    spec = ModelSpec(
        architecture=recipe.network(options.classes),
        preprocessing=Preprocessing(
            short_side=recipe.short_side, crop=recipe.crop, mean=(122.0, 117.0, 104.0)
        ),
        labels=tuple(f"class {number}" for number in range(options.classes)),
    )
    network = AlexNet(spec.architecture)
    initialize(network, recipe)
    options.out.mkdir(parents=True, exist_ok=True)
    save_model(options.out, Classifier(spec, network=network.eval()))


if __name__ == "__main__":
    main()
