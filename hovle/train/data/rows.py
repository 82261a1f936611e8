"""Rows: every key of a row is read, known to be harmless, counted, or the reason to leave the row out.

A key that nobody reads does no harm where it tells where the row comes from. Where it holds what the conversation is
about (a picture under another name, a video, tools), the model would learn to answer blind: such a row is skipped. Of
any other key the name is counted.
"""

import base64
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from ...errors import printable_name
from ...model.pictures import picture_size
from .records import PICTURE_MARK, PICTURE_SUFFIXES
from .skips import FILM, SkipSampleError

Turn = tuple[str, str]
"""Role and text, with `<image>` where a picture stands."""

_HARMLESS = """
    id idx index uid uuid qid key hash md5 sha256 source dataset data_source dataset_name origin origin_dataset
    task task_type type category subset split config lang language license licence url urls link file_name
    filename original_url timestamp date created_at version width height width_list height_list original_width
    original_height exif model meta metadata info __key__ __url__ __index_level_0__
"""
HARMLESS = frozenset(_HARMLESS.split())
"""Keys that tell where a row comes from and teach nothing; so do `question_id`, `image_id` and their like."""

PICTURE_WORDS = frozenset({"image", "images", "img", "imgs", "picture", "pictures", "pic", "pics", "photo", "photos"})
FILM_WORDS = frozenset({"video", "videos", "audio", "audios", "sound", "sounds", "speech"})
ADDRESS_WORDS = frozenset({"url", "urls"})
_ABOUT_WORDS = """
    id ids idx index url urls path paths file name filename source width height size hash
"""
ABOUT_WORDS = frozenset(_ABOUT_WORDS.split())
"""Words of keys that tell of a picture that the row has anyway."""

FILM_ITEMS = ("video", "video_url", "audio", "audio_url", "input_audio")
"""Types of content items about what no model of this kind sees."""

TOOL_KEYS = ("tools", "functions")

_FILM_SUFFIXES = """
    .mp4 .avi .mov .mkv .webm .mpg .mpeg .m4v .wav .mp3 .flac .ogg .opus .m4a .aac
"""
FILM_SUFFIXES = frozenset(_FILM_SUFFIXES.split())
"""Of files of videos and sounds."""

MEMBERS, LEFT, FAULT = "__members__", "__left__", "__fault__"
"""Columns that our own readers of files make: members of a tar, what lies beside them and is none, and what is wrong
with a row, empty where it is sound."""

MOST_KEYS_NAMED = 5
"""Unread keys a remark names."""

UNKNOWN_PICTURE = "picture in an unknown column"
"""Reason of a row about a picture that nobody reads."""


def words_of(key: str) -> set[str]:
    """Words of a key, whether joined by signs or by capitals."""
    return set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key).lower()))


def unread_keys(
    row: Mapping, read: Collection[str], num_pictures: int, name: str, is_caption: bool = False
) -> tuple[str, ...]:
    """Keys of a row that hold something, that nobody reads and that are not known to be harmless.

    Args:
        row: A row, or a part of one that has keys.
        read: Keys that are read.
        num_pictures: Pictures the row has.
        name: Of the row, for messages.
        is_caption: Whether its text is no conversation but tells of a picture, whose address may be a plain `url`.

    Raises:
        SkipSampleError: Where a key holds what the conversation is about.
    """
    left = []
    for key, value in row.items():
        if key in read or is_empty(value):
            continue
        words = words_of(str(key))
        _check_films_and_tools(key, value, words, num_pictures, name)
        _check_picture(key, value, words, num_pictures, name, is_caption)
        is_number = bool(words & {"id", "ids"})
        if not is_number and str(key).lower() not in HARMLESS:
            left.append(str(key))
    return tuple(left)


def _check_films_and_tools(key: Any, value: Any, words: set[str], num_pictures: int, name: str) -> None:
    has_suffix = any(_suffix(text) in FILM_SUFFIXES for text in _texts(value))
    is_film = has_suffix or bool(words & FILM_WORDS and not _is_number(value)) or f".{key}".lower() in FILM_SUFFIXES
    if is_film and not (num_pictures and words & ABOUT_WORDS):
        detail = f"its {printable_name(key)} holds a video or sound, which no model of this kind sees."
        raise SkipSampleError(name, FILM, detail)
    if key in TOOL_KEYS:
        detail = f"its {key} are not shown to the model, which would learn to call what it does not know."
        raise SkipSampleError(name, "tools", detail)


def _check_picture(key: Any, value: Any, words: set[str], num_pictures: int, name: str, is_caption: bool) -> None:
    if shows_a_picture(value):
        is_unread = True
    elif num_pictures:
        names_file = any(_suffix(text) in PICTURE_SUFFIXES for text in _texts(value))
        is_unread = names_file and bool(words & PICTURE_WORDS) and not words & ABOUT_WORDS
    else:
        names_file = any(_suffix(text) in PICTURE_SUFFIXES or text.startswith("data:image") for text in _texts(value))
        is_named = words & PICTURE_WORDS or (is_caption and words & ADDRESS_WORDS)
        is_unread = names_file or bool(is_named and (_texts(value) or isinstance(value, Mapping)))
        is_unread |= _is_number(value) and bool(words & PICTURE_WORDS and words & {"id", "idx", "index"})
    if is_unread:
        detail = (
            f"its column {printable_name(key)!r} holds or names a picture and is not read; rename it, or leave it out "
            "of rows that are about no picture."
        )
        raise SkipSampleError(name, UNKNOWN_PICTURE, detail)


