"""What a build holds: exact counts in `card.json`, and the same for people in `README.md`, with pictures."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from .building import Build, check_held_out
from .samples import SPLITS
from .shards import from_row, read_rows
from .sheets import COLUMNS, draw_sheet
from .skill import Skill

NUM_SHOWN = 6 * COLUMNS
"""Pictures of a contact sheet."""

PARTS_SHOWN = {"train": "", "test": "-held-out"}
"""Part of a skill -> end of the name of its contact sheet, which must name no part: readers would take it for one."""


def count_part(skill: Skill, folder: Path, split: str) -> dict[str, Any]:
    """Exact counts of a part of a skill, from its shards."""
    counts: Counter[str] = Counter()
    answers: dict[str, Counter[str]] = {}
    sizes: Counter[str] = Counter()
    for row in read_rows(folder, skill.name, split):
        counts["pictures"] += 1
        counts["questions"] += len(row["messages"]) // 2
        counts["regions"] += len(row["regions"])
        counts["picture_bytes"] += len(row["image"]["bytes"])
        for question in from_row(row).questions:
            answers.setdefault(question.kind, Counter())[question.answer] += 1
        sizes[f"{row['width']}x{row['height']}"] += 1
    kinds = Counter({kind: found.total() for kind, found in answers.items()})
    return {
        **counts,
        "kinds_of_question": dict(kinds.most_common()),
        "majority_answers": {kind: _majority(answers[kind]) for kind, _ in kinds.most_common()},
        "picture_sizes": dict(sizes.most_common()),
    }


def _majority(answers: Counter[str]) -> dict[str, Any]:
    """The answer that is right most often, and for which share: what is got without looking."""
    ((answer, count),) = answers.most_common(1)
    return {"answer": answer, "share": round(count / answers.total(), 3)}


def make_card(skills: Sequence[Skill], build: Build) -> dict[str, Any]:
    """All that is known of a build, the same for the same build."""
    sources = {source.asset: asdict(source) for skill in skills for source in skill.sources}
    return {
        "seed": build.seed,
        "size": build.size,
        "skills": {
            skill.name: {
                "description": skill.description,
                "revision": skill.revision,
                "parts": {split: count_part(skill, build.folder, split) for split in SPLITS},
                "held_out": check_held_out(skill, build.folder),
                "sources": [source.asset for source in skill.sources],
            }
            for skill in skills
        },
        "sources": dict(sorted(sources.items())),
    }


def write_card(skills: Sequence[Skill], build: Build) -> None:
    """Write `card.json`, `README.md` and the contact sheets beside the shards."""
    card = make_card(skills, build)
    (build.folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (build.folder / "README.md").write_text(describe(card), encoding="utf-8")
    sheets = build.folder / "sheets"
    sheets.mkdir(exist_ok=True)
    for skill in skills:
        for split in PARTS_SHOWN:
            samples = [from_row(row) for row in _spread_rows(skill, build, split)]
            title = f"{skill.name}, {'held out' if split == 'test' else 'to learn from'}: {skill.description}"
            draw_sheet(samples, title).save(sheets / _sheet_name(skill.name, split))


def _spread_rows(skill: Skill, build: Build, split: str) -> list[dict[str, Any]]:
    """Some rows at even distances."""
    total = skill.count(split, build.size)
    wanted = {place * total // NUM_SHOWN for place in range(NUM_SHOWN)}
    return [row for place, row in enumerate(read_rows(build.folder, skill.name, split)) if place in wanted]


def _sheet_name(skill: str, split: str) -> str:
    return f"{skill}{PARTS_SHOWN[split]}.png"


def describe(card: dict[str, Any]) -> str:
    """The card for people, in Markdown."""
    rows = [
        (name, split, *(f"{part[key]:,}" for key in ("pictures", "questions", "regions")), _megabytes(part))
        for name, skill in card["skills"].items()
        for split, part in skill["parts"].items()
    ]
    counts = tabulate(rows, ("skill", "part", "pictures", "questions", "regions", "MB"), tablefmt="github")
    sources = tabulate(
        [
            (
                source["title"],
                source["package"],
                source["license"],
                ", ".join(source["splits"]),
                f"`{source['sha256']}`",
            )
            for source in card["sources"].values()
        ],
        ("source", "package", "license", "parts", "sha256"),
        tablefmt="github",
    )
    skills = "\n\n".join(_describe_skill(name, skill) for name, skill in card["skills"].items())
    return f"""# Drawn pictures with questions

Made by `hovle data build`, size {card["size"]}, seed {card["seed"]}; `card.json` has more counts. Each skill is a
folder of parquet files: `image`, `messages` (turns that do not depend on each other: train with
`independent_turns: true`), `regions` (what stands where), `source` (what a picture was made from), `metadata` (kinds
of questions, other answers that are right, what results may be split by).

{counts}

## Skills

{skills}

## Sources

{sources}
"""


def _megabytes(part: dict[str, Any]) -> str:
    return f"{part['picture_bytes'] / 1e6:,.1f}"


def _describe_skill(name: str, skill: dict[str, Any]) -> str:
    held_out = ", ".join(f"{count:,} {kind}s" for kind, count in skill["held_out"].items())
    learned = skill["parts"]["train"]
    kinds = ", ".join(
        f"{kind} {count:,} ({learned['majority_answers'][kind]['share']:.0%})"
        for kind, count in learned["kinds_of_question"].items()
    )
    return (
        f"### {name}\n\n{skill['description']} Questions to learn from, with the share of their "
        f"most frequent answer: {kinds}. Of what the test part was made from, "
        f"the training part has none: {held_out}.\n\n"
        + "\n".join(f"![{name}](sheets/{_sheet_name(name, split)})" for split in PARTS_SHOWN)
    )
