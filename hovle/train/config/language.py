"""What holds a HoVLE to the bare language model while it learns to see."""

import math
from typing import Annotated

from pydantic import Field

from .section import Number, PositiveOrZero, Section, section


@section
class LanguageConfig(Section):
    """Text without pictures in every batch, on which the model is held to the bare language model.

    What is held must be as wide as what is asked: text of one kind keeps the language of that kind best.
    """

    source: str
    """UTF-8 text file; JSON lines of `{"messages": [...]}` or `{"text": "..."}`, as `hovle data replay` writes them; a
    folder or file that `datasets` reads, with a column `text` or `messages`; `python_docs`; or `smollm2_replay`, which
    ships: 120,000 tokens that SmolLM2-135M-Instruct wrote by itself."""
    share: Annotated[Number, Field(gt=0, le=0.5)] = 0.1
    """Its tokens over all of a batch, as near as whole rows allow where it takes more than one. They are taken from
    the batch's own rows: raise `rows_per_batch` where as many pictures as before shall be seen in a step."""
    weight: PositiveOrZero = 1.0
    """Weight of the squared error of what would enter the language model over the squared length of its embedding, a
    mean per token (`text_error`): what a cosine hardly sees. The language model does not run for it."""
    kl_weight: PositiveOrZero | None = None
    """Weight of the KL divergence from the bare language model in nats, a mean per token (`language_kl`). None: 1
    where the language model learns, else 0. Above 0 the text runs through the language model twice."""
    around_images: bool = False
    """With next_token, hold the text in front of, between and after pictures too, but for replies, by the same two
    weights: its embeddings (`prompt_error`), and what the bare language model says when it is shown what ours makes of
    the pictures beside plain text (`prompt_kl`): one more pass without gradient, and the head at these places."""

    def layout(self, num_rows: int, row_length: int) -> tuple[int, int]:
        """How many rows of a batch begin with text, and with how many tokens of it each: whole rows or part of one."""
        wanted = self.share * num_rows
        if wanted < 1:
            return 1, round(wanted * row_length)
        return math.floor(wanted + 0.5), row_length
