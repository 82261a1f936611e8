"""Messages of a conversation, as `apply_chat_template` reads them."""

from collections.abc import Sequence

import jinja2

from ..model.processing_hovle import HoVLEProcessor


def message(role: str, text: str, pictures: Sequence[dict] = ()) -> dict:
    """A message: items of pictures, then words."""
    return {"role": role, "content": [*pictures, {"type": "text", "text": text}]}


def refuse_hidden_system(processor: HoVLEProcessor, system: str | None) -> None:
    """Raise ValueError where the model would not be shown what it is told before the conversation begins, if it is."""
    if system is None:
        return
    try:
        prompt = processor.apply_chat_template([message("system", system), message("user", "?")])
    except jinja2.TemplateError as error:
        raise ValueError(f"The model's chat template takes no system message ({error}); leave it out.") from error
    if system.strip() not in prompt:
        raise ValueError(
            "The model's chat template does not show system messages: put what it should know into the question."
        )
