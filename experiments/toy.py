"""A small drawn data set with the domains and classes of PACS: no download, no files.

Every picture is a figure (one of seven silhouettes with random pose and proportions) painted in
one of four styles. The styles part the way the PACS domains do: shaded bodies on textured ground
(photo), brush strokes in strong colours (art_painting), flat colours with black outlines
(cartoon), thin grey lines on white (sketch). A network that learns from fills and textures in one
style therefore fails on another, which is the gap the experiments are about.

Picture `index` of a class is a pure function of (domain, class, index): asking for fewer pictures
never changes the ones that remain.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 64  # pixels
IMAGES_PER_CLASS = 40

# Figures are drawn at this multiple of SIDE and averaged down, which smooths their edges.
_OVERSAMPLING = 3
_CANVAS = SIDE * _OVERSAMPLING

Points = np.ndarray  # float64 (k, 2): x to the right, y down
Color = tuple[int, int, int]


@dataclass
class Shape:
    """A closed outline. `tone` picks its colour: 0 main, 1 shaded, 2 light, 3 dark."""

    points: Points
    tone: int = 0
    outlined: bool = False  # keeps its own outline where it lies inside the silhouette


@dataclass
class Figure:
    """What is to be drawn, in any unit: it is scaled to the canvas later.

    parts: shapes that together make the silhouette, back to front
    marks: shapes inside the silhouette (eyes, windows, spots)
    lines: open strokes inside the silhouette (strings, mane)
    """

    parts: list[Shape] = field(default_factory=list)
    marks: list[Shape] = field(default_factory=list)
    lines: list[Points] = field(default_factory=list)

    def add(self, points: Points, tone: int = 0, outlined: bool = False) -> None:
        self.parts.append(Shape(points, tone, outlined))

    def mark(self, points: Points, tone: int = 3) -> None:
        self.marks.append(Shape(points, tone))


# ------------------------------------------------------------------------------------------- shapes


def _polar(angle, length) -> np.ndarray:
    """The vector of this length at this angle (degrees, 0 = right, 90 = up): (2,) or (2, k)."""
    radians = np.deg2rad(angle)
    return np.array([np.cos(radians), -np.sin(radians)]) * length


def _ellipse(center, radius_x: float, radius_y: float, angle: float = 0.0) -> Points:
    turn = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    along, across = _polar(angle, 1.0), _polar(angle - 90, 1.0)
    return (
        np.asarray(center)
        + radius_x * np.cos(turn)[:, None] * along
        + radius_y * np.sin(turn)[:, None] * across
    )


def _limb(path, widths) -> Points:
    """A tube along the points of `path` (k, 2), as wide as `widths` (k,), with a round end."""
    path = np.asarray(path, dtype=np.float64)
    half = np.asarray(widths, dtype=np.float64)[:, None] / 2
    direction = np.gradient(path, axis=0)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True) + 1e-12
    normal = np.stack([-direction[:, 1], direction[:, 0]], axis=1)
    turn = np.linspace(-np.pi / 2, np.pi / 2, 7)[1:-1, None]
    cap = path[-1] + half[-1] * (np.cos(turn) * direction[-1] - np.sin(turn) * -normal[-1])
    return np.concatenate([path - normal * half, cap, (path + normal * half)[::-1]])


def _curve(start, control, end, count: int = 9) -> Points:
    """A quadratic Bezier curve of `count` points."""
    t = np.linspace(0, 1, count)[:, None]
    start, control, end = (np.asarray(p, dtype=np.float64) for p in (start, control, end))
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * control + t**2 * end


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]], dtype=np.float64)


# ------------------------------------------------------------------------------------------ figures


def _legs(figure: Figure, rng, half_length: float, hip: float, length: float, width: float) -> None:
    """Four legs of a walking animal; the far pair is shaded and stands a little inwards."""
    for far in (True, False):
        for side in (-1, 1):
            swing = rng.uniform(-0.22, 0.22) * length
            top = np.array([side * (half_length - width * (1.1 if far else 0.55)), hip])
            knee = top + [swing * 0.3 + rng.uniform(-0.05, 0.05) * length, length * 0.5]
            foot = top + [swing, length * (0.93 if far else 1.0)]
            widths = np.array([1.25, 0.95, 0.85]) * width
            figure.add(_limb([top, knee, foot], widths), tone=1 if far else 0)


def _dog(rng) -> Figure:
    figure = Figure()
    half, thick = rng.uniform(0.62, 0.74), rng.uniform(0.24, 0.30)
    leg = rng.uniform(0.48, 0.62)
    tail = rng.uniform(95, 150)
    root = np.array([-half * 0.92, -thick * 0.5])
    tip = root + _polar(tail, rng.uniform(0.42, 0.6))
    figure.add(_limb(_curve(root, root + [-0.25, -0.05], tip), np.linspace(0.15, 0.07, 9)))
    _legs(figure, rng, half * 0.95, thick * 0.2, leg + thick * 0.6, 0.17)
    figure.add(_ellipse((-half * 0.3, 0), half * 0.72, thick))
    figure.add(_ellipse((half * 0.4, -0.02), half * 0.58, thick * 1.12))
    chest = np.array([half * 0.72, -thick * 0.35])
    head = chest + _polar(rng.uniform(42, 68), rng.uniform(0.40, 0.50))
    figure.add(_limb([chest, head], [0.42, 0.34]))
    size = rng.uniform(0.23, 0.27)
    figure.add(_ellipse(head, size, size * 0.92))
    nose = head + _polar(rng.uniform(-22, -4), size * rng.uniform(1.45, 1.75))
    figure.add(_limb([head, nose], [size * 1.15, size * 0.75]))
    ear = head + [-size * 0.5, -size * 0.55]
    figure.add(
        _ellipse(ear + [-0.03, size * 0.65], size * 0.38, size * 0.88, rng.uniform(-22, 12)),
        tone=1,
        outlined=True,
    )
    figure.mark(_ellipse(nose + [0.05, -0.03], 0.06, 0.055))
    figure.mark(_ellipse(head + [size * 0.38, -size * 0.2], 0.04, 0.045))
    return figure


def _elephant(rng) -> Figure:
    figure = Figure()
    half, thick = rng.uniform(0.68, 0.78), rng.uniform(0.46, 0.54)
    leg = rng.uniform(0.42, 0.55)
    root = np.array([-half * 0.95, -0.1])
    figure.add(_limb([root, root + [-0.1, 0.25], root + [-0.12, 0.5]], [0.07, 0.05, 0.08]))
    _legs(figure, rng, half * 0.92, thick * 0.4, leg + thick * 0.5, rng.uniform(0.29, 0.34))
    figure.add(_ellipse((0, 0), half, thick))
    size = rng.uniform(0.36, 0.41)
    head = np.array([half * 0.95, -thick * 0.55 + rng.uniform(-0.08, 0.05)])
    mouth = head + [size * 0.65, size * 0.25]
    if rng.random() < 0.6:  # trunk hanging, its tip curled forwards
        end = mouth + [rng.uniform(0.12, 0.38), rng.uniform(0.7, 0.9)]
        trunk = _curve(mouth, mouth + [0.3, 0.1], end, 12)
    else:  # trunk raised
        end = mouth + [rng.uniform(0.35, 0.5), rng.uniform(-0.5, -0.2)]
        trunk = _curve(mouth, mouth + [0.55, 0.5], end, 12)
    figure.add(_limb(trunk, np.linspace(0.27, 0.12, 12)))
    figure.add(_ellipse(head, size, size * 0.98))
    tusk = mouth + [-0.06, 0.16]
    figure.add(
        _limb(_curve(tusk, tusk + [0.16, 0.14], tusk + [0.3, 0.04], 6), np.linspace(0.1, 0.04, 6)),
        tone=2,
        outlined=True,
    )
    figure.add(
        _ellipse(head + [-size * 0.6, 0.1], size * 0.72, size * 1.12, rng.uniform(-15, 15)),
        tone=1,
        outlined=True,
    )
    figure.mark(_ellipse(head + [size * 0.45, -size * 0.2], 0.045, 0.05))
    return figure


def _giraffe(rng) -> Figure:
    figure = Figure()
    half, thick = rng.uniform(0.42, 0.50), rng.uniform(0.22, 0.26)
    leg = rng.uniform(0.72, 0.88)
    root = np.array([-half * 0.95, -0.05])
    figure.add(_limb([root, root + [-0.1, 0.2], root + [-0.1, 0.45]], [0.05, 0.04, 0.08]))
    _legs(figure, rng, half * 0.92, thick * 0.2, leg + thick * 0.5, 0.12)
    figure.add(_ellipse((0, 0), half, thick, rng.uniform(10, 20)))
    shoulder = np.array([half * 0.72, -thick * 0.55])
    head = shoulder + _polar(rng.uniform(58, 80), rng.uniform(1.15, 1.4))
    bend = (shoulder + head) / 2 + [-0.08, 0]
    neck = _curve(shoulder, bend, head, 8)
    figure.add(_limb(neck, np.linspace(0.33, 0.15, 8)))
    muzzle = head + _polar(rng.uniform(-35, -8), rng.uniform(0.28, 0.36))
    for shift in (-0.07, 0.03):
        figure.add(_limb([head + [shift, 0], head + [shift - 0.04, -0.22]], [0.05, 0.06]), tone=3)
    figure.add(_limb([head + [-0.05, -0.02], head + [-0.2, -0.08]], [0.1, 0.05]), tone=1)
    figure.add(_limb([head, muzzle], [0.21, 0.13]))
    for along in np.linspace(0.12, 0.85, 5):
        on_neck = neck[int(along * 7)] + rng.uniform(-0.04, 0.04, 2)
        figure.mark(_ellipse(on_neck, 0.055, 0.045, rng.uniform(0, 90)), tone=1)
    for x in np.linspace(-0.65, 0.65, 5):
        spot = np.array([x * half, rng.uniform(-0.4, 0.4) * thick - x * half * 0.26])
        figure.mark(_ellipse(spot, rng.uniform(0.06, 0.09), 0.06, rng.uniform(0, 90)), tone=1)
    figure.mark(_ellipse(head + [0.04, -0.03], 0.03, 0.03))
    return figure


def _guitar(rng) -> Figure:
    figure = Figure()
    lower, upper = rng.uniform(0.44, 0.52), rng.uniform(0.32, 0.38)
    waist = rng.uniform(0.46, 0.54)
    neck = rng.uniform(0.95, 1.15)
    top = -waist - upper * 0.5
    figure.add(_box(-0.085, top - neck, 0.085, top + 0.3), tone=3, outlined=True)
    head = top - neck
    figure.add(
        np.array([[-0.1, head], [-0.15, head - 0.28], [0.15, head - 0.28], [0.1, head]]), tone=1
    )
    for y in (head - 0.07, head - 0.2):
        figure.add(_ellipse((-0.18, y), 0.06, 0.04), tone=2)
        figure.add(_ellipse((0.18, y), 0.06, 0.04), tone=2)
    figure.add(_ellipse((0, 0.1), lower, lower * 0.9))
    figure.add(_ellipse((0, -waist), upper, upper * 0.9))
    figure.add(_limb([(0, -waist * 0.8), (0, 0)], [upper * 1.5, upper * 1.7]))
    figure.mark(_ellipse((0, -waist * 0.45), 0.16, 0.16))
    figure.mark(_box(-0.2, 0.22, 0.2, 0.31))
    for x in (-0.04, 0.04):
        figure.lines.append(np.array([[x, 0.25], [x, head - 0.1]]))
    return figure


def _horse(rng) -> Figure:
    figure = Figure()
    half, thick = rng.uniform(0.60, 0.68), rng.uniform(0.27, 0.32)
    leg = rng.uniform(0.68, 0.80)
    root = np.array([-half * 0.95, -thick * 0.4])
    end = root + [rng.uniform(-0.3, -0.14), rng.uniform(0.6, 0.8)]
    tail = _curve(root, root + [-0.32, 0.0], end)
    figure.add(_limb(tail, np.array([8, 12, 16, 19, 21, 22, 20, 15, 6]) / 100), tone=3)
    _legs(figure, rng, half * 0.95, thick * 0.3, leg + thick * 0.5, 0.15)
    figure.add(_ellipse((-half * 0.42, -0.02), half * 0.56, thick * 1.05))
    figure.add(_ellipse((0.05, 0.02), half * 0.8, thick * 0.88))
    figure.add(_ellipse((half * 0.5, 0), half * 0.5, thick))
    chest = np.array([half * 0.7, -thick * 0.3])
    poll = chest + _polar(rng.uniform(48, 64), rng.uniform(0.68, 0.78))
    crest = _curve(chest + [-0.1, 0], (chest + poll) / 2 + [-0.12, -0.08], poll, 8)
    figure.add(_limb(crest + [-0.09, -0.05], np.linspace(0.34, 0.2, 8)), tone=3)
    figure.add(_limb(crest, np.linspace(0.52, 0.25, 8)))
    muzzle = poll + _polar(rng.uniform(-58, -36), rng.uniform(0.46, 0.54))
    figure.add(np.array([poll + [-0.09, -0.05], poll + [-0.01, -0.27], poll + [0.08, -0.07]]))
    figure.add(_limb([poll, (poll + muzzle) / 2, muzzle], [0.27, 0.22, 0.16]))
    figure.mark(_ellipse(poll + (muzzle - poll) * 0.25 + [0.03, -0.04], 0.03, 0.035))
    figure.lines.append(crest[1:-1] + [-0.12, -0.02])
    return figure


def _house(rng) -> Figure:
    figure = Figure()
    half, wall = rng.uniform(0.6, 0.85), rng.uniform(0.6, 0.85)
    roof, eave = rng.uniform(0.5, 0.75), rng.uniform(0.08, 0.18)
    chimney = rng.uniform(0.3, 0.55) * half * rng.choice([-1, 1])
    figure.add(_box(chimney - 0.09, -roof - 0.08, chimney + 0.09, -0.05), tone=3, outlined=True)
    figure.add(_box(-half, -0.02, half, wall), outlined=True)
    ridge = rng.uniform(0.0, 0.5) * half  # 0: a gable; above: a hipped roof
    outline = [[-half - eave, 0], [-ridge, -roof], [ridge, -roof], [half + eave, 0]]
    figure.add(np.array(outline), tone=1, outlined=True)
    door = rng.uniform(-0.2, 0.2) * half
    figure.mark(_box(door - 0.12, wall - rng.uniform(0.36, 0.46), door + 0.12, wall))
    for side in (-1, 1):
        x, size = side * half * 0.63, rng.uniform(0.1, 0.14)
        y = wall * 0.38
        figure.mark(_box(x - size, y - size, x + size, y + size), tone=2)
        figure.lines.append(np.array([[x, y - size], [x, y + size]]))
        figure.lines.append(np.array([[x - size, y], [x + size, y]]))
    return figure


def _person(rng) -> Figure:
    figure = Figure()
    shoulder, hip = rng.uniform(0.22, 0.27), rng.uniform(0.15, 0.19)
    torso = rng.uniform(0.58, 0.68)
    thigh, upper_arm = rng.uniform(0.40, 0.46), rng.uniform(0.30, 0.35)
    skirt = rng.random() < 0.35
    for side in (-1, 1):
        at_hip = np.array([side * hip * 0.6, torso])
        spread = -90 + side * rng.uniform(3, 20)
        knee = at_hip + _polar(spread, thigh)
        foot = knee + _polar(-90 + side * rng.uniform(-12, 10), thigh)
        leg = _limb([at_hip, knee, foot], [0.21, 0.17, 0.13])
        figure.add(leg, tone=2 if skirt else 1)
        figure.add(_ellipse(foot + [side * 0.04, 0.02], 0.1, 0.055), tone=3)
        at_shoulder = np.array([side * shoulder * 0.85, 0.06])
        raised = rng.choice([rng.uniform(8, 35), rng.uniform(60, 140)], p=[0.7, 0.3])
        elbow = at_shoulder + _polar(-90 + side * raised, upper_arm)
        hand = elbow + _polar(-90 + side * (raised + rng.uniform(-20, 60)), upper_arm)
        figure.add(_limb([at_shoulder, elbow, hand], [0.16, 0.12, 0.1]))
        figure.add(_ellipse(hand, 0.065, 0.065), tone=2)
    figure.add(_limb([(0, 0.05), (0, -0.15)], [0.12, 0.11]), tone=2)
    figure.add(
        np.array([[-shoulder, 0], [shoulder, 0], [hip, torso + 0.05], [-hip, torso + 0.05]]),
        outlined=skirt,
    )
    if skirt:
        hem = hip + rng.uniform(0.16, 0.28)
        figure.add(
            np.array(
                [[-hip, torso * 0.8], [hip, torso * 0.8], [hem, torso + 0.34], [-hem, torso + 0.34]]
            ),
            tone=1,
            outlined=True,
        )
    head = np.array([rng.uniform(-0.04, 0.04), -0.27])
    figure.add(_ellipse(head + [0, -0.05], 0.19, 0.19), tone=3)  # hair
    figure.add(_ellipse(head + [0, 0.02], 0.155, 0.18), tone=2, outlined=True)
    for x in (-0.06, 0.06):
        figure.mark(_ellipse(head + [x, 0.0], 0.022, 0.025))
    return figure


_FIGURES: dict[str, Callable[[np.random.Generator], Figure]] = {
    "dog": _dog,
    "elephant": _elephant,
    "giraffe": _giraffe,
    "guitar": _guitar,
    "horse": _horse,
    "house": _house,
    "person": _person,
}
# Largest tilt in degrees either way: a guitar lies at any slant, a house stands upright.
_TILT = {"guitar": 60.0, "house": 4.0}


def _placed(figure: Figure, rng, tilt: float) -> Figure:
    """The figure turned, mirrored, scaled and moved into the canvas, in canvas pixels."""
    angle = np.deg2rad(rng.uniform(-tilt, tilt))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    mirror = np.array([rng.choice([-1.0, 1.0]), 1.0])
    matrix = rotation.T * mirror
    silhouette = np.concatenate([part.points for part in figure.parts]) @ matrix
    low, high = silhouette.min(axis=0), silhouette.max(axis=0)
    extent = high - low
    scale = _CANVAS * rng.uniform(0.72, 0.92) / extent.max()
    # The free room on each side is spread at random, but never more than a tenth from the middle.
    room = np.minimum((_CANVAS * 0.98 - extent * scale) / 2, _CANVAS * 0.1)
    middle = _CANVAS / 2 + rng.uniform(-1, 1, 2) * np.maximum(room, 0)
    shift = middle - (low + high) / 2 * scale

    def move(points: Points) -> Points:
        return points @ matrix * scale + shift

    return Figure(
        [Shape(move(s.points), s.tone, s.outlined) for s in figure.parts],
        [Shape(move(s.points), s.tone) for s in figure.marks],
        [move(line) for line in figure.lines],
    )


# ------------------------------------------------------------------------------------------- styles


def _hsv(hue: float, saturation: float, value: float) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, min(saturation, 1.0), min(value, 1.0))
    return round(red * 255), round(green * 255), round(blue * 255)


def _tones(hue: float, saturation: float, value: float) -> list[Color]:
    """The colours of tones 0 to 3 (main, shaded, light, dark) around one colour."""
    return [
        _hsv(hue, saturation, value),
        _hsv(hue, saturation * 1.05, value * 0.72),
        _hsv(hue + 0.03, saturation * 0.45, min(value * 1.35, 0.97)),
        _hsv(hue - 0.02, saturation, value * 0.38),
    ]


def _xy(points: Points) -> list[float]:
    """The flat [x, y, x, y, ...] that ImageDraw takes."""
    return points.ravel().tolist()


def _fill(draw: ImageDraw.ImageDraw, figure: Figure, tones: list) -> None:
    for shape in figure.parts + figure.marks:
        draw.polygon(_xy(shape.points), fill=tones[shape.tone])


def _closed_line(draw: ImageDraw.ImageDraw, points: Points, color, width: int) -> None:
    # The first edge is drawn twice, so that the corner where the line closes is joined as well.
    draw.line(_xy(np.concatenate([points, points[:2]])), fill=color, width=width, joint="curve")


def _outlined(draw: ImageDraw.ImageDraw, figure: Figure, tones: list, ink, width: int) -> None:
    """Fills in `tones` with lines of `width` canvas pixels around the silhouette and its marks."""
    # Lines around every part first, then the fills: what is left of the lines is the outer half
    # of those on the border of the union, so inner joints (leg and body) show none.
    for part in figure.parts:
        _closed_line(draw, part.points, ink, 2 * width)
    for part in figure.parts:
        draw.polygon(_xy(part.points), fill=tones[part.tone])
        if part.outlined:
            _closed_line(draw, part.points, ink, width)
    for shape in figure.marks:
        draw.polygon(_xy(shape.points), fill=tones[shape.tone])
        _closed_line(draw, shape.points, ink, width)
    for line in figure.lines:
        draw.line(_xy(line), fill=ink, width=width, joint="curve")


def _mask(figure: Figure) -> Image.Image:
    """The silhouette: 255 inside, 0 outside, at SIDE pixels, smooth edges."""
    canvas = Image.new("L", (_CANVAS, _CANVAS), 0)
    draw = ImageDraw.Draw(canvas)
    for part in figure.parts:
        draw.polygon(_xy(part.points), fill=255)
    return canvas.reduce(_OVERSAMPLING)


def _smooth_noise(rng, cells: int, channels: int = 1) -> np.ndarray:
    """Noise with bumps of about SIDE / cells pixels: float32 (SIDE, SIDE, channels), about +-1."""
    grids = rng.uniform(-1, 1, (channels, cells, cells)).astype(np.float32)
    size = (SIDE, SIDE)
    return np.stack(
        [np.asarray(Image.fromarray(g).resize(size, Image.Resampling.BICUBIC)) for g in grids], -1
    )


def _to_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


# Natural colours (hue, saturation, value) of each class's photo; the animal ones vary around it.
_NATURAL = {
    "dog": (0.08, 0.50, 0.62),
    "elephant": (0.07, 0.10, 0.55),
    "giraffe": (0.10, 0.55, 0.82),
    "guitar": (0.07, 0.75, 0.68),
    "horse": (0.05, 0.55, 0.45),
    "house": (0.08, 0.30, 0.80),
    "person": (0.60, 0.45, 0.60),
}


def _photo(figure: Figure, rng, class_name: str) -> Image.Image:
    hue, saturation, value = _NATURAL[class_name]
    spread = 0.5 if class_name in ("house", "person") else 0.03  # walls and clothes: any colour
    tones = _tones(
        hue + rng.uniform(-spread, spread),
        saturation * rng.uniform(0.7, 1.2),
        value * rng.uniform(0.75, 1.15),
    )
    if class_name == "person":
        tones[2] = _hsv(rng.uniform(0.04, 0.08), rng.uniform(0.3, 0.6), rng.uniform(0.45, 0.95))

    # Ground below, sky or a wall above, both mottled, out of focus.
    sky = np.array(_hsv(rng.uniform(0.5, 0.65), rng.uniform(0.05, 0.4), rng.uniform(0.6, 0.95)))
    ground = np.array(_hsv(rng.uniform(0.1, 0.33), rng.uniform(0.2, 0.5), rng.uniform(0.3, 0.65)))
    row = np.arange(SIDE, dtype=np.float32)[:, None, None]
    horizon = rng.uniform(0.45, 0.75) * SIDE + 3 * _smooth_noise(rng, 6)
    below = 1 / (1 + np.exp(-(row - horizon) / 1.5))
    background = sky * (1 - below) + ground * below
    background = background + (10 + 22 * below) * _smooth_noise(rng, 10)
    background = background + (4 + 14 * below) * _smooth_noise(rng, 32)
    background = _to_image(background).filter(ImageFilter.GaussianBlur(rng.uniform(0.4, 1.2)))

    layer = Image.new("RGB", (_CANVAS, _CANVAS), tones[0])
    _fill(ImageDraw.Draw(layer), figure, tones)
    body = np.asarray(layer.reduce(_OVERSAMPLING), dtype=np.float32)

    # A blurred silhouette serves as height; its slope towards the lamp gives the shading.
    mask = _mask(figure)
    height = np.asarray(mask.filter(ImageFilter.GaussianBlur(3)), dtype=np.float32) / 255
    slope_y, slope_x = np.gradient(height)
    lamp = _polar(rng.uniform(40, 140), 1.0)
    shading = 0.95 - 3.2 * (slope_x * lamp[0] + slope_y * lamp[1])
    body = body * np.clip(shading, 0.35, 1.5)[..., None] + 9 * _smooth_noise(rng, 24)

    picture = Image.composite(_to_image(body), background, mask)
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.7)))
    pixels = np.asarray(picture, dtype=np.float32)
    column = np.linspace(-1, 1, SIDE, dtype=np.float32)
    across, down = rng.uniform(-0.15, 0.15, 2)
    light = 1 + across * column[None, :, None] + down * column[:, None, None]
    return _to_image(pixels * light + rng.normal(0, 3.0, (SIDE, SIDE, 3)))


def _brush(layer: Image.Image, rng, count: int, length: float, spread: float, angle: float) -> None:
    """Covers `layer` with short strokes, each in the colour found under it, varied by `spread`."""
    draw = ImageDraw.Draw(layer)
    width, height = layer.size
    middle = rng.uniform(0, 1, (count, 2)) * (width - 1, height - 1)
    angles = angle + rng.uniform(-35, 35, count)
    half = _polar(angles, length / 2 * rng.uniform(0.5, 1.3, count)).T
    shifts = rng.normal(0, spread, (count, 3)) + rng.normal(0, spread, (count, 1))
    thickness = rng.integers(2, 6, count)
    under = np.asarray(layer)[middle[:, 1].astype(int), middle[:, 0].astype(int)]
    colors = np.clip(np.rint(under + shifts), 0, 255).astype(int)
    strokes = np.concatenate([middle - half, middle + half], axis=1)
    for ends, color, wide in zip(
        strokes.tolist(), colors.tolist(), thickness.tolist(), strict=True
    ):
        draw.line(ends, fill=tuple(color), width=wide)


def _art_painting(figure: Figure, rng, class_name: str) -> Image.Image:
    # Painters have habits: each class leans to a hue of its own, widely spread. That is a cue
    # which works within this domain and misleads outside it.
    hue = CLASSES.index(class_name) / len(CLASSES) + rng.normal(0, 0.09)
    # Figure and ground differ in brightness, most often with the figure the brighter one.
    if rng.random() < 0.85:
        tones = _tones(hue, rng.uniform(0.6, 0.95), rng.uniform(0.8, 1.0))
        ground_value = rng.uniform(0.15, 0.48, 2)
    else:
        tones = _tones(hue, rng.uniform(0.6, 0.95), rng.uniform(0.3, 0.5))
        ground_value = rng.uniform(0.5, 0.95, 2)
    ground_hue = rng.uniform(0, 1) + np.array([0.0, rng.uniform(-0.12, 0.12)])
    top, low = (
        np.array(_hsv(h, rng.uniform(0.25, 0.7), v), dtype=np.float32)
        for h, v in zip(ground_hue, ground_value, strict=True)
    )
    size = (_CANVAS // 2, _CANVAS // 2)  # strokes need less sharpness than edges do
    ramp = np.linspace(0, 1, SIDE, dtype=np.float32)[:, None, None]
    ground = top * (1 - ramp) + low * ramp + 30 * _smooth_noise(rng, 5, 3)
    background = _to_image(ground).resize(size, Image.Resampling.BILINEAR)
    _brush(background, rng, 130, 15, 20, rng.uniform(0, 180))

    layer = Image.new("RGB", (_CANVAS, _CANVAS), tones[0])
    _fill(ImageDraw.Draw(layer), figure, tones)
    layer = layer.resize(size, Image.Resampling.BILINEAR)
    _brush(layer, rng, 150, 8, 17, rng.uniform(0, 180))

    out = (SIDE, SIDE)
    picture = Image.composite(
        layer.resize(out, Image.Resampling.BOX),
        background.resize(out, Image.Resampling.BOX),
        _mask(figure),
    )
    canvas_grain = rng.normal(0, 5.0, (SIDE, SIDE, 1))
    return _to_image(np.asarray(picture, dtype=np.float32) + canvas_grain)


def _cartoon(figure: Figure, rng, class_name: str) -> Image.Image:
    hue = rng.uniform(0, 1)
    tones = _tones(hue, rng.uniform(0.55, 1.0), rng.uniform(0.7, 1.0))
    if rng.random() < 0.5:
        ground = _hsv(0, 0, 1.0)
    else:
        ground = _hsv(hue + rng.uniform(0.3, 0.7), rng.uniform(0.15, 0.6), 1.0)
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), ground)
    _outlined(ImageDraw.Draw(canvas), figure, tones, (15, 15, 20), int(rng.integers(4, 7)))
    return canvas.reduce(_OVERSAMPLING)


def _sketch(figure: Figure, rng, class_name: str) -> Image.Image:
    # An unsteady hand: a slow wave, the same for all lines, moves every point a little.
    phase, pace = rng.uniform(0, 2 * np.pi, 4), rng.uniform(0.03, 0.08, 4)

    def wobble(points: Points) -> Points:
        x, y = points[:, 0], points[:, 1]
        wave_x = np.sin(pace[0] * y + phase[0]) + np.sin(pace[1] * x + phase[1])
        wave_y = np.sin(pace[2] * x + phase[2]) + np.sin(pace[3] * y + phase[3])
        return points + 1.3 * np.stack([wave_x, wave_y], axis=1)

    unsteady = Figure(
        [Shape(wobble(s.points), s.tone, s.outlined) for s in figure.parts],
        [Shape(wobble(s.points), s.tone) for s in figure.marks],
        [wobble(line) for line in figure.lines],
    )
    ink = int(rng.integers(30, 90))
    canvas = Image.new("L", (_CANVAS, _CANVAS), 255)
    _outlined(ImageDraw.Draw(canvas), unsteady, [255] * 4, ink, int(rng.integers(3, 5)))
    return canvas.reduce(_OVERSAMPLING).convert("RGB")


_STYLES: dict[str, Callable[[Figure, np.random.Generator, str], Image.Image]] = {
    "art_painting": _art_painting,
    "cartoon": _cartoon,
    "photo": _photo,
    "sketch": _sketch,
}

DOMAINS = tuple(_STYLES)
CLASSES = tuple(_FIGURES)


# ---------------------------------------------------------------------------------------- interface


def draw(domain: str, class_name: str, index: int) -> np.ndarray:
    """Picture `index` (>= 0) of a class in a domain: uint8 (SIDE, SIDE, 3), RGB."""
    rng = np.random.default_rng([DOMAINS.index(domain), CLASSES.index(class_name), index])
    figure = _placed(_FIGURES[class_name](rng), rng, _TILT.get(class_name, 8.0))
    return np.array(_STYLES[domain](figure, rng, class_name))


def load_toy(name: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Draws one domain, class after class.

    Args:
        name: one of DOMAINS.
        limit: pictures per class, at least 1; None or more than IMAGES_PER_CLASS: all of them.

    Returns:
        images uint8 (n, SIDE, SIDE, 3) RGB; labels int64 (n,), an index into CLASSES;
        a name "<class>/<file>" for each image.

    Raises:
        ValueError: an unknown domain, or a limit below 1.
    """
    if name not in DOMAINS:
        raise ValueError(f"domain {name!r} is unknown; known are {', '.join(DOMAINS)}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but must be at least 1 image per class")
    count = IMAGES_PER_CLASS if limit is None else min(limit, IMAGES_PER_CLASS)
    images = np.stack([draw(name, label, i) for label in CLASSES for i in range(count)])
    labels = np.repeat(np.arange(len(CLASSES), dtype=np.int64), count)
    files = tuple(f"{label}/{label}_{i:03d}.png" for label in CLASSES for i in range(count))
    return images, labels, files
