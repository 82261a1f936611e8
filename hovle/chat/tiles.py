"""Draw how a picture is cut into tiles, and count the tokens it takes in a prompt.

The drawing shows the picture with the borders and numbers of its tiles in reading order and, if there is more than
one, the thumbnail that follows them: the whole picture squeezed into one square tile, as the model sees it.

  hovle tiles photo.jpg                            the released model's numbers: 448 px, up to 12 tiles
  hovle tiles photo.jpg --max-tiles 6 --out 6.png  fewer tiles, fewer tokens
  hovle tiles photo.jpg --model my-model           the numbers of a model folder
  hovle tiles a.jpg b.jpg --max-image-tokens 3000  pictures of one prompt that share a budget; who has most tiles
                                                   gives way first; draws tiles-1.png, tiles-2.png
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..loading import load_processor
from ..model.configuration_hovle import HoVLEConfig, count_tile_tokens
from ..model.image_processing_hovle import HoVLEImageProcessor
from ..model.pictures import load_picture
from ..model.tiling import SQUEEZED, TileGrid

PICTURE_SIDE = 960
"""Longer side of the picture in the drawing, in pixels."""

MARGIN = 24
FONT_SIZE = 20
BACKGROUND = "#ffffff"
INK = "#1b1f24"
PALE_INK = "#59636e"
LINE = "#ffffff"
LINE_SHADOW = "#d1242f"


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """How one picture is cut, and what it costs."""

    grid: TileGrid
    tile_size: int
    """Side of a tile in pixels."""

    tokens_per_tile: int

    shares: tuple[float, float]
    """The part of the picture's height and width in pixels that is left."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the prompt, `<img>` and `</img>` included."""
        return self.grid.num_tiles * self.tokens_per_tile + 2

    def lines(self) -> list[str]:
        """Say it in words, one fact per line."""
        return [
            f"grid             {self._grid_in_words()}",
            f"tiles            {self.grid.num_tiles}",
            f"tokens per tile  {self.tokens_per_tile}",
            f"tokens in all    {self.num_tokens:,} (with <img> and </img>)",
            f"what is left     {self._left_in_words()}",
        ]

    def captions(self) -> list[str]:
        """Say it shortly, for the drawing."""
        return [
            self._grid_in_words(),
            f"{self.grid.num_tiles} x {self.tokens_per_tile} + 2 = {self.num_tokens:,} tokens",
            *([f"left: {self._left_in_words()}"] if min(self.shares) < SQUEEZED else []),
        ]

    def _left_in_words(self) -> str:
        """How much of the picture's pixels the tiles keep, along both sides."""
        height, width = self.shares
        words = f"{width:.0%} of its width, {height:.0%} of its height"
        return words + (": small print is lost" if min(self.shares) < SQUEEZED else "")

    def _grid_in_words(self) -> str:
        if not self.grid.has_thumbnail:
            return f"one tile of {self.tile_size} px"
        return f"{self.grid.columns} x {self.grid.rows} tiles of {self.tile_size} px + thumbnail"


def plan_tiles(
    image_sizes: Sequence[tuple[int, int]],
    image_processor: HoVLEImageProcessor,
    pixels_per_token_side: int,
    max_image_tokens: int | None = None,
) -> list[TilePlan]:
    """Plan the tiles of the pictures of one prompt.

    Args:
        image_sizes: Height and width of each upright picture in pixels.
        image_processor: Cuts pictures into tiles.
        pixels_per_token_side: Side of the square of pixels that becomes one token.
        max_image_tokens: Tokens all pictures may take together.

    Raises:
        ValueError: When a tile does not divide into whole tokens, or the budget is too small.
    """
    tile_size = image_processor.tile_size
    tokens_per_tile = count_tile_tokens(tile_size, pixels_per_token_side)
    limits: list[int] = [image_processor.max_patches] * len(image_sizes)
    if max_image_tokens is not None:
        limits = image_processor.spread_tiles(image_sizes, max_image_tokens, tokens_per_tile)[0]
    grids = [
        image_processor.choose_grid(*size, {"max_tiles": limit})
        for size, limit in zip(image_sizes, limits, strict=True)
    ]
    return [
        TilePlan(grid=grid, tile_size=tile_size, tokens_per_tile=tokens_per_tile, shares=grid.shares(*size, tile_size))
        for grid, size in zip(grids, image_sizes, strict=True)
    ]


