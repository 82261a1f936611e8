"""Write a conversation as JSON that `apply_chat_template` reads again."""

import base64
import io
import json
import os
from collections.abc import Sequence
from typing import Any

from PIL import Image


def write_messages(messages: Sequence[dict], path: str | os.PathLike) -> None:
    """Write messages to a new file; pictures in them come with where they are from, as `origin` tells.

    Raises:
        ValueError: When there is such a file.
    """
    text = json.dumps([_saved(message) for message in messages], ensure_ascii=False, indent=1)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text + "\n")
    except FileExistsError:
        raise ValueError(f"{os.fspath(path)} exists; name another file.") from None


def origin(source: Any) -> dict:
    """Where a picture can be read again, as an item of a message names it; empty for one that is no name."""
    if isinstance(source, str) and ("://" in source[:32] or source[:32].lstrip()[:5].lower() == "data:"):
        return {"url": source.strip()}
    if isinstance(source, str | os.PathLike) and os.path.exists(source):
        return {"path": os.path.abspath(source)}
    return {}


def _saved(message: dict) -> dict:
    """A message with its pictures by name, or as PNG in base64."""
    items = []
    for item in message["content"]:
        rest = {key: value for key, value in item.items() if key != "image"}
        if rest.keys() == {"type"}:
            rest["base64"] = _png(item["image"])
        items.append(rest)
    return {**message, "content": items}


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
