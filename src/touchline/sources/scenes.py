"""The drawing of the sample: one scene of a made-up match, as an RGB image.

A scene is laid out in metres (x to the right, y up, z away from the camera), drawn far to near in 8-bit RGB, and every
random choice in it comes from the generator that is handed in.

The pixels are the same on every processor, so only operations that are defined to the last bit are used: integers; of
floating point `+ - * /` and square roots, one NumPy operation at a time; of OpenCV its scalar drawing (polygons, lines,
circles), tables, saturating sums, and what it promises bit-exact (`GaussianBlur` of 8 bits, `INTER_LINEAR_EXACT`).
NumPy's sines, exponentials, normal draws and matrix products, and OpenCV's other kernels, differ between processors:
`_sine`, `_normal`, `_product`, `resized` and `_warped` stand in for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import product
from operator import add
from typing import Any

import cv2
import numpy as np

Image = np.ndarray  # (height, width, 3) uint8 RGB
Rng = np.random.Generator
Colour = tuple[int, int, int]
Vector = Sequence[float] | np.ndarray
Vectors = Sequence[Vector] | np.ndarray
Kit = tuple[Colour, Colour, Colour, Colour]  # shirt, its second colour, shorts, socks
Point = tuple[float, float, float]

BALLS = ("oval", "patched", "ringed", "segmented")
GOALS = ("uprights", "net", "ring", "gate")
SHIRTS = ("hoops", "plain", "stripes", "halves")
KITS: tuple[Colour, ...] = (
    (200, 30, 45), (30, 60, 150), (245, 245, 240), (20, 100, 60), (240, 195, 40), (25, 25, 35),
    (90, 160, 215), (235, 115, 30), (110, 30, 60), (95, 60, 140),
)  # fmt: skip
GREENS: tuple[Colour, ...] = ((70, 130, 52), (86, 142, 60), (58, 112, 50), (120, 132, 66), (98, 112, 58))
LEAVES: tuple[Colour, ...] = ((48, 86, 44), (66, 98, 40), (96, 92, 40), (36, 70, 50))
WALLS: tuple[Colour, ...] = ((190, 170, 150), (150, 80, 65), (205, 205, 200))
SKINS: tuple[Colour, ...] = ((245, 210, 180), (225, 175, 140), (190, 135, 100), (140, 90, 62), (92, 60, 45))
HAIRS: tuple[Colour, ...] = ((30, 24, 22), (70, 45, 28), (150, 105, 55), (205, 175, 110), (125, 60, 30))


def _sine(angle: Any) -> Any:
    """Of radians, within 1e-9: the Taylor series after folding into a quarter turn either way."""
    half = angle / np.pi
    # NumPy takes ten times as long for one number.
    turns = round(half) if isinstance(half, float) else np.rint(half)
    x = (half - turns) * np.pi * (1 - 2 * (turns % 2))
    y = x * x
    return x * (1 - y / 6 * (1 - y / 20 * (1 - y / 42 * (1 - y / 72 * (1 - y / 110 * (1 - y / 156))))))


def _circle(angle: np.ndarray | float) -> np.ndarray:
    """The points (cosine, sine) of the unit circle at `angle` radians: (2,) and the shape of `angle`."""
    return np.array([_sine(angle + np.pi / 2), _sine(angle)])


def _normal(rng: Rng, mean: float = 0.0, deviation: float = 1.0, *size: int) -> Any:
    """Nearly normal numbers, a float or an array of `size`: sums of twelve uniform ones."""
    uniform = rng.random((12, *size))
    # Not `sum`, which from Python 3.12 on adds floats in another way.
    return mean + deviation * (reduce(add, uniform if size else uniform.tolist()) - 6)


def _product(left: np.ndarray, right: np.ndarray | Sequence[Any]) -> np.ndarray:
    """The matrix product of (m, k) and (k, ...), added up in the order of k."""
    return np.asarray(sum(np.multiply.outer(column, values) for column, values in zip(left.T, right, strict=True)))


def resized(image: Image, width: int, height: int) -> Image:
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)


def _warped(texture: Image, view: np.ndarray, rows: slice, width: int) -> tuple[Image, np.ndarray]:
    """The 8-bit `texture` as the homography `view` (3, 3), pixels to pixels, shows it; interpolated linearly.

    Args:
        rows: those of the picture that are wanted, each of `width` pixels.

    Returns:
        An image of these rows whose borders go on for ever, and for each of its pixels, bool: within the texture.
    """
    tall, wide = texture.shape[:2]
    # Pixels to pixels again: the inverse up to its scale, which cancels. Those of the texture are counted in 256ths.
    back = np.array([np.cross(view[1], view[2]), np.cross(view[2], view[0]), np.cross(view[0], view[1])])
    back[:, :2] *= 256
    # The channels of a pixel as 16-bit parts of one integer, so that one operation is of all of them.
    coloured = texture.ndim == 3
    parts = cv2.cvtColor(texture, cv2.COLOR_RGB2RGBA) if coloured else texture
    kind = np.uint64 if coloured else np.uint16
    pixels = parts.astype(np.uint16).ravel().view(kind)
    low, half = (np.full(4, value, np.uint16).view(kind)[0] for value in (255, 128))

    def between(first: np.ndarray, second: np.ndarray, share: np.ndarray) -> np.ndarray:
        return (first * (256 - share) + second * share + half) >> 8 & low

    def strip(top: int) -> tuple[Image, np.ndarray]:
        across, down = np.arange(width), np.arange(top, min(top + 32, rows.stop))[:, None]
        u, v, w = (column[0] * across + column[1] * down + column[2] for column in back.T)
        w[w == 0] = 1e-9
        within = np.ones(w.shape, bool)
        for at, side in ((u, wide), (v, tall)):
            np.rint(np.divide(at, w, out=at), out=at)
            within &= (at >= 0) & (at < (side - 1) * 256)
            np.clip(at, 0, (side - 1) * 256 - 1, out=at)
        columns, lines = u.astype(np.int64), v.astype(np.int64)
        corner = (lines >> 8) * wide + (columns >> 8)
        right, below = ((at & 255).astype(kind) for at in (columns, lines))
        top_left, top_right, low_left, low_right = (np.take(pixels, corner + step) for step in (0, 1, wide, wide + 1))
        shown = between(between(top_left, top_right, right), between(low_left, low_right, right), below)
        parts = shown.view(np.uint16).astype(np.uint8)
        return cv2.cvtColor(parts.reshape(*shown.shape, 4), cv2.COLOR_RGBA2RGB) if coloured else parts, within

    # Strips of the picture, as their numbers stay in the processor's cache: four times as fast.
    shown, within = zip(*map(strip, range(rows.start, rows.stop, 32)), strict=True)
    return np.concatenate(shown), np.concatenate(within)


def _rows(image: Image, y: np.ndarray) -> slice:
    """Those of the image that may show anything between the least and the greatest `y`, in pixels; at least one."""
    top, bottom = np.clip([y.min() - 2, y.max() + 3], (0, 1), (len(image) - 1, len(image))).astype(int)
    return slice(top, bottom)


@dataclass(frozen=True)
class Sport:
    """What tells a class: its ball, its goal (and the markings that go with it), and most of its shirts."""

    ball: str
    goal: str
    shirt: str

    @property
    def bulk(self) -> float:
        """Breadth of its players; 1 is slim."""
        return {"oval": 1.22, "segmented": 1.1}.get(self.ball, 1.0)


def draw(sport: Sport, rng: Rng) -> Image:
    """One scene, 200 to 640 pixels a side."""
    shot = str(rng.choice(["goal", "play", "ball", "player"], p=[0.46, 0.2, 0.2, 0.14]))
    width, height = _size(rng)
    camera, subject, goal = _camera(shot, width, height, rng)
    backdrop = _stands if rng.random() < 0.7 else _countryside
    hard = rng.random() < 0.07
    light = str(rng.choice(["sun", "cloud", "dusk", "night"], p=[0.4, 0.35, 0.15, 0.1]))

    image = _sky(width, height, light, rng)
    _pitch(image, camera, goal, sport.goal, rng)
    backdrop(image, camera, goal.z, rng)
    players, ball_at = _play(sport, subject, shot, rng)
    shows_goal = not hard and rng.random() < {"goal": 1.0}.get(shot, 0.85)
    shows_ball = shot == "ball" or (not hard and rng.random() < 0.8)
    if shows_goal:
        keeper_at = goal.world([(rng.uniform(-2, 2), 0, 1)])[0]
        players.append(_someone(sport, keeper_at, "reach", 1, _kit(rng), rng))

    _shadows(image, camera, [player.at for player in players], light, rng)
    things: list[tuple[float, Callable[[], None]]] = [(p.at[2], partial(_figure, image, camera, p)) for p in players]
    if shows_goal:
        things.append((goal.z, partial(_goal, image, camera, goal, sport.goal, rng)))
    if shows_ball:
        things.append((ball_at[2] - 0.3, partial(_ball, image, camera, ball_at, sport.ball, rng)))
    in_focus = subject[1] + 2.5 if shot in ("ball", "player") else None
    for depth, draw_thing in sorted(things, key=lambda pair: -pair[0]):
        if in_focus is not None and depth < in_focus:
            # What lies behind the subject of a close-up is out of focus.
            image[:] = _blurred(image, rng.uniform(0.8, 3.5))
            in_focus = None
        draw_thing()
    return _lens(_weather(image, light, rng), rng)


@dataclass(frozen=True)
class Camera:
    """A pinhole at (0, eye, 0) that looks along z. `matrix` (3, 4) takes (x, y, z, 1) in metres to pixels."""

    width: int
    height: int
    focal: float
    matrix: np.ndarray

    def project(self, points: Vectors) -> np.ndarray:
        """(n, 3) metres to (n, 2) pixels; what is behind the camera is put just before it."""
        right, up, away = np.asarray(points, float).T
        x, y, depth = (a * right + b * up + c * away + d for a, b, c, d in self.matrix.tolist())
        # cv2 takes 32-bit fixed point; a point far outside the frame is as good as one a little nearer.
        return np.clip(np.stack([x, y], axis=1) / np.maximum(depth, 0.05)[:, None], -9000, 9000)

    def scale(self, at: Vector) -> float:
        """Pixels a metre at the point `at`."""
        (right, up, away), (a, b, c, d) = at, self.matrix[2].tolist()
        return self.focal / max(float(a * right + b * up + c * away + d), 0.3)


@dataclass(frozen=True)
class Place:
    """Where the middle of the goal line lies, and how it is turned; w runs from it into the field."""

    x: float
    z: float
    yaw: float

    @property
    def matrix(self) -> np.ndarray:
        """(3, 3): (u, w, 1) on the pitch to (x, z, 1) in the world."""
        cosine, sine = _circle(self.yaw)
        return np.array([[cosine, sine, self.x], [sine, -cosine, self.z], [0, 0, 1]])

    def world(self, points: Sequence[Sequence[float]] | np.ndarray) -> np.ndarray:
        """(n, 3) of (u, y, w) to (n, 3) of (x, y, z), metres."""
        u, y, w = np.asarray(points, float).T
        x, z, _ = _product(self.matrix, [u, w, np.ones_like(u)])
        return np.stack([x, y, z], axis=1)


def _size(rng: Rng) -> tuple[int, int]:
    longer = rng.uniform(300, 640)
    power = np.clip(_normal(rng, 0.2, 0.35), -1, 1)
    aspect = (2 + power) / (2 - power)  # nearly the exponential
    sides = (longer, longer / aspect) if aspect > 1 else (longer * aspect, longer)
    return int(np.clip(sides[0], 200, 640)), int(np.clip(sides[1], 200, 640))


def _camera(shot: str, width: int, height: int, rng: Rng) -> tuple[Camera, tuple[float, float], Place]:
    """A camera, the (x, z) of its subject, and a goal that is (nearly always) in the frame."""
    side = min(width, height)
    match shot:
        case "goal":
            distance, eye, aim = rng.uniform(14, 40), rng.uniform(0.8, 7), 2.6
            focal = rng.uniform(0.65, 1.1) * side * distance / 7
            goal_z, yaw, subject_z = distance, _normal(rng, 0, 0.3), distance * rng.uniform(0.55, 0.9)
        case "play":
            distance, eye, aim = rng.uniform(10, 22), rng.uniform(1.2, 5), 1.2
            focal = rng.uniform(0.3, 0.6) * side * distance / 1.8
            goal_z, yaw, subject_z = distance + rng.uniform(4, 14), rng.uniform(-0.8, 0.8), distance
        case "ball":
            distance, eye, aim = rng.uniform(2.2, 3.5), rng.uniform(0.3, 1.3), rng.uniform(0.1, 0.4)
            focal = rng.uniform(0.17, 0.32) * side * distance / 0.15
            goal_z, yaw, subject_z = rng.uniform(14, 30), _normal(rng, 0, 0.4), distance
        case _:
            distance, eye, aim = rng.uniform(5, 8), rng.uniform(1, 2), rng.uniform(0.9, 1.2)
            focal = rng.uniform(0.6, 1.2) * side * distance / 1.8
            goal_z, yaw, subject_z = distance + rng.uniform(6, 15), _normal(rng, 0, 0.4), distance
    cosine, sine = np.array([distance, eye - aim]) / np.sqrt(distance * distance + (eye - aim) * (eye - aim))
    level, lean = _circle(_normal(rng, 0, 0.04))
    turn = np.array([[level, -lean, 0], [lean, level, 0], [0, 0, 1]])
    centre = width * rng.uniform(0.4, 0.6), height * rng.uniform(0.45, 0.65)
    lens = np.array([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]])
    outside = np.array([[1, 0, 0, 0], [0, -cosine, -sine, eye * cosine], [0, -sine, cosine, eye * sine]])
    camera = Camera(width, height, focal, _product(_product(lens, turn), outside))
    goal_x = rng.uniform(-0.18, 0.18) * width * goal_z / focal
    subject_x = rng.uniform(-0.2, 0.2) * width * subject_z / focal
    return camera, (subject_x, subject_z), Place(goal_x, goal_z, yaw)


def _polygon(image: Image, points: np.ndarray, colour: Sequence[float] | float) -> None:
    # cv2 takes antialiased corners in 1/16 pixel.
    cv2.fillPoly(image, [np.rint(np.asarray(points) * 16).astype(np.int32)], colour, cv2.LINE_AA, 4)


def _stroke(image: Image, points: Vectors, width: float, colour: Sequence[float] | float) -> None:
    """A line through `points`, (n, 2) pixels."""
    corners = np.rint(np.asarray(points) * 16).astype(np.int32)
    cv2.polylines(image, [corners], False, colour, max(1, round(width)), cv2.LINE_AA, 4)


def _disc(image: Image, centre: Vector, radius: float, colour: Sequence[float] | float) -> None:
    middle = int(centre[0] * 16), int(centre[1] * 16)
    cv2.circle(image, middle, max(8, round(radius * 16)), colour, cv2.FILLED, cv2.LINE_AA, 4)


def _shade(colour: Sequence[float], factor: float) -> Colour:
    red, green, blue = (int(min(255, value * factor)) for value in colour)
    return red, green, blue


def _grade(image: Image, gain: Vector | float, offset: Vector | float) -> Image:
    """`image * gain + offset`, channel by channel."""
    table = np.arange(256)[:, None] * np.asarray(gain) + np.asarray(offset)
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8)[:, None])


def _pick(colours: Sequence[Colour], rng: Rng) -> Colour:
    return colours[int(rng.integers(len(colours)))]


def _blurred(image: Image, deviation: float) -> Image:
    return cv2.GaussianBlur(image, (0, 0), deviation, hint=cv2.ALGO_HINT_ACCURATE)


def _mottle(width: int, height: int, cells: int, rng: Rng) -> np.ndarray:
    """Smooth noise, (height, width) of about mean 0 and deviation 1."""
    values = _normal(rng, 0, 1, cells, cells)

    def between(length: int) -> tuple[np.ndarray, np.ndarray]:
        at = np.linspace(0, cells - 1.001, length)
        cell = at.astype(int)
        share = at - cell
        return cell, share * share * (3 - 2 * share)

    cell, share = between(height)
    values = values[cell] + (values[cell + 1] - values[cell]) * share[:, None]
    cell, share = between(width)
    noise = np.take(np.diff(values), cell, axis=1)
    noise *= share
    noise += np.take(values, cell, axis=1)
    noise *= 1.2
    return noise


def _sky(width: int, height: int, light: str, rng: Rng) -> Image:
    top, bottom = {
        "sun": ((70, 130, 205), (185, 215, 240)),
        "cloud": ((150, 160, 172), (205, 210, 214)),
        "dusk": ((75, 80, 135), (245, 165, 105)),
        "night": ((12, 16, 34), (40, 46, 72)),
    }[light]
    # It is smooth, so it is painted small.
    down = np.linspace(0, 1, 48)[:, None, None]
    sky = np.array(top) * (1 - down) + np.array(bottom) * down + _normal(rng, 0, 8, 3)
    clouds = np.clip(_mottle(48, 48, 7, rng) * 0.35 + 0.1, 0, 0.8)[..., None]
    cloud = np.array(bottom) * 0.5 + (30 if light == "night" else 118)
    small = np.clip(sky * (1 - clouds) + cloud * clouds, 0, 255).astype(np.uint8)
    return resized(small, width, height)


def _stands(image: Image, camera: Camera, goal_z: float, rng: Rng) -> None:
    """A stand of spectators behind boards: a painted wall that the camera sees somewhat askew."""
    rows, seats, pixels = 26, 260, 5
    tall, wide = rows * pixels, seats * pixels
    fans = np.array([_pick(KITS, rng) for _ in range(3)] * 2 + [*KITS, *SKINS] + [(60, 62, 70)] * 12, np.uint8)
    crowd = fans[rng.integers(len(fans), size=(rows, seats))] * rng.uniform(0.3, 0.6)
    wall = resized(crowd.astype(np.uint8), wide, tall)
    wall[::15] = wall[::15] // 2
    wall[: int(tall * rng.uniform(0.1, 0.3))] = _shade((255, 255, 255), rng.uniform(0.15, 0.6))
    for aisle in range(int(rng.integers(40, 90)), wide, 110):
        wall[tall // 3 : -14, aisle : aisle + 5] = 105
    for start in range(0, wide, 60):
        wall[-14:, start : start + 60] = _shade(_pick(KITS, rng), 0.7)
        cv2.line(wall, (start + 8, tall - 7), (start + 48, tall - 7), (170, 170, 170), 2)
    cosine, sine = _circle(np.clip(_normal(rng, 0, 0.3), -0.6, 0.6))
    distance, high = goal_z + rng.uniform(9, 22), rng.uniform(6, 18)
    # Its near end must lie before the camera: behind it, a homography turns inside out.
    reach = min(90.0, 0.85 * distance / max(abs(sine), 0.01))
    left_top = (-reach * cosine, high, distance - reach * sine, 1)
    along, down = 2 * reach / wide * np.array([cosine, 0, sine, 0]), np.array([0, -high / tall, 0, 0])
    view = _product(camera.matrix, np.stack([along, down, left_top], axis=1))
    _, y, depth = _product(view, np.array([(u, v, 1) for u in (0, wide) for v in (0, tall)], float).T)
    shown_in = _rows(image, y / depth)
    shown, within = _warped(wall, view, shown_in, camera.width)
    cv2.copyTo(shown, within.astype(np.uint8), image[shown_in])


def _countryside(image: Image, camera: Camera, goal_z: float, rng: Rng) -> None:
    """Hills, a row of trees and at times a club house: a training ground."""
    ridge = np.interp(np.arange(60), range(0, 60, 6), rng.uniform(0, 16, 10))
    hills = [(x, y, 300) for x, y in zip(np.linspace(-400, 400, 60), ridge, strict=True)]
    outline = camera.project([*hills, (400, -2, 300), (-400, -2, 300)])
    _polygon(image, outline, _shade((112, 140, 132), rng.uniform(0.6, 1.1)))
    far = goal_z + rng.uniform(15, 40)

    def board(colour: Colour, *corners: tuple[float, float]) -> None:
        _polygon(image, camera.project([(x, y, far) for x, y in corners]), colour)

    if rng.random() < 0.4:
        x, wide, tall = rng.uniform(-12, 12), rng.uniform(6, 14), rng.uniform(3, 5)
        board(_pick(WALLS, rng), (x, 0), (x + wide, 0), (x + wide, tall), (x, tall))
        board((95, 60, 55), (x - 0.5, tall), (x + wide + 0.5, tall), (x + wide / 2, tall * 1.5))
    leaf = _pick(LEAVES, rng)
    for x in np.arange(-60, 60, rng.uniform(1.5, 4)):
        tall = rng.uniform(2, 7)
        for _ in range(3):
            at = (x + _normal(rng, 0, 1), tall * rng.uniform(0.4, 0.9), far + 1)
            _disc(image, camera.project([at])[0], tall * 0.3 * camera.scale(at), _shade(leaf, rng.uniform(0.7, 1.3)))
        board(_shade(leaf, 0.7), (x - 2, 0), (x + 2, 0), (x + 2, 1.2), (x - 2, 1.2))


def _arc(u: float, w: float, radius: float, start: float = 0, end: float = 360) -> np.ndarray:
    """Part of a circle round (u, w) as a path, (40, 2) metres; `start` and `end` in degrees."""
    turns = np.radians(np.linspace(start, end, 40))
    return (np.array([[u], [w]]) + radius * _circle(turns)).T


def _dashed(start: tuple[float, float], end: tuple[float, float], dashes: int) -> list[np.ndarray]:
    cuts = np.linspace(start, end, 2 * dashes)
    return list(cuts.reshape(dashes, 2, 2))


# The lines on the pitch as paths of (u, w), metres from the middle of the goal line; each goal comes with its own.
BEHIND, FIELD, HALFWAY, TOUCH = -15, 70, 50, 34
COMMON_LINES: list[Vectors] = [
    [(-TOUCH, 0), (TOUCH, 0)],
    [(-TOUCH, BEHIND), (-TOUCH, FIELD)],
    [(TOUCH, BEHIND), (TOUCH, FIELD)],
    [(-TOUCH, HALFWAY), (TOUCH, HALFWAY)],
]
LINES: dict[str, list[Vectors]] = {
    "uprights": [
        [(-TOUCH, -10), (TOUCH, -10)],
        [(-TOUCH, 22), (TOUCH, 22)],
        *_dashed((-TOUCH, 5), (TOUCH, 5), 12),
        *_dashed((-TOUCH, 40), (TOUCH, 40), 14),
        *(dash for u in (-29, -19, 19, 29) for dash in _dashed((u, 3), (u, 60), 10)),
    ],
    "net": [
        [(-9.16, 0), (-9.16, 5.5), (9.16, 5.5), (9.16, 0)],
        [(-20.16, 0), (-20.16, 16.5), (20.16, 16.5), (20.16, 0)],
        _arc(0, 11, 9.15, 37, 143),
        _arc(0, HALFWAY, 9.15),
    ],
    "ring": [_arc(0, 0, 15, 0, 180), _arc(0, 0, 5, 0, 180)],
    "gate": [[(-10, 0), (0, 14), (10, 0)], _arc(0, HALFWAY, 20)],
}


def _pitch(image: Image, camera: Camera, goal: Place, goal_kind: str, rng: Rng) -> None:
    """Grass with its lines, painted from above at 6 pixels a metre and laid down by the camera.

    One channel says how light the ground is: up to 160 it is grass, 255 is paint.
    """
    pixels, wide = 6, 110
    columns, rows = wide * pixels, (FIELD - BEHIND) * pixels
    contrast = 7 * rng.uniform(0.4, 1.5)
    tone = _mottle(columns, rows, 24, rng)
    tone *= contrast
    tone += 118
    u, w = np.arange(columns)[None], np.arange(rows)[:, None]
    striped = (u if rng.random() < 0.5 else w) // int(rng.uniform(4, 8) * pixels) % 2
    tone += striped * rng.choice([0, 9, 18])
    turf = np.clip(tone, 0, 160, out=tone).astype(np.uint8)
    for path in COMMON_LINES + LINES[goal_kind]:
        _stroke(turf, np.add(np.asarray(path), (wide / 2, -BEHIND)) * pixels, 2, 255)
    painted = np.array([[1 / pixels, 0, -wide / 2], [0, 1 / pixels, BEHIND], [0, 0, 1]])
    view = _product(_product(camera.matrix[:, [0, 2, 3]], goal.matrix), painted)
    # Above the horizon the same homography would show the pitch a second time, upside down.
    left, right = camera.project([(-400, 0, 400), (400, 0, 400)])
    mask = np.zeros(image.shape[:2], np.uint8)
    _polygon(mask, np.array([left, right, (9000, 9000), (-9000, 9000)]), 255)
    shown_in = _rows(image, np.array([left[1], right[1], camera.height]))
    ground, _ = _warped(turf, view, shown_in, camera.width)
    blades = rng.integers(0, 24, size=(camera.height // 3 + 1, camera.width // 2 + 1), dtype=np.uint8)
    ground = cv2.subtract(ground, resized(blades, camera.width, camera.height)[shown_in])
    green = np.array(_pick(GREENS, rng))
    paint = np.array((238, 240, 235)) * rng.uniform(0.85, 1)
    tables = [np.interp(np.arange(256), (0, 160, 245), (0, green[c] * 1.3, paint[c])) for c in range(3)]
    colours = [cv2.LUT(ground, np.clip(table, 0, 255).astype(np.uint8)) for table in tables]
    cv2.copyTo(cv2.merge(colours), mask[shown_in], image[shown_in])


@dataclass(frozen=True)
class Player:
    """Somebody at `at` (x, lift, z), metres, who faces left (-1) or right (1)."""

    at: Point
    pose: str
    facing: int
    kit: Kit
    pattern: str
    bulk: float
    skin: Colour
    hair: Colour
    jitter: np.ndarray  # (8,) about 0, added to the angles of the pose


def _someone(sport: Sport, at: Sequence[float], pose: str, facing: int, kit: Kit, rng: Rng) -> Player:
    x, lift, z = (float(value) for value in at)
    return Player(
        at=(x, lift, z),
        pose=pose,
        facing=facing,
        kit=kit,
        pattern=sport.shirt if rng.random() < 0.9 else "plain",
        bulk=sport.bulk * rng.uniform(0.92, 1.1),
        skin=_pick(SKINS, rng),
        hair=_pick(HAIRS, rng),
        jitter=_normal(rng, 0, 0.12, 8),
    )


def _kit(rng: Rng) -> Kit:
    shirt, second, shorts = (KITS[index] for index in rng.choice(len(KITS), 3, replace=False))
    return shirt, second, _pick([shorts, shirt, (245, 245, 240), (25, 25, 35)], rng), _pick([shirt, second], rng)


@dataclass(frozen=True)
class Role:
    """Somebody in a play: one of `poses`, `team` 0 or 1, metres from the play's middle, there with a `chance`."""

    poses: tuple[str, ...]
    team: int
    x: float = 0
    z: float = 0
    facing: int = 1
    lift: float = 0
    chance: float = 1


