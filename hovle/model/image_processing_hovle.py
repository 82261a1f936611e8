"""Cut a picture into square tiles as the released HoVLE does.

The grid (columns x rows) whose aspect ratio is closest to the picture's is chosen, the picture is resized to fill it
and cut in reading order; if that gives more than one tile, the whole picture follows as a last tile, the thumbnail.
transformers' GotOcr2 processor has the same rule. Its Pillow variant is the base here: Pillow's bicubic filter is
what the released model saw, torchvision's differs by a grey level, and pixels do not change with what is installed.

`do_rescale=False, do_normalize=False` takes the fast way that training takes: bytes (uint8) are cut and resized by
torch, and the model normalises them as its first step. Normalised numbers of the two ways differ by at most 0.035, but
for a few pixels beside pure black or white (`pixels.py`); which is why the slow way, the released model's, is the
default.
"""

import copy
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling, SizeDict
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import (
    GotOcr2ImageProcessorKwargs,
    GotOcr2ImageProcessorPil,
)

from .loading_arguments import IN_FILES, LOADING, OF_MODELS, refuse_unknown
from .pictures import load_picture
from .pixels import cut_pixels
from .tiling import TileGrid

FIXED = {"do_resize": True, "do_center_crop": False, "do_pad": False, "data_format": "channels_first"}
"""Arguments of other image processors that have no meaning for tiles, with the only value they may have."""

MOST_TILES = 1024
"""Of one picture: so many grids are compared in a fraction of a second, and no model sees more."""

LARGEST_TILE = 4096
"""Side in pixels."""


class HoVLEImageProcessorKwargs(GotOcr2ImageProcessorKwargs, total=False):  # type: ignore[call-arg]
    """Arguments of one call, beside those of every transformers image processor.

    tile_size (`int`):
        Side of a tile in pixels; the short form of `size={"height": s, "width": s}`.
    min_tiles (`int`):
        Fewest tiles of the grid; another name of `min_patches`.
    max_tiles (`int`):
        Most tiles of the grid, the thumbnail not counted; another name of `max_patches`.
    tile_limits (`list[int]`):
        `max_tiles` of each picture, where pictures of one call get different numbers.
    """

    tile_size: int | None
    min_tiles: int | None
    max_tiles: int | None
    tile_limits: list[int] | None


