"""Pictures of embeddings: nearest words over the picture; cosines, norms and drift."""

from pathlib import Path

from .drawing import COLORS, FONT_SIZE, GRAY, add_caption, drawable, layer_ticks, save
from .embedding_reading import KINDS, EmbeddingReading
from .model_under_test import HOLISTIC

MAX_CELLS = 24
"""Cells along a side whose words can still be read; a finer picture is shown by its thumbnail's tokens."""

CELL_WIDTH = 0.75
CELL_HEIGHT = 0.42
"""Inches a word needs at least."""


def draw_words(pyplot, found: EmbeddingReading, path: Path) -> None:
    """Write the word nearest to each image token into its cell over the picture."""
    picture, grid = found.prompt.image, found.prompt.grid
    words, thumbnail_words = grid.split(found.nearest)
    cosines, thumbnail_cosines = grid.split(found.image_cosine)
    remark = ""
    if max(words.shape) > MAX_CELLS:
        remark = f" The picture's {words.shape[1]} x {words.shape[0]} cells are too many to read; see embeddings.json."
    panels = [] if remark else [(words, cosines, False)]
    if thumbnail_words is not None and thumbnail_cosines is not None:
        panels.append((thumbnail_words, thumbnail_cosines, True))
    if not panels:
        panels, remark = [(words, cosines, False)], ""  # one tile only: large, but all there is
    sizes = [_size(panel[0].shape, 1.0 if panel[2] else picture.height / picture.width) for panel in panels]
    width, height = sum(size[0] for size in sizes) + 0.4 * len(sizes), max(size[1] for size in sizes) + 0.4
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(width, height), width_ratios=[size[0] for size in sizes], squeeze=False
    )
    figure.subplots_adjust(left=0.01, right=0.99, top=1 - 0.35 / height, bottom=0.02, wspace=0.06)
    for axis, (ids, closeness, is_thumbnail), size in zip(axes[0], panels, sizes, strict=True):
        _label_cells(axis, found, ids, closeness, size)
        axis.set_title("thumbnail" if is_thumbnail else found.tested.label, fontsize=FONT_SIZE, loc="left")
    add_caption(
        figure,
        "The word whose embedding is nearest, by cosine, to each image token as it enters the language model; below "
        f"it the cosine. A thumbnail's tokens see the whole picture, squeezed into a square.{remark}",
        max(50, round(14 * width)),
    )
    save(pyplot, figure, path)


def _size(shape, aspect: float) -> tuple[float, float]:
    """Inches a picture of this height over width needs so that each cell holds a word."""
    num_rows, num_columns = shape
    width = max(num_columns * CELL_WIDTH, num_rows * CELL_HEIGHT / aspect, 3.0)
    return width, width * aspect


def _label_cells(axis, found: EmbeddingReading, ids, closeness, size: tuple[float, float]) -> None:
    num_rows, num_columns = ids.shape
    picture = found.prompt.image
    axis.imshow(picture, extent=(0, num_columns, num_rows, 0), alpha=0.45, aspect="auto")
    for row in range(num_rows + 1):
        axis.axhline(row, color="white", lw=0.8)
    for column in range(num_columns + 1):
        axis.axvline(column, color="white", lw=0.8)
    characters = max(4, int(size[0] / num_columns / 0.07))
    for row in range(num_rows):
        for column in range(num_columns):
            word = drawable(found.tested.token_text(int(ids[row, column])), characters)
            axis.text(
                column + 0.5,
                row + 0.5,
                f"{word}\n{float(closeness[row, column]):.2f}",
                ha="center",
                va="center",
                fontsize=FONT_SIZE - 2,
                linespacing=1.1,
            )
    axis.set_axis_off()


def draw_numbers(pyplot, found: EmbeddingReading, path: Path) -> None:
    """Draw how cosines and norms spread and how tokens drift through the layers."""
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 6.4))
    (cosine_axis, norm_axis), drift_axes = axes
    colors = dict(zip(KINDS, COLORS, strict=True))
    text_cosine = found.text_cosine[~found.text_cosine.isnan()]
    lowest = min(0.0, float(text_cosine.min()), float(found.image_cosine.min()))
    bins = [lowest + (1.0 - lowest) * place / 40 for place in range(41)]
    for values, kind, label in (
        (text_cosine, "text", "text tokens: with their own word"),
        (found.image_cosine, "image", "image tokens: with the nearest word"),
    ):
        _histogram(cosine_axis, values.clamp(max=1.0), bins, colors[kind], label)
    cosine_axis.set_xlabel("cosine with the table", fontsize=FONT_SIZE)
    largest = float(max(found.text_norm.max(), found.image_norm.max(), found.table_norm.max()))
    smallest = float(min(found.text_norm.min(), found.image_norm.min(), found.table_norm.min()))
    bins = [smallest + (largest * 1.02 - smallest) * place / 40 for place in range(41)]
    for values, color, label in (
        (found.table_norm, GRAY, "words of the table"),
        (found.text_norm, colors["text"], "text tokens"),
        (found.image_norm, colors["image"], "image tokens"),
    ):
        _histogram(norm_axis, values, bins, color, label)
    norm_axis.set_xlabel("length over the mean word's", fontsize=FONT_SIZE)
    for axis in (cosine_axis, norm_axis):
        axis.set_ylabel("share of tokens", fontsize=FONT_SIZE)
        axis.legend(fontsize=FONT_SIZE - 1, loc="upper center")
    num_holistic = len(found.tested.holistic_layers)
    for axis, field, title in zip(
        drift_axes,
        ("to_input", "to_first"),
        ("each layer's output with its input", "each layer's output with its section's first input"),
        strict=True,
    ):
        for drift in found.drifts:
            for kind in KINDS:
                values = getattr(drift, field)[kind]
                first = 1 - len(values) if drift.section.name == HOLISTIC else 1
                name = f"{kind} tokens" if drift is found.drifts[-1] else None
                places = range(first, first + len(values))
                axis.plot(places, values, color=colors[kind], marker="o", markersize=3, lw=1.4, label=name)
        if num_holistic:
            axis.axvspan(0.5 - num_holistic, 0.5, color=GRAY, alpha=0.1, lw=0, label="holistic layers")
        ticks = layer_ticks(num_holistic, len(found.tested.language_layers))
        axis.set_xticks(list(ticks.values()), list(ticks))
        axis.set_xlabel("layer", fontsize=FONT_SIZE)
        axis.set_ylabel("mean cosine", fontsize=FONT_SIZE)
        axis.set_title(f"drift: {title}", fontsize=FONT_SIZE + 1)
        axis.legend(fontsize=FONT_SIZE - 1)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=FONT_SIZE - 1)
    figure.suptitle(found.tested.label, fontsize=FONT_SIZE + 2)
    figure.tight_layout()
    save(pyplot, figure, path)


def _histogram(axis, values, bins: list[float], color: str, label: str) -> None:
    shares = [1 / len(values)] * len(values)
    axis.hist(values.tolist(), bins=bins, weights=shares, color=color, alpha=0.55, label=label)