@dataclass(frozen=True)
class Play:
    """Who takes part, and the box (two corners, metres from the play's middle) in which the ball is."""

    roles: tuple[Role, ...]
    ball: tuple[Point, Point]


def _at(x: float, y: float, z: float) -> tuple[Point, Point]:
    return (x, y, z), (x, y, z)


SCRUM = Play(
    (
        *(
            Role(("bind",), int(side > 0), side * (0.75 + 0.9 * row), z, -side)
            for side, row, z in product((-1, 1), (0, 1), (-0.5, 0, 0.5))
        ),
        Role(("stoop",), 0, 0.3, -1.1),
    ),
    _at(0.5, 0.5, -1.3),
)
LINEOUT = Play(
    (
        *(Role(("stand",), team, 0.9 * k, team - 0.5, 1 - 2 * team) for k, team in product(range(-2, 3), (0, 1))),
        Role(("reach",), 0, 0.45, -0.3, lift=1),
    ),
    _at(0.6, 3.4, -0.3),
)
CARRY = Play(
    (Role(("carry",), 0), Role(("dive", "run"), 1, -1.5, 0.4), Role(("bind", "run"), 1, 1.6, 0.3, -1)),
    _at(0.26, 1.15, -0.15),
)
DRIBBLE = Play((Role(("run",), 0), Role(("run", "stand"), 1, 1.3, 0.5, -1)), _at(0.6, 0.12, -0.2))
KICK = Play((Role(("kick",), 0), Role(("stand",), 1, 2, 0.8, -1)), ((0.9, 0.12, 0), (0.9, 0.9, 0)))
WALL = Play(
    (*(Role(("wall",), 1, 0.55 * k, 0.02 * k) for k in range(4)), Role(("kick",), 0, -2.5, -1.5)),
    _at(-1.8, 0.12, -1.5),
)
# Half of these heights are under the ground, where no ball goes: those lie on it.
SPREAD = Play((), ((-2, -3.5, -1), (2, 4, -1)))
CLOSE_UP = Play((Role(("stand",), 0, 0.45, 0.25, -1, chance=0.5),), _at(0, 0.15, 0))
PLAYS = {
    "oval": (SCRUM, SCRUM, LINEOUT, CARRY, CARRY, SPREAD),
    "patched": (DRIBBLE, DRIBBLE, WALL, KICK, KICK, SPREAD),
    "ringed": (LINEOUT, KICK, SPREAD),
    "segmented": (WALL, CARRY, SPREAD),
}


