"""Questions about pictures that are not there, with replies that say so: what a model must not answer by guessing."""

import json
import random
from collections.abc import Sequence

from .building import Build
from .shards import read_rows
from .skill import Skill

FILE = "no-picture.jsonl"
"""Beside the shards: conversations of text alone, which a recipe reads as a `chat` source."""

EVERY = 20
"""One of so many pictures to learn from gives a question."""

REPLIES = (
    "There is no picture. Please send one.",
    "I cannot see a picture; there is none in your message.",
    "No picture came with your question, so I cannot say.",
    "There is no picture here that I could look at.",
)


def write_no_picture(build: Build, skills: Sequence[Skill]) -> int:
    """Write the file from the questions of the training part; returns how many conversations it has."""
    lines = []
    for skill in skills:
        rng = random.Random(f"{build.seed}/no picture/{skill.name}")
        for number, row in enumerate(read_rows(build.folder, skill.name, "train", ["messages"])):
            if number % EVERY == 0:
                asked = rng.choice(row["messages"][::2])["content"]
                turns = (("user", asked), ("assistant", rng.choice(REPLIES)))
                lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}))
    (build.folder / FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)
