"""Render chats with a language model's own template so that a user's text cannot pose as a special token.

A tokenizer that parses a rendered chat cannot tell the template's `<|im_end|>` from one a user typed. Here a user's
text is broken up before the template sees it, so what the rendered string still shows as special is the template's.
"""

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils import get_json_schema

PRIVATE_RANGES = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Private-use characters; a chat borrows two that occur nowhere in it."""


class SpecialTokens:
    """The special tokens of a tokenizer, and how to keep typed ones apart from real ones.

    Args:
        names: The tokens.
        strip_left: Those that swallow the white space before them.
        strip_right: Those that swallow the white space after them.
    """

    def __init__(self, names: frozenset[str], strip_left: frozenset[str], strip_right: frozenset[str]):
        self.names = sorted(filter(None, names), key=len, reverse=True)  # the longest match wins
        self.strip_left, self.strip_right = strip_left, strip_right
        self.pattern = "|".join(map(re.escape, self.names)) or "(?!)"
        self.inside = re.compile(f"(?=(?:{self.pattern}))")  # a look-ahead also finds overlapping ones
        self.heads = {name[:end] for name in self.names for end in range(1, len(name))}
        self.tails = {name[start:] for name in self.names for start in range(1, len(name))}
        self.longest = max(map(len, self.names), default=0)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "SpecialTokens":
        """Collect the special tokens a tokenizer has now; the same ones give the same object."""
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        return _special_tokens(
            frozenset(token.content for token in added) | frozenset(tokenizer.all_special_tokens),
            frozenset(token.content for token in added if token.lstrip),
            frozenset(token.content for token in added if token.rstrip),
        )

    def break_up(self, text: str, breaker: str, at_borders: bool) -> str:
        """Put `breaker` into whatever the tokenizer could take for a special token.

        Args:
            text: What a user wrote.
            breaker: A character that occurs nowhere in the chat; taking it out again gives `text`.
            at_borders: Also break a piece of a special token at either end, which the surrounding text could
                complete.
        """
        starts = {match.start() + 1 for match in self.inside.finditer(text)}
        if at_borders and text.strip():
            lead, trail = len(text) - len(text.lstrip()), len(text.rstrip())  # templates may trim
            lengths = range(1, self.longest)
            if any(text[lead : lead + length] in self.tails for length in lengths):
                starts.add(lead)
            if any(text[max(trail - length, lead) : trail] in self.heads for length in lengths):
                starts.add(trail)
            if any(text[lead:trail] in name for name in self.names):
                starts.add(trail)
        cuts = [0, *sorted(starts), len(text)]
        return breaker.join(text[start:end] for start, end in itertools.pairwise(cuts))


@lru_cache(maxsize=16)
def _special_tokens(*args: frozenset[str]) -> SpecialTokens:
    return SpecialTokens(*args)


class ChatRenderer:
    """Render chats with a language model's own template and remember which special tokens are the template's.

    User text is broken up (see `SpecialTokens.break_up`) before the template sees it, and a picture becomes a mark of
    private-use characters. The template gets plain strings, so any text template works; one that reads lists of
    items only gets a list of one text item.

    Args:
        tokenizer: Renders the template.
        template: Jinja source.
        breaker: Character that breaks up special tokens; it occurs in no string of the chat.
        mark: Another such character, for pictures.
        text_after_image: Stands after each picture unless the message itself goes on with it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, breaker: str, mark: str, text_after_image: str = ""
    ):
        self.tokenizer = tokenizer
        self.special_tokens = SpecialTokens.of(tokenizer)
        self.template = template
        self.words = set(re.findall(r"\w+", re.sub(self.special_tokens.pattern, " ", template)))
        self.breaker, self.mark = breaker, mark
        self.text_after_image = text_after_image

    def render(self, chats: Sequence[Sequence[dict]], tools=None, documents=None, **kwargs) -> list["Prompt"]:
        """Render a batch of chats.

        Args:
            chats: One list of messages per chat. `content` is a string or a list of `{"type": "text"}` and
                `{"type": "image"}` items.
            tools: As in `tokenizer.apply_chat_template`.
            documents: As in `tokenizer.apply_chat_template`.
            **kwargs: Passed to `tokenizer.apply_chat_template`; template variables are the developer's words, not a
                user's, and may hold special tokens.
        """
        pictures: list[list[dict]] = [[] for _ in chats]
        prepared = [
            [self._prepare_message(message, items) for message in chat]
            for chat, items in zip(chats, pictures, strict=True)
        ]
        if self._wants_lists():
            prepared = [[_as_list_content(message) for message in chat] for chat in prepared]
        rendered = self.tokenizer.apply_chat_template(
            prepared,
            chat_template=self.template,
            tools=self._protect(tools),
            documents=self._protect(documents),
            tokenize=False,
            **kwargs,
        )
        return [self._split(text, items) for text, items in zip(rendered, pictures, strict=True)]

    def _prepare_message(self, message: dict, pictures: list[dict]) -> dict:
        """Flatten a message's items into one protected string; its picture items join `pictures`."""
        # A role stays whole at its borders: templates write `<|` + role + `|>`.
        prepared = {
            self._protect(key): self._protect(value, at_borders=key != "role")
            for key, value in message.items()
            if key != "content"
        }
        content = message.get("content")
        if content is None:
            return prepared
        if isinstance(content, str):
            content = [content]
        if not isinstance(content, list | tuple):
            raise ValueError(f"The content of a message must be a string or a list, got {type(content).__name__}.")
        parts: list[str] = []  # text and marks in turn; neighbouring texts are one text
        text = pending = ""  # pending: what still has to follow a picture
        for item in content:
            kind = item.get("type") if isinstance(item, dict) else None
            words = item if isinstance(item, str) else item.get("text") if kind == "text" else None
            if isinstance(words, str):
                text += words if words.startswith(pending) else pending + words
                pending = ""
            elif kind in ("image", "image_url"):
                parts += [self._break_up(text + pending), f"{self.mark}{len(pictures)}{self.mark}"]
                pictures.append(item)
                text, pending = "", self.text_after_image
            elif kind == "text":
                raise ValueError(f"An item of type 'text' needs a string as its 'text', got {words!r:.80}.")
            else:
                found = f"an item of type {kind!r}" if isinstance(item, dict) else type(item).__name__
                raise ValueError(
                    f'A message holds {found}; items are {{"type": "text", "text": ...}} and {{"type": "image", ...}}.'
                )
        prepared["content"] = "".join([*parts, self._break_up(text + pending)])
        return prepared

    def _break_up(self, text: str, at_borders: bool = True) -> str:
        return self.special_tokens.break_up(text, self.breaker, at_borders)

    def _protect(self, value: Any, at_borders: bool = True) -> Any:
        """Break up special tokens in every string of a nested value, keys included.

        Words of the template stay whole at their borders, as it may compare strings with them.
        """
        if isinstance(value, str):
            return self._break_up(value, at_borders and value not in self.words)
        if isinstance(value, dict):
            return {
                self._protect(key, at_borders) if isinstance(key, str) else key: self._protect(item, at_borders)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._protect(item, at_borders) for item in value]
        return value

    def _wants_lists(self) -> bool:
        """Whether the template shows a message's content only if it comes as a list of items."""
        if shows_string := self._shows(self.mark):
            return False
        if shows_list := self._shows([{"type": "text", "text": self.mark}]):
            return True
        if shows_string is None or shows_list is None:
            return False  # it refuses this chat; what it says to the real one is for the caller
        raise ValueError("The chat template leaves out what a user message says; HoVLE needs one that shows it.")

    def _shows(self, content: Any) -> bool | None:
        """Whether the template writes this content, which holds the mark, of a user message; None if it fails."""
        messages = [{"role": "user", "content": content}]
        try:
            return self.mark in self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False
            )
        except (TypeError, jinja2.TemplateError):
            return None

    def _split(self, text: str, items: list[dict]) -> "Prompt":
        """Cut a rendered chat at the template's special tokens and at picture marks."""
        check_unicode(text)
        border = re.compile(f"({self.mark}[0-9]+{self.mark}|{self.special_tokens.pattern})")
        pieces = [piece.replace(self.breaker, "") for piece in border.split(text)]
        order = [int(piece.strip(self.mark)) for piece in pieces[1::2] if piece.startswith(self.mark)]
        if sorted(order) != list(range(len(items))):
            raise ValueError(
                f"The messages hold {len(items)} pictures but the chat template shows {len(order)}: it drops or "
                "repeats part of a message."
            )
        # Plain: without the breakers just the same tokens would be found.
        is_plain = self.breaker not in text or border.split("".join(pieces)) == pieces
        return Prompt(pieces, [items[index] for index in order], order, is_plain, self.mark)


