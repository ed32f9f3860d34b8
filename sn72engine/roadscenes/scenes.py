"""Road scenes drawn from a seed: perspective road, roadside, traffic and, or not, roadwork.

A scene of label 1 holds at least one of :data:`objects.ROADWORK`; one of label 0 holds none, but
look-alikes in the same places and as many of them. The two scenes of one seed share their road,
background and weather, so that nothing but the objects tells the labels apart. At a high
difficulty something nearer may hide roadwork almost wholly, as it does on a road, so that no model
can be right on every scene.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from sn72engine.errors import OptionError
from sn72engine.roadscenes import objects, weather
from sn72engine.roadscenes.dice import Dice
from sn72engine.roadscenes.objects import Colour, Drawing, Light, Spot
from sn72engine.spec import Options, check_int, check_number

#: Scenes are drawn this much larger and averaged down, which smooths edges.
_SCALE = 2

#: Half the width of the carriageway in metres: ties the perspective to real sizes.
_HALF_ROAD = 3.5


@dataclass(frozen=True, slots=True)
class SceneOptions(Options):
    """How hard and how large a scene is.

    Args:
        difficulty: 0 to 1; higher means fewer, smaller and partly hidden roadwork objects, more
            look-alikes, worse light and weather.
        size: side of the square picture in pixels.
    """

    difficulty: float = 0.5
    size: int = 224

    def __post_init__(self) -> None:
        check_number("difficulty", self.difficulty, 0.0, 1.0)
        check_int("size", self.size, 32, 2048)


def scene(seed: int, label: int, *, difficulty: float = 0.5, size: int = 224) -> np.ndarray:
    """Draw one scene; shorthand for the picture of :func:`render`.

    Returns:
        uint8 of shape (size, size, 3), RGB.

    Raises:
        OptionError: an argument is out of range.
    """
    return render(seed, label, SceneOptions(difficulty=difficulty, size=size)).picture


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture, uint8 of shape (size, size, 3), and where its roadwork is.

    ``boxes`` are left, top, right, bottom as shares of the picture's side, about, and may reach
    beyond it; none for label 0.
    """

    picture: np.ndarray
    boxes: tuple[tuple[float, float, float, float], ...]


def render(seed: int, label: int, options: SceneOptions) -> Scene:
    """Draw one scene.

    Args:
        seed: 0 or more; the same seed, label and options give the same picture in any process.
            Another Pillow version may rasterise an edge pixel differently.
        label: 1 with roadwork, 0 without.
        options: difficulty and size.

    Raises:
        OptionError: ``seed`` or ``label`` is out of range.
    """
    check_int("seed", seed, 0)
    if label not in (0, 1):
        raise OptionError(f"label={label!r} must be 0 (no roadwork) or 1 (roadwork)")
    difficulty = options.difficulty
    backdrop = Dice(seed, "backdrop")
    conditions = weather.roll(backdrop, difficulty)
    road = _Road.rolled(backdrop, options.size * _SCALE)
    canvas = Image.fromarray(
        weather.sky(road.size, road.horizon, weather.DAYLIGHT[conditions.daylight])
    )
    draw = ImageDraw.Draw(canvas)
    _ground(draw, road, backdrop)
    standing = _backdrop(road, backdrop) + _traffic(
        road, Dice(seed, label, "objects"), label, difficulty
    )
    lights: list[Light] = []
    boxes = []
    for item in sorted(standing, key=lambda item: item.depth):
        x, y, metre = road.place(item.across, item.depth)
        item.drawing(Spot(draw, x, y, metre, lights), item.dice)
        if item.drawing in objects.ROADWORK:
            half, height = (length * metre for length in objects.ROADWORK[item.drawing])
            left, top, right, bottom = (
                edge / road.size for edge in (x - half, y - height, x + half, y)
            )
            boxes.append((left, top, right, bottom))
    camera = Dice(seed, label, "camera")
    picture = weather.expose(canvas, lights, conditions, road.horizon, _SCALE, camera)
    return Scene(picture, tuple(boxes))


