"""Turn a picture into embeddings of a prompt, with what lies in stem.safetensors; needs numpy and Pillow only.

    stem = Stem("stem.safetensors")
    image = stem(Image.open("picture.png"))    # (tokens, hidden size), float32
    text = stem.prompt(len(image))             # stands where the picture stands: <img><IMG_CONTEXT>...</img>

Tokenize the prompt, look its ids up in the decoder's input embeddings, and put `image` where the id is
`stem.image_token_id`; the decoder runs on that (`inputs_embeds`, in llama.cpp a batch of embeddings). Pictures are cut
into tiles as in training: the grid closest in aspect ratio, then the whole picture as the last tile.
"""

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


class Stem:
    """Patch convolution, positions, shuffle and two layers of a HoVLE, in float32.

    Args:
        path: The file.
    """

    def __init__(self, path: str | Path):
        tensors, settings = read_safetensors(path)
        self.tensors = tensors
        self.patch_size: int = settings["patch_size"]
        self.factor: int = settings["shuffle_factor"]
        self.has_projector: bool = settings["has_projector"]
        self.tile_size: int = settings["tile_size"]
        self.min_tiles: int = settings["min_tiles"]
        self.max_tiles: int = settings["max_tiles"]
        self.resample = Image.Resampling(settings["resample"])
        self.rescale_factor: float = settings["rescale_factor"]
        self.mean = np.float32(settings["image_mean"]).reshape(-1, 1, 1)
        self.std = np.float32(settings["image_std"]).reshape(-1, 1, 1)
        self.image_token_id: int = settings["image_token_id"]
        self.tokens: list[str] | None = settings["tokens"]
        self.text_after_image: str = settings["text_after_image"]

    def __call__(self, picture: Image.Image) -> np.ndarray:
        """Embeddings of a picture in prompt order, shape `(tokens, D)`."""
        features = self.embed(self.tiles(picture))
        return features.reshape(-1, features.shape[-1])

    def prompt(self, num_tokens: int) -> str:
        """What stands in the prompt for a picture of so many tokens; ValueError without a tokenizer's names."""
        if self.tokens is None:
            raise ValueError("The model was exported without a tokenizer: make the prompt of ids.")
        start, context, end = self.tokens
        return f"{start}{context * num_tokens}{end}{self.text_after_image}"

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Columns and rows of tiles, closest in aspect ratio; of equally close grids, a larger one if half filled."""
        most = self.max_tiles
        grids = [(x, y) for x in range(1, most + 1) for y in range(1, most + 1) if self.min_tiles <= x * y <= most]
        best, best_difference = (1, 1), math.inf
        for columns, rows in sorted(grids, key=lambda grid: grid[0] * grid[1]):
            difference = abs(width / height - columns / rows)
            is_filled = width * height > 0.5 * self.tile_size**2 * columns * rows
            if difference < best_difference or (difference == best_difference and is_filled):
                best, best_difference = (columns, rows), difference
        return best if most > 1 else (1, 1)

    def tiles(self, picture: Image.Image) -> np.ndarray:
        """Normalised tiles of a picture in reading order, the thumbnail last, shape `(N, C, s, s)`."""
        picture = upright_rgb(picture)
        side = self.tile_size
        columns, rows = self.grid(picture.height, picture.width)
        canvas = np.asarray(picture.resize((columns * side, rows * side), self.resample))
        tiles = [
            canvas[row * side : (row + 1) * side, column * side : (column + 1) * side]
            for row in range(rows)
            for column in range(columns)
        ]
        if len(tiles) > 1:
            tiles.append(np.asarray(picture.resize((side, side), self.resample)))
        pixels = np.stack(tiles).transpose(0, 3, 1, 2).astype(np.float32)
        return (pixels * np.float32(self.rescale_factor) - self.mean) / self.std

    def embed(self, tiles: np.ndarray) -> np.ndarray:
        """Image tokens of tiles, `(N, C, s, s)` to `(N, S, D)`."""
        num_tiles, channels, side = tiles.shape[:3]
        grid = side // self.patch_size
        patches = tiles.reshape(num_tiles, channels, grid, self.patch_size, grid, self.patch_size)
        patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(num_tiles, grid**2, -1)
        features = self._linear(patches, "patch_embedding.projection") + self.tensors["position_embedding"]
        if not self.has_projector:
            return features
        small = grid // self.factor
        blocks = features.reshape(num_tiles, small, self.factor, small, self.factor, -1)
        joined = blocks.transpose(0, 1, 3, 2, 4, 5).reshape(num_tiles, small**2, -1)
        return self._linear(gelu(self._linear(joined, "projector.linear_1")), "projector.linear_2")

    def _linear(self, values: np.ndarray, name: str) -> np.ndarray:
        weight = self.tensors[f"{name}.weight"]
        return values @ weight.reshape(len(weight), -1).T + self.tensors[f"{name}.bias"]


def upright_rgb(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF data say, in RGB, transparency on white; profiles and HDR are left aside."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "RGB" and not picture.has_transparency_data:
        return picture
    picture = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def gelu(values: np.ndarray) -> np.ndarray:
    """Values times the normal distribution's integral up to them (erf by Abramowitz and Stegun 7.1.26)."""
    x = np.abs(values) / np.float32(math.sqrt(2))
    t = 1 / (1 + np.float32(0.3275911) * x)
    series = t * np.float32(1.061405429) - np.float32(1.453152027)
    for coefficient in (1.421413741, -0.284496736, 0.254829592):
        series = series * t + np.float32(coefficient)
    erf = np.copysign(1 - series * t * np.exp(-x * x), values)
    return (0.5 * values * (1 + erf)).astype(np.float32)


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors by name, and the settings of the stem, out of a safetensors file of float32."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        data = file.read()
    settings = json.loads(header.pop("__metadata__")["hovle_stem"])
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError(f"{name} in {path} is {entry['dtype']}; a stem holds F32 only.")
        start, end = entry["data_offsets"]
        tensors[name] = np.frombuffer(data[start:end], "<f4").reshape(entry["shape"])
    return tensors, settings
