"""Light, weather and camera: what happens to a drawn scene before it is a picture.

Only additions, multiplications, divisions and comparisons in float32 are used on pixels, which
IEEE 754 rounds the same everywhere; falloffs are ``1 / (1 + d^2)``, not exponentials.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sn72engine.roadscenes.dice import Dice
from sn72engine.roadscenes.objects import Colour, Light

Gain = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Daylight:
    """Time of day: sky colours at the top and at the horizon, gain per channel on the ground."""

    top: Colour
    low: Colour
    gain: Gain
    lamps: float


DAYLIGHT: dict[str, Daylight] = {
    "day": Daylight((108, 158, 214), (206, 222, 234), (1.0, 1.0, 0.98), 0.0),
    "overcast": Daylight((172, 178, 186), (206, 208, 210), (0.86, 0.87, 0.9), 0.0),
    "dusk": Daylight((62, 66, 112), (236, 156, 106), (0.66, 0.54, 0.5), 0.6),
    "night": Daylight((10, 12, 24), (34, 34, 50), (0.2, 0.21, 0.27), 1.0),
}


@dataclass(frozen=True, slots=True)
class Conditions:
    """Everything that comes between the scene and the picture; shares and radii are 0 for none.

    ``blur`` is in pixels of a 96-pixel picture, ``noise`` in grey levels (standard deviation),
    ``exposure`` a factor, ``beam`` the strength of our own headlights.
    """

    daylight: str
    fog: float
    rain: float
    blur: float
    noise: float
    exposure: float
    beam: float


def roll(dice: Dice, difficulty: float) -> Conditions:
    """Draw conditions; bad ones are more frequent and stronger at a high ``difficulty``."""
    night = 0.08 + 0.22 * difficulty
    dusk = 0.12 + 0.1 * difficulty
    turn = dice.uniform(0, 1)
    if turn < night:
        daylight = "night"
    elif turn < night + dusk:
        daylight = "dusk"
    else:
        daylight = dice.pick(("day", "overcast"))
    fog = dice.uniform(0.2, 0.4 + 0.4 * difficulty) if dice.chance(0.1 + 0.2 * difficulty) else 0.0
    rain = dice.uniform(0.3, 0.5 + 0.5 * difficulty) if dice.chance(0.1 + 0.2 * difficulty) else 0.0
    blurred = dice.chance(0.15 + 0.3 * difficulty)
    return Conditions(
        daylight=daylight,
        fog=fog,
        rain=rain,
        blur=dice.uniform(0.3, 0.5 + 0.5 * difficulty) if blurred else 0.0,
        noise=dice.uniform(1.0, 3.0 + 9.0 * difficulty),
        exposure=dice.uniform(0.9 - 0.15 * difficulty, 1.1 + 0.15 * difficulty),
        beam=dice.uniform(1.0, 1.8),
    )


def sky(size: int, horizon: float, daylight: Daylight) -> np.ndarray:
    """Sky colours from the top to the horizon: uint8 of shape (size, size, 3)."""
    share = np.clip(np.arange(size, dtype=np.float32) / np.float32(horizon * size), 0, 1)[:, None]
    top, low = (np.array(c, dtype=np.float32) for c in (daylight.top, daylight.low))
    column = (top + (low - top) * share).astype(np.uint8)
    return np.repeat(column[:, None, :], size, axis=1)


def expose(
    scene: Image.Image,
    lights: Sequence[Light],
    conditions: Conditions,
    horizon: float,
    scale: int,
    dice: Dice,
) -> np.ndarray:
    """Turn a drawn scene into a picture.

    Args:
        scene: RGB, drawn in daylight colours with the sky already as it looks.
        lights: lamps, in pixels of ``scene``.
        conditions: light, weather and camera.
        horizon: row of the horizon as a share of the height.
        scale: by how much ``scene`` is larger than the picture.
        dice: of the rain and the noise.

    Returns:
        uint8 of shape (height, width, 3).
    """
    small = scene.reduce(scale)
    size = small.width
    daylight = DAYLIGHT[conditions.daylight]
    if conditions.rain:
        small = _rain(small, conditions.rain, dice)
    pixels = np.asarray(small, dtype=np.float32)
    pixels = pixels * _illumination(size, horizon, daylight, conditions.beam)
    _glow(pixels, lights, daylight.lamps, scale)
    if conditions.fog:
        _fog(pixels, horizon, conditions.fog, daylight)
    pixels *= np.float32(conditions.exposure)
    if conditions.blur:
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        radius = conditions.blur * size / 96
        pixels = np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=np.float32)
    sigma = np.float32(conditions.noise * (1.4 if conditions.daylight == "night" else 1.0))
    noisy = pixels + dice.noise(pixels.shape) * sigma
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _illumination(size: int, horizon: float, daylight: Daylight, beam: float) -> np.ndarray:
    """Gain per pixel: daylight below the sky, and the pool of our headlights when it is dark."""
    gain = np.array(daylight.gain, dtype=np.float32)
    row = (np.arange(size, dtype=np.float32) / np.float32(size))[:, None]
    column = (np.arange(size, dtype=np.float32) / np.float32(size))[None, :]
    # Where the sky shows it already has its colour; blend over a tenth of the height.
    ground = np.clip((row - np.float32(horizon - 0.3)) * np.float32(5.0), 0, 1)
    sky_gain = np.float32(1.0 - 0.35 * daylight.lamps)
    across = (column - np.float32(0.5)) / np.float32(0.34)
    down = (row - np.float32(horizon + 0.22)) / np.float32(0.2)
    pool = np.float32(beam * daylight.lamps) / (1 + across * across + down * down)
    base = (1 - ground) * sky_gain + ground
    field = base[..., None] * gain if daylight.lamps else np.ones((1, 1, 1), np.float32) * gain
    warm = np.array((0.5, 0.47, 0.4), dtype=np.float32)
    result: np.ndarray = field + pool[..., None] * warm
    return result


def _glow(pixels: np.ndarray, lights: Sequence[Light], strength: float, scale: int) -> None:
    """Add the light of each lamp within a few of its radii."""
    if not strength:
        return
    size = pixels.shape[0]
    for light in lights:
        x, y = light.x / scale, light.y / scale
        radius = max(light.radius / scale, 0.35)
        reach = 6 * radius + 2
        left, right = max(0, int(x - reach)), min(size, int(x + reach) + 1)
        top, bottom = max(0, int(y - reach)), min(size, int(y + reach) + 1)
        if left >= right or top >= bottom:
            continue
        dx = (np.arange(left, right, dtype=np.float32) + np.float32(0.5 - x)) / np.float32(radius)
        dy = (np.arange(top, bottom, dtype=np.float32) + np.float32(0.5 - y)) / np.float32(radius)
        falloff = np.float32(strength) / (1 + dx[None, :] * dx[None, :] + dy[:, None] * dy[:, None])
        edge = np.float32(strength / 37)
        glow = np.clip(falloff - edge, 0, None)
        pixels[top:bottom, left:right] += glow[..., None] * np.array(light.colour, dtype=np.float32)


def _fog(pixels: np.ndarray, horizon: float, density: float, daylight: Daylight) -> None:
    """Blend towards the colour of the air; densest at the horizon, thin near the camera."""
    size = pixels.shape[0]
    row = np.arange(size, dtype=np.float32) / np.float32(size)
    near = np.clip((row - np.float32(horizon)) / np.float32(1 - horizon), 0, 1)
    share = (np.float32(density) * (1 - np.float32(0.8) * near))[:, None, None]
    low = np.array(daylight.low, dtype=np.float32)
    air = low * np.float32(0.4) + np.float32(0.6) * low.mean()
    pixels += (air - pixels) * share


def _rain(picture: Image.Image, strength: float, dice: Dice) -> Image.Image:
    """Slanted streaks."""
    size = picture.width
    mask = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(mask)
    slant = dice.uniform(-0.25, 0.25)
    for _ in range(int(70 * strength)):
        x, y = dice.uniform(0, size), dice.uniform(-0.1 * size, size)
        length = dice.uniform(0.04, 0.12) * size
        draw.line(
            (x, y, x + slant * length, y + length),
            fill=dice.count(40, 110),
            width=max(1, size // 128),
        )
    return Image.composite(Image.new("RGB", picture.size, (206, 212, 220)), picture, mask)
