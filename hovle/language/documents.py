"""Documents of text as token ids: rows of JSON lines, or a plain text."""

from collections.abc import Iterator
from pathlib import Path

import jinja2

from ..files.documents import UnreadableError, parse_json
from ..model.processing_hovle import HoVLEProcessor
from .text_perplexity import read_text

SHIPPED = {name: Path(__file__).with_name(f"{name}.jsonl") for name in ("smollm2_replay", "smollm2_replay_held_out")}
"""Name -> what SmolLM2-135M-Instruct wrote by itself (`hovle data replay`): 120,000 tokens of seed 0, and 16,000 of
seed 1 (`--batch 32`), on which nothing that ships is trained."""


def read_text_documents(source: str, processor: HoVLEProcessor, field: str) -> Iterator[list[int]]:
    """Token ids of each row of a `.jsonl` file, or of a text as `read_text` finds it.

    Args:
        source: The file, or the name of a text or of one of `SHIPPED`.
        processor: Its tokenizer and chat template encode it.
        field: Of a recipe or command, which errors name.

    Raises:
        ValueError: Where one cannot be read.
    """
    path = SHIPPED.get(source, Path(source))
    if path.suffix != ".jsonl" or not path.is_file():
        yield encode_prose(read_text(source, field), processor)
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            name = f"{path.name}:{number}"
            try:
                row = parse_json(line, name)
            except UnreadableError as error:
                raise ValueError(f"{field}: {error}") from error
            yield encode_row(row, name, processor, field)


def encode_row(row: object, name: str, processor: HoVLEProcessor, field: str) -> list[int]:
    """Token ids of a row with a `text`, or with `messages` of text alone as the chat template writes them."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return encode_prose(row["text"], processor)
    try:
        messages = row["messages"]  # type: ignore[index]  # what it is not, the error says
        if any(isinstance(message["content"], list) and _pictures(message["content"]) for message in messages):
            raise ValueError("it shows a picture, and the language is held on text alone")
        [ids] = processor.encode_chats([messages], [])
    except (ValueError, KeyError, TypeError, jinja2.TemplateError) as error:
        raise ValueError(
            f'{field}: {name}: expected {{"messages": [{{"role": ..., "content": "..."}}, ...]}} or '
            f'{{"text": "..."}}, found {str(row)[:80]!r} ({error!r:.200}).'
        ) from error
    return ids


def _pictures(content: list[dict]) -> list[dict]:
    return [item for item in content if item["type"] != "text"]


def encode_prose(text: str, processor: HoVLEProcessor) -> list[int]:
    """Token ids of plain text, in which nothing is special, paragraph by paragraph."""
    ids: list[int] = []
    paragraphs = text.split("\n\n")
    for number, paragraph in enumerate(paragraphs, 1):
        end = "\n\n" if number < len(paragraphs) else ""
        ids += processor._encode_text(paragraph + end, at_start=number == 1)
    return ids