def _play(sport: Sport, subject: tuple[float, float], shot: str, rng: Rng) -> tuple[list[Player], Point]:
    """The players round `subject` (x, z), and where the ball is (x, y, z)."""
    plays = PLAYS[sport.ball]
    play = CLOSE_UP if shot == "ball" else plays[int(rng.integers(len(plays)))]
    middle_x, middle_z = subject
    teams = _kit(rng), _kit(rng)
    ways = int(rng.choice([-1, 1]))
    players: list[Player] = []

    def add(pose: str, team: int, x: float, z: float, facing: int, lift: float = 0) -> None:
        at = (middle_x + ways * x, lift, middle_z + z)
        players.append(_someone(sport, at, pose, ways * facing, teams[team], rng))

    for role in play.roles:
        if rng.random() < role.chance:
            add(str(rng.choice(role.poses)), role.team, role.x, role.z, role.facing, role.lift)
    # Classes show about as many players, or the colours of a photo would tell the class.
    idle = ("run", "run", "stand", "stoop" if sport.ball == "oval" else "stand")
    for _ in range(max(int(rng.integers(5, 13)) - len(players), int(rng.integers(0, 2)))):
        near = rng.uniform(2, 14)
        x = rng.uniform(-0.6, 0.6) * (middle_z + near)
        add(str(rng.choice(idle)), int(rng.integers(2)), x, near, int(rng.choice([-1, 1])))
    if rng.random() < 0.12:
        # Somebody walks through the picture.
        add("run", 0, rng.uniform(-1, 1), -0.4 * middle_z, 1)
    x, y, z = rng.uniform(*play.ball)
    return players, (middle_x + ways * x, max(y, 0.12), middle_z + z)