@dataclass(frozen=True, slots=True)
class _Road:
    """The perspective: lengths as shares of the picture's side, ``size`` in canvas pixels.

    A place is ``across`` (0 the middle of the road, ±1 its edges) and ``depth``: 0 at the
    horizon, 1 at the lower border, in proportion to the picture's rows, so that distance goes
    with ``1 / depth`` and sizes with ``depth``.
    """

    size: int
    horizon: float
    vanish: float
    centre: float
    half: float

    @classmethod
    def rolled(cls, dice: Dice, size: int) -> _Road:
        vanish = dice.uniform(0.36, 0.64)
        return cls(
            size=size,
            horizon=dice.uniform(0.36, 0.48),
            vanish=vanish,
            centre=vanish + dice.uniform(-0.2, 0.2),
            half=dice.uniform(0.6, 0.8),
        )

    def point(self, across: float, depth: float) -> tuple[float, float]:
        x = self.vanish + (self.centre - self.vanish + across * self.half) * depth
        y = self.horizon + (1 - self.horizon) * depth
        return x * self.size, y * self.size

    def place(self, across: float, depth: float) -> tuple[float, float, float]:
        """Foot point in canvas pixels, and pixels per metre there."""
        x, y = self.point(across, depth)
        return x, y, self.half * self.size * depth / _HALF_ROAD

    def shows(self, across: float, depth: float) -> bool:
        return 0.05 < self.point(across, depth)[0] / self.size < 0.95


@dataclass(frozen=True, slots=True)
class _Item:
    drawing: Drawing
    across: float
    depth: float
    dice: Dice


def _ground(draw: ImageDraw.ImageDraw, road: _Road, dice: Dice) -> None:
    """Hills, verge, carriageway, patches and lane marks."""
    size = road.size
    level = road.horizon * size
    if dice.chance(0.6):
        hill = objects.tinted((110, 128, 124), dice, 16)
        for _ in range(2):
            x, width, height = (
                dice.uniform(0, size),
                dice.uniform(0.3, 0.7),
                dice.uniform(0.02, 0.1),
            )
            draw.ellipse(
                (
                    x - width * size,
                    level - height * size,
                    x + width * size,
                    level + height * size,
                ),
                fill=hill,
            )
    verges: tuple[Colour, ...] = ((96, 122, 70), (132, 120, 92), (136, 136, 134), (112, 130, 84))
    verge = objects.tinted(dice.pick(verges), dice)
    draw.rectangle((0, level, size, size), fill=verge)
    for _ in range(14):
        x, y, metre = road.place(dice.uniform(-4, 4), dice.uniform(0.1, 1.0))
        patch = objects.shade(verge, dice.uniform(0.85, 1.12))
        draw.ellipse((x - metre, y - 0.15 * metre, x + metre, y + 0.15 * metre), fill=patch)
    asphalt = objects.tinted(objects.shade((92, 94, 98), dice.uniform(0.75, 1.2)), dice, 4)
    far, near = 0.01, 1.02

    def strip(left: float, right: float, start: float, end: float, colour: Colour) -> None:
        corners = ((left, start), (right, start), (right, end), (left, end))
        draw.polygon([road.point(u, depth) for u, depth in corners], fill=colour)

    if dice.chance(0.5):
        strip(-1.35, 1.35, far, near, objects.tinted((158, 156, 150), dice))
    strip(-1, 1, far, near, asphalt)
    for _ in range(dice.count(1, 5)):
        left, start = dice.uniform(-0.9, 0.6), dice.uniform(0.1, 0.9)
        patch = objects.shade(asphalt, dice.uniform(0.85, 1.08))
        strip(left, left + dice.uniform(0.1, 0.4), start, start * dice.uniform(1.05, 1.4), patch)
    paint = dice.pick(((226, 226, 220), (226, 226, 220), (222, 190, 90)))
    if dice.chance(0.8):
        for side in (-0.94, 0.94):
            strip(side - 0.02, side + 0.02, far, near, (222, 222, 216))
    phase = dice.uniform(0, 1)
    for dash in range(14):
        # Dashes are evenly spaced in distance, which is 1 / depth.
        start, end = 1 / (1.9 + dash + phase), 1 / (1.4 + dash + phase)
        strip(-0.018, 0.018, start, end, paint)


