"""Decoding, statistics and batches: exact sums, and randomness that depends on the image alone."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.training.train_runs import paint_photographs

from topfive.model_spec import Preprocessing
from topfive.preprocessing import decode
from topfive_training.batches import color_noise, steps_per_epoch, training_batches
from topfive_training.dataset import ImageList, scan
from topfive_training.randomness import normal, order, sample_keys, uniform
from topfive_training.recipe import Recipe
from topfive_training.squares import Opened, Squares, open_squares

SMALL = Recipe(short_side=230, width=0.02, batch_size=8, images_per_crop=1)
PREPROCESSING = Preprocessing(short_side=230, crop=227)


def images_of(folder: Path) -> ImageList:
    return scan(folder, validation_fraction=0.2, seed=0).training


def open_all(images: ImageList, cache: Path, limit_bytes: int = 2**30) -> Opened:
    return open_squares(
        images,
        PREPROCESSING,
        230,
        folder=cache,
        limit_bytes=limit_bytes,
        workers=2,
        with_statistics=True,
        progress=lambda done, total: None,
    )


@pytest.fixture(scope="module")
def squares(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Squares:
    return open_all(images_of(photographs), tmp_path_factory.mktemp("cache")).squares


def test_squares_and_statistics_are_those_of_a_plain_loop(photographs: Path, tmp_path: Path) -> None:
    images = images_of(photographs)
    opened = open_all(images, tmp_path)
    plain = np.stack(
        [
            np.asarray(decode(images.path(i).read_bytes(), PREPROCESSING, crop=230).image)
            for i in range(len(images))
        ]
    )
    assert all(np.array_equal(opened.squares[i], plain[i]) for i in range(len(images)))
    found = opened.statistics
    assert found is not None
    wide = plain.astype(np.float64)
    np.testing.assert_allclose(found.mean_image, wide.mean(0).transpose(2, 0, 1), rtol=1e-6)
    colors = wide.reshape(-1, 3)
    np.testing.assert_allclose(found.mean, colors.mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.std, colors.std(0), rtol=1e-9)
    # The components times their transpose are the covariance again.
    components = found.color_components.double().numpy()
    np.testing.assert_allclose(components @ components.T, np.cov(colors.T, bias=True), rtol=1e-4, atol=1e-2)


def test_without_room_for_a_cache_the_pixels_are_the_same(photographs: Path, tmp_path: Path) -> None:
    images = images_of(photographs)
    cached, decoded = open_all(images, tmp_path), open_all(images, tmp_path / "other", limit_bytes=0)
    assert cached.squares.cached
    assert not decoded.squares.cached
    for opened in (cached, decoded):
        first, *_ = training_batches(opened.squares, SMALL, epoch=0, first_step=0, rank=0, ranks=1, workers=2)
        if opened is cached:
            expected = first
    for one, other in zip(expected, first, strict=True):
        assert torch.equal(one, other)


def test_the_second_time_nothing_is_decoded(photographs: Path, tmp_path: Path) -> None:
    images = images_of(photographs)
    open_all(images, tmp_path)

    def never(done: int, total: int) -> None:
        raise AssertionError("decoded again")

    open_squares(
        images,
        PREPROCESSING,
        230,
        folder=tmp_path,
        limit_bytes=2**30,
        workers=1,
        with_statistics=True,
        progress=never,
    )


def test_unreadable_files_are_named_and_left_out(tmp_path: Path) -> None:
    folder = paint_photographs(tmp_path / "photographs", 3)
    (folder / "blue" / "notes.txt").write_text("not an image")
    whole = (folder / "green" / "000.jpg").read_bytes()
    (folder / "green" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "red" / "empty.png").touch()
    images = ImageList(
        root=folder,
        names=("blue/000.jpg", "blue/notes.txt", "green/cut.jpg", "green/001.jpg", "red/empty.png"),
        classes=(0, 0, 1, 1, 2),
    )
    for _ in range(2):  # the second time from the record
        opened = open_all(images, tmp_path / "cache")
        assert opened.unreadable.keys() == {"blue/notes.txt", "green/cut.jpg", "red/empty.png"}
        assert "truncated" in opened.unreadable["green/cut.jpg"]
        assert opened.squares.images.names == ("blue/000.jpg", "green/001.jpg")
        assert opened.squares.classes_N.tolist() == [0, 1]
        expected = decode((folder / "green/001.jpg").read_bytes(), PREPROCESSING, crop=230).image
        assert np.array_equal(opened.squares[1], np.asarray(expected))


def batches(squares: Squares, recipe: Recipe = SMALL, **options: Any) -> list[Any]:
    place: dict[str, Any] = {"epoch": 0, "first_step": 0, "rank": 0, "ranks": 1, "workers": 1} | options
    return list(training_batches(squares, recipe, **place))


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_ranks_batches_together_are_those_of_one(squares: Squares, ranks: int) -> None:
    whole = batches(squares)
    parts = [batches(squares, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len(whole) == steps_per_epoch(len(squares), 8) == 3
    for step, batch in enumerate(whole):
        for position, tensor in enumerate(batch):
            assert torch.equal(torch.cat([part[step][position] for part in parts]), tensor)


def test_a_batch_in_mid_epoch_is_the_same_when_it_is_the_first(squares: Squares) -> None:
    for one, other in zip(batches(squares)[2], batches(squares, first_step=2)[0], strict=True):
        assert torch.equal(one, other)


def test_epochs_and_seeds_differ(squares: Squares) -> None:
    first = batches(squares)[0]
    for other in (
        batches(squares, epoch=1)[0],
        batches(squares, dataclasses.replace(SMALL, seed=1))[0],
    ):
        assert not torch.equal(first.images_BHWC, other.images_BHWC)
        assert not torch.equal(first.keys_B, other.keys_B)


def test_every_crop_is_a_crop_of_its_image(squares: Squares) -> None:
    keys = {key: index for index, key in enumerate(sample_keys(0, 0, torch.arange(len(squares))).tolist())}
    mirrored, corners = 0, set()
    for batch in batches(squares):
        for crop, key in zip(batch.images_BHWC.numpy(), batch.keys_B.tolist(), strict=True):
            square = squares[keys[key]]
            (y, x, flipped), *rest = [
                (y, x, flipped)
                for y in range(4)
                for x in range(4)
                for flipped in (False, True)
                if np.array_equal(square[y : y + 227, x : x + 227][:, :: -1 if flipped else 1], crop)
            ]
            assert not rest
            mirrored += flipped
            corners.add((y, x))
    assert 4 <= mirrored <= 20
    assert len(corners) > 8


def test_images_may_share_a_crop_as_in_the_original(squares: Squares) -> None:
    shared = dataclasses.replace(SMALL, images_per_crop=8)
    keys = {key: index for index, key in enumerate(sample_keys(0, 0, torch.arange(len(squares))).tolist())}
    for batch in batches(squares, shared):
        corners = set()
        for crop, key in zip(batch.images_BHWC.numpy(), batch.keys_B.tolist(), strict=True):
            square = squares[keys[key]]
            corners |= {
                (y, x, step)
                for y in range(4)
                for x in range(4)
                for step in (1, -1)
                if np.array_equal(square[y : y + 227, x : x + 227][:, ::step], crop)
            }
        assert len(corners) == 1


def test_color_noise_has_the_covariance_of_the_colors() -> None:
    components = torch.tensor([[30.0, 2.0, 0.0], [28.0, -3.0, 1.0], [25.0, 1.0, -2.0]])
    noise = color_noise(sample_keys(0, 0, torch.arange(40_000)), components, 0.1)
    assert noise.shape == (40_000, 3, 1, 1)
    covariance = np.cov(noise[:, :, 0, 0].numpy().T)
    np.testing.assert_allclose(covariance, (0.01 * components @ components.T).numpy(), rtol=0.05, atol=0.01)


def test_numbers_are_uniform_normal_and_independent() -> None:
    keys = sample_keys(5, 7, torch.arange(20_000))
    numbers = uniform(keys, torch.arange(4)).numpy()
    assert 0 <= numbers.min() < 1e-3
    assert 1 - 1e-3 < numbers.max() < 1
    np.testing.assert_allclose(numbers.mean(0), 0.5, atol=0.01)
    np.testing.assert_allclose(numbers.var(0), 1 / 12, atol=0.003)
    np.testing.assert_allclose(np.corrcoef(numbers.T), np.eye(4), atol=0.03)
    drawn = normal(keys, torch.arange(2)).numpy()
    np.testing.assert_allclose(drawn.mean(0), 0, atol=0.03)
    np.testing.assert_allclose(drawn.std(0), 1, atol=0.03)


def test_an_order_is_a_permutation_and_differs_by_epoch() -> None:
    first, second = order(0, 0, 1000), order(0, 1, 1000)
    assert sorted(first.tolist()) == list(range(1000))
    assert (first == second).sum() < 20