# Angles in radians: lean of the back, then thigh, thigh, knee, knee, upper arm, upper arm, elbows. A limb hangs at 0
# and swings forward; a knee bends backward.
POSES: dict[str, tuple[float, ...]] = {
    "stand": (0.0, 0.1, -0.1, 0.05, 0.05, 0.2, -0.15, 0.4),
    "run": (0.25, 0.9, -0.45, 0.9, 0.8, 0.8, -0.7, 1.4),
    "carry": (0.35, 0.95, -0.5, 1.0, 0.8, 0.5, -0.6, 1.6),
    "kick": (-0.2, 1.2, -0.2, 0.15, 0.2, -0.9, 1.2, 0.4),
    "bind": (1.25, 0.5, -0.5, 0.9, 0.4, 1.5, 1.7, 0.2),
    "stoop": (0.75, 0.6, -0.1, 0.7, 0.4, 0.5, 0.3, 0.8),
    "reach": (0.05, 0.15, -0.1, 0.1, 0.1, 2.8, 3.0, 0.15),
    "dive": (1.35, -1.0, -1.3, 0.3, 0.5, 1.8, 1.5, 0.1),
    "wall": (0.0, 0.05, -0.05, 0.02, 0.02, 0.35, 0.3, 0.3),
}


def _figure(image: Image, camera: Camera, player: Player) -> None:
    """A player as a flat figure, 1.8 m tall, that faces sideways."""
    scale, origin = camera.scale(player.at), complex(*camera.project([player.at])[0])
    angles = np.array(POSES[player.pose]) + player.jitter
    back, thigh, other_thigh, knee, other_knee, arm, other_arm, elbow = angles.tolist()
    shirt, second, shorts, socks = player.kit
    bulk, skin = player.bulk, player.skin

    # Points are complex numbers, metres from the feet: forward or back, and up. Of arrays so small NumPy is slow.
    def step(start: complex, angle: float, length: float) -> complex:
        return start + length * complex(player.facing * _sine(angle), -_sine(angle + np.pi / 2))

    def on_screen(point: complex) -> tuple[float, float]:
        pixels = origin + scale * point.conjugate()
        return pixels.real, pixels.imag

    def limb(points: Sequence[complex], colours: Sequence[Colour], widths: Sequence[float]) -> None:
        for start, end, colour, width in zip(points, points[1:], colours, widths, strict=False):
            _stroke(image, [on_screen(start), on_screen(end)], width * bulk * scale, colour)

    legs = []
    for upper, bend in ((other_thigh, other_knee), (thigh, knee)):
        joint = step(0, upper, 0.46)
        legs.append((0, joint, step(joint, upper - abs(bend), 0.44)))
    hip = complex(0, 0.06 - min(foot.imag for _, _, foot in legs) + (0.35 if player.pose == "dive" else 0))
    neck = step(hip, np.pi - back, 0.56)
    shoulder = step(hip, np.pi - back, 0.5)
    arms = []
    for upper in (other_arm, arm):
        joint = step(shoulder, upper, 0.3)
        arms.append((shoulder, joint, step(joint, upper + elbow, 0.27)))
    sleeve = second if player.pattern == "plain" else shirt

    for near, (leg, hand) in enumerate(zip(legs, arms, strict=True)):
        dim = 0.75 + 0.25 * near
        if near:
            _torso(image, np.array(on_screen(hip)), np.array(on_screen(neck)), bulk * scale, player)
        hips, joint, foot = (hip + point for point in leg)
        middle = hips + 0.75 * (joint - hips)
        sock = joint + 0.35 * (foot - joint)
        colours = [_shade(colour, dim) for colour in (shorts, skin, skin, socks)]
        limb((hips, middle, joint, sock, foot), colours, (0.2, 0.15, 0.12, 0.11))
        toe = foot + complex(0.16 * player.facing, -0.02)
        limb((foot, toe), [_shade((40, 36, 40), dim)], [0.08])
        middle = hand[0] + 0.6 * (hand[1] - hand[0])
        limb((hand[0], middle, hand[1], hand[2]), [_shade(c, dim) for c in (sleeve, skin, skin)], (0.13, 0.1, 0.085))
    x, y = on_screen(step(neck, np.pi - back * 0.7, 0.15))
    limb((neck, step(neck, np.pi - back, 0.08)), [_shade(skin, 0.85)], [0.11])
    _disc(image, (x, y), 0.13 * scale, player.hair)
    _disc(image, (x + scale * 0.025 * player.facing, y + scale * 0.03), 0.105 * scale, skin)


