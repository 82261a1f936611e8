"""Time a model in the engines that are installed: the same prompts, on the same machine, in turns.

  hovle bench engines MODEL                                      all engines that are installed
  hovle bench engines MODEL --engines torch,onnx --rounds 5
  hovle bench engines MODEL --out eval/results/speed/engines.json

The model is exported for each engine first. Each engine runs in a process of its own; all take turns, prompt by
prompt, so that what else the machine does hurts all alike. Prompts show generated photographs of several shapes, and
one shows none; answers are greedy, of `--tokens` tokens each. The best round counts, the median shows how quiet the
machine was; a first round warms up.

  parity               how often the engine's next token is torch's, behind each prefix of torch's own answers
  tokens/s             of an answer, from its first token to its last
  time to first token  from a prompt's tiles and ids to its first token, the mean over prompts
  memory               the most that the engine's process held, Python, torch and the processor included
  size                 of the files it reads: decoder, stem, table of words

torch computes in float32, uncompiled. Beside them stands a peer, SmolVLM-256M's shapes in OpenVINO with random
weights: as many words, each picture as the tiles of 512 pixels that cover it and one of the whole. Engines that are
not installed are told, and left out unless --engines names them.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tabulate import tabulate
from transformers.generation.streamers import BaseStreamer

from ..export.command import export
from ..export.gguf import QUANTIZATIONS, file_name
from ..export.llama_cpp import LlamaCppForConditionalGeneration
from ..export.needs import need
from ..export.onnx_runtime import OnnxForConditionalGeneration
from ..export.openvino_runtime import OpenVinoForConditionalGeneration
from ..export.write_stem import STEM
from ..files.checkpoint_files import local_folder
from ..files.model_folder import short_name
from ..loading import load_model, load_processor
from ..machine.facts import environment
from ..machine.memory import peak_resident_bytes
from ..machine.processes import end_with_parent
from ..options import positive
from .data import generate_photograph
from .engines_peer import peer_prompt, write_peer

SHAPES: tuple[tuple[int, int] | None, ...] = ((448, 448), (1200, 600), (300, 700), None)
"""Width and height of the picture of each prompt; None for a prompt without one."""

QUESTION = "Describe what you see, and how many things there are."

PEER = "openvino SmolVLM-256M"
"""Another model, which `engines_peer.py` makes."""

PACKAGES = ("llama-cpp-python", "openvino", "onnxruntime")


@dataclass(frozen=True)
class Engine:
    """A way to run a model."""

    format: str | None
    """What `hovle export --to` writes for it; None for the model folder itself."""
    files: tuple[str, ...]
    """Patterns of the files it reads of its folder."""
    number_format: str
    loader: Any = None
    """Class that has `load`; None for torch."""
    options: tuple[str, ...] = ()
    """What `load` takes beside the folder."""
    needs: tuple[str, ...] = ()
    """What installs its runtime, and the module."""


ENGINES = {
    "torch": Engine(None, ("*.safetensors",), "float32"),
    **{
        f"llama.cpp {name}": Engine(
            "gguf",
            (file_name(name), STEM.as_posix()),
            name,
            LlamaCppForConditionalGeneration,
            (name,),
            ("hovle[llamacpp]", "llama_cpp", "gguf"),
        )
        for name in QUANTIZATIONS
    },
    "openvino": Engine(
        "openvino",
        ("openvino_*model.*",),
        "its own choice",
        OpenVinoForConditionalGeneration,
        needs=("hovle[openvino]", "openvino", "openvino_tokenizers"),
    ),
    PEER: Engine(
        PEER,
        ("openvino_*model.*",),
        "its own choice",
        OpenVinoForConditionalGeneration,
        needs=("hovle[openvino]", "openvino"),
    ),
    "onnx": Engine(
        "onnx",
        ("onnx/*",),
        "float32",
        OnnxForConditionalGeneration,
        needs=("hovle[onnx]", "onnx", "onnxscript", "onnxruntime"),
    ),
}
"""Name -> how it is run; torch comes first, as others are compared with it."""


def bench_engines(args: argparse.Namespace) -> dict:
    """Export the model, run the engines in turns, and return figures with their circumstances."""
    source = local_folder(args.model)
    processor = load_processor(source)
    prompts = [encode(processor, shape) for shape in SHAPES]
    num_words = [int((prompt["input_ids"] != processor.image_token_id).sum()) for prompt in prompts]
    peers_prompts = list(map(peer_prompt, SHAPES, num_words))
    chosen, left_out = choose(args.engines)
    with contextlib.ExitStack() as stack:
        exports = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folders, refused = export_for(chosen, source, exports, is_named=args.engines is not None)
        workers = {
            name: stack.enter_context(
                run_apart(name, folder, peers_prompts if name == PEER else prompts, args.threads)
            )
            for name, folder in folders.items()
        }
        rounds = measure(workers, len(prompts), args.tokens, args.rounds)
        expected = [workers["torch"].submit(answer, index, args.tokens).result().ids for index in range(len(prompts))]
        figures = {
            name: {
                "format": ENGINES[name].number_format,
                "size_bytes": size_of(ENGINES[name], folders[name]),
                "parity": None if name in ("torch", PEER) else parity(worker, expected),
                **rounds[name],
                "peak_memory_bytes": worker.submit(peak_resident_bytes).result(),
            }
            for name, worker in workers.items()
        }
    return {
        "bench": "engines",
        "model": short_name(args.model),
        "prompt_tokens": [prompt["input_ids"].shape[1] for prompt in prompts],
        "answer_tokens": args.tokens,
        "parity_positions": len(prompts) * args.tokens,
        "rounds": args.rounds,
        "engines": figures,
        "left_out": left_out | refused,
        "environment": {**environment(*PACKAGES), "threads": args.threads, "date": time.strftime("%Y-%m-%d")},
    }


def encode(processor: Any, shape: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    """A prompt about a generated photograph of this width and height, or about none."""
    content: list[dict] = [{"type": "text", "text": QUESTION}]
    if shape is not None:
        picture = generate_photograph(sum(shape)).resize(shape, Image.Resampling.BICUBIC)
        content.insert(0, {"type": "image", "image": picture})
    messages = [{"role": "user", "content": content}]
    return dict(
        processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


def choose(names: str | None) -> tuple[list[str], dict[str, str]]:
    """Engines to run, torch first, and why others cannot be.

    Args:
        names: With commas between them, each of which must be installed; None for all that are.
    """
    wanted = list(ENGINES) if names is None else [name.strip() for name in names.split(",")]
    if unknown := [name for name in wanted if name not in ENGINES]:
        raise ValueError(f"--engines: {', '.join(unknown)} is none of {', '.join(ENGINES)}.")
    left_out: dict[str, str] = {}
    for name in wanted:
        try:
            if ENGINES[name].needs:
                need(f"The engine {name}", *ENGINES[name].needs)
        except ValueError as error:
            if names is not None:
                raise
            left_out[name] = str(error)
    return ["torch", *(name for name in wanted if name not in {"torch", *left_out})], left_out


def export_for(
    engines: list[str], source: Path, folder: Path, is_named: bool
) -> tuple[dict[str, Path], dict[str, str]]:
    """Where each engine finds its files, and why a format is none for the model.

    Args:
        engines: Their names.
        source: The model's folder.
        folder: Where to export to, a folder for each format.
        is_named: Whether the user asked for these engines, so that one that cannot be had is an error.
    """
    folders, refused = {}, {}
    for name in engines:
        to = ENGINES[name].format
        target = source if to is None else folder / to
        try:
            if not target.exists():
                assert to is not None
                if name == PEER:
                    write_peer(target)
                else:
                    export(source, target, to)
        except ValueError as error:
            if is_named:
                raise
            refused[name] = str(error)
        else:
            folders[name] = target
    return folders, refused


def size_of(engine: Engine, folder: Path) -> int:
    """Bytes of the files that an engine reads."""
    return sum(path.stat().st_size for pattern in engine.files for path in folder.glob(pattern))


# ---------------------------------------------------------------------------------------------- in an engine's process


@dataclass(frozen=True)
class Answer:
    """What an engine said, and when."""

    ids: list[int]
    seconds_to_first_token: float
    seconds_of_others: float


@contextlib.contextmanager
def run_apart(name: str, folder: Path, prompts: list[dict], num_threads: int) -> Iterator[ProcessPoolExecutor]:
    """A process that has loaded a model in an engine, for `answer` and `next_tokens`; it ends with the context."""
    context = multiprocessing.get_context("spawn")
    arguments = (name, folder, prompts, num_threads)
    with ProcessPoolExecutor(1, mp_context=context, initializer=_load, initargs=arguments) as executor:
        yield executor


_HERE: dict[str, Any] = {}
"""Model and prompts of this process."""


def _load(name: str, folder: Path, prompts: list[dict], num_threads: int) -> None:
    end_with_parent()
    torch.set_num_threads(num_threads)
    engine = ENGINES[name]
    if engine.loader is None:
        model = load_model(folder, dtype=torch.float32).eval()
    else:
        model = engine.loader.load(folder, *engine.options)
    _HERE.update(model=model, prompts=prompts)


class _Stopwatch(BaseStreamer):
    """Notes when the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to note."""


def answer(index: int, num_tokens: int) -> Answer:
    """Answer a prompt of this process greedily, as if nothing had been read before.

    Args:
        index: Which prompt.
        num_tokens: How many tokens, whether or not the model would have ended before.
    """
    stopwatch = _Stopwatch()
    started_at = time.perf_counter()
    ids = _generate(_HERE["prompts"][index], num_tokens, streamer=stopwatch)
    _, first, *others = stopwatch.times
    return Answer(ids, first - started_at, (others[-1] if others else first) - first)


def next_tokens(index: int, ids: list[int]) -> list[int]:
    """The likeliest token behind a prompt of this process and each beginning of an answer."""
    prompt = _HERE["prompts"][index]
    found = []
    for length in range(len(ids)):
        said = torch.tensor([ids[:length]], dtype=torch.long)
        longer = {
            **prompt,
            "input_ids": torch.cat([prompt["input_ids"], said], dim=1),
            "attention_mask": torch.cat([prompt["attention_mask"], torch.ones_like(said)], dim=1),
        }
        found += _generate(longer, 1, forget=length == 0)
    return found


def _generate(prompt: dict, num_tokens: int, forget: bool = True, **options: Any) -> list[int]:
    model = _HERE["model"]
    if forget and hasattr(model, "forget"):  # torch keeps nothing from one call to the next
        model.forget()
    generated = model.generate(
        **prompt, do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens, **options
    )
    return generated[0, prompt["input_ids"].shape[1] :].tolist()


# ---------------------------------------------------------------------------------------------- figures


def measure(
    workers: dict[str, ProcessPoolExecutor], num_prompts: int, num_tokens: int, num_rounds: int
) -> dict[str, dict[str, float]]:
    """Let engines take turns, prompt by prompt, and return the best and the median round of each."""
    first: dict[str, list[float]] = {name: [] for name in workers}
    rate: dict[str, list[float]] = {name: [] for name in workers}
    for number in range(num_rounds + 1):
        answers: dict[str, list[Answer]] = {name: [] for name in workers}
        for index, (name, worker) in itertools.product(range(num_prompts), workers.items()):
            answers[name].append(worker.submit(answer, index, num_tokens).result())
        if number:  # the first round warms up
            for name, given in answers.items():
                first[name].append(statistics.mean(item.seconds_to_first_token for item in given))
                seconds = sum(item.seconds_of_others for item in given)
                rate[name].append(num_prompts * (num_tokens - 1) / seconds)
    return {
        name: {
            "tokens_per_second": round(max(rate[name]), 2),
            "median_tokens_per_second": round(statistics.median(rate[name]), 2),
            "seconds_to_first_token": round(min(first[name]), 4),
            "median_seconds_to_first_token": round(statistics.median(first[name]), 4),
        }
        for name in workers
    }


def parity(worker: ProcessPoolExecutor, expected: list[list[int]]) -> float:
    """Share of torch's tokens that are the engine's next ones, too."""
    pairs = [
        pair
        for index, ids in enumerate(expected)
        for pair in zip(worker.submit(next_tokens, index, ids).result(), ids, strict=True)
    ]
    return round(statistics.mean(found == wanted for found, wanted in pairs), 4)


def table(result: dict) -> str:
    """Figures in columns, a line for each engine, and a line for each that was left out."""
    rows = [
        [
            name,
            item["format"],
            f"{item['size_bytes'] / 1e6:,.0f} MB",
            "another model" if name == PEER else "reference" if item["parity"] is None else f"{item['parity']:.1%}",
            f"{item['tokens_per_second']:.1f}",
            f"{item['seconds_to_first_token']:.2f} s",
            f"{item['peak_memory_bytes'] / 2**30:.2f} GiB",
        ]
        for name, item in result["engines"].items()
    ]
    heads = ["engine", "format", "size", "parity", "tokens/s", "time to first token", "memory"]
    left_out = [f"left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join([tabulate(rows, heads, disable_numparse=True), *left_out])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle bench engines`."""
    parser.add_argument("model", metavar="MODEL", help="model folder or Hub id; a flat HoVLE with its processor")
    parser.add_argument("--out", metavar="FILE", help="also write the result as JSON")
    parser.add_argument(
        "--engines", metavar="NAMES", help=f"with commas between them (default: all installed): {', '.join(ENGINES)}"
    )
    parser.add_argument("--rounds", type=positive, default=5, metavar="N", help="rounds that count (default: 5)")
    parser.add_argument(
        "--tokens", type=answer_length, default=64, metavar="N", help="tokens of an answer (default: 64)"
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=torch.get_num_threads(),
        metavar="N",
        help="of each engine (default: torch's)",
    )


def answer_length(text: str) -> int:
    """A number of tokens between whose first and last time passes."""
    number = positive(text)
    if number < 2:
        raise argparse.ArgumentTypeError(f"must be at least 2, as a rate needs a first and a last token, got {text}")
    return number


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write the result."""
    result = bench_engines(args)
    print(table(result))  # noqa: T201 - this is the command's output
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0