class HoVLEImageProcessor(GotOcr2ImageProcessorPil):
    """Turn pictures into tiles: `pixel_values` of shape `(all tiles, 3, s, s)` and `num_patches`, tiles per picture.

    Pictures may be anything `hovle.model.pictures.load_picture` reads, alone or in lists. Without arguments: tiles of
    448 pixels, 1 to 12 of them plus the thumbnail, ImageNet mean and standard deviation. With `do_rescale=False` and
    `do_normalize=False`, given once or saved, tiles are uint8 and the model normalises them, with the `image_mean` and
    `image_std` of its config; a filter other than the bicubic one stays Pillow's.
    """

    valid_kwargs = HoVLEImageProcessorKwargs
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"height": 448, "width": 448}  # noqa: RUF012 - the base class declares it this way
    crop_to_patches = True

    def __init__(self, **kwargs):
        refuse_unknown(kwargs, {*self.valid_kwargs.__annotations__, *IN_FILES}, type(self).__name__)
        # Kept under the base class's names only: an attribute `tile_size` would overrule a later `size`.
        super().__init__(**_base_names(kwargs))
        self._standardize_kwargs(**{name: getattr(self, name) for name in CHECKED})

    def _set_attributes(self, **kwargs) -> None:
        """Keep every setting under one name, as the base class does, but for our other names of the same."""
        names = [name for name in self.valid_kwargs.__annotations__ if name not in OTHER_NAMES]
        given = {name: kwargs[name] if kwargs.get(name) is not None else getattr(self, name, None) for name in names}
        for name, value in self._standardize_kwargs(**copy.deepcopy(given)).items():
            setattr(self, name, value)
        self._valid_kwargs_names = names

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load from a folder or the Hub; settings given beside it replace the saved ones, unknown ones are refused."""
        known = {*cls.valid_kwargs.__annotations__, *LOADING, *OF_MODELS}
        if not kwargs.get("return_unused_kwargs"):
            refuse_unknown(kwargs, known, cls.__name__)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels; another name of `size`."""
        return self.grid_settings()["size"].height

    @tile_size.setter
    def tile_size(self, side: int) -> None:
        self.size = {"height": side, "width": side}

    @property
    def min_tiles(self) -> int:
        """Fewest tiles of the grid; another name of `min_patches`."""
        return self.min_patches

    @min_tiles.setter
    def min_tiles(self, fewest: int) -> None:
        self.min_patches = fewest

    @property
    def max_tiles(self) -> int:
        """Most tiles of the grid, the thumbnail not counted; another name of `max_patches`."""
        return self.max_patches

    @max_tiles.setter
    def max_tiles(self, most: int) -> None:
        self.max_patches = most

    def fetch_images(self, image_url_or_urls):
        """Load pictures, in the nesting they came in, as upright RGB; an error tells the picture's number."""
        numbers = itertools.count(1)

        def load(source):
            if isinstance(source, list | tuple) or getattr(source, "ndim", None) == 4:
                return [load(one) for one in source]
            number = next(numbers)
            return load_picture(source, name=f"picture {number} of the request")

        return load(image_url_or_urls)

    def choose_grid(self, height: int, width: int, images_kwargs: dict | None = None) -> TileGrid:
        """Choose how many tiles go across and down.

        Args:
            height: Of the upright picture, in pixels.
            width: Of the upright picture, in pixels.
            images_kwargs: Arguments that replace the defaults, for instance `{"max_tiles": 6}`.
        """
        kwargs = self.grid_settings(images_kwargs)
        if not kwargs["crop_to_patches"]:
            return TileGrid(1, 1)
        return TileGrid.closest(height, width, kwargs["size"].height, kwargs["min_patches"], kwargs["max_patches"])

    def grid_settings(self, images_kwargs: dict | None = None) -> dict:
        """`size`, `min_patches`, `max_patches` and `crop_to_patches` of a call with these arguments."""
        names = ("size", "min_patches", "max_patches", "crop_to_patches")
        defaults = {name: getattr(self, name) for name in names}
        return self._standardize_kwargs(**{**defaults, **(images_kwargs or {})})

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict | None = None) -> int:
        """Count the tiles of a picture without its pixels, the thumbnail included; arguments as in `choose_grid`."""
        return self.choose_grid(height, width, images_kwargs).num_tiles

    def spread_tiles(
        self,
        image_sizes: Sequence[tuple[int, int]],
        max_image_tokens: int,
        tokens_per_tile: int,
        images_kwargs: dict | None = None,
    ) -> tuple[list[int], list[int]]:
        """Share a budget of tokens between pictures; `HoVLEProcessor.spread_tiles` explains it."""
        images_kwargs = dict(images_kwargs or {})
        limits = images_kwargs.pop("tile_limits", None)
        own = (
            [{}] * len(image_sizes)
            if limits is None
            else [{"max_patches": limit, "max_tiles": None} for limit in limits]
        )
        fewest = self.grid_settings(images_kwargs)["min_patches"]

        grids = [
            self.choose_grid(*size, {**images_kwargs, **limit}) for size, limit in zip(image_sizes, own, strict=True)
        ]
        while True:
            tokens = [2 + tokens_per_tile * grid.num_tiles for grid in grids]
            sizes = [grid.columns * grid.rows for grid in grids]
            if sum(tokens) <= max_image_tokens:
                return sizes, tokens
            largest = sizes.index(max(sizes))
            if sizes[largest] <= fewest:
                raise ValueError(
                    f"max_image_tokens ({max_image_tokens}) is too small: {len(grids)} pictures take {sum(tokens)} "
                    f"tokens with the fewest tiles ({fewest} each). Give fewer pictures or a smaller tile_size."
                )
            fewer = {**images_kwargs, "max_patches": sizes[largest] - 1, "max_tiles": None}
            grids[largest] = self.choose_grid(*image_sizes[largest], fewer)

    def _standardize_kwargs(self, **kwargs) -> dict:  # type: ignore[override]
        """Translate our names into the base class's and refuse numbers that allow no grid."""
        kwargs = super()._standardize_kwargs(**{**_base_names(kwargs), "default_to_square": True})
        _check_numbers(kwargs)
        size = kwargs["size"]
        if size.height is None or size.height != size.width:
            raise ValueError(f"size must be one number or an equal height and width, as tiles are square; got {size}.")
        if kwargs.get("input_data_format") is not None:
            raise ValueError(
                f"input_data_format={kwargs['input_data_format']!r} is not taken: an array's shape tells its layout, "
                "(H, W, C), (H, W) or (C, H, W); where both ends fit, channels are last in numpy, first in torch."
            )
        for name, only in FIXED.items():
            if kwargs.get(name) not in (None, only):
                raise ValueError(f"{name}={kwargs[name]!r} cannot be had: tiles always have {name}={only!r}.")
        return kwargs

    def gives_bytes(self, images_kwargs: dict | None = None) -> bool:
        """Whether a call with these arguments gives tiles of bytes, uint8, which the model is to normalise."""
        given = {name: value for name, value in (images_kwargs or {}).items() if value is not None}
        return not any(given.get(name, getattr(self, name)) for name in ("do_rescale", "do_normalize"))

    def _preprocess(self, images, *args, tile_limits: list[int] | None = None, **kwargs) -> BatchFeature:
        if tile_limits is not None and len(tile_limits) != len(images):
            raise ValueError(f"tile_limits holds {len(tile_limits)} numbers for {len(images)} pictures.")
        if self.gives_bytes(kwargs) and kwargs["resample"] == PILImageResampling.BICUBIC:
            return self._preprocess_bytes(images, tile_limits, **kwargs)
        if tile_limits is None:
            return super()._preprocess(images, *args, **kwargs)
        return_tensors = kwargs.pop("return_tensors", None)
        parts = [
            super(HoVLEImageProcessor, self)._preprocess(
                [image], *args, **{**kwargs, "max_patches": limit, "return_tensors": None}
            )
            for image, limit in zip(images, tile_limits, strict=True)
        ]
        data = {name: [item for part in parts for item in part[name]] for name in ("pixel_values", "num_patches")}
        return BatchFeature(data, tensor_type=return_tensors)

    def _preprocess_bytes(
        self,
        images: list[Image.Image],
        tile_limits: list[int] | None,
        *,
        size: SizeDict,
        crop_to_patches: bool,
        min_patches: int,
        max_patches: int,
        return_tensors: str | None = None,
        **_,
    ) -> BatchFeature:
        """Tiles of bytes, cut and resized as in training."""
        parts = []
        for image, limit in zip(images, tile_limits or [max_patches] * len(images), strict=True):
            most = limit if crop_to_patches else 1
            grid = TileGrid.closest(image.height, image.width, size.height, min_patches, most)
            if most > 1:  # else the caller wants it so
                grid.warn_if_squeezing(image.height, image.width, size.height)
            parts.append(cut_pixels(torch.from_numpy(np.array(image)), grid, size.height))
        tiles = torch.cat(parts)
        pixel_values = tiles if return_tensors == "pt" else list(tiles.numpy())
        data = {"pixel_values": pixel_values, "num_patches": [len(part) for part in parts]}
        return BatchFeature(data, tensor_type=return_tensors)

    def process_image(self, image: Image.Image, **kwargs) -> Image.Image:  # type: ignore[override]
        """Leave a loaded picture as Pillow holds it; the base class's arrays take twice its memory before resizing."""
        return image

    def crop_image_to_patches(  # type: ignore[override]
        self,
        image: Image.Image,
        min_patches: int,
        max_patches: int,
        patch_size: SizeDict,
        resample: PILImageResampling | int | None = None,
    ) -> list[np.ndarray]:
        """Cut a picture into tiles in reading order, the thumbnail last; each uint8, shape `(3, s, s)`."""
        side = patch_size.height
        grid = TileGrid.closest(image.height, image.width, side, min_patches, max_patches)
        grid.warn_if_squeezing(image.height, image.width, side)
        return grid.cut(lambda height, width: self.resize(image, SizeDict(height=height, width=width), resample), side)

    def normalize(self, image: np.ndarray, mean, std, **kwargs) -> np.ndarray:  # type: ignore[override]
        """Subtract the mean and divide by the standard deviation of each channel, shape `(3, s, s)`.

        Same numbers as the base class within rounding, in less time.
        """
        mean = np.asarray(mean, dtype=np.float32).reshape(-1, 1, 1)
        std = np.asarray(std, dtype=np.float32).reshape(-1, 1, 1)
        return (image - mean) / std


