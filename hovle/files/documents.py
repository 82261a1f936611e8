"""JSON and YAML of unknown origin: what cannot be read or is built to exhaust the reader is a ValueError by name.

Whoever reads a file that others wrote reads it here: Python's own readers answer deep nesting with a RecursionError,
and so does much that is done to their result (copying, printing, comparing).
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import printable

MOST_LEVELS = 100
"""Lists and objects within each other; the deepest honest ones, tokenizers, have about 10."""

MOST_YAML_VALUES = 100_000
"""Values of a YAML file, one behind an alias counted each time: aliases of aliases make gigabytes of a few lines."""

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for one in Git LFS."""

FOREIGN_ERRORS = (ValueError, RecursionError, LookupError, TypeError, AttributeError)
"""What PyYAML raises beside its own: converters of scalars (`!!bool x`, `!!timestamp x`) pass on what they meet."""


class UnreadableError(ValueError):
    """A document that cannot be read, is nested too deeply or too large; the message names it."""


def load_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; errors as in `parse_json`, and OSError."""
    return parse_json(Path(path).read_bytes(), path)


def load_yaml(path: str | os.PathLike) -> Any:
    """Read a YAML file in UTF-8; errors as in `parse_yaml`, and OSError."""
    return parse_yaml(Path(path).read_bytes(), path)


def parse_json(text: str | bytes, name: object, keys_once: bool = False) -> Any:
    """Read JSON.

    Args:
        text: The document.
        name: Where it comes from, for errors.
        keys_once: Also refuse an object that says something twice; by default the last one counts.

    Raises:
        UnreadableError: When it is no JSON, or nested deeper than `MOST_LEVELS`.
    """
    try:
        content = json.loads(text, object_pairs_hook=_object_once if keys_once else None)
    except RecursionError:
        raise UnreadableError(_too_deep(name)) from None
    except ValueError as error:  # broken JSON, another encoding, numbers of thousands of digits
        refuse_pointer(text, name)
        raise UnreadableError(f"{printable(str(name))} cannot be read as JSON: {printable(str(error))}") from error
    opened = text.count("[") + text.count("{") if isinstance(text, str) else text.count(b"[") + text.count(b"{")
    if opened > MOST_LEVELS:  # small documents, such as a row of data, are not walked through
        _check_nesting(content, _inner_json, name)
    return content


def parse_yaml(text: str | bytes, name: object) -> Any:
    """Read YAML without tags that make objects; bytes are UTF-8.

    Args:
        text: The document.
        name: Where it comes from, for errors.

    Raises:
        UnreadableError: When it is no such YAML, says something twice, is nested deeper than `MOST_LEVELS`, or has
            more than `MOST_YAML_VALUES` values.
    """
    import yaml  # not everyone who reads JSON reads recipes

    try:
        text = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        return yaml.load(text, _yaml_loader(name))
    except RecursionError:
        raise UnreadableError(_too_deep(name)) from None
    except UnreadableError:
        raise
    except (yaml.YAMLError, *FOREIGN_ERRORS) as error:
        raise UnreadableError(f"{printable(str(name))} is no plain YAML: {printable(str(error))}") from error


def refuse_pointer(start: str | bytes, name: object) -> None:
    """Raise where what begins like this is a Git LFS pointer: a checkout without LFS has these instead of large files.

    Args:
        start: The beginning of a file.
        name: Where it comes from, for errors.
    """
    if (start.encode() if isinstance(start, str) else start).startswith(POINTER):
        raise UnreadableError(
            f"{printable(str(name))} is a Git LFS pointer, not the file it stands for: run `git lfs pull` where it "
            "was cloned, or download it anew."
        )


def _too_deep(name: object) -> str:
    return (
        f"{printable(str(name))} nests lists and objects more than {MOST_LEVELS} levels deep, which no file of this "
        "kind needs: it is damaged or made to do harm. Take it from where it came from anew."
    )


def _object_once(pairs: list[tuple[str, Any]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key {twice!r}")
    return content


def _inner_json(value: Any) -> Iterable[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (item for item in inner if isinstance(item, dict | list))


def _check_nesting(root: Any, inner: Callable[[Any], Iterable[Any]], name: object, most: int | None = None) -> None:
    """Raise where what is in `root` goes too deep, or is more than `most`; level by level, so without recursion."""
    level, total = [root], 0
    for _ in range(MOST_LEVELS):
        below = (item for value in level for item in inner(value))
        level = list(below if most is None else itertools.islice(below, most - total + 1))
        total += len(level)
        if most is not None and total > most:
            raise UnreadableError(
                f"{printable(str(name))} holds more than {most:,} values once its aliases are written out: write "
                "them out yourself, or leave most of them away."
            )
        if not level:
            return
    raise UnreadableError(_too_deep(name))


def _yaml_loader(name: object) -> type:
    """PyYAML's safe loader with bounds, for one document, which its errors name."""
    import yaml

    def inner(node: yaml.Node) -> Iterable[yaml.Node]:
        if isinstance(node, yaml.MappingNode):
            return itertools.chain.from_iterable(node.value)
        return node.value if isinstance(node, yaml.SequenceNode) else ()

    class Loader(yaml.SafeLoader):
        def get_single_node(self):
            node = super().get_single_node()
            if node is not None:
                _check_nesting(node, inner, name, MOST_YAML_VALUES)
            return node

        def compose_mapping_node(self, anchor):
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value!r}", key.start_mark)
                seen.add((key.tag, key.value))
            return node

    return Loader
