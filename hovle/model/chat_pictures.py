"""The pictures of a call: those that messages carry, and those that are given beside prompts."""

import itertools
from typing import Any

from .chat_rendering import Prompt
from .pictures import Kind, load_picture

PICTURE_KEYS: dict[str, Kind | None] = {
    "image": None,
    "bytes": None,  # before the path, as datasets' items have both and the path may be of another machine
    "url": "url",
    "path": "path",
    "base64": "base64",
}
"""Where an item `{"type": "image", ...}` of a message may carry its picture, and how a string there is read."""


def with_labels(chat: list[dict]) -> list[dict]:
    """Number the pictures of a conversation in its text."""
    numbers = itertools.count(1)
    labelled = []
    for message in chat:
        content = message.get("content")
        if isinstance(content, list | tuple):
            items: list = []
            for item in content:
                if isinstance(item, dict) and item.get("type") in ("image", "image_url"):
                    label = {"type": "text", "text": f"Image-{next(numbers)}: "}
                    items += [label, item, {"type": "text", "text": "\n"}]
                else:
                    items.append(item)
            message = {**message, "content": items}
        labelled.append(message)
    return labelled


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list | tuple) or getattr(value, "ndim", None) == 4


def flatten_pictures(images: Any) -> list:
    """List pictures in order; lists and 4-dimensional arrays hold several."""
    if images is None:
        return []
    if _is_sequence(images):
        return [picture for part in images for picture in flatten_pictures(part)]
    return [images]


def check_nesting(num_expected: list[int], images: Any) -> None:
    """Raise when pictures come in one list per prompt and a list holds other than its prompt's number."""
    if not isinstance(images, list | tuple) or len(images) != len(num_expected) or not all(map(_is_sequence, images)):
        return
    for number, (expected, given) in enumerate(zip(num_expected, images, strict=True), start=1):
        if expected != len(flatten_pictures(given)):
            raise ValueError(
                f"Prompt {number} marks {expected} pictures but {len(flatten_pictures(given))} are given for it."
            )


def pictures_of(prompts: list[Prompt], images: Any) -> list:
    """Collect the pictures of all chats in prompt order, from their items or, if these carry none, from `images`.

    `images` come in the order of the items, which a template may change.
    """
    items = [item for prompt in prompts for item in prompt.pictures]
    carried = [_picture_of(item) for item in items]
    if images is not None:
        check_nesting([len(prompt.pictures) for prompt in prompts], images)
        given = flatten_pictures(images)
        if any(source is not None for source in carried) or len(given) != len(items):
            num_carried = sum(source is not None for source in carried)
            raise ValueError(
                f"The messages hold {len(items)} picture items, {num_carried} of them with a picture, and "
                f"{len(given)} pictures are given besides. Give each picture once."
            )
        rest = iter(given)
        of_prompts = [[next(rest) for _ in prompt.pictures] for prompt in prompts]
        return [own[place] for prompt, own in zip(prompts, of_prompts, strict=True) for place in prompt.picture_order]
    missing = sum(source is None for source in carried)
    if missing:
        raise ValueError(
            f"The messages hold {len(items)} picture items but only {len(items) - missing} pictures: an item needs "
            f"one of the keys {', '.join(PICTURE_KEYS)}."
        )
    pictures = []
    for number, (kind, source) in enumerate(filter(None, carried), start=1):
        pictures.append(load_picture(source, f"picture {number} of the request", kind=kind))
    return pictures


def _picture_of(item: dict) -> tuple[Kind | None, Any] | None:
    """Take the picture out of an item, with how to read it if it is a string; a URL that is None is an error."""
    if item["type"] == "image_url":
        url = item.get("image_url")
        item = {"url": url.get("url") if isinstance(url, dict) else url}
    for key, kind in PICTURE_KEYS.items():
        if item.get(key) is not None:
            return kind, item[key]
    if "url" in item:  # a stranger's item must not be filled with one of the pictures given beside the messages
        raise ValueError("A picture item has the url None; give an address, or leave the key out.")
    return None
