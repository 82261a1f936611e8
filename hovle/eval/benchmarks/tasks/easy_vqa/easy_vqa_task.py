"""Questions of easy-VQA for lmms-eval. `*.jsonl` name the places of the questions in the test split; `hovle fetch`
brings the split itself, so that neither the Hub nor a key is needed.

The questions are those that `draw_questions` of `hovle.assets.vqa_questions` draws with seed 0: those that the
demo's report is about.
"""

import datasets

from hovle.assets import easy_vqa
from hovle.assets.vqa_questions import Question, load_questions
from hovle.eval.vqa import exact_match, with_blank_pictures


def with_pictures(places: datasets.Dataset) -> datasets.Dataset:
    """Turn places in the test split into questions with picture and answer."""
    return _documents(_chosen(places))


def with_blank_pictures_only(places: datasets.Dataset) -> datasets.Dataset:
    """The same about white pictures: what can be guessed without looking."""
    return _documents(with_blank_pictures(_chosen(places)))


def _chosen(places: datasets.Dataset) -> list[Question]:
    questions = load_questions(easy_vqa() / "test")
    return [questions[place] for place in places["place"]]


def _documents(questions: list[Question]) -> datasets.Dataset:
    pictures = [item.picture if not hasattr(item.picture, "as_posix") else str(item.picture) for item in questions]
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    columns = {
        "question": [item.text for item in questions],
        "answer": [item.answer for item in questions],
        "image": pictures,
    }
    return datasets.Dataset.from_dict(columns, features=features)


def doc_to_visual(doc: dict) -> list:
    """The picture a question is about."""
    return [doc["image"].convert("RGB")]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    """1 where the whole answer is the expected one, up to case and a final full stop; else 0."""
    return {"exact_match": exact_match(results[:1], [Question(doc["question"], doc["answer"], None)])}