def _torso(image: Image, hip: np.ndarray, neck: np.ndarray, size: float, player: Player) -> None:
    """From `hip` to `neck` (pixels), in the pattern of the shirt."""
    spine = neck - hip
    across = np.array([-spine[1], spine[0]]) / max(_length(spine), 1e-6) * size

    def patch(low: float, high: float, left: float, right: float, colour: Colour) -> None:
        corners = [(low, left), (low, right), (high, right), (high, left)]
        _polygon(image, np.array([hip + t * spine + s * (0.15 + 0.06 * t) * across for t, s in corners]), colour)

    shirt, second, shorts, _ = player.kit
    _disc(image, hip, 0.14 * size, shorts)
    patch(0, 1, -1, 1, shirt)
    match player.pattern:
        case "hoops":
            for low in (0.1, 0.45, 0.8):
                patch(low, low + 0.17, -1, 1, second)
        case "stripes":
            for left in (-0.8, -0.1, 0.6):
                patch(0, 1, left, left + 0.3, second)
        case "halves":
            patch(0, 1, 0, 1, second)
        case _:
            patch(0.92, 1, -0.6, 0.6, second)


def _goal(image: Image, camera: Camera, goal: Place, kind: str, rng: Rng) -> None:
    colour = _pick([(245, 245, 242), (245, 245, 242), (240, 215, 70), (225, 225, 230)], rng)
    pad = _pick(KITS, rng)

    def bar(*points: Point, thick: float = 0.2, paint: Colour = colour) -> None:
        world = goal.world(points)
        path = camera.project(world)
        width = thick * camera.scale(world.mean(axis=0))
        _stroke(image, path, width, paint)
        if width > 3:
            _stroke(image, path + np.array((width * 0.3, width * 0.1)), width * 0.25, _shade(paint, 0.75))

    def post(u: float, tall: float, padded: float, thick: float = 0.2) -> None:
        bar((u, 0, 0), (u, tall, 0), thick=thick)
        bar((u, 0, 0), (u, padded, 0), thick=2.5 * thick, paint=pad)

    match kind:
        case "uprights":
            tall = rng.uniform(7, 12)
            for u in (-2.8, 2.8):
                post(u, tall, 2.1)
            bar((-2.8, 3, 0), (2.8, 3, 0))
        case "net":
            _net(image, camera, goal, rng)
            for u in (-3.66, 3.66):
                bar((u, 2.44, 0), (u, 2.3, -1), thick=0.06)
            bar((-3.66, 0, 0), (-3.66, 2.44, 0), (3.66, 2.44, 0), (3.66, 0, 0))
        case "ring":
            post(0, 4, 1.9)
            bar(*((u, y, 0) for u, y in _arc(0, 5.4, 1.4)))
        case _:
            for u, tall in ((-6, 5), (-2.2, 8), (2.2, 8), (6, 5)):
                post(u, tall, 1.5, 0.17)


