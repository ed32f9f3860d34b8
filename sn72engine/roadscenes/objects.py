"""Drawings of the things that stand on and beside a road, in metres, y upwards from the ground.

Each function draws one object at the foot point of a :class:`Spot`. The first group makes a scene
positive; the second looks alike in colour or shape and must not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from PIL import ImageDraw

from sn72engine.roadscenes.dice import Dice

Colour = tuple[int, int, int]
Point = tuple[float, float]
Drawing = Callable[["Spot", Dice], None]

BLACK: Colour = (24, 24, 26)
GREY: Colour = (120, 122, 124)
WHITE: Colour = (240, 240, 236)
REFLECTIVE: Colour = (214, 218, 214)
STEEL: Colour = (150, 154, 158)
GLASS: Colour = (58, 72, 88)
RED: Colour = (200, 32, 36)
ORANGE: Colour = (250, 112, 22)
AMBER: Colour = (255, 176, 40)
YELLOW: Colour = (246, 196, 28)
LIME: Colour = (204, 236, 46)
BLUE: Colour = (34, 84, 178)
SKIN: tuple[Colour, ...] = ((236, 196, 166), (190, 136, 100), (112, 76, 54))


@dataclass(frozen=True, slots=True)
class Light:
    """Something that shines: centre and radius in pixels of the canvas, colour."""

    x: float
    y: float
    radius: float
    colour: Colour


@dataclass(slots=True)
class Spot:
    """A place on the ground: foot point in canvas pixels and pixels per metre there."""

    draw: ImageDraw.ImageDraw
    x: float
    y: float
    metre: float
    lights: list[Light] = field(default_factory=list)

    def polygon(self, points: Sequence[Point], colour: Colour) -> None:
        """A filled polygon."""
        self.draw.polygon([self._pixel(p) for p in points], fill=colour)

    def box(self, left: float, bottom: float, right: float, top: float, colour: Colour) -> None:
        """A filled rectangle."""
        self.polygon([(left, bottom), (right, bottom), (right, top), (left, top)], colour)

    def band(
        self, bottom: float, top: float, below: float, above: float, colour: Colour, x: float = 0.0
    ) -> None:
        """A filled trapezoid centred on ``x`` with half-widths ``below`` and ``above``."""
        self.polygon(
            [(x - below, bottom), (x + below, bottom), (x + above, top), (x - above, top)], colour
        )

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """A filled circle."""
        self.ellipse(x, y, radius, radius, colour)

    def ellipse(self, x: float, y: float, across: float, up: float, colour: Colour) -> None:
        """A filled ellipse with half-axes ``across`` and ``up``."""
        left, top = self._pixel((x - across, y + up))
        right, bottom = self._pixel((x + across, y - up))
        self.draw.ellipse((left, top, right, bottom), fill=colour)

    def line(self, points: Sequence[Point], width: float, colour: Colour) -> None:
        """A polyline ``width`` metres thick, at least one pixel."""
        pixels = max(1, round(width * self.metre))
        self.draw.line([self._pixel(p) for p in points], fill=colour, width=pixels, joint="curve")

    def light(self, x: float, y: float, radius: float, colour: Colour) -> None:
        """A lamp: drawn as a disc, and shining when it is dark."""
        self.disc(x, y, radius, colour)
        px, py = self._pixel((x, y))
        self.lights.append(Light(px, py, radius * self.metre, colour))

    def _pixel(self, point: Point) -> Point:
        return self.x + point[0] * self.metre, self.y - point[1] * self.metre


def tinted(colour: Colour, dice: Dice, spread: int = 14) -> Colour:
    """``colour`` with each channel moved by up to ``spread``: paint fades and gets dirty."""
    red, green, blue = (min(255, max(0, c + dice.count(-spread, spread))) for c in colour)
    return red, green, blue


def shade(colour: Colour, factor: float) -> Colour:
    """``colour`` darkened or lightened."""
    red, green, blue = (min(255, max(0, int(c * factor))) for c in colour)
    return red, green, blue


# Roadwork: any of these makes the scene positive.


def cone(spot: Spot, dice: Dice) -> None:
    """An orange traffic cone with two reflective bands."""
    height = dice.uniform(0.7, 1.0)
    orange = tinted(ORANGE, dice)
    half = 0.2 * height

    def width(share: float) -> float:
        return half * (1 - 0.82 * share)

    spot.box(-0.3 * height, 0, 0.3 * height, 0.07 * height, shade(orange, 0.55))
    spot.band(0.07 * height, height, width(0.05), width(1.0), orange)
    for low, high in ((0.36, 0.54), (0.68, 0.82)):
        spot.band(low * height, high * height, width(low), width(high), REFLECTIVE)


def drum(spot: Spot, dice: Dice) -> None:
    """An orange barrel with white bands."""
    orange = tinted(ORANGE, dice)
    spot.box(-0.34, 0, 0.34, 0.08, BLACK)
    spot.band(0.08, 1.0, 0.29, 0.24, orange)
    for low in (0.3, 0.62):
        spot.band(low, low + 0.16, 0.28, 0.265, WHITE)
    if dice.chance(0.3):
        spot.light(0, 1.1, 0.1, AMBER)


def barrier(spot: Spot, dice: Dice) -> None:
    """A barrier with one or two boards in slanted stripes."""
    half = dice.uniform(0.8, 1.5)
    paint = tinted(dice.pick((RED, ORANGE)), dice)
    for x in (-0.8 * half, 0.8 * half):
        spot.box(x - 0.04, 0, x + 0.04, 1.05, GREY)
        spot.box(x - 0.22, 0, x + 0.22, 0.08, BLACK)
    for bottom in dice.pick(((0.72,), (0.72, 0.3))):
        _stripes(spot, -half, bottom, half, bottom + 0.3, paint)
    if dice.chance(0.45):
        for x in (-0.7 * half, 0.7 * half):
            spot.light(x, 1.15, 0.11, AMBER)


def work_sign(spot: Spot, dice: Dice) -> None:
    """A temporary sign on a low stand: orange diamond or yellow triangle, with a figure."""
    middle = dice.uniform(0.95, 1.25)
    for x in (-0.4, 0.4):
        spot.line([(x, 0), (0, middle)], 0.06, GREY)
    if dice.chance(0.6):
        size = dice.uniform(0.6, 0.8)
        _diamond(spot, middle, size, BLACK)
        _diamond(spot, middle, size * 0.9, tinted(ORANGE, dice))
    else:
        size = dice.uniform(0.62, 0.8)
        _triangle(spot, middle, size, RED)
        _triangle(spot, middle - 0.02, size * 0.68, tinted((250, 190, 40), dice))
    _digger(spot, middle - 0.05, 0.5 * size)


def worker(spot: Spot, dice: Dice) -> None:
    """A person in a high-visibility vest with reflective bands and a helmet."""
    vest = tinted(dice.pick((LIME, ORANGE)), dice)
    trousers = vest if dice.chance(0.4) else tinted((46, 50, 70), dice)
    _legs(spot, trousers)
    if trousers is vest:
        spot.box(-0.2, 0.3, 0.2, 0.38, REFLECTIVE)
    spot.band(0.8, 1.45, 0.27, 0.25, vest)
    _arms(spot, dice, vest)
    for y in (0.9, 1.1):
        spot.box(-0.27, y, 0.27, y + 0.08, REFLECTIVE)
    for x in (-0.14, 0.14):
        spot.box(x - 0.04, 1.1, x + 0.04, 1.45, REFLECTIVE)
    spot.disc(0, 1.6, 0.13, dice.pick(SKIN))
    helmet = tinted(dice.pick((WHITE, YELLOW, ORANGE)), dice)
    spot.polygon([(-0.17, 1.62), (0.17, 1.62), (0.11, 1.78), (-0.11, 1.78)], helmet)
    if dice.chance(0.5):
        side = dice.pick((-1, 1))
        spot.line([(side * 0.35, 1.2), (side * 0.55, 0.05)], 0.05, (120, 84, 50))


def excavator(spot: Spot, dice: Dice) -> None:
    """A tracked excavator from the side."""
    paint = tinted(dice.pick((YELLOW, ORANGE)), dice)
    side = dice.pick((-1, 1))
    size = dice.uniform(0.65, 0.9)

    def at(x: float, y: float) -> Point:
        return side * x * size, y * size

    spot.polygon([at(-1.5, 0.1), at(1.3, 0.1), at(1.5, 0.5), at(1.3, 0.8), at(-1.5, 0.8)], BLACK)
    for x in (-1.1, -0.4, 0.3, 1.0):
        spot.disc(side * x * size, 0.4 * size, 0.2 * size, GREY)
    spot.polygon([at(-1.6, 0.9), at(1.0, 0.9), at(1.0, 1.7), at(-1.6, 1.8)], paint)
    spot.polygon([at(-0.3, 1.7), at(0.9, 1.7), at(0.7, 2.8), at(-0.3, 2.8)], shade(paint, 0.8))
    spot.polygon([at(-0.1, 1.8), at(0.75, 1.8), at(0.6, 2.65), at(-0.1, 2.65)], GLASS)
    lift = dice.uniform(3.0, 3.8)
    boom = [at(0.9, 1.4), at(2.1, lift), at(3.3, lift - 0.9)]
    spot.line(boom, 0.34 * size, shade(paint, 0.92))
    spot.line([at(3.3, lift - 0.9), at(3.0, 1.1)], 0.26 * size, shade(paint, 0.85))
    spot.polygon([at(2.6, 1.2), at(3.4, 1.2), at(3.1, 0.4), at(2.5, 0.6)], BLACK)


# Look-alikes: none of these makes the scene positive.


def traffic_sign(spot: Spot, dice: Dice) -> None:
    """A permanent sign on a tall post."""
    height = dice.uniform(2.0, 2.6)
    spot.line([(0, 0), (0, height)], 0.08, STEEL)
    kind = dice.count(0, 5)
    if kind == 0:
        _triangle(spot, height, 0.55, RED)
        _triangle(spot, height - 0.01, 0.38, WHITE)
        spot.line([(0, height - 0.2), (0, height + 0.16)], 0.09, BLACK)
    elif kind == 1:
        spot.disc(0, height, 0.42, RED)
        spot.disc(0, height, 0.31, WHITE)
        for x in (-0.1, 0.1):
            spot.box(x - 0.06, height - 0.12, x + 0.06, height + 0.12, BLACK)
    elif kind == 2:
        spot.disc(0, height, 0.42, BLUE)
        spot.line([(-0.15, height - 0.15), (0.15, height + 0.15)], 0.1, WHITE)
    elif kind == 3:
        _diamond(spot, height, 0.55, WHITE)
        _diamond(spot, height, 0.45, tinted(YELLOW, dice))
    elif kind == 4:
        corner = 0.18
        spot.polygon(
            [
                (-0.42, height - corner),
                (-corner, height - 0.42),
                (corner, height - 0.42),
                (0.42, height - corner),
                (0.42, height + corner),
                (corner, height + 0.42),
                (-corner, height + 0.42),
                (-0.42, height + corner),
            ],
            RED,
        )
        spot.box(-0.26, height - 0.08, 0.26, height + 0.08, WHITE)
    else:
        spot.box(-0.5, height - 0.35, 0.5, height + 0.35, tinted((20, 110, 70), dice))
        for y in (-0.15, 0.1):
            spot.box(-0.38, height + y, 0.3, height + y + 0.08, WHITE)


def warm_sign(spot: Spot, dice: Dice) -> None:
    """A permanent yellow diamond with a bend on it: the nearest thing to a work sign."""
    height = dice.uniform(1.7, 2.3)
    spot.line([(0, 0), (0, height)], 0.08, STEEL)
    _diamond(spot, height, 0.66, BLACK)
    _diamond(spot, height, 0.6, tinted((244, 186, 30), dice))
    bend = dice.pick((-1, 1))
    spot.line([(0, height - 0.3), (0, height), (bend * 0.2, height + 0.22)], 0.1, BLACK)


def bollard(spot: Spot, dice: Dice) -> None:
    """A post at the kerb, in steel, white, or dull red with one band."""
    height = dice.uniform(0.8, 1.1)
    paint = tinted(dice.pick((STEEL, WHITE, (70, 74, 78), (176, 66, 44))), dice)
    spot.band(0, height, 0.09, 0.08, paint)
    spot.disc(0, height, 0.08, paint)
    spot.band(0.7 * height, 0.82 * height, 0.085, 0.083, dice.pick((WHITE, BLACK, RED)))


def pedestrian(spot: Spot, dice: Dice) -> None:
    """A person in plain clothes, sometimes in a bright coat."""
    plain: tuple[Colour, ...] = ((60, 66, 90), (130, 50, 56), (88, 100, 80), (196, 190, 180))
    coat = tinted(dice.pick((*plain, (236, 104, 34), (226, 214, 60))), dice)
    _legs(spot, tinted((52, 54, 64), dice))
    spot.band(dice.uniform(0.55, 0.8), 1.45, 0.28, 0.24, coat)
    _arms(spot, dice, shade(coat, 0.9))
    spot.disc(0, 1.6, 0.13, dice.pick(SKIN))
    spot.ellipse(0, 1.68, 0.14, 0.09, tinted((60, 44, 34), dice))
    if dice.chance(0.3):
        spot.box(0.2, 0.7, 0.42, 1.0, tinted((120, 40, 90), dice))


def car(spot: Spot, dice: Dice) -> None:
    """A car from behind or from ahead; a share of them orange, yellow or red."""
    cool: tuple[Colour, ...] = ((188, 190, 194), (52, 56, 64), (36, 62, 120), (226, 226, 224))
    paint = tinted(dice.pick((*cool, (238, 110, 30), (182, 34, 38), (232, 186, 40))), dice)
    _vehicle(spot, dice, paint, half=0.92, waist=0.95, top=1.48)


def van(spot: Spot, dice: Dice) -> None:
    """A delivery van or bus; a share of them yellow or orange."""
    cool: tuple[Colour, ...] = (WHITE, (90, 110, 130))
    paint = tinted(dice.pick((*cool, YELLOW, (240, 120, 40))), dice)
    top = dice.uniform(2.2, 3.0)
    _vehicle(spot, dice, paint, half=1.1, waist=1.3, top=top)
    if dice.chance(0.4):
        spot.box(-0.95, 0.5 * top, 0.95, 0.5 * top + 0.16, dice.pick((WHITE, RED, BLUE)))


def bin_(spot: Spot, dice: Dice) -> None:
    """A litter bin or post box: a coloured box about as large as a drum."""
    paint = tinted(dice.pick(((220, 96, 36), (206, 44, 40), (46, 110, 70), YELLOW)), dice)
    spot.band(0.0, 1.0, 0.26, 0.3, paint)
    spot.box(-0.32, 0.95, 0.32, 1.08, shade(paint, 0.7))
    spot.box(-0.16, 0.72, 0.16, 0.8, BLACK)


# Background.


def tree(spot: Spot, dice: Dice) -> None:
    """A broad-leaved tree."""
    height = dice.uniform(4.0, 8.0)
    spot.box(-0.18, 0, 0.18, 0.5 * height, (84, 64, 48))
    green = tinted((62, 102, 52), dice, 24)
    for _ in range(5):
        x, y = dice.uniform(-0.22, 0.22) * height, dice.uniform(0.5, 0.85) * height
        radius = dice.uniform(0.16, 0.26) * height
        spot.disc(x, y, radius, shade(green, dice.uniform(0.75, 1.15)))


def building(spot: Spot, dice: Dice) -> None:
    """A house front with rows of windows, some lit."""
    half, height = dice.uniform(4.0, 8.0), dice.uniform(5.0, 13.0)
    wall = tinted(dice.pick(((170, 150, 130), (150, 110, 92), (140, 144, 150))), dice, 8)
    spot.box(-half, 0, half, height, wall)
    if dice.chance(0.5):
        spot.polygon([(-half, height), (half, height), (0, height + 0.4 * half)], shade(wall, 0.6))
    columns, rows = dice.count(3, 5), dice.count(2, 4)
    for column in range(columns):
        x = -half + (column + 0.5) * 2 * half / columns
        for row in range(rows):
            y = 1.2 + row * (height - 1.5) / rows
            glass = (232, 206, 140) if dice.chance(0.2) else GLASS
            spot.box(x - 0.6, y, x + 0.6, y + 1.3, glass)


def lamp_post(spot: Spot, dice: Dice) -> None:
    """A street lamp with its arm towards the road."""
    arm = -1.4 if spot.x > 0 and dice.chance(0.5) else 1.4
    spot.line([(0, 0), (0, 6.0), (arm, 6.4)], 0.12, GREY)
    spot.light(arm, 6.3, 0.22, (255, 226, 170))


def bush(spot: Spot, dice: Dice) -> None:
    """A low bush that hides what is behind it."""
    green = tinted((56, 92, 48), dice, 20)
    for x in (-0.35, 0.0, 0.35):
        y = dice.uniform(0.25, 0.45)
        spot.disc(x, y, dice.uniform(0.3, 0.42), shade(green, dice.uniform(0.8, 1.15)))


#: Half the width and the height of each roadwork object, about, in metres.
ROADWORK: dict[Drawing, tuple[float, float]] = {
    cone: (0.3, 0.9),
    drum: (0.35, 1.1),
    barrier: (1.2, 1.1),
    work_sign: (0.6, 1.8),
    worker: (0.4, 1.8),
    excavator: (2.0, 2.4),
}
LOOKALIKES: tuple[Drawing, ...] = (
    traffic_sign,
    warm_sign,
    bollard,
    pedestrian,
    car,
    van,
    bin_,
)


def _stripes(
    spot: Spot, left: float, bottom: float, right: float, top: float, paint: Colour
) -> None:
    spot.box(left, bottom, right, top, WHITE)
    pitch = 0.26
    slant = top - bottom
    x = left - slant
    while x < right:
        corners = ((x, bottom), (x + pitch, bottom), (x + pitch + slant, top), (x + slant, top))
        spot.polygon([(min(right, max(left, cx)), cy) for cx, cy in corners], paint)
        x += 2 * pitch


def _diamond(spot: Spot, middle: float, size: float, colour: Colour) -> None:
    spot.polygon([(0, middle - size), (size, middle), (0, middle + size), (-size, middle)], colour)


def _triangle(spot: Spot, middle: float, size: float, colour: Colour) -> None:
    low = middle - 0.5 * size
    spot.polygon([(-0.87 * size, low), (0.87 * size, low), (0, middle + size)], colour)


def _digger(spot: Spot, middle: float, size: float) -> None:
    """The figure with a shovel and a heap."""
    spot.disc(-0.1 * size, middle + 0.55 * size, 0.2 * size, BLACK)
    spot.line([(-0.1 * size, middle + 0.4 * size), (-0.3 * size, middle - 0.5 * size)], 0.1, BLACK)
    spot.line([(-0.1 * size, middle + 0.2 * size), (0.4 * size, middle - 0.4 * size)], 0.07, BLACK)
    spot.ellipse(0.5 * size, middle - 0.5 * size, 0.35 * size, 0.2 * size, BLACK)


def _legs(spot: Spot, colour: Colour) -> None:
    for x in (-0.11, 0.11):
        spot.box(x - 0.1, 0, x + 0.1, 0.85, colour)


def _arms(spot: Spot, dice: Dice, colour: Colour) -> None:
    for side in (-1, 1):
        reach = dice.uniform(0.3, 0.5)
        spot.line([(side * 0.24, 1.38), (side * reach, dice.uniform(0.8, 1.1))], 0.12, colour)


def _vehicle(
    spot: Spot, dice: Dice, paint: Colour, *, half: float, waist: float, top: float
) -> None:
    spot.ellipse(0, 0.05, half * 1.1, 0.14, (30, 30, 32))
    for x in (-0.75 * half, 0.75 * half):
        spot.box(x - 0.13, 0, x + 0.13, 0.4, BLACK)
    spot.band(0.25, waist, half, half * 0.97, paint)
    spot.band(waist, top, half * 0.92, half * 0.74, shade(paint, 0.9))
    spot.band(waist + 0.04, waist + 0.4, half * 0.84, half * 0.74, GLASS)
    lamp = (230, 40, 36) if dice.chance(0.6) else (255, 246, 214)
    for x in (-0.78 * half, 0.78 * half):
        spot.light(x, 0.72 * waist, 0.12, lamp)
    spot.box(-0.25, 0.4, 0.25, 0.52, WHITE)
