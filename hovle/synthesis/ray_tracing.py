"""Pictures of a model on a floor: rays by Embree, soft shadows and light from a whole sky, in plain numpy.

Axis legend: R rays, F faces, C color channels. Lengths are those of the model, Y points up.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .colors import Rgb
from .layouts import Size
from .meshes import Floats, Mesh

Vector = NDArray[np.float32]

_NOTHING = -1
_MOST_LAYERS = 4
"""Transparent surfaces a ray passes before it sees what is behind them."""


@dataclass(frozen=True)
class Camera:
    """Where a picture is taken from."""

    azimuth: float
    """Degrees around the vertical axis; 0: from +Z."""
    elevation: float
    """Degrees above the floor."""
    view_angle: float = 30.0
    """Degrees the whole height of the picture takes in."""
    fill: float = 0.85
    """Share of the picture's shorter side that the model's extent takes."""
    shift: tuple[float, float] = (0.0, 0.0)
    """Of the model's middle from that of the picture, in shares of its width and height."""


@dataclass(frozen=True)
class Light:
    """One sun of some width, and a sky."""

    azimuth: float
    elevation: float
    strength: float = 0.9
    softness: float = 0.12
    """Radius of the sun's disc at the distance 1."""
    sky: float = 0.55


@dataclass(frozen=True)
class Surroundings:
    """What a model stands on and before: linear colors, 0 to 1."""

    floor: tuple[float, float, float]
    wall: tuple[float, float, float]


class Stage:
    """A model made ready for pictures: scaled to the height or width 1, standing in the middle of the floor."""

    def __init__(self, mesh: Mesh):
        from embreex import mesh_construction, rtcore_scene

        low, high = mesh.vertices[mesh.faces].min(axis=(0, 1)), mesh.vertices[mesh.faces].max(axis=(0, 1))
        middle = (low + high) / 2
        origin = np.array([middle[0], low[1], middle[2]], np.float32)
        self.mesh = mesh
        self.vertices = ((mesh.vertices - origin) / (high - low).max()).astype(np.float32)
        self.extent = (high - low) / (high - low).max()
        self._scene = rtcore_scene.EmbreeScene()
        mesh_construction.TriangleMesh(self._scene, self.vertices, mesh.faces)
        self._geometry_normals = _face_normals(self.vertices, mesh.faces)
        self._albedo = np.array([linear(np.array(material.color)) for material in mesh.materials], np.float32)
        self.opacity = np.array([material.opacity for material in mesh.materials], np.float32)
        self.shine = np.array([min(0.5, material.shine) for material in mesh.materials], np.float32)
        self.exponent = np.array([material.exponent for material in mesh.materials], np.float32)

    @property
    def mean_color(self) -> Rgb:
        """Mean color of its faces, by their area, in sRGB."""
        a, b, c = (self.vertices[self.mesh.faces[:, corner]] for corner in range(3))
        areas = np.linalg.norm(np.cross(b - a, c - a), axis=-1)
        seen = np.array(
            [
                material.texture.mean(axis=(0, 1)) if material.texture is not None else np.array(material.color) * 255
                for material in self.mesh.materials
            ]
        )
        mean = np.average(seen[self.mesh.material_ids], axis=0, weights=areas + 1e-12)
        red, green, blue = (round(part) for part in mean.tolist())
        return red, green, blue

    def hit(self, origins: Vector, directions: Vector) -> dict[str, NDArray]:
        """First faces that rays meet: `primID` is -1 for none, `u`, `v` and `tfar` say where."""
        found: dict[str, NDArray] = self._scene.run(origins, directions, query="INTERSECT", output=True)
        return found

    def is_hidden(self, origins: Vector, directions: Vector) -> NDArray[np.bool_]:
        """Whether rays meet anything."""
        return self._scene.run(origins, directions, query="OCCLUDED") != _NOTHING

    def surface(self, faces: NDArray[np.int32], u: Floats, v: Floats) -> tuple[Vector, Vector, NDArray[np.int32]]:
        """Linear color, unit normal and material number at points of faces."""
        weights = np.stack([1 - u - v, u, v], axis=-1).astype(np.float32)[..., None]
        flat = self._geometry_normals[faces]
        smooth = (self.mesh.normals[faces] * weights).sum(axis=1)
        length = np.linalg.norm(smooth, axis=-1, keepdims=True)
        normals = np.where(length > 1e-3, smooth / np.maximum(length, 1e-9), flat).astype(np.float32)
        material_ids = self.mesh.material_ids[faces]
        colors = self._albedo[material_ids]
        coordinates = (self.mesh.coordinates[faces] * weights).sum(axis=1)
        for number, material in enumerate(self.mesh.materials):
            if material.texture is not None and (chosen := material_ids == number).any():
                colors[chosen] = linear(_looked_up(material.texture, coordinates[chosen]) / 255.0)
        return colors, normals, material_ids


