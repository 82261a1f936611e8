"""Stand-in for your own data: `python train/example/prepare.py example_data` writes pictures and a LLaVA-style JSON.

Copies 600 easy-VQA pictures into `pictures/` and writes `conversations.json` with three questions about each. Put your
own folder and file in their place.
"""

import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path

from hovle.assets import easy_vqa
from hovle.assets.vqa_questions import Question, load_questions

NUM_PICTURES = 600
QUESTIONS_PER_PICTURE = 3


def conversation(asked: list[Question]) -> dict:
    """One entry of a LLaVA-style file: turns about one picture, `<image>` where it is shown."""
    turns = []
    for question in asked:
        mark = "<image>\n" if not turns else ""
        turns.append({"from": "human", "value": mark + question.text})
        turns.append({"from": "gpt", "value": question.answer})
    return {"image": asked[0].picture.name, "conversations": turns}


def main(folder: Path) -> None:
    """Write pictures and conversations."""
    asked_about = defaultdict(list)
    for question in load_questions(easy_vqa() / "train"):
        asked_about[question.picture].append(question)
    pictures = sorted(asked_about)[:NUM_PICTURES]
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        shutil.copy(picture, folder / "pictures" / picture.name)
    entries = [conversation(asked_about[picture][:QUESTIONS_PER_PICTURE]) for picture in pictures]
    (folder / "conversations.json").write_text(json.dumps(entries, indent=1), encoding="utf-8")
    sys.stdout.write(f"{len(pictures)} pictures and {len(entries)} conversations in {folder}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