def _net(image: Image, camera: Camera, goal: Place, rng: Rng) -> None:
    veil = image.copy()
    mesh = rng.uniform(0.26, 0.4)
    back = [((u, 0.0, -2.0), (u, 2.3, -1.0)) for u in np.arange(-3.66, 3.7, mesh)]
    back += [((-3.66, 2.3 * t, t - 2), (3.66, 2.3 * t, t - 2)) for t in np.arange(0, 1.01, mesh / 2.4)]
    roof = [((u, 2.3, -1.0), (u, 2.44, 0.0)) for u in np.arange(-3.66, 3.7, mesh)]
    sides = [((u, y, 0.0), (u, y, y / 2.3 - 2)) for u in (-3.66, 3.66) for y in np.arange(0, 2.4, mesh)]
    threads = camera.project(goal.world(np.reshape(back + roof + sides, (-1, 3))))
    for thread in threads.reshape(-1, 2, 2):
        _stroke(veil, thread, 1, (240, 240, 240))
    image[:] = (3 * veil.astype(np.uint16) + image) // 4


def _ball(image: Image, camera: Camera, at: Point, kind: str, rng: Rng) -> None:
    """A ball as a shaded solid: each pixel's normal on the unit sphere, turned at random, picks its colour."""
    centre = camera.project([at])[0]
    radius = max(2.5, 0.15 * camera.scale(at))
    stretch = rng.uniform(1.3, 1.55) if kind == "oval" else 1.0
    spin = rng.uniform(0, 2 * np.pi)
    half = int(radius * stretch) + 2
    left, top = np.maximum(np.round(centre).astype(int) - half, 0)
    right, bottom = np.maximum(np.round(centre).astype(int) + half + 1, 0)
    region = image[top:bottom, left:right]
    if region.size == 0:
        return
    rows, columns = np.ogrid[top : top + region.shape[0], left : left + region.shape[1]]
    dx, dy = (columns - centre[0]) / radius, (rows - centre[1]) / radius
    cosine, sine = _circle(spin)
    along, across = (dx * cosine + dy * sine) / stretch, dy * cosine - dx * sine
    distance = _length([along, across])
    normal = np.stack([along, across, np.sqrt(np.clip(1 - distance * distance, 0, 1))])

    base = np.array(_pick([(245, 245, 240), (245, 245, 240), (240, 225, 190), (250, 220, 70), (240, 150, 60)], rng))
    patch = np.array(_pick([(28, 28, 34), (28, 28, 34), (30, 50, 120), (150, 25, 40), (20, 80, 50)], rng))
    dark = _panels(kind, normal, radius, rng)[..., None]
    lit = 0.5 + 0.6 * np.clip(0.8 * normal[2] - 0.55 * normal[1], 0, 1)
    cover = _edge((1 - distance) * radius)[..., None]
    colour = np.clip((base * (1 - dark) + patch * dark) * lit[..., None], 0, 255)
    region[:] = region * (1 - cover) + colour * cover


