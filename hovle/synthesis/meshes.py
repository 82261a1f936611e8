"""Wavefront OBJ models with their materials and textures, as arrays."""

import io
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Material:
    """How a part of a model looks."""

    color: tuple[float, float, float] = (0.8, 0.8, 0.8)
    """Diffuse, 0 to 1, in sRGB as the format has it."""
    opacity: float = 1.0
    shine: float = 0.0
    """Mean of the specular color."""
    exponent: float = 10.0
    """Of the highlight: the higher, the smaller."""
    texture: NDArray[np.uint8] | None = field(default=None, repr=False, compare=False)
    """sRGB, shape `(H, W, 3)`; replaces the color."""


@dataclass(frozen=True)
class Mesh:
    """Triangles of a model."""

    vertices: Floats
    """Shape `(V, 3)`."""
    faces: NDArray[np.int32]
    """Vertex numbers, shape `(F, 3)`."""
    normals: Floats
    """Of each corner, shape `(F, 3, 3)`; zero where the file gives none."""
    coordinates: Floats
    """Of each corner in its texture, shape `(F, 3, 2)`."""
    material_ids: NDArray[np.int32]
    """Of each face, shape `(F,)`."""
    materials: tuple[Material, ...]


def read_obj(name: str, read: Callable[[str], bytes]) -> Mesh:
    """Read a model and what it refers to.

    Args:
        name: Of the .obj file.
        read: Gives the bytes of a file by its name as the model or its material file writes it; KeyError for none.

    Raises:
        ValueError: When the file holds no triangle, or a face of vertices that are not there.
    """
    reader = _ObjReader(read)
    for line in read(name).decode("utf-8", "replace").splitlines():
        reader.take(line)
    return reader.mesh(name)


def turned(mesh: Mesh, rotation: Floats) -> Mesh:
    """A mesh turned by a matrix of the shape `(3, 3)`."""
    return replace(mesh, vertices=mesh.vertices @ rotation.T, normals=mesh.normals @ rotation.T)


class _ObjReader:
    def __init__(self, read: Callable[[str], bytes]):
        self._read = read
        self._lists: dict[str, list[list[str]]] = {"v": [], "vn": [], "vt": []}
        self._corners: list[tuple[int, int, int]] = []
        self._face_materials: list[int] = []
        self._materials: dict[str, Material] = {}
        self._order: list[str] = []
        self._current = self._number_of("")

    def take(self, line: str) -> None:
        key, *parts = line.split() or [""]
        if key in self._lists:
            self._lists[key].append(parts[: 2 if key == "vt" else 3])
        elif key == "f":
            self._take_face(parts)
        elif key == "usemtl":
            self._current = self._number_of(" ".join(parts))
        elif key == "mtllib":
            self._materials |= _read_materials(" ".join(parts), self._read)

    def _number_of(self, material: str) -> int:
        if material not in self._order:
            self._order.append(material)
        return self._order.index(material)

    def _take_face(self, parts: Sequence[str]) -> None:
        """Corners of a polygon, made into a fan of triangles."""
        counts = [len(self._lists[key]) for key in ("v", "vt", "vn")]
        corners = [_corner(part, counts) for part in parts]
        for second, third in itertools.pairwise(corners[1:]):
            self._corners += (corners[0], second, third)
            self._face_materials.append(self._current)

    def mesh(self, name: str) -> Mesh:
        vertices = np.array(self._lists["v"], dtype=np.float32)
        corners = np.array(self._corners, dtype=np.int32).reshape(-1, 3, 3)
        if not len(corners):
            raise ValueError(f"{name} holds no face; expected a model of triangles or polygons.")
        faces = corners[..., 0]
        if faces.min() < 0 or faces.max() >= len(vertices):
            raise ValueError(f"{name} has a face of vertex {faces.max() + 1}, but {len(vertices)} vertices.")
        return Mesh(
            vertices,
            faces,
            _gathered(self._lists["vn"], corners[..., 2], 3),
            _gathered(self._lists["vt"], corners[..., 1], 2),
            np.array(self._face_materials, dtype=np.int32),
            tuple(self._materials.get(material, Material()) for material in self._order),
        )


def _corner(part: str, counts: Sequence[int]) -> tuple[int, int, int]:
    """Numbers of vertex, texture coordinate and normal from zero; -1 for none."""
    numbers = [int(number) if number else 0 for number in part.split("/")]
    numbers += [0] * (3 - len(numbers))
    first, second, third = (
        number - 1 if number >= 0 else count + number for number, count in zip(numbers, counts, strict=True)
    )
    return first, second, third


def _gathered(rows: list[list[str]], numbers: NDArray[np.int32], width: int) -> Floats:
    """Rows by number, zero where there is none."""
    table = np.zeros((len(rows) + 1, width), np.float32)
    if rows:
        table[:-1] = np.array(rows, dtype=np.float32)
    return table[np.where((numbers >= 0) & (numbers < len(rows)), numbers, len(rows))]


def _read_materials(name: str, read: Callable[[str], bytes]) -> dict[str, Material]:
    materials: dict[str, dict] = {}
    current: dict = {}
    for line in read(name).decode("utf-8", "replace").splitlines():
        key, *parts = line.split() or [""]
        if key == "newmtl":
            current = materials.setdefault(" ".join(parts), {})
        elif key == "Kd":
            current["color"] = tuple(min(1.0, float(part)) for part in parts[:3])
        elif key == "Ks":
            current["shine"] = float(np.mean([float(part) for part in parts[:3]]))
        elif key == "Ns":
            current["exponent"] = max(1.0, float(parts[0]))
        elif key == "d":
            current["opacity"] = float(parts[-1])
        elif key == "map_Kd":
            current["texture"] = _read_texture(" ".join(parts), read)
    return {material: Material(**values) for material, values in materials.items()}


def _read_texture(name: str, read: Callable[[str], bytes]) -> NDArray[np.uint8] | None:
    """The texture of a name or of its last part; None where the model comes without it, as some do."""
    for candidate in (name, name.replace("\\", "/").rsplit("/", 1)[-1]):
        try:
            content = read(candidate)
        except KeyError:
            continue
        with Image.open(io.BytesIO(content)) as image:
            image.thumbnail((512, 512))
            return np.asarray(image.convert("RGB"))
    return None
