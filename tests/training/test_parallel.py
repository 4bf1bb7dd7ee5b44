from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from topfive.model_spec import Architecture
from topfive_training.collectives import Traffic
from topfive_training.initialization import initialize
from topfive_training.network import AlexNet, published_architecture
from topfive_training.optimizer import make_optimizer, set_rates
from topfive_training.parallel import Mode, ParallelError, Parallelism, check_parallel, expected_traffic
from topfive_training.ranks import Ranks, launch
from topfive_training.recipe import Recipe
from topfive_training.schedule import Phase

BATCH, STEPS, CLASSES = 4, 20, 5
SMALL = Architecture(width=0.05, classes=CLASSES, within_map_norm=True)
OTHERS = {
    "batch norm": Architecture(width=0.05, classes=CLASSES, normalization="batch"),
    "dropout before": Architecture(
        name="alexnet-2014", width=0.05, classes=CLASSES, normalization="none", dropout_scaling="training"
    ),
    "norm across towers": Architecture(name="caffenet", width=0.05, classes=CLASSES),
}
"""Networks whose layers are divided in other ways."""


def batches(steps: int, side: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images_BCHW = 60 * torch.randn(BATCH, 3, side, side, generator=generator).double()
        classes_B = torch.randint(0, CLASSES, (BATCH,), generator=generator)
        yield images_BCHW, classes_B, torch.arange(BATCH) + 1000 * step


def train(ranks: Ranks, mode: Mode, architecture: Architecture, steps: int) -> dict[str, Any]:
    """So many steps in float64, where rounding is far below what any mistake would change."""
    recipe = Recipe(width=architecture.width)
    network = AlexNet(architecture).train()
    initialize(network, recipe)
    parallelism = Parallelism(mode, network.double(), rank=ranks.rank, ranks=ranks.size)
    optimizer = make_optimizer(parallelism.part, recipe)
    share, shares = parallelism.share
    mine = slice(share * BATCH // shares, (share + 1) * BATCH // shares)
    losses = []
    for images_BCHW, classes_B, keys_B in batches(steps, 224 if architecture.name == "alexnet-2014" else 227):
        parallelism.links.traffic.reset()
        logits_BK = parallelism.model(images_BCHW[mine], keys_B[mine])
        loss = F.cross_entropy(logits_BK, classes_B[mine], reduction="sum") / BATCH
        loss.backward()  # type: ignore[no-untyped-call]
        set_rates(optimizer, Phase(rate=0.01, first_rate=0.01, color_noise=0.0))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(ranks.total(loss.detach()) if shares > 1 else loss.detach()))
    parallelism.collect()
    velocities = {name: optimizer.velocity(p) for name, p in parallelism.part.named_parameters()}
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        "traffic": dict(parallelism.links.traffic.payload),
        **{
            f"velocity {n}": v
            for n, v in parallelism.gather(velocities, dict(network.named_parameters())).items()
        },
        **{f"weight {name}": tensor for name, tensor in network.state_dict().items()},
    }


def several_runs(ranks: Ranks, folder: Path, modes: list[tuple[Mode, str]]) -> int:
    for mode, name in modes:
        found = train(ranks, mode, *((SMALL, STEPS) if name == "2012" else (OTHERS[name], 3)))
        # Every rank writes: all must have the same whole.
        torch.save(found, folder / f"{mode} {name} {ranks.rank}.pt")
    return 0


@pytest.fixture(scope="module")
def one_process() -> dict[str, dict[str, Any]]:
    networks = {name: train(Ranks(), "data", network, 3) for name, network in OTHERS.items()}
    return {"2012": train(Ranks(), "data", SMALL, STEPS), **networks}


def check_agreement(
    folder: Path, modes: list[tuple[Mode, str]], one_process: dict[str, dict[str, Any]], size: int
) -> None:
    for mode, name in modes:
        expected = one_process[name]
        for rank in range(size):
            found = torch.load(folder / f"{mode} {name} {rank}.pt")
            assert found.keys() == expected.keys()
            network = SMALL if name == "2012" else OTHERS[name]
            if network.normalization != "batch":
                assert found["traffic"] == expected_traffic(mode, network, batch=BATCH, value_bytes=8)
            for key in expected.keys() - {"traffic"}:
                where = f"{mode}, {size} ranks, {name}, rank {rank}: {key}"
                assert torch.allclose(found[key], expected[key], rtol=1e-9, atol=1e-11), where


def test_two_ranks_train_as_one(tmp_path: Path, one_process: dict[str, dict[str, Any]]) -> None:
    modes: list[tuple[Mode, str]] = [(mode, "2012") for mode in get_args(Mode)]
    modes += [("hybrid", "dropout before"), ("hybrid", "norm across towers"), ("towers", "batch norm")]
    launch(2, several_runs, tmp_path, modes)
    check_agreement(tmp_path, modes, one_process, 2)
    losses = one_process["2012"]["losses"]
    assert losses.std() > 0.01, "nothing was trained"


def test_four_ranks_train_as_one(tmp_path: Path, one_process: dict[str, dict[str, Any]]) -> None:
    modes: list[tuple[Mode, str]] = [("data", "2012"), ("hybrid", "2012")]
    launch(4, several_runs, tmp_path, modes)
    check_agreement(tmp_path, modes, one_process, 4)


def test_the_calculated_traffic_is_that_of_the_published_networks() -> None:
    network = published_architecture("alexnet-2012")
    assert expected_traffic("data", network, batch=1024) == {"all-reduce": 4 * 60_965_224}
    hybrid = expected_traffic("hybrid", network, batch=1024)
    assert hybrid["all-reduce"] == 4 * (34_944 + 307_456 + 885_120 + 663_936 + 442_624)  # conv1 to conv5
    assert hybrid["reduce-scatter"] == 4 * 1024 * (9216 + 4096 + 1000)
    towers = expected_traffic("towers", network, batch=128)
    assert towers["all-gather"] == 4 * 128 * (256 * 13 * 13 + 9216 + 4096)


def test_what_a_rank_sends_is_the_ring_algorithms_count() -> None:
    traffic = Traffic(ranks=4)
    traffic.count("all-reduce", 1000)
    traffic.count("all-gather", 400)
    traffic.count("all-gather", 400)
    assert traffic.payload == {"all-reduce": 1000, "all-gather": 800}
    assert traffic.sent_by_each == 2100


@pytest.mark.parametrize(
    ("mode", "architecture", "batch", "ranks", "sentence"),
    [
        ("towers", SMALL, 8, 4, "needs 2 processes, one for each tower, and there are 4"),
        ("towers", OTHERS["dropout before"], 8, 2, "alexnet-2014 does not have them: use --parallel hybrid"),
        ("towers", OTHERS["norm across towers"], 8, 2, "caffenet does not have them"),
        ("hybrid", SMALL, 32, 32, "divides the 208 units of fc6 among the ranks, and 32 does not"),
        ("hybrid", SMALL, 7, 2, "2 does not divide a batch of 7"),
        ("model", SMALL, 8, 2, "--parallel is 'model'; it must be data or hybrid or towers"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    mode: Any, architecture: Architecture, batch: int, ranks: int, sentence: str
) -> None:
    with pytest.raises(ParallelError, match=sentence):
        check_parallel(mode, architecture, batch=batch, ranks=ranks)


def test_what_can_be_divided_is_allowed() -> None:
    for mode in get_args(Mode):
        check_parallel(mode, SMALL, batch=8, ranks=2)
    check_parallel("data", SMALL, batch=7, ranks=3)
