"""What holds a HoVLE to the bare language model while it learns to see."""

import math
from typing import Annotated, Literal

from pydantic import Field

from .section import Number, Positive, Section, section


@section
class LanguageConfig(Section):
    """Text without pictures in every batch, on which the model is held to the bare language model.

    What is held must be as wide as what is asked: text of one kind keeps the language of that kind best.
    """

    source: str
    """UTF-8 text file; JSON lines of `{"messages": [...]}` or `{"text": "..."}`, as `hovle data replay` writes them; a
    folder or file that `datasets` reads, with a column `text` or `messages`; or `python_docs`."""
    share: Annotated[Number, Field(gt=0, le=0.5)] = 0.1
    """Its tokens over all of a batch, as near as whole rows allow where it takes more than one. They are taken from
    the batch's own rows: raise `rows_per_batch` where as many pictures as before shall be seen in a step."""
    weight: Positive = 1.0
    """Weight of what holds it, a mean per token: with next_token the KL divergence from the bare language model in
    nats (`language_kl`), with distillation what `error` says."""
    around_images: bool = False
    """With next_token, hold the text in front of, between and after pictures too, but for replies (`prompt_kl`, by the
    same weight): the bare language model is shown what ours makes of the pictures beside plain text. It costs one more
    pass of the language model without gradient, and the head at these places."""
    error: Literal["relative", "fisher", "kl"] = "relative"
    """What holds text in distillation, beside the cosine of all text: the squared error of what would enter the
    language model over the squared length of the embedding (`text_error`); the squared error weighted by how much each
    direction changes what the language model says, as measured before the first step (`fisher_error`); or the KL
    divergence from the bare language model through its frozen layers, in nats (`language_kl`): two passes of it."""

    def layout(self, num_rows: int, row_length: int) -> tuple[int, int]:
        """How many rows of a batch begin with text, and with how many tokens of it each."""
        rows = max(1, math.floor(self.share * num_rows + 0.5))
        return rows, min(row_length, round(self.share * num_rows * row_length / rows))
