"""Rules in the place of the judges of MM-Vet, HallusionBench and MathVista.

They read what a short answer says and are the same for everyone, but not what the benchmarks' authors use: scores are
not comparable with published ones.
"""

import ast
import re

from hovle.eval.intervals import hallusion

PICTURE_COLUMNS = ("image", "decoded_image")


def doc_to_visual(doc: dict) -> list:
    """The picture of a question."""
    picture = next((doc[name] for name in PICTURE_COLUMNS if hasattr(doc.get(name), "convert")), None)
    return [] if picture is None else [picture.convert("RGB")]


# --- MM-Vet


def mmvet_results(doc: dict, results: list[str]) -> dict[str, float]:
    """The best share of phrases found, over the alternatives that `<OR>` separates and whose phrases `<AND>` does."""
    said = _words(results[0])
    alternatives = [[_words(phrase) for phrase in part.split("<AND>")] for part in doc["answer"].split("<OR>")]
    shares = [sum(phrase in said for phrase in phrases) / len(phrases) for phrases in alternatives]
    return {"exact_match": max(shares)}


def _words(text: str) -> str:
    """Words and numbers in lower case, with a space around each."""
    found = re.findall(r"[\w.%$-]*[\w%$]", text.lower())
    return f" {' '.join(found)} "


# --- HallusionBench


def hallusion_results(doc: dict, results: list[str]) -> dict[str, dict]:
    """Whether the first yes or no of the answer is right; none at all is wrong."""
    said = re.search(r"\b(yes|no)\b", results[0].lower())
    truth = {"1": "yes", "0": "no"}[str(doc["gt_answer"])]
    keys = ("category", "subcategory", "set_id", "figure_id", "question_id")
    return {"average": {**{key: str(doc[key]) for key in keys}, "correct": said is not None and said[1] == truth}}


def hallusion_average(values: list[dict]) -> float:
    """Mean of the shares of right answers, of questions all right and of pictures all right."""
    return hallusion(values, lambda _: 0.0).score


# --- MathVista


def mathvista_results(doc: dict, results: list[str]) -> dict[str, float]:
    """Whether the answer, read by `read_answer`, is the expected one."""
    precision = int(doc["precision"] or 0)
    given = read_answer(results[0], doc["choices"], doc["answer_type"], precision)
    return {"exact_match": float(given is not None and given == str(doc["answer"]).strip())}


def read_answer(text: str, choices: list[str] | None, answer_type: str, precision: int) -> str | None:
    """Read a choice, number or list from an answer.

    Args:
        text: What the model said.
        choices: For multiple choice; a letter, alone or in brackets, or the only choice named counts.
        answer_type: Else `integer`, `float` or `list`: the last one in the text counts.
        precision: Decimal places of a float.

    Returns:
        The answer as the data writes it; None when there is none.
    """
    if choices:
        return _read_choice(text, list(choices))
    if answer_type == "list":
        lists = re.findall(r"\[[^\[\]]*\]", text)
        return str(_literal(lists[-1])) if lists else None
    numbers = re.findall(r"-?\d+(?:\.\d+)?", re.sub(r"(?<=\d),(?=\d{3})", "", text))
    if not numbers:
        return None
    value = float(numbers[-1])
    return str(int(value)) if answer_type == "integer" else str(round(value, precision))


def _read_choice(text: str, choices: list[str]) -> str | None:
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(choices)]
    found = re.findall(rf"\(([{letters}])\)", text) or re.findall(rf"^\s*([{letters}])(?![\w'])", text)
    if found:
        return choices[letters.index(found[-1])]
    named = [choice for choice in choices if _words(choice) in _words(text)]
    return named[0] if len(named) == 1 else None


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):  # words without quotation marks
        return text