def _edge(pixels: np.ndarray) -> np.ndarray:
    """0 to 1 across one pixel where `pixels`, a distance, passes 0: an antialiased border."""
    return np.clip(pixels + 0.5, 0, 1)


def _panels(kind: str, normal: np.ndarray, radius: float, rng: Rng) -> np.ndarray:
    """How dark each pixel of a ball is, 0 to 1: its panels, and at half strength its seams.

    Args:
        normal: (3, height, width) on the unit sphere.
        radius: of the ball, pixels.
    """
    turned = _product(_rotation(rng), normal)
    match kind:
        case "oval":
            tip = np.abs(normal[0])
            cosine, sine = _circle(rng.uniform(0, np.pi))
            a, b = normal[1] * cosine + normal[2] * sine, normal[2] * cosine - normal[1] * sine
            bands = _edge((tip - rng.uniform(0.5, 0.75)) * radius) * _edge((0.93 - tip) * radius)
            # |a b| / (a² + b²) is half the sine of twice the angle round the ball's axis.
            half_sine = np.abs(a * b) / np.maximum(a * a + b * b, 1e-9)
            seams = _edge((0.05 - half_sine * np.clip(1 - tip, 0.1, 1)) * radius)
            return np.maximum(bands, 0.55 * seams)
        case "patched":
            # Dark round the twelve corners of an icosahedron; a seam where two corners are equally near.
            phi = (1 + np.sqrt(5)) / 2
            corners = np.array([p for b in (-phi, phi) for p in ((0, 1, b), (1, b, 0), (b, 0, 1))])
            nearest = second = np.full(normal.shape[1:], -1.0)
            for nearness in np.abs(_product(corners / np.sqrt(1 + phi * phi), turned)):
                second = np.maximum(second, np.minimum(nearest, nearness))
                nearest = np.maximum(nearest, nearness)
            patches = _edge((nearest - rng.uniform(0.915, 0.935)) * 2 * radius)
            seams = _edge((0.02 - (nearest - second)) * radius)
            return np.maximum(patches, 0.33 * seams)
        case "ringed":
            return _edge((_sine(7 * turned[0]) - 0.2) * radius / 5)
        case _:
            # The sine of four times the angle round the third axis.
            a, b = turned[:2] / np.maximum(_length(turned[:2]), 1e-9)
            return _edge(4 * a * b * (b * b - a * a) * radius / 4)


