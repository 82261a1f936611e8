"""The models a page offers, of which one is in memory."""

from collections.abc import Sequence

from ..chat.conversation import Conversation
from ..loading import load_processor


class Models:
    """Models by path; one of them is in memory, and another takes its place when it is asked for.

    The processors of all are read at once, so that a folder that holds none is refused before the page is there.
    `conversation` is for one thread at a time.

    Args:
        paths: Model folders or Hub ids; the first one is loaded now.
        max_new_tokens: Longest answer in tokens.
        max_image_tokens: Tokens all pictures of a chat may take together, or None for no limit.
        label_images: Number the pictures: Image-1, Image-2, ...

    Raises:
        ValueError: For a path that comes twice, and for what is no model.
    """

    def __init__(
        self,
        paths: Sequence[str],
        max_new_tokens: int = 256,
        max_image_tokens: int | None = None,
        label_images: bool = False,
    ):
        if twice := {path for path in paths if paths.count(path) > 1}:
            raise ValueError(f"{', '.join(sorted(twice))}: named twice; name each model once.")
        self.max_new_tokens = max_new_tokens
        self.max_image_tokens = max_image_tokens
        self.label_images = label_images
        self.processors = {path: load_processor(path) for path in paths}
        self._loaded: tuple[str, Conversation] | None = None
        self._load(paths[0])

    @property
    def names(self) -> list[str]:
        """What the models are called: their paths, the first one the page begins with."""
        return list(self.processors)

    def is_loaded(self, name: str) -> bool:
        """Whether this is the model in memory."""
        return self._loaded is not None and self._loaded[0] == name

    def conversation(self, name: str, messages: Sequence[dict] = (), images: Sequence[dict] = ()) -> Conversation:
        """A conversation with a model that goes on from `messages`; loads it in the place of the one in memory.

        Whoever keeps the conversation keeps the model, too.
        """
        held = self._loaded[1] if self._loaded is not None and self.is_loaded(name) else self._load(name)
        return held.another(messages, images)

    def _load(self, name: str) -> Conversation:
        self._loaded = None  # before the next one is read: two may not fit into memory
        conversation = Conversation(
            name,
            max_new_tokens=self.max_new_tokens,
            max_image_tokens=self.max_image_tokens,
            label_images=self.label_images,
        )
        self._loaded = (name, conversation)
        return conversation
