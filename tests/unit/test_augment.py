"""Changed images: each change by itself against numpy, and all of them within their bounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.errors import ConfigError
from workers import augment
from workers.augment import Augment, cut, moved

IMAGES = np.random.default_rng(0).normal(size=(4, 2, 5, 7)).astype(np.float32)


def shifted(image: np.ndarray, down: int, right: int) -> np.ndarray:
    """By hand, with zeros from outside."""
    out = np.zeros_like(image)
    height, width = image.shape[-2:]
    for row in range(height):
        for column in range(width):
            if 0 <= row - down < height and 0 <= column - right < width:
                out[..., row, column] = image[..., row - down, column - right]
    return out


def check_moves() -> None:
    shifts = np.array([[0, 0], [1, -2], [-4, 0], [9, 9]])
    found = augment.moved(IMAGES, np.zeros(4), shifts)
    np.testing.assert_array_equal(
        found, [shifted(image, *move) for image, move in zip(IMAGES, shifts, strict=True)]
    )
    square = IMAGES[..., :5]
    quarter = augment.moved(square, np.full(4, np.pi / 2), np.zeros((4, 2), int))
    np.testing.assert_allclose(quarter, np.rot90(square, axes=(2, 3)), atol=1e-6)
    both = augment.moved(square, np.full(4, np.pi / 2), np.full((4, 2), 1))
    np.testing.assert_allclose(both, shifted(np.rot90(square, axes=(2, 3)), 1, 1), atol=1e-6)


def test_shifts_and_quarter_turns_are_those_of_numpy() -> None:
    check_moves()


def clockwise(images: np.ndarray, turns: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    return moved(images, -turns, shifts)


def up_and_left(images: np.ndarray, turns: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    return moved(images, turns, -shifts)


def from_the_other_side(images: np.ndarray, turns: np.ndarray, shifts: np.ndarray) -> np.ndarray:
    if turns.any():
        return moved(images, turns, shifts)
    return np.stack([np.roll(image, tuple(move), (1, 2)) for image, move in zip(images, shifts, strict=True)])


@pytest.mark.parametrize("mistake", [clockwise, up_and_left, from_the_other_side])
def test_a_mistake_in_moving_is_caught(mistake: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augment, "moved", mistake)
    with pytest.raises(AssertionError):
        check_moves()


def test_between_pixels_it_interpolates() -> None:
    ramp = np.broadcast_to(np.arange(9.0, dtype=np.float32), (1, 1, 9, 9))
    turn = np.radians(30)
    found = moved(ramp, np.array([turn]), np.zeros((1, 2), int))[0, 0, 3:6, 3:6]
    place = np.arange(-1, 2)
    np.testing.assert_allclose(found, 4 + np.cos(turn) * place - np.sin(turn) * place[:, None], atol=1e-6)


def test_a_cut_out_square_is_zero_as_far_as_it_lies_inside() -> None:
    ones = np.ones((3, 2, 5, 7), np.float32)
    found = cut(ones, np.array([[2, 3], [0, 0], [4, 6]]), 3)
    assert (found == 0).sum(axis=(2, 3)).tolist() == [[9, 9], [4, 4], [4, 4]]
    assert not found[0, :, 1:4, 2:5].any()
    assert ones.all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 99), channels=st.integers(0, 2))
def test_images_keep_their_shape_and_the_draw_is_the_seeds(seed: int, channels: int) -> None:
    shape = (3, channels, 6, 6) if channels else (3, 6, 6)
    images = np.random.default_rng(seed).uniform(0.5, 1, shape).astype(np.float32)
    kept = images.copy()
    change = Augment.parsed("shift:1,rotate:20,noise:0.01,cutout:2")
    first, again, other = (change(images, np.random.default_rng(s)) for s in (seed, seed, seed + 1))
    assert (first.shape, first.dtype) == (shape, np.float32)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(images, kept)
    assert (first == 0).any()


def test_each_change_stays_within_its_bounds() -> None:
    one = np.zeros((500, 9, 9), np.float32)
    one[:, 4, 4] = 1
    places = np.argwhere(Augment(shift=2)(one, np.random.default_rng(0)))[:, 1:]
    assert len(places) == 500
    assert {tuple(place) for place in places.tolist()} == {(r, c) for r in range(2, 7) for c in range(2, 7)}
    noise = Augment(noise=0.5)(np.zeros((500, 9, 9), np.float32), np.random.default_rng(0))
    assert noise.std() == pytest.approx(0.5, rel=0.02)
    holes = Augment(cutout=3)(np.ones((500, 9, 9), np.float32), np.random.default_rng(0)) == 0
    assert set(holes.sum(axis=(1, 2)).tolist()) == {4, 6, 9}
    row = np.zeros((500, 9, 9), np.float32)
    row[:, 4, :] = 1
    turned = Augment(rotate=10)(row, np.random.default_rng(0))
    assert turned[:, 4, 4] == pytest.approx(1)
    assert not turned[:, [0, 1, 2, 6, 7, 8], :].any()  # 4 tan 10 degrees is below 1
    assert len(np.unique(turned[:, 4, 8])) > 400


def test_it_is_written_as_it_is_read() -> None:
    assert Augment.parsed("shift:2,rotate:10,noise:0.1,cutout:8") == Augment(2, 10.0, 0.1, 8)
    assert Augment.parsed("cutout:3") == Augment(cutout=3)
    for wrong in (
        "",
        "shift",
        "shift:0",
        "shift:1.5",
        "shift:-1",
        "rotate:181",
        "noise:0",
        "shift:1,shift:2",
        "blur:1",
    ):
        with pytest.raises(ConfigError, match="must be some of shift:PIXELS"):
            Augment.parsed(wrong)
