"""Visual question answering by free generation: answer questions about pictures and compare with the truth."""

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..assets.vqa_questions import Question, draw_questions
from ..loading import load_model, load_processor
from ..machine.speed import fastest_dtype
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.pictures import load_picture, picture_size
from ..model.processing_hovle import HoVLEProcessor


@torch.inference_mode()
def answer_questions(
    model: HoVLEForConditionalGeneration,
    processor: HoVLEProcessor,
    questions: Sequence[Question],
    *,
    batch_size: int = 100,
    max_new_tokens: int = 8,
    description: str = "answering",
) -> list[str]:
    """Answer questions greedily; the same words about the same picture are answered once.

    Prompts of like length are answered together, the longest first: little is padded, and what memory or time is
    needed shows early.

    Args:
        model: In evaluation mode; its dtype decides the number format.
        processor: The model's own.
        questions: What to answer; a picture that is None is not there. Paths and the bytes of files are read batch by
            batch.
        batch_size: Prompts generated together.
        max_new_tokens: Longest answer in tokens.
        description: Shown on the progress bar.
    """
    distinct = {(question.text, _identity(question.picture)): question for question in questions}
    lengths = {key: _length(question, processor) for key, question in distinct.items()}
    distinct = {key: distinct[key] for key in sorted(distinct, key=lengths.__getitem__, reverse=True)}
    answers: list[str] = []
    for start in tqdm(range(0, len(distinct), batch_size), desc=description, unit="batch"):
        chats = [
            [{"role": "user", "content": [*_shown(question.picture), _text(question.text)]}]
            for question in list(distinct.values())[start : start + batch_size]
        ]
        inputs = processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(model.device, model.dtype)
        generated = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processor.batch_decode(generated[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.extend(text.strip() for text in texts)
    answer_of = dict(zip(distinct, answers, strict=True))
    return [answer_of[question.text, _identity(question.picture)] for question in questions]


CHARACTERS_PER_TOKEN = 4
"""Of English, roughly."""


def _length(question: Question, processor: HoVLEProcessor) -> float:
    """Tokens of a prompt, roughly, by the size of its picture."""
    num_tiles = 0
    if question.picture is not None:
        width, height = _size(question.picture)
        num_tiles = processor.image_processor.get_number_of_image_patches(height, width)
    return num_tiles * processor.image_seq_length + len(question.text) / CHARACTERS_PER_TOKEN


def _identity(picture: Any) -> Any:
    return picture if isinstance(picture, (str, Path, bytes)) else id(picture)


def _shown(picture: Any) -> list[dict]:
    return [] if picture is None else [{"type": "image", "image": picture}]


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def exact_match(answers: Sequence[str], questions: Sequence[Question]) -> float:
    """Share of answers that equal the expected one up to case, surrounding space and a final full stop."""
    hits = [_normal(answer) == _normal(question.answer) for answer, question in zip(answers, questions, strict=True)]
    return sum(hits) / len(hits)


def _normal(text: str) -> str:
    return text.strip().rstrip(".").lower()


def with_blank_pictures(questions: Sequence[Question]) -> list[Question]:
    """The same questions about white pictures of the same size: what can be guessed without looking."""
    blank = functools.cache(lambda size: Image.new("RGB", size, "white"))
    return [Question(item.text, item.answer, blank(_size(item.picture))) for item in questions]


def _size(picture: Any) -> tuple[int, int]:
    """Width and height of an upright picture, from the header of its file where it is one."""
    if isinstance(picture, (Path, bytes)):
        height, width = picture_size(picture)
        return width, height
    return load_picture(picture).size


def with_shuffled_pictures(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The same questions, each about another question's picture."""
    order = list(range(len(questions)))
    random.Random(seed).shuffle(order)
    moved = dict(zip(order, order[1:] + order[:1], strict=True))  # no one keeps its own
    return [Question(item.text, item.answer, questions[moved[index]].picture) for index, item in enumerate(questions)]


def score_model(folder: Path, split: Path, count: int) -> tuple[dict[str, float], list[tuple[Question, str]]]:
    """Measure exact match on questions of a split, with true, blank and shuffled pictures.

    Args:
        folder: Model folder; it is loaded in the number format this machine is fastest with.
        split: Where the questions are.
        count: How many to ask in each variant.

    Returns:
        Scores: `accuracy`, `blank_pictures` and `shuffled_pictures` on balanced questions, `accuracy_unbalanced` and
        `blank_pictures_unbalanced` on evenly drawn ones; and the balanced questions with their answers.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    processor = load_processor(folder)
    model = load_model(folder, dtype=fastest_dtype(device)).to(device).eval()
    questions = draw_questions(split, count, balanced=True)
    unbalanced = draw_questions(split, count, balanced=False)
    variants = {
        "accuracy": questions,
        "blank_pictures": with_blank_pictures(questions),
        "shuffled_pictures": with_shuffled_pictures(questions),
        "accuracy_unbalanced": unbalanced,
        "blank_pictures_unbalanced": with_blank_pictures(unbalanced),
    }
    answers = {
        name: answer_questions(model, processor, variant, description=name.replace("_", " "))
        for name, variant in variants.items()
    }
    scores = {name: exact_match(answers[name], variants[name]) for name in variants}
    return scores, list(zip(questions, answers["accuracy"], strict=True))
