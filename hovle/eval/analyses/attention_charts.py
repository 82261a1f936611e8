"""Pictures of attention: curves over the layers, and where each answer token looks."""

from pathlib import Path

from .attention_reading import ROWS, AttentionReading
from .drawing import COLORS, FONT_SIZE, GRAY, add_caption, drawable, layer_ticks, save
from .model_under_test import HOLISTIC

PANELS = (
    ("image", "mass on image tokens"),
    ("entropy", "entropy among image tokens"),
    ("sparsity", "sparsity among image tokens"),
)
"""Field of `RowStatistics.means` -> what its panel is called."""

LAYERS_CAPTION = (
    "Each query's attention, one row in one head, sums to 1. Mass: its share on image tokens (dotted: on the prompt's "
    "first token). Entropy: of its attention among the n image tokens it can see, in units of log n; 1 is even, 0 is "
    "all on one token. Sparsity: share of those n that get less than a tenth of an even share. Text to image: mean "
    "over heads and over all tokens behind the picture's first that are no image tokens. Image to image: mean over "
    "heads and image tokens, a token itself included. H1, ...: holistic layers; 1, ...: layers of the language model."
)


def draw_layers(pyplot, readings: list[AttentionReading], path: Path) -> None:
    """Draw mass, entropy and sparsity over the layers of one model or two, the language models' layers aligned."""
    figure, axes = pyplot.subplots(2, len(PANELS), figsize=(12, 5.6), sharex=True, sharey="col")
    num_holistic = max(_num_holistic(found) for found in readings)
    num_language = max(len(found.tested.language_layers) for found in readings)
    for axis_row, (name, field) in zip(axes, ROWS.items(), strict=True):
        for axis, (key, title) in zip(axis_row, PANELS, strict=True):
            for found, color in zip(readings, COLORS, strict=False):
                _draw_curve(axis, found, field, key, color)
            axis.set_title(f"{name.replace('_', ' ')}: {title}", fontsize=FONT_SIZE + 1)
            axis.grid(alpha=0.25)
            axis.set_ylim(0, 1.02)
            axis.tick_params(labelsize=FONT_SIZE - 1)
            if num_holistic:
                axis.axvspan(0.5 - num_holistic, 0.5, color=GRAY, alpha=0.1, lw=0)
            axis.set_xlim(0.5 - num_holistic, num_language + 0.5)
    ticks = layer_ticks(num_holistic, num_language)
    for axis in axes[-1]:
        axis.set_xticks(list(ticks.values()), list(ticks))
        axis.set_xlabel("layer", fontsize=FONT_SIZE)
    if num_holistic:
        axes[0, 0].annotate(
            "holistic\nlayers", (0.5 - num_holistic / 2, 0.98), ha="center", va="top", fontsize=8, color=GRAY
        )
    handles = [
        pyplot.Line2D([], [], color=color, marker="o", markersize=3, label=found.tested.label)
        for found, color in zip(readings, COLORS, strict=False)
    ]
    handles.append(pyplot.Line2D([], [], color=GRAY, linestyle=":", label="mass on the first token"))
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.legend(handles=handles, loc="upper center", ncols=len(handles), fontsize=FONT_SIZE, frameon=False)
    add_caption(figure, LAYERS_CAPTION, 190)
    save(pyplot, figure, path)


def _num_holistic(found: AttentionReading) -> int:
    return len(found.tested.holistic_layers)


def _draw_curve(axis, found: AttentionReading, field: str, key: str, color: str) -> None:
    """One model's curve, broken between its sections."""
    for section, layers in found.layers:
        first = 1 - len(layers) if section.name == HOLISTIC else 1
        places = range(first, first + len(layers))
        means = [getattr(layer, field).means() for layer in layers]
        axis.plot(places, [row[key] for row in means], color=color, marker="o", markersize=3, lw=1.4)
        if key == "image":
            axis.plot(places, [row["first_token"] for row in means], color=color, linestyle=":", lw=1.2)