def _face_normals(vertices: Floats, faces: NDArray[np.int32]) -> Vector:
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    normals = np.cross(b - a, c - a)
    return (normals / np.maximum(np.linalg.norm(normals, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


def _looked_up(texture: NDArray[np.uint8], coordinates: Floats) -> NDArray[np.uint8]:
    """The nearest texel; textures repeat, and their second coordinate points up."""
    height, width = texture.shape[:2]
    x = np.floor((coordinates[:, 0] % 1) * width).astype(int) % width
    y = np.floor((-coordinates[:, 1] % 1) * height).astype(int) % height
    return texture[y, x]


def linear(encoded: NDArray) -> Vector:
    """Light of sRGB colors between 0 and 1 (IEC 61966-2-1)."""
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4).astype(np.float32)


def _encoded(linear: Vector) -> Vector:
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)


def render(
    stage: Stage,
    camera: Camera,
    light: Light,
    around: Surroundings,
    size: Size,
    seed: int,
    samples: int = 2,
    light_rays: int = 3,
) -> tuple[Image.Image, tuple[int, int, int, int] | None]:
    """Take a picture.

    Args:
        stage: The model.
        camera: Where from.
        light: Sun and sky.
        around: Floor and wall.
        size: Width and height in pixels.
        seed: Of all chance: where in its pixel a ray goes, which way light comes from.
        samples: Rays of a pixel are the square of it.
        light_rays: Rays to the sun, and as many to the sky, from each point seen.

    Returns:
        The picture, and the box of the model in it, right and bottom outside; None where it is not seen.
    """
    rng = np.random.default_rng(seed)
    fine = (size[0] * samples, size[1] * samples)
    origins, directions = _camera_rays(stage, camera, fine, rng)
    colors = np.zeros((len(origins), 3), np.float32)
    weight = np.ones(len(origins), np.float32)
    seen = np.zeros(len(origins), bool)
    open_rays = np.arange(len(origins))
    starts = origins.copy()
    for layer in range(_MOST_LAYERS):
        found = stage.hit(starts[open_rays], directions[open_rays])
        met = found["primID"] != _NOTHING
        missed, open_rays = open_rays[~met], open_rays[met]
        colors[missed] += weight[missed, None] * _behind(
            stage, starts[missed], directions[missed], light, around, rng, light_rays
        )
        if not len(open_rays):
            break
        faces, u, v, distance = (found[key][met] for key in ("primID", "u", "v", "tfar"))
        seen[open_rays] = True
        points = starts[open_rays] + directions[open_rays] * distance[:, None]
        albedo, normals, material_ids = stage.surface(faces, u, v)
        normals *= np.where((normals * directions[open_rays]).sum(axis=-1, keepdims=True) > 0, -1, 1)
        shaded = _shaded(stage, points, normals, -directions[open_rays], albedo, material_ids, light, rng, light_rays)
        opacity = np.ones(len(open_rays), np.float32) if layer == _MOST_LAYERS - 1 else stage.opacity[material_ids]
        colors[open_rays] += (weight[open_rays] * opacity)[:, None] * shaded
        weight[open_rays] *= 1 - opacity
        going_on = weight[open_rays] > 0.02
        starts[open_rays] = points + 1e-4 * directions[open_rays]
        open_rays = open_rays[going_on]
    image = _developed(colors, size, samples)
    return image, _box_of(seen, size, samples)


def _camera_rays(stage: Stage, camera: Camera, fine: Size, rng: np.random.Generator) -> tuple[Vector, Vector]:
    azimuth, elevation = np.radians(camera.azimuth), np.radians(camera.elevation)
    back = np.array([np.sin(azimuth) * np.cos(elevation), np.sin(elevation), np.cos(azimuth) * np.cos(elevation)])
    right = np.array([np.cos(azimuth), 0, -np.sin(azimuth)])
    up = np.cross(back, right)
    middle = np.array([0, stage.extent[1] / 2, 0])
    corners = stage.extent * (np.array(np.meshgrid(*[(-0.5, 0.5)] * 3)).reshape(3, -1).T)
    tangent = np.tan(np.radians(camera.view_angle) / 2)
    aspect = fine[0] / fine[1]
    away = _distance_to_fill(corners, (right, up, back), (tangent * aspect, tangent), camera.fill)
    eye = middle + back * away
    x = (np.arange(fine[0]) + 0.5) / fine[0] * 2 - 1
    y = 1 - (np.arange(fine[1]) + 0.5) / fine[1] * 2
    grid_x, grid_y = np.meshgrid(x, y)
    grid_x = grid_x + rng.uniform(-1, 1, grid_x.shape) / fine[0] - 2 * camera.shift[0]
    grid_y = grid_y + rng.uniform(-1, 1, grid_y.shape) / fine[1] + 2 * camera.shift[1]
    directions = (grid_x[..., None] * right * aspect + grid_y[..., None] * up) * tangent - back
    directions = directions.reshape(-1, 3)
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    origins = np.broadcast_to(eye, directions.shape)
    return np.ascontiguousarray(origins, np.float32), np.ascontiguousarray(directions, np.float32)


def _distance_to_fill(
    corners: NDArray, axes: tuple[NDArray, NDArray, NDArray], tangents: tuple[float, float], fill: float
) -> float:
    """How far the middle must be for the corners to take that share of the picture in its tighter direction."""
    right, up, back = axes
    away = 4.0
    for _ in range(12):  # each step is right but for perspective
        depth = away - corners @ back
        reach = max(
            (np.abs(corners @ axis) / (depth * tangent)).max()
            for axis, tangent in zip((right, up), tangents, strict=True)
        )
        away = max(away * reach / fill, (corners @ back).max() + 0.05)
    return away


def _toward(azimuth: float, elevation: float) -> Vector:
    a, e = np.radians(azimuth), np.radians(elevation)
    return np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)], np.float32)


