"""What is kept of each visitor's chat, within bounds that hold for all visitors together."""

import threading
from collections import OrderedDict
from dataclasses import dataclass, field

from PIL import Image

from .looks import Look

MAX_CHATS = 32
"""Chats kept; the one that was not used for longest goes first."""

MAX_PICTURES = 64
"""Pictures of one chat."""

MAX_FORGOTTEN = 10_000
"""Visitors who are remembered as those whose chat was forgotten."""

MAX_PIXELS = 240_000_000
"""Pixels of the pictures of all chats together; each takes three bytes."""


@dataclass
class Chat:
    """One visitor's chat. It holds no model, so that none stays in memory for its sake."""

    model: str
    """Which model answers."""
    messages: list[dict] = field(default_factory=list)
    """What was said, as `Conversation.messages`."""
    waiting: list[dict] = field(default_factory=list)
    """Pictures for the next question, as `Conversation.images`."""
    names: list[str] = field(default_factory=list)
    """File names of all pictures, in their order."""
    answer_ids: list[int] = field(default_factory=list)
    """Tokens of the last answer."""
    stopped_by: str | None = None
    """What the last answer reached before the model said it was done; None where it said so."""
    look: Look | None = None
    """Where they looked, once that was asked for."""
    is_stopped: bool = False
    """Whether the visitor wants the answer that is being generated to end."""

    @property
    def items(self) -> list[dict]:
        """Items of all pictures, those said and those waiting."""
        said = [item for message in self.messages for item in message["content"] if item["type"] == "image"]
        return [*said, *self.waiting]

    @property
    def pictures(self) -> list[Image.Image]:
        """All pictures, those said and those waiting."""
        return [item["image"] for item in self.items]

    @property
    def num_pixels(self) -> int:
        """Pixels of all pictures."""
        return sum(picture.width * picture.height for picture in self.pictures)


class Chats:
    """Chats by visitor. Several threads may ask at once.

    Args:
        model: Which model answers in a new chat.
    """

    def __init__(self, model: str):
        self.model = model
        self._chats: OrderedDict[str, Chat] = OrderedDict()  # last used last
        self._forgotten: OrderedDict[str, None] = OrderedDict()  # their pages may show what is no more
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._chats)

    def of(self, visitor: str) -> Chat:
        """A visitor's chat, a new one where there was none.

        Raises:
            ValueError: When it was forgotten, so that a page that shows it is told.
        """
        with self._lock:
            if visitor in self._forgotten:
                raise ValueError(
                    "This chat was forgotten, to make room for others' or because its page was away: press New chat."
                )
            chat = self._chats.setdefault(visitor, Chat(self.model))
            self._chats.move_to_end(visitor)
            while len(self._chats) > MAX_CHATS:
                self._forget_oldest()
            return chat

    def begin(self, visitor: str, chat: Chat | None = None) -> None:
        """Put a chat, by default a new one with the same model, in the place of a visitor's last; its answer ends."""
        with self._lock:
            self._forgotten.pop(visitor, None)
            last = self._chats.pop(visitor, None)
            if last is not None:
                last.is_stopped = True
            self._chats[visitor] = chat or Chat(self.model if last is None else last.model)

    def stop(self, visitor: str) -> None:
        """End a visitor's answer; as far as it came, it is part of the chat."""
        with self._lock:
            if visitor in self._chats:
                self._chats[visitor].is_stopped = True

    def forget(self, visitor: str) -> None:
        """End a visitor's answer and forget the chat."""
        with self._lock:
            if visitor in self._chats:
                self._forget(visitor)

    def add(self, visitor: str, items: list[dict], names: list[str]) -> Chat:
        """Let pictures wait for a visitor's next question; other visitors' oldest chats make room.

        Raises:
            ValueError: When this chat alone would hold too many; none is added then.
        """
        chat = self.of(visitor)
        num_new = sum(item["image"].width * item["image"].height for item in items)
        with self._lock:
            if len(chat.items) + len(items) > MAX_PICTURES or chat.num_pixels + num_new > MAX_PIXELS:
                raise ValueError(
                    f"The chat would hold {len(chat.items) + len(items)} pictures with "
                    f"{(chat.num_pixels + num_new) / 1e6:.0f} megapixels; at most {MAX_PICTURES} with "
                    f"{MAX_PIXELS / 1e6:.0f} megapixels are kept. Begin a new chat, or show smaller pictures."
                )
            chat.waiting = [*chat.waiting, *items]
            chat.names = [*chat.names, *names]
            while sum(each.num_pixels for each in self._chats.values()) > MAX_PIXELS:
                self._forget_oldest()
        return chat

    def _forget_oldest(self) -> None:
        self._forget(next(iter(self._chats)))

    def _forget(self, visitor: str) -> None:
        self._chats.pop(visitor).is_stopped = True
        self._forgotten[visitor] = None
        while len(self._forgotten) > MAX_FORGOTTEN:
            self._forgotten.popitem(last=False)
