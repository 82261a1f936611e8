"""What is measured: a row for each ability, with the share that is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from ...synthesis.samples import Question, Sample

Metric = Literal["exact", "macro", "cer", "false_yes", "blind"]
"""`exact`: share of answers that are the right one or another name for it; `macro`: the mean of that over right
answers, each of which counts the same however often it comes; `cer`: wrong characters over characters, case
included; `false_yes`: share of answers that begin with yes where it is no; `blind`: share of replies to a question
about a picture that is not there which do not say so."""

Rival = Literal["neighbours", "ocr"]
"""`neighbours`: names of the nearest drawings to learn from in an image network's features; `ocr`: an OCR network."""

AT_MOST: tuple[Metric, ...] = ("cer", "false_yes", "blind")
"""Metrics of which less is better."""

EASY_VQA = "easy_vqa"
"""Stands for the asset where others name skills of `hovle.synthesis`."""

Wanted = Callable[[Sample, Question], bool]


def of_kinds(*kinds: str) -> Wanted:
    """Questions that ask for one of these."""
    return lambda _, question: question.kind in kinds


def in_case(case: str) -> Wanted:
    """Names of objects that were held out in this way."""
    return lambda sample, question: question.kind == "name" and sample.facets["case"] == case


def _is_short_text(sample: Sample, question: Question) -> bool:
    is_short = sample.facets["layout"] != "notice" and int(sample.facets["num_words"]) <= 3
    return question.kind == "read" and is_short and float(sample.facets["letter_size"]) >= 20


def _is_notice(sample: Sample, question: Question) -> bool:
    return question.kind == "read" and sample.facets["layout"] == "notice"


def _is_about_nothing(_: Sample, question: Question) -> bool:
    return question.kind in ("absent", "presence") and question.answer == "no"


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One ability."""

    name: str
    title: str
    skills: tuple[str, ...]
    """Skills whose held-out part is drawn from, in turn."""
    wanted: Wanted
    """Which of their questions are asked."""
    bound: float | None = None
    """What is asked for; None: only reported."""
    metric: Metric = "exact"
    split_by: tuple[str, ...] = ()
    """Facets that the result is told apart by."""
    max_new_tokens: int = 16
    rival: Rival | None = None
    """Another network that is asked the same, if anybody wants to know."""
    beats_rival: bool = False
    """Whether what is asked for is what that one gets."""

    @property
    def at_most(self) -> bool:
        """Whether less is better."""
        return self.metric in AT_MOST


def is_met(bar: Bar, bound: float | None, score: float) -> bool | None:
    """Whether a score is as good as asked for; None where nothing is asked for."""
    if bound is None:
        return None
    return score <= bound if bar.at_most else score >= bound


_NAME, _POSITION = of_kinds("name"), of_kinds("side", "where", "neighbor", "between", "corner")
_CHART = (
    "largest", "smallest", "value", "how many", "above", "compare", "trend", "change", "title", "color", "by color",
    "cell", "cell of one", "largest in column", "smallest in column", "rows", "row presence", "nth row",
)  # fmt: skip

_ROWS = (
    Bar(
        name="reading",
        title="reading, unseen fonts, 1-3 words at 20-64 px",
        skills=("reading",),
        wanted=_is_short_text,
        bound=0.06,
        metric="cer",
        split_by=("letter_size", "num_words"),
        rival="ocr",
        max_new_tokens=40,
    ),
    Bar(
        name="notices",
        title="reading, notices of several lines",
        skills=("reading",),
        wanted=_is_notice,
        metric="cer",
        split_by=("letter_size",),
        rival="ocr",
        max_new_tokens=96,
    ),
    Bar(
        name="pictogram-name",
        title="pictogram name, unseen style",
        skills=("pictograms",),
        wanted=_NAME,
        rival="neighbours",
        beats_rival=True,
    ),
    Bar(
        name="pictogram-category",
        title="pictogram category, unseen style, macro",
        skills=("pictograms",),
        wanted=of_kinds("category"),
        bound=0.7,
        metric="macro",
    ),
    Bar(
        name="signs",
        title="traffic signs, held-out variants and distortions",
        skills=("signs",),
        wanted=_NAME,
        bound=0.9,
        split_by=("is_distorted",),
    ),
    Bar(
        name="flags",
        title="flags, held-out drawings",
        skills=("flags",),
        wanted=_NAME,
        bound=0.9,
        split_by=("style", "is_distorted"),
    ),
    Bar(
        name="object-new-view",
        title="known 3-D object from a new view",
        skills=("objects",),
        wanted=in_case("new view"),
        bound=0.85,
    ),
    Bar(
        name="object-new-model",
        title="unseen 3-D model of a known name",
        skills=("objects",),
        wanted=in_case("new model"),
        bound=0.5,
    ),
    Bar(
        name="icons",
        title="user-interface icon, unseen style, name or alias",
        skills=("icons",),
        wanted=_NAME,
        bound=0.35,
    ),
    Bar(name="clipart", title="clip art, another drawing of a known thing", skills=("clipart",), wanted=_NAME),
    Bar(
        name="clothing",
        title="clothing, Fashion-MNIST test",
        skills=("clothing",),
        wanted=_NAME,
        bound=0.88,
        split_by=("name",),
    ),
    Bar(
        name="count",
        title="scenes: count",
        skills=("scenes",),
        wanted=of_kinds("count", "count all", "count color"),
        bound=0.9,
        split_by=("things", "family"),
    ),
    Bar(
        name="position",
        title="scenes: position",
        skills=("scenes",),
        wanted=_POSITION,
        bound=0.9,
        split_by=("family",),
    ),
    Bar(
        name="color",
        title="scenes: color",
        skills=("scenes",),
        wanted=of_kinds("color"),
        bound=0.9,
        split_by=("family",),
    ),
    Bar(
        name="charts",
        title="charts and tables of a held-out tool",
        skills=("charts",),
        wanted=of_kinds(*_CHART),
        bound=0.65,
        split_by=("form",),
        max_new_tokens=32,
    ),
    Bar(
        name="clocks",
        title="time to five minutes",
        skills=("clocks",),
        wanted=of_kinds("time"),
        bound=0.9,
        split_by=("clock",),
    ),
    Bar(
        name="easy-vqa",
        title="easy-VQA test",
        skills=(EASY_VQA,),
        wanted=lambda *_: True,
        bound=0.99,
        max_new_tokens=8,
    ),
    Bar(
        name="false-yes",
        title="false yes about what is not there",
        skills=("reading", "scenes", "flags", "signs"),
        wanted=_is_about_nothing,
        bound=0.1,
        metric="false_yes",
    ),
    Bar(
        name="no-picture",
        title="answers about a picture that is not there",
        skills=("pictograms", "scenes", "clocks", "reading"),
        wanted=of_kinds("name", "count all", "time", "read", "color"),
        bound=0.05,
        metric="blind",
        max_new_tokens=32,
    ),
)

BARS: Mapping[str, Bar] = MappingProxyType({bar.name: bar for bar in _ROWS})
"""Every ability by name, in the order of tables."""
