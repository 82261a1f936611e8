"""Visual question answering by free generation: answer questions about pictures and compare with the truth."""

import functools
import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from ..machine import fastest_dtype
from ..modeling_hovle import HoVLEForConditionalGeneration
from ..pictures import load_picture
from ..processing_hovle import HoVLEProcessor


@dataclass(frozen=True)
class Question:
    """One question about one picture."""

    text: str
    answer: str
    """The expected answer, compared as a whole."""
    picture: Any
    """Anything the processor reads as a picture: a path, a PIL image, an array."""


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
    """Answer questions greedily, in order; the same words about the same picture are answered once.

    Args:
        model: In evaluation mode; its dtype decides the number format.
        processor: The model's own.
        questions: What to answer.
        batch_size: Prompts generated together.
        max_new_tokens: Longest answer in tokens.
        description: Shown on the progress bar.
    """
    distinct = {(question.text, _identity(question.picture)): question for question in questions}
    answers: list[str] = []
    for start in tqdm(range(0, len(distinct), batch_size), desc=description, unit="batch"):
        chats = [
            [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": load_picture(question.picture)}, _text(question.text)],
                }
            ]
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


def _identity(picture: Any) -> Any:
    return picture if isinstance(picture, (str, Path)) else id(picture)


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
    return [Question(item.text, item.answer, blank(load_picture(item.picture).size)) for item in questions]


def with_shuffled_pictures(questions: Sequence[Question], seed: int = 0) -> list[Question]:
    """The same questions, each about another question's picture."""
    order = list(range(len(questions)))
    random.Random(seed).shuffle(order)
    moved = dict(zip(order, order[1:] + order[:1], strict=True))  # no one keeps its own
    return [Question(item.text, item.answer, questions[moved[index]].picture) for index, item in enumerate(questions)]


def load_questions(folder: Path) -> list[Question]:
    """Read one easy-VQA split: `questions.json` beside `images/`."""
    rows = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return [Question(question, answer, folder / "images" / f"{image}.png") for question, answer, image in rows]


def wording_weights(questions: Sequence[Question]) -> list[float]:
    """For each question, how little its wording tells the answer: 1 where always the same is right, else more.

    Drawn with these weights, the answers to a wording come nearly equally often while there are plenty of each.
    """
    wordings = Counter(question.text for question in questions)
    answered = Counter((question.text, question.answer) for question in questions)
    return [wordings[item.text] / answered[item.text, item.answer] for item in questions]


def describe_wording(train: Sequence[Question], test: Sequence[Question]) -> dict[str, Any]:
    """How much of a data set can be answered without its pictures.

    Args:
        train: Questions the answers may be learned from.
        test: Questions that are answered.

    Returns:
        Counts of questions and pictures; `yes_no_share`, of the test questions whose answer is yes or no; and
        `guessed_share`, of those that get their right answer when each wording gets the one it has most often in
        training.
    """
    answers: dict[str, Counter] = {}
    for question in train:
        answers.setdefault(question.text, Counter())[question.answer] += 1
    usual = {text: counts.most_common(1)[0][0] for text, counts in answers.items()}
    splits = {"train": train, "test": test}
    counts = {f"{name}_questions": len(questions) for name, questions in splits.items()}
    counts |= {f"{name}_pictures": len({item.picture for item in questions}) for name, questions in splits.items()}
    return {
        **counts,
        "yes_no_share": sum(question.answer in ("yes", "no") for question in test) / len(test),
        "guessed_share": sum(usual.get(question.text) == question.answer for question in test) / len(test),
    }


def draw_weighted(weights: Sequence[float], count: int, seed: int) -> list[int]:
    """Choose so many places by weight, or all if there are fewer, in order (Efraimidis and Spirakis, 2006)."""
    generator = random.Random(seed)
    keys = [generator.random() ** (1 / weight) for weight in weights]
    return sorted(sorted(range(len(keys)), key=lambda place: -keys[place])[:count])


def draw_questions(folder: Path, count: int, *, balanced: bool, seed: int = 0) -> list[Question]:
    """Draw so many questions of a split, the same ones every time.

    Args:
        folder: The split.
        count: How many.
        balanced: Draw by `wording_weights` instead of evenly.
        seed: Another one gives other questions.
    """
    questions = load_questions(folder)
    if not 1 <= count <= len(questions):
        raise ValueError(f"Between 1 and {len(questions)} questions can be drawn from {folder.name}, not {count}.")
    weights = wording_weights(questions) if balanced else [1.0] * len(questions)
    return [questions[place] for place in draw_weighted(weights, count, seed)]


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
    model = HoVLEForConditionalGeneration.from_pretrained(folder, dtype=fastest_dtype(device)).to(device).eval()
    processor = HoVLEProcessor.from_pretrained(folder)
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