def draw_tiles(picture: Image.Image, plan: TilePlan, title: str) -> Image.Image:
    """Draw a picture with its tiles numbered in reading order, the thumbnail beside or below it, and the counts."""
    scale = PICTURE_SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    font = ImageFont.load_default(FONT_SIZE)
    line_height = round(FONT_SIZE * 1.5)
    # A thumbnail stands beside the picture, below a wide one.
    is_wide = width > 2 * height
    thumbnail_side = min(height, 240) if is_wide else 240
    left, top = (MARGIN, MARGIN + height + MARGIN) if is_wide else (MARGIN + width + MARGIN, MARGIN)
    right, bottom = MARGIN + width, MARGIN + height
    if plan.grid.has_thumbnail:
        right, bottom = max(right, left + thumbnail_side), max(bottom, top + thumbnail_side + line_height)
    captions = [f"{title}: {picture.width} x {picture.height} px", *plan.captions()]
    right = max(right, *(MARGIN + round(font.getlength(caption)) for caption in captions))
    caption_top = bottom + MARGIN // 2

    canvas = Image.new("RGB", (right + MARGIN, caption_top + len(captions) * line_height + MARGIN // 2), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    canvas.paste(picture.resize((width, height), Image.Resampling.BICUBIC), (MARGIN, MARGIN))
    _draw_grid(draw, plan.grid, MARGIN, MARGIN, width, height)
    if plan.grid.has_thumbnail:
        canvas.paste(picture.resize((thumbnail_side, thumbnail_side), Image.Resampling.BICUBIC), (left, top))
        _draw_frame(draw, left, top, thumbnail_side, thumbnail_side)
        _draw_badge(draw, plan.grid.num_tiles, left, top, thumbnail_side)
        draw.text((left, top + thumbnail_side + 6), "thumbnail", fill=PALE_INK, font=font)
    for number, caption in enumerate(captions):
        ink = INK if number == 0 else PALE_INK
        draw.text((MARGIN, caption_top + number * line_height), caption, fill=ink, font=font)
    return canvas


def _draw_grid(draw: ImageDraw.ImageDraw, grid: TileGrid, left: int, top: int, width: int, height: int) -> None:
    """Draw tile borders and numbers over the picture."""
    boxes = [(left + x0, top + y0, left + x1, top + y1) for x0, y0, x1, y1 in grid.boxes(height, width)]
    for color, line_width in ((LINE_SHADOW, 5), (LINE, 1)):
        for x in [box[0] for box in boxes[1 : grid.columns]]:
            draw.line([(x, top), (x, top + height - 1)], fill=color, width=line_width)
        for y in [box[1] for box in boxes[grid.columns :: grid.columns]]:
            draw.line([(left, y), (left + width - 1, y)], fill=color, width=line_width)
    _draw_frame(draw, left, top, width, height)
    for number, (x0, y0, x1, y1) in enumerate(boxes, start=1):
        _draw_badge(draw, number, x0, y0, min(x1 - x0, y1 - y0))


def _draw_frame(draw: ImageDraw.ImageDraw, left: int, top: int, width: int, height: int) -> None:
    draw.rectangle([left - 3, top - 3, left + width + 2, top + height + 2], outline=LINE_SHADOW, width=3)


def _draw_badge(draw: ImageDraw.ImageDraw, number: int, left: int, top: int, room: int) -> None:
    """Write a tile's number into its upper left corner, smaller where there is little room."""
    font = ImageFont.load_default(max(9, min(FONT_SIZE + 8, room // 4)))
    box = draw.textbbox((0, 0), str(number), font=font)
    text_width, text_height = box[2] - box[0], box[3] - box[1]
    gap, padding = min(8, room // 12), max(3, round(text_height * 0.45))
    x, y = left + gap, top + gap
    width = max(text_width, text_height) + 2 * padding
    height = text_height + 2 * padding
    draw.rounded_rectangle([x, y, x + width, y + height], radius=padding, fill=LINE_SHADOW)
    draw.text((x + width / 2, y + height / 2), str(number), fill=LINE, font=font, anchor="mm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle tiles`."""
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="picture file or http(s) URL; several: a prompt"
    )
    parser.add_argument(
        "--out", default="tiles.png", metavar="FILE", help="drawing to write, numbered if several (default: tiles.png)"
    )
    parser.add_argument(
        "--max-image-tokens", type=int, metavar="N", help="tokens all pictures may take together (default: no limit)"
    )
    parser.add_argument("--model", metavar="DIR", help="take all numbers from this model folder or Hub id")
    parser.add_argument("--tile-size", type=int, metavar="PX", help="side of a tile (default: 448, or the model's)")
    parser.add_argument("--min-tiles", type=int, metavar="N", help="fewest tiles (default: 1, or the model's)")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="most tiles (default: 12, or the model's)")
    parser.add_argument("--patch-size", type=int, metavar="PX", help="side of a patch (default: 14, or the model's)")
    parser.add_argument(
        "--shuffle-factor",
        type=int,
        metavar="N",
        help="patches joined along a token's side (default: 2, or the model's)",
    )


def run(args: argparse.Namespace) -> int:
    """Draw the tiles and print the counts."""
    image_processor, pixels_per_token_side = _numbers_from(args)
    pictures = [load_picture(source) for source in args.pictures]
    sizes = [(picture.height, picture.width) for picture in pictures]
    plans = plan_tiles(sizes, image_processor, pixels_per_token_side, args.max_image_tokens)
    for number, (source, picture, plan) in enumerate(zip(args.pictures, pictures, plans, strict=True), start=1):
        out = Path(args.out)
        if len(pictures) > 1:
            out = out.with_stem(f"{out.stem}-{number}")
        drawing = draw_tiles(picture, plan, title=Path(source).name[:60])
        try:
            drawing.save(out)
        except (OSError, ValueError) as error:
            raise ValueError(f"{out}: cannot be written ({error}).") from error
        lines = [f"picture          {picture.width} x {picture.height} px", *plan.lines(), f"drawing          {out}"]
        print("\n".join(lines) + "\n" * (len(pictures) > 1))  # noqa: T201 - this is the command's output
    if len(pictures) > 1 or args.max_image_tokens is not None:
        budget = "" if args.max_image_tokens is None else f" of at most {args.max_image_tokens:,}"
        total = sum(plan.num_tokens for plan in plans)
        print(f"together         {total:,} tokens{budget}")  # noqa: T201
    return 0


def _numbers_from(args: argparse.Namespace) -> tuple[HoVLEImageProcessor, int]:
    """Take the model's numbers, or the released model's, and replace those given on the command line."""
    for name in ("patch_size", "shuffle_factor"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}.")
    given = {name: getattr(args, name) for name in ("tile_size", "min_tiles", "max_tiles")}
    given = {name: value for name, value in given.items() if value is not None}
    if args.model is None:
        defaults = HoVLEConfig.__dataclass_fields__
        patch_size = args.patch_size or defaults["patch_size"].default
        return HoVLEImageProcessor(**given), patch_size * (args.shuffle_factor or 2)
    if args.patch_size is not None or args.shuffle_factor is not None:
        raise ValueError("--patch-size and --shuffle-factor belong to the model; leave them out with --model.")
    processor = load_processor(args.model)
    defaults = processor.image_processor.to_dict()
    return HoVLEImageProcessor(**{**defaults, **given}), processor.pixels_per_token_side
