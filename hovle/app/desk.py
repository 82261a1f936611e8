"""What the page asks for, done: pictures taken, questions answered, drawings made. Nothing here knows gradio.

Whatever a visitor can cause is a `ValueError` whose text the page shows.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from ..chat.tiles import TilePlan, draw_tiles, plan_tiles
from ..model.pictures import load_picture
from .chats import Chat, Chats
from .looks import Look, draw_look, look
from .models import Models

LONGEST_NAME = 60
"""Characters of a file name that captions show."""


class Desk:
    """Does what visitors ask for. `ask` and `look` use the model: one thread at a time."""

    def __init__(self, models: Models):
        self.models = models
        self.chats = Chats(models.names[0])

    # --- pictures ----------------------------------------------------------------------------------------------------

    def add_pictures(self, visitor: str, paths: Sequence[str]) -> list[str]:
        """Let pictures wait for the visitor's next question.

        Args:
            visitor: Who shows them.
            paths: Files; their last parts are what the pictures are called.

        Returns:
            What is wrong with those that are left out, a sentence each.

        Raises:
            ValueError: When they would be too many; none is added then.
        """
        pictures, names, faults = [], [], []
        for path in paths:
            name = Path(path).name
            try:
                pictures.append(load_picture(Path(path).read_bytes(), name))  # the path is none of the visitor's
                names.append(name)
            except ValueError as error:
                faults.append(str(error))
        chat = self.chats.of(visitor)
        self._plans(chat.model, [*chat.pictures, *pictures])  # refuses what the budget of tokens has no room for
        self.chats.add(visitor, [{"type": "image", "image": picture} for picture in pictures], names)
        return faults

    def draw_tiles(self, visitor: str) -> list[tuple[Image.Image, str]]:
        """Draw how the model sees each picture of the chat, with captions."""
        chat = self.chats.of(visitor)
        pictures = chat.pictures
        return [
            (
                draw_tiles(picture, plan, title=name[:LONGEST_NAME]),
                f"{name[:LONGEST_NAME]}: {plan.num_tokens:,} tokens",
            )
            for picture, plan, name in zip(pictures, self._plans(chat.model, pictures), chat.names, strict=True)
        ]

    def _plans(self, model: str, pictures: Sequence[Image.Image]) -> list[TilePlan]:
        processor = self.models.processors[model]
        sizes = [(picture.height, picture.width) for picture in pictures]
        budget = self.models.max_image_tokens if pictures else None
        return plan_tiles(sizes, processor.image_processor, processor.pixels_per_token_side, budget)

    # --- talk --------------------------------------------------------------------------------------------------------

    def ask(self, visitor: str, question: str) -> Iterator[str]:
        """Ask a question after all that was said, and yield the answer as far as it came, longer each time.

        Raises:
            ValueError: For an empty question, and when the model has no room for it.
        """
        if not question.strip():
            raise ValueError("Write a question first.")
        chat = self.chats.of(visitor)
        shown = chat.waiting
        conversation = self.models.conversation(chat.model, chat.messages, shown)
        chat.look, chat.is_stopped = None, False
        answer = ""
        pieces = conversation.stream(question.strip())
        try:
            for piece in pieces:
                yield (answer := answer + piece)
                if chat.is_stopped:
                    break
        finally:
            pieces.close()
            if conversation.answer_ids:
                chat.messages, chat.answer_ids = conversation.messages, conversation.answer_ids
                chat.stopped_by = "your stop" if chat.is_stopped else conversation.stopped_by
                chat.waiting = chat.waiting[len(shown) :]  # pictures may have come meanwhile

    def begin(self, visitor: str) -> None:
        """Begin a new chat with the same model, without pictures."""
        self.chats.begin(visitor)

    def choose(self, visitor: str, model: str) -> None:
        """Begin a new chat with another model; all pictures of the last one wait for its first question.

        Raises:
            ValueError: For a model that is not offered, and where its budget of tokens has no room for the pictures.
        """
        if model not in self.models.processors:
            raise ValueError(f"{model}: not offered; choose one of {', '.join(self.models.names)}.")
        chat = self.chats.of(visitor)
        self._plans(model, chat.pictures)
        self.chats.begin(visitor, Chat(model, waiting=chat.items, names=chat.names))

    # --- attention ---------------------------------------------------------------------------------------------------

    def look(self, visitor: str) -> tuple[list[str], list[tuple[str, float]]]:
        """Read where each token of the last answer looks.

        Returns:
            Names of sections of layers, the last one to begin with, and the answer's tokens with the share of their
            attention in it that falls on pictures.

        Raises:
            ValueError: Without an answer, and without a picture.
        """
        chat = self.chats.of(visitor)
        num_said = len(chat.items) - len(chat.waiting)
        if not chat.answer_ids:
            raise ValueError("There is no answer yet whose tokens could look anywhere: ask something first.")
        if not num_said:
            raise ValueError("The chat shows no picture that the answer could look at: add one and ask again.")
        conversation = self.models.conversation(chat.model, chat.messages)
        conversation.answer_ids = chat.answer_ids
        chat.look = look(conversation, chat.model, self._plans(chat.model, chat.pictures[:num_said]))
        return chat.look.sections, self.masses(visitor, chat.look.sections[-1])

    def masses(self, visitor: str, section: str) -> list[tuple[str, float]]:
        """The answer's tokens with the share of their attention in a section that falls on pictures."""
        found = self._found(visitor, section)
        return list(zip(found.tokens, found.masses(section), strict=True))

    def draw_look(self, visitor: str, section: str, token: int) -> list[tuple[Image.Image, str]]:
        """Draw where one of the answer's tokens looks in a section, over each picture, with captions."""
        found = self._found(visitor, section)
        if not 0 <= token < len(found.tokens):
            raise ValueError(f"The answer has {len(found.tokens)} tokens, there is no number {token + 1}.")
        chat = self.chats.of(visitor)
        num_said = len(found.grids[section])
        names = [name[:LONGEST_NAME] for name in chat.names[:num_said]]
        return draw_look(found, section, token, chat.pictures[:num_said], names)

    def _found(self, visitor: str, section: str) -> Look:
        found = self.chats.of(visitor).look
        if found is None:
            raise ValueError("Where the answer looks was not read yet: press the button first.")
        if section not in found.maps:
            raise ValueError(f"{section}: no section of this model; it has {', '.join(found.sections)}.")
        return found
