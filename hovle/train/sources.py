"""Sources: readers that turn files into records, conversations whose pictures are still on disk."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..assets import easy_vqa
from ..eval.vqa import Question, draw_weighted, load_questions, wording_weights
from .config import DataConfig

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class Record:
    """One conversation as the source holds it, and others about the same pictures."""

    name: str
    """Where it comes from, for messages."""
    messages: list[dict]
    """Chat messages with picture paths."""
    others: tuple[list[dict], ...] = ()
    """Conversations that start with the same pictures; none sees another."""
    weights: tuple[float, ...] = ()
    """How readily each conversation is drawn, this record's own first; empty: all take part."""
    num_drawn: int = 0
    """How many of them make a sample when they are drawn."""

    @property
    def has_branches(self) -> bool:
        """Whether samples of it hold several conversations."""
        return bool(self.others) and self.num_drawn != 1

    def draw(self, seed: int) -> "Record":
        """Choose `num_drawn` of the conversations by weight, without repetition."""
        if not self.weights:
            return self
        chosen = draw_weighted(self.weights, self.num_drawn, seed)
        first, *others = [[self.messages, *self.others][place] for place in chosen]
        return Record(self.name, first, tuple(others))


def load_records(config: DataConfig) -> list[Record]:
    """Read the list of conversations of a source; pictures stay on disk."""
    if config.source == "easy_vqa":
        folder = Path(config.path) if config.path else easy_vqa()
        questions = load_questions(folder / config.split)
        if config.balance_answers:
            return _balanced_records(questions, config.questions_per_sample)
        return _question_records(questions, config.questions_per_sample)
    if config.path is None:
        raise ValueError(f"data.path is missing: the source {config.source!r} needs a file or folder.")
    if config.source == "chat":
        return _chat_records(Path(config.path))
    if config.source == "pictures":
        return _picture_records(Path(config.path))
    raise ValueError(f"Unknown data.source {config.source!r}; known: easy_vqa, chat, pictures.")


def _question_records(questions: list[Question], questions_per_sample: int) -> list[Record]:
    """Records of so many questions about one picture; a picture's last record may hold fewer."""
    records = []
    for picture, asked in _by_picture(questions).items():
        conversations = [conversation(picture, question.text, question.answer) for question in asked]
        for start in range(0, len(asked), questions_per_sample):
            first, *others = conversations[start : start + questions_per_sample]
            records.append(Record(f"{picture.name}[{start}]", first, tuple(others)))
    return records


def _balanced_records(questions: list[Question], questions_per_sample: int) -> list[Record]:
    """One record per picture; its questions are drawn the more readily the less their wording tells the answer."""
    weights = dict(zip(questions, wording_weights(questions), strict=True))
    records = []
    for picture, asked in _by_picture(questions).items():
        first, *others = [conversation(picture, question.text, question.answer) for question in asked]
        weights_here = tuple(weights[question] for question in asked)
        records.append(Record(picture.name, first, tuple(others), weights_here, questions_per_sample))
    return records


def _by_picture(questions: list[Question]) -> dict[Path, list[Question]]:
    groups: dict[Path, list[Question]] = {}
    for question in questions:
        groups.setdefault(question.picture, []).append(question)
    return groups


def conversation(picture: Path, question: str, answer: str) -> list[dict]:
    """Messages of one question about one picture, and its answer."""
    return [
        {"role": "user", "content": [{"type": "image", "path": str(picture)}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def _chat_records(path: Path) -> list[Record]:
    """Read JSON lines `{"messages": [...]}`; relative picture paths are relative to the file and stay beside it."""
    records = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            name = f"{path.name}:{number}"
            try:
                messages = json.loads(line)["messages"]
                for message in messages:
                    for item in message["content"] if isinstance(message["content"], list) else ():
                        if item["type"] == "image":
                            item["path"] = str(_inside(path.parent, item["path"]))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{name}: expected {{"messages": [{{"role": ..., "content": [{{"type": "image", "path": ...}}, '
                    f'{{"type": "text", "text": ...}}]}}]}}, found {line[:80]!r} ({error!r}).'
                ) from error
            records.append(Record(name, messages))
    if not records:
        raise ValueError(f"{path} holds no conversations.")
    return records


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"Picture {name!r} lies outside {folder}; keep pictures beside the data file.")
    return path


def _picture_records(folder: Path) -> list[Record]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES)
    if not paths:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURE_SUFFIXES)}).")
    return [Record(path.name, conversation(path, "", "")) for path in paths]


def picture_paths(messages: list[dict]) -> list[str]:
    """Paths of a conversation's pictures in their order."""
    return [
        item["path"]
        for message in messages
        if isinstance(message["content"], list)
        for item in message["content"]
        if item["type"] == "image"
    ]