class Prompt:
    """One rendered chat.

    Attributes:
        pieces: Text at even places, special tokens and picture marks at odd places.
        pictures: The picture items of its messages, in prompt order.
        picture_order: Place of each of them among the items of the messages.
        is_plain: Whether parsing the string for special tokens gives the same as these pieces.
    """

    def __init__(self, pieces: list[str], pictures: list[dict], order: list[int], is_plain: bool, mark: str):
        self.pieces = pieces
        self.pictures = pictures
        self.picture_order = order
        self.is_plain = is_plain
        self.mark = mark

    def is_mark(self, index: int) -> bool:
        """Whether the piece at this place stands for a picture."""
        return index % 2 == 1 and self.pieces[index].startswith(self.mark)

    def text(self, image_token: str) -> str:
        """Join the pieces, with `image_token` for each picture."""
        return "".join(image_token if self.is_mark(index) else piece for index, piece in enumerate(self.pieces))


def check_unicode(text: str) -> None:
    """Raise for half of a surrogate pair, which tokenizers refuse to read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(error.start - 10, 0) : error.end + 10]
        raise ValueError(f"A text holds half of a surrogate pair ({around!r}), which is no character.") from error


def tool_schemas(tools: Sequence | None) -> list | None:
    """Describe tools that are functions, as the tokenizer would, so that their docstrings are strings of the chat."""
    return [get_json_schema(tool) if callable(tool) else tool for tool in tools] if tools else None


def unused_characters(values: Any) -> tuple[str, str]:
    """Find two private-use characters that occur in no string of a nested value."""
    used: set[str] = set()

    def visit(value: Any) -> None:
        if isinstance(value, str):
            if not value.isascii():  # pictures in base64 are long
                used.update(value)
        elif isinstance(value, dict):
            visit(list(value))
            visit(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)

    visit(values)
    unused = (chr(code) for codes in PRIVATE_RANGES for code in codes if chr(code) not in used)
    try:
        return next(unused), next(unused)
    except StopIteration:
        raise ValueError("The messages use up every private-use character of Unicode.") from None


def _as_list_content(message: dict) -> dict:
    """Give a message's string as a list of one text item, for templates that read only lists."""
    if not isinstance(message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": message["content"]}]}
