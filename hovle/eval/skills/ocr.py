"""What an OCR network reads in the same pictures: RapidOCR with the PP-OCR models that come in its package."""

import importlib
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from ...requirements import installed_version
from .items import Item


def check_installed() -> None:
    """Raise ValueError, with what to install, where there is no OCR network to compare with."""
    if installed_version("rapidocr") is None or installed_version("onnxruntime") is None:
        raise ValueError("--ocr reads with RapidOCR: pip install 'hovle[ocr]'")


def read_items(items: Sequence[Item]) -> list[str]:
    """Read pictures: of notices all lines that are found, from top to bottom, of others the one line they hold."""
    engine: Any = importlib.import_module("rapidocr").RapidOCR()  # an extra
    logging.getLogger("RapidOCR").setLevel(logging.ERROR)  # it warns of pictures in which it finds nothing
    texts = []
    for item in tqdm(items, desc="RapidOCR", unit=" pictures", disable=None):
        blue_first = np.asarray(item.picture)[:, :, ::-1]
        is_notice = item.facets.get("layout") == "notice"
        found = engine(blue_first, use_det=is_notice, use_cls=False, use_rec=True)
        texts.append("\n".join(found.txts or ()))
    return texts
