"""Messages as pictures: what a user wrote is drawn, and the language model's own reply to it is the answer.

After "Reading, Not Thinking" (arXiv 2603.09095): a model that reads a question in a picture should say what it says to
the question as text.
"""

import hashlib
import json
import logging
import random
from functools import cached_property
from types import MappingProxyType

from ..lettering import Block, Lettering, letter_page, wrap
from ..looks import draw_looks
from ..samples import SPLITS, Question, Sample
from ..skill import AssetFolders, Source
from ..words import split_of
from .reading import READ, SMALLEST, Reading, paint, wear

logger = logging.getLogger(__name__)

REPLAY = "replay"
"""Name of the file of messages among the assets."""

ASKED = (
    "Answer what the picture asks.",
    "Reply to the message in the picture.",
    "What is your answer to what is written here?",
    "Read the message and answer it.",
    "Respond to this text.",
)

_LARGEST = 24
_MOST_CHARACTERS = 260
"""Of a message: longer ones need more tiles than there may be."""

_MOST_TRIES = 60


class Replay(Reading):
    """Messages as pictures."""

    name = "replay"
    description = "Messages of users as pictures, with what the bare language model replies to them as text."
    revision = 2
    sizes = MappingProxyType(
        {
            "small": MappingProxyType({"train": 300, "validation": 30, "test": 60}),
            "full": MappingProxyType({"train": 10_000, "validation": 200, "test": 500}),
        }
    )
    held_out = ("font", "text")

    def __init__(self, folders: AssetFolders):
        super().__init__(folders)
        digest = hashlib.sha256(folders[REPLAY].read_bytes()).hexdigest()
        self.sources = (
            Source(asset=REPLAY, title="Replies of the language model", package="-", sha256=digest, license="-"),
        )

    @cached_property
    def messages(self) -> dict[str, list[tuple[str, str]]]:
        """Part -> messages of users that can be drawn, and the replies to them; each message once.

        Left aside, and told of, is what is too long, has characters that few fonts have, or stands under a system
        prompt that no picture shows.
        """
        found: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        num_chats = num_drawn = 0
        for line in self.folders[REPLAY].read_text(encoding="utf-8").splitlines():
            turns = json.loads(line).get("messages", [])
            num_chats += bool(turns)
            if [turn["role"] for turn in turns[:2]] != ["user", "assistant"]:
                continue
            asked, reply = " ".join(turns[0]["content"].split()), turns[1]["content"].strip()
            if reply and asked.isascii() and 0 < len(asked) <= _MOST_CHARACTERS:
                found[split_of(asked.lower())].setdefault(asked, reply)
                num_drawn += 1
        if num_drawn < num_chats:
            logger.warning(
                "replay: %d of %d chats cannot be drawn and are left aside", num_chats - num_drawn, num_chats
            )
        return {split: list(pairs.items()) for split, pairs in found.items()}

    def limit(self, split: str) -> int | None:
        """All parts show each message once."""
        return len(self.messages[split])

    def draw(self, index: int, split: str, seed: int) -> Sample:
        """Draw the message whose turn it is."""
        rng = self.rng(index, split, seed)
        messages = self.messages[split]
        text, reply = messages[self.place(index, len(messages), split, seed)]
        family, block, lettering = self._on_page(text, split, rng)
        looks = draw_looks(rng)
        image = paint(lettering, looks, rng, may_frame=True)
        questions = [Question(rng.choice(ASKED), reply, "reply")]
        if rng.random() < 0.3:
            questions.append(Question(rng.choice(READ), text, "read"))
        return Sample(
            wear(image, block.font.size, rng),
            image.size,
            tuple(questions),
            tuple(line.region() for line in lettering.lines),
            (f"font:{family}", f"text:{text}"),
            {"font_size": int(block.font.size), "num_words": len(text.split())},
        )

    def _on_page(self, text: str, split: str, rng: random.Random) -> tuple[str, Block, Lettering]:
        for attempt in range(_MOST_TRIES):
            font = rng.choice(rng.choice(self.fonts[split]))
            if font.has_capitals_only or not font.can_write(text):
                continue
            face = font.at(rng.randint(SMALLEST, max(SMALLEST, _LARGEST - attempt)))
            block = Block(wrap(text, face, rng.choice((310, 420, 540))), face, rng.uniform(1.15, 1.4))
            lettering = letter_page(block, rng, most_rows=4)
            if lettering is not None:
                return font.family, block, lettering
        raise ValueError(f"No font and size of {_MOST_TRIES} shows the message {text[:80]!r} on a page.")
