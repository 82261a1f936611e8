"""Where the drawn maps are bright, against a model that is made to look at the dark part of a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from hovle import HoVLEForConditionalGeneration
from hovle.charts import load_pyplot
from hovle.cli import main
from hovle.eval.analyses import attention_charts
from hovle.eval.analyses.attention_reading import AttentionReading, read_attention
from hovle.eval.analyses.model_under_test import ModelUnderTest

LOOKER = "7"
"""The one token that looks at what is dark; all others look at nothing in particular."""


def see_dark(model: HoVLEForConditionalGeneration, looker: int) -> None:
    """Set weights: in each layer, queries at the token `looker` look at dark patches, all others evenly.

    Hidden dimension 0 says how dark an image token is, 1 keeps norms away from zero, 2 marks the looker. No layer
    changes anything, and the slowest pair of rotary dimensions carries queries and keys, so that places do not matter.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.zero_()
        base = model.model
        base.patch_embedding.projection.weight[0] = -1 / base.patch_embedding.projection.weight[0].numel()
        base.patch_embedding.projection.bias[1] = 1
        base.projector.linear_1.weight[0, :: model.config.text_config.hidden_size] = 1
        base.projector.linear_2.weight[0, 0] = 1
        base.projector.linear_2.bias[1] = 1
        model.get_input_embeddings().weight[:, 1] = 1
        model.get_input_embeddings().weight[looker, 2] = 10
        for layer in base.language_model.layers:
            attention = layer.self_attn
            slowest = attention.head_dim // 2 - 1
            attention.q_proj.weight[slowest :: attention.head_dim, 2] = 1
            attention.k_proj.weight[slowest :: attention.head_dim, 0] = 1


@pytest.fixture
def looking(save_hovle):
    """`looking(picture, answer, **config fields)`: the attention of such a model."""

    def read(picture: Image.Image, answer: str, **fields) -> AttentionReading:
        tested = ModelUnderTest(save_hovle(**fields))
        see_dark(tested.model, int(tested.encode(LOOKER)))
        return read_attention(tested, tested.prepare(picture, "what?"), tested.encode(answer))

    return read


@pytest.fixture
def figures(monkeypatch) -> list:
    """The figures that would be saved."""
    kept: list = []
    monkeypatch.setattr(attention_charts, "save", lambda pyplot, figure, path: kept.append(figure))
    yield kept
    for figure in kept:
        load_pyplot().close(figure)


def bright_places(figure, axis) -> np.ndarray:
    """Where an axis of the drawn figure has the brightest colour of a map, in the axis' coordinates, `(n, 2)`."""
    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba()).astype(int)
    box = axis.get_window_extent()
    is_bright = pixels[..., 0] - pixels[..., 2] > 50  # yellow; the picture beneath is gray
    rows, columns = np.nonzero(is_bright)
    places = np.stack([columns + 0.5, len(pixels) - rows - 0.5], axis=1)
    inside = (places > (box.x0, box.y0)).all(axis=1) & (places < (box.x1, box.y1)).all(axis=1)
    return axis.transData.inverted().transform(places[inside])


def is_within(places: np.ndarray, box: tuple[float, float, float, float], slack: float) -> bool:
    """Whether bright places fill a box (left, top, right, bottom) and nothing else."""
    left, top, right, bottom = box
    low, high = places.min(axis=0), places.max(axis=0)
    return np.allclose([*low, *high], [left, top, right, bottom], atol=slack)


KINDS = {"holistic layers": {}, "none": {"num_embedding_layers": 0}, "hd": {"pixel_shuffle_loc": "post"}}

PICTURES = {
    # size, dark box, what of the thumbnail is dark enough
    "six tiles and a thumbnail": ((210, 140), (140, 35, 175, 70), None),
    "three tiles and a thumbnail": ((150, 50), (125, 25, 150, 50), None),
    "one tile": ((56, 56), (28, 0, 56, 28), None),
    "a quarter, seen in the thumbnail too": ((210, 140), (105, 0, 210, 70), (0.5, 0, 1, 0.5)),
}


@pytest.mark.parametrize(("size", "box", "in_thumbnail"), PICTURES.values(), ids=PICTURES)
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_the_drawn_map_is_bright_where_the_answer_token_looks(
    fields, size, box, in_thumbnail, looking, figures, tmp_path
):
    picture = Image.new("RGB", size, "white")
    picture.paste("black", box)
    found = looking(picture, f"1{LOOKER}2", **fields)
    num_tokens = len(found.answer)
    assert found.tokens == ["1", LOOKER, "2"]
    attention_charts.draw_maps(load_pyplot(), [found], "what?", tmp_path / "maps.png")
    (figure,) = figures
    has_thumbnail = found.prompt.grid.has_thumbnail
    columns = 1 + num_tokens
    for number, (section, layers) in enumerate(found.layers):
        first = number * columns * (1 + has_thumbnail)
        axis = figure.axes[first + columns - 1]  # "2" is predicted at the looker
        assert "\u201c2\u201d" in axis.get_title()
        assert is_within(bright_places(figure, axis), box, slack=0.02 * size[0]), section.name
        maps = found.mean_map(section, layers)
        assert sum(float(part.sum()) for part in maps[2] if part is not None) > 0.9
        for body, _ in maps[:2]:
            assert float(body.max()) == pytest.approx(float(body.min()), abs=1e-3)  # the others look nowhere
        if not has_thumbnail:
            continue
        thumbnail = bright_places(figure, figure.axes[first + 2 * columns - 1])
        if in_thumbnail is None:
            assert len(thumbnail) == 0, section.name
        else:
            assert is_within(thumbnail, in_thumbnail, slack=0.05), section.name


def test_what_is_left_out_is_said_in_the_caption_and_may_be_asked_for(looking, figures, tmp_path):
    found = looking(Image.new("RGB", (56, 56)), "13579246")
    draw = attention_charts.draw_maps
    draw(load_pyplot(), [found], "what?", tmp_path / "maps.png")
    draw(load_pyplot(), [found], "what?", tmp_path / "maps.png", max_tokens=8)
    captions = [" ".join(text.get_text() for text in figure.texts).replace("\n", " ") for figure in figures]
    assert "The first 6 of 8 answer tokens are shown." in captions[0]
    assert "answer tokens are shown" not in captions[1]
    assert [sum("on the picture" in axis.get_title() for axis in figure.axes) for figure in figures] == [12, 16]


@pytest.mark.parametrize(("options", "says"), [((), "maps.png shows the first 6 of 8"), (("--tokens", "8"), None)])
def test_the_command_says_how_many_answer_tokens_are_left_out(
    options, says, save_hovle, picture_file, tmp_path, capsys
):
    arguments = ["eval", "attention", save_hovle(), str(picture_file), "what?", "--output", str(tmp_path / "o")]
    assert main([*arguments, "--answer", "13579246", *options]) == 0
    printed = capsys.readouterr().out
    assert (says or "Written: ") in printed
    assert ("maps.png shows the first" in printed) == (says is not None)
