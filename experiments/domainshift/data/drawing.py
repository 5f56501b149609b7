"""Drawn pictures with the domains and classes of PACS: no download, no files.

A picture is a figure of random pose and proportions in the style of its domain: a shaded body in a
landscape (photo), brush strokes in free colours (art_painting), exaggerated shapes with flat
colours and black outlines (cartoon), grey lines on white (sketch).

Points are complex numbers, x to the right and y down. A figure is a list of (tone, shapes), back
to front: the shapes of one entry share an outline. Tones: 0 main, 1 shaded, 2 light, 3 dark.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

SIDE = 64  # pixels
IMAGES_PER_CLASS = 60

_CANVAS = 3 * SIDE  # figures are drawn larger and averaged down, which smooths their edges

Shape = np.ndarray  # complex128 (k,), a closed polygon
Figure = list[tuple[int, list[Shape]]]
Uniform = Callable[..., float]  # (low, high) -> a number between them
Color = tuple[float, ...]


def direction(degrees):
    """A vector of length 1: 0 points to the right, 90 up."""
    return np.exp(-1j * np.deg2rad(degrees))


def ellipse(center: complex, rx: float, ry: float, degrees: float = 0.0) -> Shape:
    turn = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    return center + (rx * np.cos(turn) + 1j * ry * np.sin(turn)) * direction(degrees)


def box(center: complex, half_width: float, half_height: float) -> Shape:
    corners = np.array([-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j])
    return center + half_width * corners.real + 1j * half_height * corners.imag


def limb(start: complex, end: complex, w0: float, w1: float, bend: complex = 0j) -> Shape:
    """A tube with a round end, `w0` wide at `start` and `w1` at `end`; its middle is off by `bend`."""
    t = np.linspace(0, 1, 9)
    path = start + t * (end - start) + 4 * t * (1 - t) * bend
    tangent = np.gradient(path)
    side = 0.5j * tangent / (np.abs(tangent) + 1e-9) * (w0 + t * (w1 - w0))
    cap = path[-1] - side[-1] * direction(-np.linspace(30, 150, 5))
    return np.concatenate([path - side, cap, (path + side)[::-1]])


# ------------------------------------------------------------------------------------------- figures


def _legs(u: Uniform, half: float, length: float, width: float) -> list[list[Shape]]:
    """The far and the near pair of legs of an animal whose body is 2 * `half` long."""
    pairs = []
    for inset, reach in ((1.3, 0.93j), (0.6, 1j)):
        tops = [side * (half - inset * width) + 0.1j for side in (-1, 1)]
        feet = [top + length * (u(-0.25, 0.25) + reach) for top in tops]
        legs = zip(tops, feet, strict=True)
        pairs.append([limb(top, foot, 1.3 * width, 0.85 * width) for top, foot in legs])
    return pairs


def _dog(u: Uniform) -> Figure:
    half, thick = u(0.6, 0.74), u(0.24, 0.3)
    far, near = _legs(u, half, u(0.5, 0.62), 0.17)
    tail, head = -half * 0.9 - 0.12j, half * 0.85 - 1j * u(0.4, 0.52)
    nose = head + u(0.33, 0.42) * direction(-u(4, 22))
    body = [ellipse(0j, half, thick), limb(half * 0.6 - 0.05j, head, 0.46, 0.34), *near]
    body += [limb(tail, tail + u(0.42, 0.6) * direction(u(95, 150)), 0.15, 0.07, -0.12)]
    body += [ellipse(head, 0.25, 0.23), limb(head, nose, 0.28, 0.18)]
    ear = ellipse(head - 0.15 + 0.04j, 0.1, 0.22, u(-12, 22))
    dark = [ellipse(nose + 0.05, 0.06, 0.055), ellipse(head + 0.1 - 0.05j, 0.035, 0.04)]
    return [(1, far), (0, body), (1, [ear]), (3, dark)]


def _elephant(u: Uniform) -> Figure:
    half, thick = u(0.68, 0.78), u(0.46, 0.54)
    far, near = _legs(u, half * 0.92, u(0.75, 0.9), u(0.29, 0.34))
    head = half * 0.95 - 1j * u(0.2, 0.32)
    mouth = head + 0.25 + 0.1j
    if u(0, 1) < 0.6:  # hanging, else raised
        tip, bend = mouth + u(0.2, 0.45) + 1j * u(0.72, 0.9), 0.12 - 0.1j
    else:
        tip, bend = mouth + u(0.5, 0.65) - 1j * u(0.2, 0.5), 0.1 + 0.25j
    trunk = limb(mouth, tip, 0.3, 0.12, bend)
    tail = limb(-half * 0.95 - 0.1j, -half - 0.12 + 0.4j, 0.07, 0.07, -0.05)
    body = [ellipse(0j, half, thick), ellipse(head, 0.38, 0.37), trunk, tail, *near]
    tusk = limb(mouth + 0.1j, mouth + u(0.28, 0.36) + 0.2j, 0.1, 0.04, 0.08j)
    ear = ellipse(head - 0.22 + 0.1j, 0.27, 0.42, u(-15, 15))
    eye = ellipse(head + 0.18 - 0.08j, 0.045, 0.05)
    return [(1, far), (0, body), (2, [tusk]), (1, [ear]), (3, [eye])]


def _giraffe(u: Uniform) -> Figure:
    half, shoulder = u(0.42, 0.5), 0.32 - 0.12j
    far, near = _legs(u, half * 0.92, u(0.78, 0.95), 0.13)
    head = shoulder + u(1.1, 1.35) * direction(u(58, 80))
    body = [ellipse(0j, half, u(0.22, 0.27), u(8, 18)), limb(shoulder, head, 0.34, 0.15, -0.05)]
    body += [limb(head, head + u(0.28, 0.36) * direction(-u(8, 35)), 0.21, 0.13), *near]
    body += [limb(-half * 0.95 - 0.05j, -half - 0.06 + 0.4j, 0.05, 0.08, -0.08)]
    horns = [limb(head + x, head + x - 0.04 - 0.2j, 0.05, 0.06) for x in (-0.07, 0.03)]
    places = [shoulder - 0.03 + t * (head - shoulder) for t in (0.1, 0.35, 0.6, 0.85)]
    places += [half * x * (1 - 0.2j) + 1j * u(-0.1, 0.1) for x in (-0.65, -0.3, 0.05, 0.4)]
    spots = [ellipse(place, u(0.05, 0.08), 0.05, u(0, 90)) for place in places]
    return [(1, far), (3, horns), (0, body), (1, spots), (3, [ellipse(head - 0.03j, 0.03, 0.03)])]


def _guitar(u: Uniform) -> Figure:
    lower, upper, waist = u(0.44, 0.52), u(0.32, 0.38), u(0.48, 0.56)
    top = -waist - upper * 0.5 - u(0.85, 1.05)
    body = [ellipse(0.1j, lower, lower * 0.9), ellipse(-1j * waist, upper, upper * 0.9)]
    body += [box(-0.5j * waist, upper * 0.78, waist * 0.5)]
    pegs = [ellipse(x + 1j * (top - y), 0.07, 0.045) for x in (-0.18, 0.18) for y in (0.07, 0.2)]
    head = limb(1j * top, 1j * (top - 0.25), 0.2, 0.3)
    neck, bridge = box(0.5j * (top - waist), 0.085, (-waist - top) / 2), box(0.27j, 0.2, 0.045)
    hole = ellipse(-0.45j * waist, 0.16, 0.16)
    return [(2, pegs), (1, [head]), (0, body), (3, [neck]), (3, [hole, bridge])]


def _horse(u: Uniform) -> Figure:
    half, thick = u(0.6, 0.68), u(0.27, 0.32)
    far, near = _legs(u, half * 0.95, u(0.8, 0.93), 0.15)
    tail, chest = -half * 0.92 - 0.1j, half * 0.7 - 0.1j
    poll = chest + u(0.68, 0.8) * direction(u(48, 64))
    muzzle = poll + u(0.44, 0.52) * direction(-u(36, 58))
    body = [ellipse(0j, half, thick), limb(chest, poll, 0.5, 0.26, -0.06 - 0.05j), *near]
    body += [limb(poll, muzzle, 0.28, 0.17), limb(poll - 0.02, poll + 0.02 - 0.24j, 0.15, 0.03)]
    mane = limb(chest - 0.26 - 0.1j, poll - 0.1 - 0.08j, 0.2, 0.12, -0.08 - 0.06j)
    swish = limb(tail, tail - u(0.14, 0.3) + 1j * u(0.55, 0.75), 0.12, 0.2, -0.15 - 0.1j)
    eye = ellipse(poll + 0.3 * (muzzle - poll) - 0.05j, 0.03, 0.035)
    return [(1, far), (3, [swish]), (3, [mane]), (0, body), (3, [eye])]


def _house(u: Uniform) -> Figure:
    half, wall, roof, size = u(0.6, 0.85), u(0.3, 0.43), u(0.5, 0.75), u(0.1, 0.15)
    eave, ridge, side = half + u(0.08, 0.18), u(0.0, 0.5) * half, 1 if u(-1, 1) > 0 else -1
    door = box(u(-0.2, 0.2) * half + 1j * (2 * wall - 0.22), 0.13, 0.22)
    chimney = box(side * u(0.3, 0.5) * half - 0.5j * roof, 0.1, roof * 0.5 + 0.1)
    gable = np.array([-eave, -ridge - 1j * roof, ridge - 1j * roof, eave])
    windows = [box(x * half + 0.76j * wall, size, size) for x in (-0.6, 0.6)]
    walls = box(1j * wall, half, wall)
    return [(3, [chimney]), (0, [walls]), (1, [gable]), (3, [door]), (2, windows)]


def _person(u: Uniform) -> Figure:
    shoulder, hip, torso, head = u(0.22, 0.27), u(0.15, 0.19), u(0.58, 0.68), u(-0.04, 0.04) - 0.27j
    legs, shoes, arms, hands = [], [], [], []
    for side in (-1, 1):
        top = side * hip * 0.6 + 1j * (torso - 0.05)
        foot = top + u(0.8, 0.95) * direction(-90 + side * u(2, 18))
        legs.append(limb(top, foot, 0.22, 0.13))
        shoes.append(ellipse(foot + side * 0.05 + 0.02j, 0.11, 0.06))
        raised = u(8, 35) if u(0, 1) < 0.7 else u(60, 140)
        hand = side * shoulder * 0.85 + 0.07j + u(0.58, 0.7) * direction(-90 + side * raised)
        arms.append(limb(side * shoulder * 0.8 + 0.08j, hand, 0.17, 0.1, 0.05j * u(-1, 1)))
        hands.append(ellipse(hand, 0.065, 0.065))
    chest = np.array([-shoulder, shoulder, hip + 1j * torso, -hip + 1j * torso])
    skin, hair = ellipse(head + 0.02j, 0.155, 0.18), ellipse(head - 0.05j, 0.19, 0.19)
    eyes = [ellipse(head + x + 0.02j, 0.01, 0.015) for x in (-0.07, 0.07)]
    hands += [limb(0.05j, -0.15j, 0.12, 0.11)]  # and the neck
    face = [(3, [hair]), (2, [skin]), (3, eyes)]
    return [(3, shoes), (1, legs), (2, hands), (0, [chest, *arms]), *face]


# By class: the figure, its largest tilt in degrees, hue, saturation and value of its photographs.
_FIGURES = {
    "dog": (_dog, 8, (0.08, 0.50, 0.62)),
    "elephant": (_elephant, 8, (0.07, 0.10, 0.55)),
    "giraffe": (_giraffe, 8, (0.10, 0.55, 0.82)),
    "guitar": (_guitar, 60, (0.07, 0.75, 0.68)),
    "horse": (_horse, 8, (0.05, 0.55, 0.45)),
    "house": (_house, 3, (0.08, 0.30, 0.80)),
    "person": (_person, 5, (0.03, 0.50, 0.65)),
}


def _moved(figure: Figure, move: Callable[[Shape], Shape]) -> Figure:
    return [(tone, [move(shape) for shape in shapes]) for tone, shapes in figure]


def _placed(figure: Figure, u: Uniform, tilt: float) -> Figure:
    """The figure tilted, mirrored or not, and scaled to its place on the canvas, in canvas pixels."""
    turn, mirrored = direction(u(-tilt, tilt)), u(-1, 1) > 0
    figure = _moved(figure, lambda s: turn * (-s.conj() if mirrored else s))
    points = np.concatenate([shape for _, shapes in figure for shape in shapes])
    low = points.real.min() + 1j * points.imag.min()
    width, height = np.ptp(points.real), np.ptp(points.imag)
    scale = _CANVAS * u(0.7, 0.92) / max(width, height)
    corner = u(0.3, 0.7) * (_CANVAS - scale * width) + 1j * u(0.3, 0.7) * (_CANVAS - scale * height)
    return _moved(figure, lambda s: corner + scale * (s - low))


# ------------------------------------------------------------------------------------------- styles


def _hsv(hue: float, saturation: float, value: float) -> tuple[int, ...]:
    rgb = colorsys.hsv_to_rgb(hue % 1.0, min(saturation, 1.0), min(value, 1.0))
    return tuple(round(255 * channel) for channel in rgb)


def _tones(hue: float, saturation: float, value: float) -> list[tuple[int, ...]]:
    """Main, shaded, light and dark tone of a colour."""
    light = _hsv(hue + 0.03, saturation * 0.45, min(value * 1.35, 0.97))
    shaded, dark = _hsv(hue, saturation, value * 0.72), _hsv(hue - 0.02, saturation, value * 0.38)
    return [_hsv(hue, saturation, value), shaded, light, dark]


def _blank(color) -> Image.Image:
    return Image.new("RGB", (_CANVAS, _CANVAS), color)


def _drawn(canvas: Image.Image, figure: Figure, tones, ink=None, width: int = 0) -> Image.Image:
    """`canvas` with the figure in `tones`, and with outlines of `ink` where `width` is not 0."""
    pen = ImageDraw.Draw(canvas)
    for tone, shapes in figure:
        outlines = [np.stack([s.real, s.imag], 1).ravel().tolist() for s in shapes]
        for xy in outlines if width else ():  # the fills cover the inner half of each line
            pen.line(xy + xy[:4], fill=ink, width=2 * width, joint="curve")
        for xy in outlines:
            pen.polygon(xy, fill=tones[tone])
    return canvas


def _noise(rng, cells: int) -> np.ndarray:
    """Smooth noise of about -1 to 1 in bumps of SIDE / cells pixels: float32 (SIDE, SIDE, 1)."""
    grid = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(grid.resize((SIDE, SIDE), Image.Resampling.BICUBIC))[..., None]


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _landscape(rng, sky: Color, ground: Color) -> np.ndarray:
    """Mottled ground below a sky: float (SIDE, SIDE, 3)."""
    row = np.arange(SIDE)[:, None, None] - rng.uniform(0.45, 0.75) * SIDE + 3 * _noise(rng, 6)
    below = 1 / (1 + np.exp(-row / 1.5))
    mottle = (8 + 22 * below) * (_noise(rng, 10) + 0.6 * _noise(rng, 32))
    return np.array(sky) * (1 - below) + np.array(ground) * below + mottle


def _strokes(picture: Image.Image, rng, count: int, length: float) -> Image.Image:
    """The picture under brush strokes, each in about the colour that it covers."""
    picture = picture.resize((_CANVAS // 2, _CANVAS // 2))
    pen, places = ImageDraw.Draw(picture), rng.integers(0, picture.width, (count, 2))
    angle = rng.uniform(0, 180) + rng.uniform(-35, 35, count)
    half = length / 2 * rng.uniform(0.5, 1.3, count) * direction(angle)
    colors = np.asarray(picture)[places[:, 1], places[:, 0]] + rng.normal(0, 14, (count, 1))
    colors = np.clip(colors + rng.normal(0, 14, (count, 3)), 0, 255).astype(int).tolist()
    half = np.stack([half.real, half.imag], 1)
    ends = np.concatenate([places - half, places + half], 1).tolist()
    for xy, color, width in zip(ends, colors, rng.integers(2, 6, count).tolist(), strict=True):
        pen.line(xy, fill=tuple(color), width=width)
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def _mask(figure: Figure) -> Image.Image:
    return _drawn(_blank(0), figure, [(255,) * 3] * 4).convert("L").reduce(3)


def _photo(figure: Figure, rng, color: Color) -> Image.Image:
    u, (hue, saturation, value), mask = rng.uniform, color, _mask(figure)
    tones = _tones(hue + u(-0.04, 0.04), saturation * u(0.7, 1.2), value * u(0.75, 1.15))
    sky = _hsv(u(0.5, 0.65), u(0.05, 0.4), u(0.6, 0.95))
    scene = _landscape(rng, sky, _hsv(u(0.1, 0.33), u(0.2, 0.5), u(0.3, 0.65)))
    # The blurred silhouette serves as height; its slope towards the lamp is the light.
    height = np.asarray(mask.filter(ImageFilter.GaussianBlur(3)), np.float32) / 255
    (down, across), lamp = np.gradient(height), direction(u(40, 140))
    light = np.clip(0.95 - 3.2 * (across * lamp.real + down * lamp.imag), 0.35, 1.5)[..., None]
    body = np.asarray(_drawn(_blank(tones[0]), figure, tones).reduce(3)) * light
    picture = Image.composite(_image(body + 9 * _noise(rng, 24)), _image(scene), mask)
    picture = np.asarray(picture.filter(ImageFilter.GaussianBlur(u(0.3, 0.7))))
    return _image(picture + rng.normal(0, 3, picture.shape))


def _art_painting(figure: Figure, rng, color: Color) -> Image.Image:
    u, hue = rng.uniform, rng.uniform()
    tones = _tones(hue, u(0.5, 0.95), u(0.4, 1.0))
    sky = _hsv(hue + u(0.25, 0.75), u(0.2, 0.7), u(0.3, 1.0))
    scene = _landscape(rng, sky, _hsv(hue + u(0.25, 0.75), u(0.3, 0.8), u(0.2, 0.8)))
    body = _strokes(_drawn(_blank(tones[0]), figure, tones), rng, 150, 8)
    picture = Image.composite(body, _strokes(_image(scene), rng, 130, 15), _mask(figure))
    return _image(np.asarray(picture) + rng.normal(0, 5, (SIDE, SIDE, 1)))


def _cartoon(figure: Figure, rng, color: Color) -> Image.Image:
    u, hue, middle = rng.uniform, rng.uniform(), _CANVAS * (0.5 + 0.5j)
    smaller = u(0.0, 0.5) / _CANVAS  # what is low is drawn small
    figure = _moved(figure, lambda s: middle + (s - middle) * (1 - smaller * s.imag))
    tones = [_hsv(hue + shift, u(0.5, 1.0), u(0.75, 1.0)) for shift in (0, 0.1, 0.3, 0.6)]
    back = [_hsv(hue + u(0.35, 0.65), u(0.1, 0.6), value) for value in (1.0, u(0.7, 1.0))]
    canvas = _blank(back[0])
    around, start = [-_CANVAS / 2] * 2 + [1.5 * _CANVAS] * 2, u(0, 30)
    for ray in range(0, 360 if u(0, 1) < 0.6 else 0, 30):
        ImageDraw.Draw(canvas).pieslice(around, start + ray, start + ray + 15, fill=back[1])
    return _drawn(canvas, figure, tones, (15, 15, 20), round(u(4, 7))).reduce(3)


def _sketch(figure: Figure, rng, color: Color) -> Image.Image:
    white, picture = (255,) * 3, _blank((255,) * 3)
    for _ in range(2):  # an unsteady hand draws every line twice
        phase, pace = rng.uniform(0, 2 * np.pi, 4), rng.uniform(0.03, 0.08, 4)

        def unsteady(s: Shape, phase=phase, pace=pace) -> Shape:
            waves = np.sin(np.stack([s.imag, s.real, s.real, s.imag], 1) * pace + phase)
            return s + 2.2 * (waves @ [1, 1, 1j, 1j])

        ink, width = (round(rng.uniform(110, 170)),) * 3, round(rng.uniform(2, 3))
        lines = _drawn(_blank(white), _moved(figure, unsteady), [white] * 4, ink, width)
        picture = ImageChops.darker(picture, lines)
    return picture.reduce(3)


_STYLES = {"art_painting": _art_painting, "cartoon": _cartoon, "photo": _photo, "sketch": _sketch}

DOMAINS = tuple(_STYLES)
CLASSES = tuple(_FIGURES)


def paint(
    domain: str, figure: Figure, rng: np.random.Generator, color: Color, tilt: float
) -> np.ndarray:
    """The figure in the style of a domain, placed at random: uint8 (SIDE, SIDE, 3), RGB.

    Args:
        color: hue, saturation and value (0 to 1) of the body in a photo; other styles choose their own.
        tilt: largest angle either way, in degrees.
    """
    return np.array(_STYLES[domain](_placed(figure, rng.uniform, tilt), rng, color))


def draw(domain: str, class_name: str, index: int) -> np.ndarray:
    """Picture `index` (>= 0) of a class in a domain: uint8 (SIDE, SIDE, 3), RGB.

    A function of its arguments alone: fewer pictures of a class are the first of more.
    """
    rng = np.random.default_rng([DOMAINS.index(domain), CLASSES.index(class_name), index])
    figure, tilt, color = _FIGURES[class_name]
    return paint(domain, figure(rng.uniform), rng, color, tilt)
