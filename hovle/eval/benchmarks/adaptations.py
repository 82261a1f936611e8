"""Changes of a benchmark's documents before they are asked, by the name `adapt` has in suites.yaml."""

from pathlib import Path
from typing import Any


def pictures_only(dataset: Any) -> Any:
    """Keep SEED-Bench's questions about pictures; its videos are long and no part of SEED-Image."""
    return dataset.filter(lambda kind: kind == "image", input_columns="data_type")


def whole_decimals(dataset: Any) -> Any:
    """Count MathVista's decimal places in whole numbers: `round` refuses 1.0, and the harness takes that for wrong."""
    import datasets

    return dataset.cast_column("precision", datasets.Value("int64"))


ADAPTATIONS = {change.__name__: change for change in (pictures_only, whole_decimals)}


def parquet_files(folder: Path) -> dict[str, Any]:
    """Arguments of `load_dataset("parquet", ...)` for files named SPLIT-*.parquet or SPLIT.parquet.

    Raises:
        ValueError: When there are none.
    """
    files: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.parquet")):
        files.setdefault(path.stem.partition("-")[0], []).append(str(path))
    if not files:
        raise ValueError(f"{folder} holds no SPLIT-*.parquet files.")
    return {"data_files": files}


class WithPictures:
    """Put pictures beside questions that name them by `imageId` (GQA keeps both apart).

    Args:
        folder: Holds parquet files of the split `testdev` with the columns `id` and `image`.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, dataset: Any) -> Any:
        import datasets

        pictures = datasets.load_dataset("parquet", split="testdev", **parquet_files(self.folder))
        pictures = pictures.cast_column("image", datasets.Image(decode=False))
        place_of = {name: place for place, name in enumerate(pictures["id"])}
        column = [pictures[place_of[name]]["image"] for name in dataset["imageId"]]
        return dataset.add_column("image", column, feature=datasets.Image())