def _sun_rays(light: Light, count: int, rng: np.random.Generator) -> Vector:
    directions = _toward(light.azimuth, light.elevation) + light.softness * rng.normal(size=(count, 3))
    return (directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.float32)


def _sun_share(
    stage: Stage, points: Vector, normals: Vector, light: Light, rng: np.random.Generator, light_rays: int
) -> NDArray[np.float32]:
    """Share of the sun that each point sees, weighted by the cosine to its normal."""
    share = np.zeros(len(points), np.float32)
    for _ in range(light_rays):
        sun = _sun_rays(light, len(points), rng)
        facing = np.maximum((normals * sun).sum(axis=-1), 0)
        toward = facing > 0
        free = ~stage.is_hidden(points[toward] + 1e-3 * normals[toward], sun[toward])
        share[toward] += facing[toward] * free
    return (share / light_rays).astype(np.float32)


def _sky_share(
    stage: Stage, points: Vector, normals: Vector, rng: np.random.Generator, light_rays: int
) -> NDArray[np.float32]:
    """Share of the sky that each point sees, weighted by the cosine to its normal."""
    open_share = np.zeros(len(points), np.float32)
    for _ in range(light_rays):
        directions = normals + _on_sphere(len(points), rng)
        directions /= np.maximum(np.linalg.norm(directions, axis=-1, keepdims=True), 1e-6)
        directions = directions.astype(np.float32)
        free = ~stage.is_hidden(points + 1e-3 * normals, directions)
        open_share += np.where(directions[:, 1] >= 0, free, 0.45 * free)  # the floor gives some light back
    return (open_share / light_rays).astype(np.float32)