def draw_maps(pyplot, readings: list[AttentionReading], question: str, path: Path, max_tokens: int = 6) -> None:
    """Draw, for each model and section, where each answer token looks: over the picture, and over the thumbnail.

    Args:
        pyplot: matplotlib's.
        readings: One model's, or two's.
        question: For the caption.
        path: PNG file to write.
        max_tokens: Answer tokens that get a map, the first ones; the caption says how many there are.
    """
    picture = readings[0].prompt.image
    rows = [(found, section, layers) for found in readings for section, layers in found.layers]
    num_columns = 1 + min(max_tokens, max(len(found.answer) for found in readings))
    width = 2.1
    height = width * min(max(picture.height / picture.width, 0.35), 2.2)
    has_thumbnails = any(found.prompt.grid.has_thumbnail for found in readings)
    thumbnail_height = 1.0 if has_thumbnails else 0.0
    row_height = height + thumbnail_height + 0.75
    total_width = width * num_columns + 0.8
    figure = pyplot.figure(figsize=(total_width, row_height * len(rows)))
    right = 1 - 0.8 / total_width
    outer = figure.add_gridspec(len(rows), 1, hspace=0.6 / row_height, left=0.01, right=right, top=0.97, bottom=0.02)
    heat = None
    for outer_row, (found, section, layers) in zip(outer, rows, strict=True):
        ratios = [height, thumbnail_height] if has_thumbnails else [height]
        inner = outer_row.subgridspec(len(ratios), num_columns, height_ratios=ratios, hspace=0.12, wspace=0.08)
        axes = inner.subplots(squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        _show_picture(axes[0, 0], found)
        label = found.tested.label.replace(" (", "\n(")
        axes[0, 0].set_title(f"{label}\n{section.name}", fontsize=FONT_SIZE - 1.5, loc="left")
        for column, (token, (body, thumbnail)) in enumerate(
            zip(found.tokens[:max_tokens], found.mean_map(section, layers), strict=False), start=1
        ):
            mass = float(body.sum()) + (0.0 if thumbnail is None else float(thumbnail.sum()))
            peak = max(float(part.max()) for part in (body, thumbnail) if part is not None)
            heat = _show_heat(axes[0, column], picture, body, peak)
            axes[0, column].set_title(
                f"\u201c{drawable(token, 14)}\u201d\n{mass:.1%} on the picture", fontsize=FONT_SIZE - 1.5
            )
            if thumbnail is not None:
                _show_heat(axes[1, column], picture, thumbnail, peak, is_square=True)
                if column == 1:
                    axes[1, 0].text(
                        0.98, 0.5, "thumbnail", fontsize=FONT_SIZE - 1, color=GRAY, ha="right", va="center"
                    )
    bar_height = 1.6 / (row_height * len(rows))
    bar = figure.colorbar(heat, cax=figure.add_axes((right + 0.1 / total_width, 0.96 - bar_height, 0.012, bar_height)))
    bar.set_label("share of the map's largest weight", fontsize=FONT_SIZE - 1)
    bar.ax.tick_params(labelsize=FONT_SIZE - 2)
    longest = max(len(found.answer) for found in readings)
    tiles = " Red lines: tiles. A thumbnail, the whole picture as one more tile, has tokens of its own."
    tiles = tiles if has_thumbnails else ""
    shown = "" if longest <= max_tokens else f" The first {max_tokens} of {longest} answer tokens are shown."
    add_caption(
        figure,
        f"Question: {question} Attention from where each answer token is predicted to each image token, mean over the "
        "heads and layers of a section; above each map the share of attention that falls on image tokens, the rest is "
        f"on text.{tiles}{shown}",
        round(14 * total_width),
    )
    save(pyplot, figure, path)


def _show_picture(axis, found: AttentionReading) -> None:
    picture, grid = found.prompt.image, found.prompt.grid
    axis.imshow(picture)
    for column in range(1, grid.columns):
        axis.axvline(picture.width * column / grid.columns - 0.5, color="#d1242f", lw=1)
    for row in range(1, grid.rows):
        axis.axhline(picture.height * row / grid.rows - 0.5, color="#d1242f", lw=1)


def _show_heat(axis, picture, weights, peak: float, is_square: bool = False):
    """Lay weights over the gray picture; a map's brightest colour is `peak`."""
    extent = (0, 1, 1, 0) if is_square else (0, picture.width, picture.height, 0)
    axis.imshow(picture.convert("L"), cmap="gray", vmin=-80, vmax=335, extent=extent, aspect="equal")
    share = (weights / max(peak, 1e-12)).numpy()
    return axis.imshow(
        share, cmap="inferno", vmin=0, vmax=1, alpha=0.35 + 0.5 * share, extent=extent, interpolation="nearest"
    )
