"""Read the names of pictures as terminals write them when a file is dropped on the window, or as people type them."""

import io
import os
import re
import shlex
import urllib.parse
import urllib.request

from PIL import Image

from ..model.pictures import FORMATS

URL = re.compile(r"https?://|data:", re.IGNORECASE)


def picture_sources(text: str) -> list[str]:
    """What stands after /image: one path or URL, or several as a shell would part them.

    Args:
        text: A name as it is, quoted, with backslashes before spaces, or as `file://`; it may start with `~`.

    Raises:
        ValueError: For `file://` of another machine.
    """
    if not text or _is_source(name := local_name(text)):
        return [name] if text else []
    words = _words(text)
    sources = [local_name(word) for word in words if word]
    if len(words) > 1 and not all(map(_is_source, sources)):  # then it is one name, spaces and all
        return [name]
    return sources


def leading_pictures(line: str) -> tuple[list[str], str]:
    """Part a line into the pictures at its start, bare paths as terminals drop them, and the question after them.

    Returns:
        Paths and URLs, and the rest; no path where the line is a question from its start, or starts with a space.
    """
    if line[:1].isspace():
        return [], line
    if _looks_like_picture(line, may_be_missing=False):
        return [local_name(line)], ""
    sources: list[str] = []
    rest = line
    while rest:
        lexer = shlex.shlex(reader := io.StringIO(rest), posix=True)
        lexer.whitespace_split, lexer.commenters = True, ""
        try:
            word = lexer.get_token()
        except ValueError:  # an apostrophe, of which there is no second
            break
        if not word or not _looks_like_picture(word):
            break
        sources.append(local_name(word))
        rest = reader.read().strip()
    return sources, rest


def local_name(text: str) -> str:
    """A path with `~` and `file://` read; what else there is stays."""
    if text.lower().startswith("file://"):
        parts = urllib.parse.urlsplit(text)
        if parts.netloc not in ("", "localhost"):
            raise ValueError(f"{text}: is a file of {parts.netloc}; only those of this machine are read.")
        return urllib.request.url2pathname(parts.path)
    return os.path.expanduser(text) if text.startswith("~") else text


def _words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError:  # an apostrophe, of which there is no second
        return [text]


def _is_source(name: str) -> bool:
    return URL.match(name) is not None or os.path.exists(name)


def _looks_like_picture(word: str, may_be_missing: bool = True) -> bool:
    """Whether someone who types this means a picture: one that is there, or a path or URL with a picture's ending."""
    name = local_name(word)
    has_folder = any(sign in name for sign in {"/", os.sep})
    file_name = re.split("[?#]", name)[0] if URL.match(name) else name
    has_ending = os.path.splitext(file_name)[1].lower() in ENDINGS
    if os.path.isfile(name):
        return has_folder or has_ending
    return may_be_missing and has_folder and has_ending


Image.init()
ENDINGS = {ending for ending, name in Image.registered_extensions().items() if name in FORMATS} | {".heic", ".heif"}
"""Of picture files, with the dot."""