def _length(vector: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    x, y = vector
    return np.sqrt(x * x + y * y)


def _rotation(rng: Rng) -> np.ndarray:
    """A random turn, (3, 3), from a random unit quaternion."""
    w, x, y, z = _normal(rng, 0, 1, 4)
    norm = w * w + x * x + y * y + z * z
    rows = [
        [w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z],
    ]
    return np.array(rows) / norm


def _shadows(image: Image, camera: Camera, feet: Sequence[Vector], light: str, rng: Rng) -> None:
    """Long ones from the sun, small ones round the feet otherwise."""
    cast = rng.uniform(-1.6, 1.6, 2) if light in ("sun", "dusk") else np.zeros(2)
    keep: Image = np.full(image.shape[:2], 255, np.uint8)
    depth = int(rng.uniform(150, 200))
    cosine, sine = 0.35 * _circle(np.linspace(0, 2 * np.pi, 12))
    for x, _, z in feet:
        ring = np.stack([x + cosine, 0 * cosine, z + sine], axis=1)
        outline = camera.project(np.r_[ring, ring + np.array([cast[0], 0, cast[1]])])
        _polygon(keep, cv2.convexHull(np.rint(outline * 16).astype(np.int32))[:, 0] / 16, depth)
    keep = _blurred(keep, 1.5)
    dark = np.flatnonzero((keep < 255).any(axis=1))
    if len(dark):
        rows = slice(dark[0], dark[-1] + 1)
        share = cv2.merge([keep[rows].astype(np.uint16) + 1] * 3)
        image[rows] = (image[rows] * share).astype(np.uint16) >> 8


def _weather(image: Image, light: str, rng: Rng) -> Image:
    height, width = image.shape[:2]
    tint = {
        "sun": (1.04, 1.02, 0.97),
        "cloud": (0.94, 0.96, 1.0),
        "dusk": (0.98, 0.8, 0.7),
        "night": (0.72, 0.76, 0.88),
    }
    what = rng.choice(["clear", "haze", "rain", "glare"], p=[0.7, 0.1, 0.1, 0.1])
    veil = rng.uniform(0.1, 0.35) if what in ("haze", "rain") else 0.0
    scene = _grade(image, np.array(tint[light]) * (1 - veil), veil * np.array((190, 196, 202)))
    match what:
        case "rain":
            streaks = np.zeros_like(scene)
            slant, length = rng.uniform(-0.3, 0.3), rng.uniform(0.03, 0.08) * height
            for x, y in rng.uniform((0, 0), (width, height), size=(width * height // 800, 2)):
                _stroke(streaks, [(x, y), (x + slant * length, y + length)], 1, (255, 255, 255))
            scene = cv2.add(scene, _grade(streaks, rng.uniform(0.1, 0.3), 0))
        case "glare":
            rows, columns = np.ogrid[0:1:48j, 0:1:48j]
            away = _length([rows - rng.uniform(-0.2, 0.2), columns - rng.uniform(0, 1)])
            near = 1 - np.clip(away, 0, 1) * np.clip(away, 0, 1)
            near = near * near * near * near  # with its square below nearly exp(-(away / 0.35) ** 2)
            glow = ((near * near)[..., None] * (150, 140, 105)).astype(np.uint8)
            scene = cv2.add(scene, resized(glow, width, height))
    return scene


def _lens(image: Image, rng: Rng) -> Image:
    """Blur, exposure, colour cast and noise of the camera."""
    height, width = image.shape[:2]
    blur = rng.random()
    if blur < 0.1:
        length, angle = int(rng.integers(3, 10)), rng.uniform(0, np.pi)
        # The camera moved: the mean of what it saw on its way.
        steps = np.rint(np.arange(length + 1)[:, None] * _circle(angle)).astype(int)
        steps -= steps.min(axis=0)
        wide = np.pad(image, ((0, length), (0, length), (0, 0)), "edge").astype(np.uint16)
        seen = np.sum([wide[y : y + height, x : x + width] for x, y in steps], axis=0)
        image = (seen // len(steps)).astype(np.uint8)
    elif blur < 0.3:
        image = _blurred(image, rng.uniform(0.6, 1.6))
    gain = rng.uniform(0.85, 1.15) * _normal(rng, 1, 0.04, 3)
    image = _grade(image, gain, 128 * (1 - gain) + _normal(rng, 0, 8))
    # Sums of four bytes have a deviation of 148; the noise has one of up to 7.
    noise = np.full((height, width), -510, np.int32)
    for grain in rng.integers(256, size=(4, height, width), dtype=np.uint8):
        noise += grain
    noise *= int(rng.uniform(0, 7 / 148) * 4096)
    noise = (noise >> 12).astype(np.int16)
    return cv2.add(image, cv2.merge([noise] * 3), dtype=cv2.CV_8U)
