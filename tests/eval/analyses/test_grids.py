"""Image tokens back in the picture's own geometry."""

import pytest
import torch
from PIL import Image

from hovle import HoVLEProcessor
from hovle.eval.analyses.grids import TokenGrid


def test_a_bright_spot_of_a_wide_picture_is_where_its_token_is_put(make_tokenizer, tiny_config):
    """Pixels tell, through the real cutting: each token's brightness, laid out, peaks where the picture is bright."""
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), tiny_config(), max_tiles=6)
    for left, top in ((0, 0), (130, 10), (70, 60), (190, 110)):
        picture = Image.new("RGB", (210, 140), "black")
        picture.paste("white", (left, top, left + 16, top + 16))
        tiles = processor.image_processor([picture], return_tensors="pt")["pixel_values"]
        grid = TokenGrid.from_counts(*processor.image_processor.choose_grid(140, 210), len(tiles), 4 * len(tiles))
        assert (grid.columns, grid.rows, grid.has_thumbnail) == (3, 2, True)
        brightness = torch.nn.functional.avg_pool2d(tiles.mean(dim=1, keepdim=True), 28).flatten()
        body, thumbnail = grid.split(brightness)
        assert body.shape == (4, 6)
        assert divmod(int(body.argmax()), 6) == ((top + 8) * 4 // 140, (left + 8) * 6 // 210)
        assert thumbnail is not None
        assert divmod(int(thumbnail.argmax()), 2) == ((top + 8) * 2 // 140, (left + 8) * 2 // 210)


def test_tokens_are_laid_out_tile_by_tile_and_row_by_row():
    grid = TokenGrid(columns=2, rows=1, side=2, has_thumbnail=True)
    body, thumbnail = grid.split(torch.arange(12))
    assert body.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert thumbnail is not None
    assert thumbnail.tolist() == [[8, 9], [10, 11]]
    assert grid.finer(2).num_tokens == 48
    assert TokenGrid(columns=1, rows=1, side=3, has_thumbnail=False).split(torch.arange(9))[1] is None


def test_counts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="has 9 tiles, but a grid of 3 x 2 has 6"):
        TokenGrid.from_counts(3, 2, 9, 36)
    with pytest.raises(ValueError, match="30 image tokens do not make 6 square tiles"):
        TokenGrid.from_counts(3, 2, 6, 30)
    with pytest.raises(ValueError, match="Expected 4 values"):
        TokenGrid(columns=1, rows=1, side=2, has_thumbnail=False).split(torch.arange(5))