def _backdrop(road: _Road, dice: Dice) -> list[_Item]:
    """Houses, trees and lamps away from the road."""
    drawings = dice.pick(
        (
            (objects.building, objects.building, objects.tree),
            (objects.tree, objects.tree, objects.tree, objects.building),
            (objects.tree, objects.bush),
        )
    )
    items = [
        _Item(
            dice.pick(drawings),
            dice.pick((-1, 1)) * dice.uniform(2.2, 6.0),
            dice.uniform(0.08, 0.42),
            dice,
        )
        for _ in range(dice.count(4, 9))
    ]
    if dice.chance(0.4):
        side = dice.pick((-1.25, 1.25))
        items += [_Item(objects.lamp_post, side, depth, dice) for depth in (0.16, 0.26, 0.5)]
    return items


def _traffic(road: _Road, dice: Dice, label: int, difficulty: float) -> list[_Item]:
    """Look-alikes for either label, then roadwork, or as many more look-alikes instead."""
    near, far = 0.85 - 0.35 * difficulty, 0.48 - 0.26 * difficulty
    items: list[_Item] = []
    for _ in range(dice.count(1, 2 + round(2 * difficulty))):
        items += _group(road, dice, dice.pick(objects.LOOKALIKES), 0.16, 0.6, difficulty)
    kinds = tuple(objects.ROADWORK) if label else objects.LOOKALIKES
    for _ in range(dice.count(1, max(1, round(3 - 2 * difficulty)))):
        group = _group(road, dice, dice.pick(kinds), far, near, difficulty)
        items += group
        if dice.chance(0.35 * difficulty):
            hidden = dice.pick(group)
            drawing = dice.pick((objects.bush, objects.bollard, objects.car))
            offset = dice.pick((-1, 1)) * dice.uniform(0.06, 0.16)
            if drawing is objects.car:
                offset *= 2.5
            items.append(_Item(drawing, hidden.across + offset, hidden.depth + 0.03, dice))
    return items


#: How many of a thing stand together, and where: on the road, or beside it.
_ROWS: dict[Drawing, tuple[int, int]] = {
    objects.cone: (2, 6),
    objects.drum: (2, 5),
    objects.barrier: (1, 2),
    objects.worker: (1, 2),
    objects.bollard: (2, 6),
    objects.pedestrian: (1, 2),
}
_BESIDE = (objects.work_sign, objects.traffic_sign, objects.warm_sign, objects.bin_)
_ON_ROAD = (objects.car, objects.van)


def _group(
    road: _Road, dice: Dice, drawing: Drawing, far: float, near: float, difficulty: float
) -> list[_Item]:
    """One object, or a row of them leading away from the camera, within the picture."""
    low, high = _ROWS.get(drawing, (1, 1))
    count = dice.count(low, max(low, round(high - (high - low) * 0.6 * difficulty)))
    across, depth = 0.0, near
    for _ in range(12):
        side = dice.pick((-1, 1))
        if drawing in _ON_ROAD:
            across = side * dice.uniform(0.3, 0.7)
        elif drawing in _BESIDE:
            across = side * dice.uniform(1.1, 1.7)
        else:
            across = side * dice.uniform(0.35, 1.6)
        depth = dice.uniform(far, near)
        if road.shows(across, depth):
            break
    else:
        across, depth = 0.0, far
    drift = dice.uniform(-0.12, 0.12)
    items = []
    for place in range(count):
        step = 1 / (1 / depth + 0.45 * place)
        items.append(_Item(drawing, across + drift * place, step, dice))
    return items
