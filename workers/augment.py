"""Images that differ a little from those that there are, so that few examples go further. Pure; needs no torch.

Images are (n, height, width) or (n, channels, height, width), float32, and what comes from outside is 0. In this
order: turn and shift, noise, cutout (a square of zeros; DeVries and Taylor, 2017).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from broker.errors import ConfigError

Images = NDArray[np.float32]

FORM = (
    "some of shift:PIXELS, rotate:DEGREES, noise:SIGMA and cutout:PIXELS, as shift:2,rotate:10,noise:0.1,cutout:8"
)
IMAGE_DIMENSIONS = (2, 3)  # of one example


@dataclass(frozen=True, slots=True)
class Augment:
    """How far images may differ, each drawn anew at every step: shifted up to `shift` whole pixels along each axis
    and turned up to `rotate` degrees (uniformly), with Gaussian noise of deviation `noise`, and without a square of
    `cutout` pixels a side around any pixel."""

    shift: int = 0
    rotate: float = 0.0
    noise: float = 0.0
    cutout: int = 0

    @classmethod
    def parsed(cls, text: str) -> Augment:
        """From `shift:2,rotate:10,noise:0.1,cutout:8`. Raises ConfigError."""
        pairs = [part.partition(":") for part in text.split(",")]
        names = [name for name, _, _ in pairs]
        if len(set(names)) != len(names) or not all(_fits(name, value) for name, _, value in pairs):
            raise ConfigError(f"setting train.augment = {text!r} must be {FORM}")
        given = {name: float(value) for name, _, value in pairs}
        return cls(
            int(given.get("shift", 0)),
            given.get("rotate", 0.0),
            given.get("noise", 0.0),
            int(given.get("cutout", 0)),
        )

    def __call__(self, images: Images, rng: Generator) -> Images:
        """Other images of the same shape; the given ones stay as they are."""
        out = images.reshape(len(images), -1, *images.shape[-2:])
        if self.shift or self.rotate:
            turns = np.radians(rng.uniform(-self.rotate, self.rotate, len(out)))
            out = moved(out, turns, rng.integers(-self.shift, self.shift, (len(out), 2), endpoint=True))
        if self.noise:
            out = out + rng.normal(0.0, self.noise, out.shape).astype(np.float32)
        if self.cutout:
            centres = rng.integers((0, 0), out.shape[-2:], (len(out), 2))
            out = cut(out, centres, self.cutout)
        return out.reshape(images.shape)


def moved(images: Images, turns: NDArray[np.float64], shifts: NDArray[np.integer]) -> Images:
    """Images (n, channels, height, width) turned about their middle by `turns` (n,) radians, counter-clockwise,
    then shifted by `shifts` (n, 2) pixels down and to the right. Between pixels it interpolates linearly."""
    height, width = images.shape[-2:]
    middle_row, middle_column = (height - 1) / 2, (width - 1) / 2
    row = np.arange(height)[None, :, None] - middle_row - shifts[:, 0, None, None]
    column = np.arange(width)[None, None, :] - middle_column - shifts[:, 1, None, None]
    cosine, sine = np.cos(turns)[:, None, None], np.sin(turns)[:, None, None]
    return _interpolated(
        images, cosine * row + sine * column + middle_row, cosine * column - sine * row + middle_column
    )


def _interpolated(images: Images, rows: NDArray[np.float64], columns: NDArray[np.float64]) -> Images:
    """The images' values at these places, each (n, height, width)."""
    height, width = images.shape[-2:]
    top, left = np.floor(rows).astype(np.intp), np.floor(columns).astype(np.intp)
    below, right = rows - top, columns - left
    numbers = np.arange(len(images))[:, None, None]
    out = np.zeros((len(images), *rows.shape[1:], images.shape[1]), dtype=np.float64)
    for down, vertical in ((0, 1 - below), (1, below)):
        for across, horizontal in ((0, 1 - right), (1, right)):
            r, c = top + down, left + across
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            share = np.where(inside, vertical * horizontal, 0.0)
            values = images[numbers, :, r.clip(0, height - 1), c.clip(0, width - 1)]
            out += share[..., None] * values
    return np.ascontiguousarray(np.moveaxis(out, -1, 1), dtype=np.float32)


def cut(images: Images, centres: NDArray[np.integer], side: int) -> Images:
    """Images with a square of zeros around each centre (row, column), as far as it lies inside."""
    height, width = images.shape[-2:]
    first = centres - side // 2
    rows = np.arange(height) - first[:, :1]
    columns = np.arange(width) - first[:, 1:]
    hit = ((rows >= 0) & (rows < side))[:, :, None] & ((columns >= 0) & (columns < side))[:, None, :]
    return np.where(hit[:, None], np.float32(0), images)


def _fits(name: str, value: str) -> bool:
    if name in ("shift", "cutout"):
        return re.fullmatch(r"[1-9]\d{0,3}", value) is not None
    is_number = re.fullmatch(r"\d{1,4}(\.\d{1,6})?", value) is not None and float(value) > 0
    return is_number and (name == "noise" or (name == "rotate" and float(value) <= 180))