CHECKED = ("size", "min_patches", "max_patches", "image_mean", "image_std", "rescale_factor")


def _check_numbers(kwargs: dict) -> None:
    """Raise ValueError for settings that allow no grid, no tile or no finite pixel, or more tiles than make sense."""
    fewest, most = kwargs["min_patches"], kwargs["max_patches"]
    whole = isinstance(fewest, int | np.integer) and isinstance(most, int | np.integer)
    if not whole or not 1 <= fewest <= most <= MOST_TILES:
        raise ValueError(
            f"min_tiles ({fewest!r:.40}) must lie between 1 and max_tiles ({most!r:.40}), and that be at most "
            f"{MOST_TILES}."
        )
    side = kwargs["size"].height
    if side is not None and not 1 <= side <= LARGEST_TILE:
        raise ValueError(f"tile_size must lie between 1 and {LARGEST_TILE} pixels, got {side}.")
    for name in ("image_mean", "image_std", "rescale_factor"):
        numbers = np.atleast_1d(np.asarray(1.0 if kwargs.get(name) is None else kwargs[name]))
        fits = numbers.dtype.kind in "iuf" and np.isfinite(numbers).all()
        if not fits or (name != "image_mean" and not (numbers > 0).all()):
            wanted = "finite numbers" if name == "image_mean" else "positive, finite numbers"
            raise ValueError(f"{name} must be {wanted}, got {kwargs[name]!r:.80}.")


OTHER_NAMES = ("tile_size", "min_tiles", "max_tiles")


def _base_names(kwargs: dict) -> dict:
    """Replace `tile_size`, `min_tiles` and `max_tiles` by the base class's names for them."""
    tile_size, min_tiles, max_tiles = (kwargs.pop(name, None) for name in OTHER_NAMES)
    if tile_size is not None:
        if tile_size < 1:
            raise ValueError(f"tile_size must be at least 1 pixel, got {tile_size}.")
        kwargs["size"] = {"height": tile_size, "width": tile_size}
    if min_tiles is not None:
        kwargs["min_patches"] = min_tiles
    if max_tiles is not None:
        kwargs["max_patches"] = max_tiles
    return kwargs


__all__ = ["HoVLEImageProcessor"]