def _on_sphere(count: int, rng: np.random.Generator) -> NDArray:
    points = rng.normal(size=(count, 3))
    return points / np.maximum(np.linalg.norm(points, axis=-1, keepdims=True), 1e-9)


def _shaded(
    stage: Stage,
    points: Vector,
    normals: Vector,
    to_eye: Vector,
    albedo: Vector,
    material_ids: NDArray[np.int32],
    light: Light,
    rng: np.random.Generator,
    light_rays: int,
) -> Vector:
    """Light that leaves points of the model toward the eye."""
    sun_share = _sun_share(stage, points, normals, light, rng, light_rays)
    half = _toward(light.azimuth, light.elevation) + to_eye
    half /= np.maximum(np.linalg.norm(half, axis=-1, keepdims=True), 1e-6)
    glint = np.maximum((normals * half).sum(axis=-1), 0) ** stage.exponent[material_ids]
    sky_share = _sky_share(stage, points, normals, rng, light_rays)
    diffuse = albedo * (light.strength * sun_share + light.sky * sky_share)[:, None]
    return diffuse + (light.strength * stage.shine[material_ids] * glint * (sun_share > 0))[:, None]


def _behind(
    stage: Stage,
    origins: Vector,
    directions: Vector,
    light: Light,
    around: Surroundings,
    rng: np.random.Generator,
    light_rays: int,
) -> Vector:
    """What is seen past the model: the floor with its shadows, which fades into the wall."""
    colors = np.broadcast_to(np.array(around.wall, np.float32), directions.shape).copy()
    down = directions[:, 1] < -1e-4
    distance = np.where(down, -origins[:, 1] / np.where(down, directions[:, 1], -1), np.inf)
    on_floor = down & (distance > 0) & (distance < 40)
    if not on_floor.any():
        return colors * (light.sky + 0.5 * light.strength)
    points = origins[on_floor] + directions[on_floor] * distance[on_floor, None]
    normals = np.broadcast_to(np.array([0, 1, 0], np.float32), points.shape)
    reach = np.linalg.norm(points[:, [0, 2]], axis=-1)
    near = reach < 3
    facing = max(0.0, float(_toward(light.azimuth, light.elevation)[1]))
    sun_share, sky_share = np.full(len(points), facing, np.float32), np.ones(len(points), np.float32)
    sun_share[near] = _sun_share(stage, points[near], normals[near], light, rng, light_rays)
    sky_share[near] = _sky_share(stage, points[near], normals[near], rng, light_rays)
    lit = np.array(around.floor, np.float32) * (light.strength * sun_share + light.sky * sky_share)[:, None]
    wall = np.array(around.wall, np.float32) * (light.sky + 0.5 * light.strength)
    fade = np.clip((reach - 1.5) / 4, 0, 1)[:, None]
    colors *= light.sky + 0.5 * light.strength
    colors[on_floor] = (1 - fade) * lit + fade * wall
    return colors


def _developed(colors: Vector, size: Size, samples: int) -> Image.Image:
    """Mean of each pixel's rays, brought to what a screen shows; bright light is pressed together."""
    width, height = size
    mean = colors.reshape(height, samples, width, samples, 3).mean(axis=(1, 3))
    pressed = mean / (1 + np.maximum(mean - 0.8, 0))
    return Image.fromarray((_encoded(pressed).clip(0, 1) * 255).round().astype(np.uint8))


def _box_of(seen: NDArray[np.bool_], size: Size, samples: int) -> tuple[int, int, int, int] | None:
    width, height = size
    mask = seen.reshape(height, samples, width, samples).any(axis=(1, 3))
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return None
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