def shows_a_picture(value: Any) -> bool:
    """Whether a column holds a picture's bytes, its own or those of its first item."""
    value = value[0] if isinstance(value, list) and value else value
    value = value.get("bytes") if isinstance(value, Mapping) else value
    if not isinstance(value, bytes):
        return False
    try:
        picture_size(value)
    except ValueError:
        return False
    return True


def is_empty(value: Any) -> bool:
    """Whether a value of a row says nothing; files of columns fill what a row lacks with such."""
    if isinstance(value, Mapping):
        return all(is_empty(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(is_empty(item) for item in value)
    return value is None or value is False or (isinstance(value, str | bytes) and not value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _texts(value: Any) -> list[str]:
    """Texts of a value, its own or those of its items and of what they name."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for key in ("path", "url", "file_name") for text in _texts(value.get(key))]
    if isinstance(value, list | tuple):
        return [text for item in value if isinstance(item, str | Mapping) for text in _texts(item)]
    return []


def _suffix(text: str) -> str:
    """Suffix of a file's name or address; none of a longer text."""
    if len(text) > 2000 or "\n" in text:
        return ""
    return PurePosixPath(text.partition("?")[0].partition("#")[0]).suffix.lower()


def remark_on(keys: Iterable[str]) -> str:
    """Name keys that nobody reads, each once."""
    names = list(dict.fromkeys(keys))
    shown = ", ".join(repr(printable_name(key)) for key in names[:MOST_KEYS_NAMED])
    return f"its {shown}{', ...' * (len(names) > MOST_KEYS_NAMED)} is not read."


# --- what a row says beside its turns --------------------------------------------------------------------------------


def with_system(turns: list[Turn], row: Mapping, name: str) -> list[Turn]:
    """Turns after what the row's own `system` says.

    Raises:
        SkipSampleError: When it is no text, or when the turns begin with another system message.
    """
    system = row.get("system")
    if is_empty(system):
        return turns
    if not isinstance(system, str):
        raise SkipSampleError(name, "malformed", f"its system is no text: {system!r:.80}.")
    if turns and turns[0][0] == "system":
        if turns[0][1] == system:
            return turns
        raise SkipSampleError(name, "malformed", "its system and its first message are two different system prompts.")
    return [("system", system), *turns]


def with_pictures_first(turns: list[Turn], num_pictures: int) -> list[Turn]:
    """Turns with a mark for each picture before the first question, where they have no marks at all."""
    asked = next((place for place, (role, _) in enumerate(turns) if role == "user"), None)
    texts = [text for role, text in turns if role == "user" and isinstance(text, str)]
    if asked is None or not num_pictures or any(PICTURE_MARK in text for text in texts):
        return turns
    role, text = turns[asked]
    return [*turns[:asked], (role, PICTURE_MARK * num_pictures + text), *turns[asked + 1 :]]


def side_pictures(row: Mapping, keys: Sequence[str], name: str) -> list[str]:
    """Names of the picture files under these keys of a row, which say the same where there are several.

    Raises:
        SkipSampleError: When they are no names, or different ones.
    """
    given = [value if isinstance(value, list) else [value] for value in map(row.get, keys) if not is_empty(value)]
    names = [[item.get("path") if isinstance(item, Mapping) else item for item in value] for value in given]
    if any(value != names[0] for value in names):
        raise SkipSampleError(name, "picture count", f"its {' and '.join(keys)} name different pictures.")
    files = [item for item in names[0] if isinstance(item, str)] if names else []
    if names and len(files) < len(names[0]):
        raise SkipSampleError(name, "malformed", f"expected names of picture files, found {given[0]!r:.80}.")
    return files


# --- pictures inside messages ----------------------------------------------------------------------------------------

PICTURE_ITEMS = ("image", "image_url")
"""Types of items of messages that are pictures."""

ITEM_KEYS = ("path", "image", "image_url", "url", "bytes")
"""Keys of an item of a message under which its picture may stand."""


def item_picture(item: Mapping, name: str) -> str | bytes | Mapping | None:
    """What an item of a message holds of its picture: the name of a file, bytes, or a mapping with either.

    None where it stands for a picture beside the messages.

    Raises:
        SkipSampleError: When the picture is named by its address only, or twice.
    """
    given = {key: item[key] for key in ITEM_KEYS if not is_empty(item.get(key))}
    if not given:
        return None
    if len(given) > 1:
        raise SkipSampleError(name, "malformed", f"an item of a message holds a picture twice: {item!r:.80}.")
    [(key, picture)] = given.items()
    if isinstance(picture, Mapping) and is_empty(picture.get("bytes")) and not is_empty(picture.get("url")):
        key, picture = "url", picture["url"]
    if not isinstance(picture, str):
        return picture
    if picture.startswith("data:"):
        return _from_data_url(picture, name)
    if key in ("url", "image_url") or re.match(r"[a-z]{2,}://", picture, re.IGNORECASE):
        detail = f"a picture is given by its address only ({picture!r:.80}); download it and give the file's name."
        raise SkipSampleError(name, "picture by address", detail)
    return picture


def _from_data_url(url: str, name: str) -> bytes:
    head, _, data = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise SkipSampleError(name, "unreadable picture", f"a data: URL cannot be read ({error}).") from error
