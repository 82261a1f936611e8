"""Words for image tokens: where they lie in the picture, and which they are."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from hovle import HoVLEImageProcessor, HoVLEProcessor
from hovle.model.tiling import TileGrid
from hovle.train.config import CharactersConfig, WordsConfig
from hovle.train.data.regions import Region
from hovle.train.data.skips import SkipSampleError
from hovle.train.data.tiles import cut_tiles
from hovle.train.data.words import NO_WORD, WordLayout, WordTargets


@pytest.fixture
def layout(parts):
    """`layout(max_tiles, field=...)`: words for tiles of 56 pixels with 2 x 2 tokens."""

    def build(max_tiles: int = 6, **fields) -> WordLayout:
        processor: HoVLEProcessor = copy.copy(parts[1])
        processor.image_processor = HoVLEImageProcessor(tile_size=56, max_tiles=max_tiles)
        return WordLayout(processor, WordsConfig(**fields))

    return build


def ids_of(layout: WordLayout, text: str) -> list[int]:
    return layout.tokenizer(text, add_special_tokens=False)["input_ids"]


def said(layout: WordLayout, targets: WordTargets, tile: int = 0) -> list[list[str]]:
    """The words of a tile by rows and columns; `.` for none and `-` for the filler."""
    names = [
        "." if word == NO_WORD else "-" if filler else layout.tokenizer.decode(word)
        for word, filler in zip(targets.word_ids[tile].tolist(), targets.is_filler[tile].tolist(), strict=True)
    ]
    return [names[start : start + layout.side] for start in range(0, len(names), layout.side)]


# --- where ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(60, 60), (56, 300), (230, 90), (170, 260), (31, 400), (97, 50)])
@pytest.mark.parametrize("kind", ["name", "line"])
def test_a_dot_is_seen_by_the_token_that_is_told_of_it(layout, size, kind):
    """On the canvas, whatever its grid, and on the thumbnail: the pixels of the tiles themselves tell."""
    height, width = size
    words = layout(min_pixels=0)
    grid = words.image_processor.choose_grid(height, width)
    num_sheets = 1 + grid.has_thumbnail
    draw, num_clear = random.Random(repr((size, kind))), 0
    for _ in range(40):
        left, top = draw.uniform(0, width - 3), draw.uniform(0, height - 3)
        right, bottom = min(left + draw.uniform(3, 12), width), min(top + draw.uniform(3, 12), height)
        targets = words.targets([Region((left, top, right, bottom), "a", kind)], height, width, "row")
        told = (targets.word_ids != NO_WORD) & ~targets.is_filler
        assert int(told.sum()) == num_sheets
        # A name stands for the middle of its box; a word for where it ends, seven eighths down.
        x, y = ((left + right) / 2, (top + bottom) / 2) if kind == "name" else (right, top + 0.875 * (bottom - top))
        seen = brightness(x, y, height, width, words)
        for number in range(num_sheets):
            sheet = slice(grid.columns * grid.rows, None) if number else slice(0, grid.columns * grid.rows)
            share = seen[sheet] / seen[sheet].sum()
            if share.max() > 0.6:  # no dot on a border, which several see
                num_clear += 1
                assert torch.equal(share == share.max(), told[sheet]), (left, top, right, bottom)
    assert num_clear > 20 * num_sheets


def brightness(x: float, y: float, height: int, width: int, words: WordLayout) -> torch.Tensor:
    """What each image token sees of a soft white dot at a place of a black picture, shape `(N, S)`."""
    down, across = np.arange(height)[:, None] + 0.5, np.arange(width)[None] + 0.5
    dot = np.exp(-((down - y) ** 2 + (across - x) ** 2) / 2)
    pixels = torch.from_numpy((255 * dot).astype(np.uint8))[..., None].expand(-1, -1, 3).contiguous()
    tiles = cut_tiles(pixels, words.image_processor)
    return nn.functional.adaptive_avg_pool2d(tiles[:, 0].float(), words.side).flatten(1)


@pytest.mark.parametrize("grid", [TileGrid(1, 1), TileGrid(3, 1), TileGrid(2, 3)])
def test_sheets_hold_every_token_once_where_the_cutter_cuts_it(grid):
    side = 3
    sheets = grid.token_sheets(side)
    assert [sheet.shape for sheet in sheets] == [(grid.rows * side, grid.columns * side), (side, side)][: len(sheets)]
    assert sorted(np.concatenate([sheet.ravel() for sheet in sheets])) == list(range(grid.num_tiles * side**2))
    right_of_first = sheets[0][0, side] if grid.columns > 1 else None
    assert right_of_first in (None, side**2)  # the first token of the second tile
    assert sheets[-1][-1, -1] == grid.num_tiles * side**2 - 1


# --- lines ----------------------------------------------------------------------------------------------------------


def test_pieces_of_a_line_stand_where_they_end_spaces_between_and_filler_elsewhere(layout):
    words = layout(3)
    text = "What on mat"
    assert len(ids_of(words, text)) == 3
    # Three tiles, six columns of 28 pixels. "What" ends in the first, " on" in the third, " mat" in the last
    edges = (0, 7, 14, 21, 27, 40, 60, 80, 110, 130, 150, 168)
    targets = words.targets([Region((0, 0, 168, 50), text, edges=edges)], 56, 168, "row")
    assert [said(words, targets, tile) for tile in range(3)] == [
        [["-", "-"], ["What", " "]],
        [["-", "-"], [" on", " "]],
        [["-", "-"], ["-", " mat"]],
    ]
    assert targets.num_pieces.tolist() == [[3, 0]]
    assert targets.word_ids[targets.is_filler].unique().tolist() == [words.filler_id] == ids_of(words, "\n")


def test_lines_in_several_rows_do_not_meet(layout):
    words = layout(1)
    regions = [Region((0, 0, 56, 26), "What"), Region((0, 30, 56, 54), "The")]
    assert said(words, words.targets(regions, 56, 56, "row")) == [["-", "What"], ["-", "The"]]


def test_a_piece_whose_token_is_taken_has_the_next_one_or_is_counted(layout):
    words = layout(1, min_pixels=1)
    text = "What on mat"
    crowded = Region((0, 0, 26, 26), text)
    targets = words.targets([crowded], 56, 56, "row")
    assert said(words, targets) == [["What", " on"], ["-", "-"]]
    assert targets.num_pieces.tolist() == [[3, 1]]


def test_words_of_a_line_may_have_boxes_of_their_own(layout):
    words = layout(1)
    regions = [Region((0, 0, 27, 26), "What"), Region((30, 0, 56, 26), " mat")]
    assert said(words, words.targets(regions, 56, 56, "row"))[0] == ["What", " mat"]


def test_what_is_too_small_on_a_sheet_is_not_asked_for_and_is_no_filler(layout):
    words = layout(6, min_pixels=8)
    # Three tiles: legible on the canvas; on the thumbnail a third as wide.
    regions = [Region((0, 4, 28, 20), "What")]
    targets = words.targets(regions, 56, 168, "row")
    assert said(words, targets, 0) == [["What", "-"], ["-", "-"]]
    assert said(words, targets, 3) == [[".", "-"], ["-", "-"]]
    small = words.targets([Region((0, 4, 28, 9), "What")], 56, 168, "row")
    assert said(words, small, 0) == [[".", "-"], ["-", "-"]]
    assert small.num_pieces.tolist() == [[1, 1]]


def test_what_looks_like_a_special_token_is_read_as_text(layout):
    words = layout(1, min_pixels=0)
    targets = words.targets([Region((0, 0, 56, 56), "<|im_end|>")], 56, 56, "row")
    special = words.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert special not in targets.word_ids
    assert targets.num_pieces[0, 0] == len(words.tokenizer.tokenize("<|im_end|>", split_special_tokens=True)) > 1


# --- names ----------------------------------------------------------------------------------------------------------


def test_a_name_has_the_last_tokens_of_its_box_and_leaves_the_rest_to_the_teacher(layout):
    words = layout(1)
    targets = words.targets([Region((0, 0, 56, 56), "cat mat", "name")], 56, 56, "row")
    assert said(words, targets) == [[".", "."], [" cat", " mat"]]
    assert not targets.is_filler.any()


def test_the_smallest_box_chooses_first_and_what_finds_no_token_is_counted(layout):
    words = layout(1)
    regions = [Region((0, 0, 56, 56), "3", "name"), Region((30, 30, 54, 54), "cat mat", "name")]
    targets = words.targets(regions, 56, 56, "row")
    assert said(words, targets) == [[".", "."], [" 3", " cat"]]
    assert targets.num_pieces.tolist() == [[3, 1]]


def test_a_name_across_tiles_has_tokens_in_the_order_in_which_they_are_seen(layout):
    words = layout(2)
    targets = words.targets([Region((0, 0, 112, 56), "cat mat", "name")], 56, 112, "row")
    assert said(words, targets, 0) == [[".", "."], [".", "."]]
    assert said(words, targets, 1) == said(words, targets, 2) == [[".", "."], [" cat", " mat"]]


def test_a_picture_with_names_is_no_picture_of_text(layout):
    words = layout(1)
    regions = [Region((0, 0, 56, 26), "What"), Region((0, 30, 56, 56), "cat", "name")]
    assert said(words, words.targets(regions, 56, 56, "row")) == [[".", "What"], [".", " cat"]]
    nothing = words.targets([], 56, 56, "row")
    assert said(words, nothing) == [[".", "."], [".", "."]]


# --- characters -----------------------------------------------------------------------------------------------------


def test_characters_stand_over_their_tokens_from_left_to_right(layout):
    words = layout(1, min_pixels=1, characters=CharactersConfig(per_token=3, alphabet="abc"))
    targets = words.targets([Region((0, 0, 40, 26), "ab c dcba")], 56, 56, "row")
    # 40 pixels for nine characters: the middles of "ab c d" are in the first token, of "cba" in the second.
    assert targets.character_ids[0].tolist() == [[1, 2, 3], [3, 2, 1], [NO_WORD] * 3, [NO_WORD] * 3]
    other = words.targets([Region((0, 0, 40, 26), "d")], 56, 56, "row")
    assert other.character_ids[0, 0].tolist() == [4, 0, 0]
    named = words.targets([Region((0, 0, 40, 26), "a", "name")], 56, 56, "row")
    assert (named.character_ids == NO_WORD).all()


# --- refusals -------------------------------------------------------------------------------------------------------


def test_a_filler_of_several_tokens_is_refused(layout):
    with pytest.raises(ValueError, match=r"objective.words.filler must be one token, but .* 'zqxj' as \d"):
        layout(1, filler="zqxj")


def test_a_box_outside_the_picture_skips_the_sample(layout):
    with pytest.raises(SkipSampleError, match="its picture is 56 x 56"):
        layout(1).targets([Region((0, 0, 57, 56), "a")], 56, 56, "row")


def test_an_alphabet_with_a_character_twice_is_refused():
    with pytest.raises(ValueError, match="each character once"):
        CharactersConfig(alphabet="aba")
