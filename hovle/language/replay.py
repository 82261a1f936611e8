"""Let a language model write the text on which it is held: conversations and prose of its own.

examples:
  hovle data replay asset:smollm2-135m-instruct --tokens 500000 --out replay.jsonl
  hovle data replay models/hovle --tokens 100000 --out replay.jsonl --chats 1
  hovle data replay gpt2 --tokens 100000 --out replay.jsonl --chats 0      a model that knows no chats

What a model was trained on is seldom known; what it says by itself is near it. FILE holds JSON lines for a recipe's
`language.source`: {"messages": [...]} with a user's turn, which the model writes too once its chat template has opened
one, and a reply (the way of Magpie, arXiv 2406.08464); and {"text": "..."}, which goes on from a frequent word. A
text or a reply is cut at --length tokens, a user's turn at a quarter of them. Of a HoVLE its language model writes, as
it is there. Repeated documents and those that run in circles are left out and counted.

The same model, seed and options give the same file on the same machine. An interrupted or killed run goes on where it
was when it is started again; until it is complete, FILE.partial holds what there is.
"""

import argparse
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from ..assets import resolve_asset
from ..errors import StopRunError
from ..files.atomic import rename_durably
from ..files.documents import load_json
from ..files.fingerprints import fingerprint_files
from ..files.model_folder import refuse_missing_folder
from ..loading import load_model, load_processor, reading
from ..machine.speed import dtype_name, fastest_dtype
from ..model.backbones import zero_residual_writers
from ..model.configuration_hovle import HoVLEConfig
from ..model.language_model import load_language_model, load_tokenizer
from ..options import positive

MOST_EMPTY_BATCHES = 20
"""So many batches in a row from which nothing can be kept end the run."""

NUM_FIRST_WORDS = 2000
"""Prose goes on from one of the most frequent words: a tokenizer learns those first."""

MOST_LIKELY = 2048
"""Tokens a word is drawn from at most. Sorting a whole vocabulary and drawing from it takes longer on a CPU than the
model does; of SmolLM2-135M's, 95 % of the probability lie in fewer in all but rare places."""

MARK = "HOVLE-USER-TURN"
"""Stands for a user's turn when a chat template is looked at."""


@dataclass(frozen=True, kw_only=True)
class ReplaySettings:
    """All that decides what is written, but for its length."""

    model: str
    """Hash of the model's files."""
    seed: int
    chats: float
    """Share of the tokens that are conversations."""
    batch_size: int
    length: int
    """Most tokens the model writes of a text or a reply. A user's turn, mostly short, is cut at a quarter of them: a
    batch takes as long as its longest row."""
    temperature: float
    top_p: float
    dtype: str


@dataclass
class Progress:
    """How far a file is after some whole batches, kept beside it."""

    settings: ReplaySettings
    num_batches: int = 0
    num_bytes: int = 0
    """Of the file; what is beyond was written by a batch that did not end."""
    num_tokens: dict[str, int] = field(default_factory=lambda: {"chats": 0, "prose": 0})
    counts: dict[str, int] = field(default_factory=dict)
    """Documents that were `kept`, and those that were not, by reason."""

    def count(self, what: str) -> None:
        """Note one document."""
        self.counts[what] = self.counts.get(what, 0) + 1

    @property
    def total(self) -> int:
        """Tokens of all documents."""
        return sum(self.num_tokens.values())

    def save(self, path: Path) -> None:
        """Replace the file of an earlier batch."""
        unfinished = path.with_name(f"{path.name}.writing")
        unfinished.write_text(json.dumps(dataclasses.asdict(self)), encoding="utf-8")
        os.replace(unfinished, path)

    @classmethod
    def load(cls, path: Path) -> "Progress":
        """Read what `save` wrote."""
        values = load_json(path)
        return cls(**{**values, "settings": ReplaySettings(**values["settings"])})


@dataclass(frozen=True)
class Document:
    """What the model wrote."""

    row: dict
    """The JSON line."""
    key: str
    """Two documents of the same key say the same."""
    num_tokens: int


class ChatTurns:
    """How a chat template opens and ends a user's turn.

    Args:
        tokenizer: With the template.

    Raises:
        ValueError: For a template that shows no user's turn, or ends it with no special token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        advice = "Write prose alone with --chats 0, or name a language model with a template of its own."
        if not tokenizer.chat_template:
            raise ValueError(f"The tokenizer has no chat template, so it opens no user's turn. {advice}")
        try:
            rendered = str(tokenizer.apply_chat_template([{"role": "user", "content": MARK}], tokenize=False))
        except jinja2.TemplateError as error:
            raise ValueError(f"The chat template refuses a user's turn ({error}). {advice}") from error
        header, found, rest = rendered.partition(MARK)
        if not found:
            raise ValueError(f"The chat template shows no user's turn: it makes {rendered!r:.80} of one. {advice}")
        self.header: list[int] = tokenizer(header, add_special_tokens=False)["input_ids"]
        ends = tokenizer(rest, add_special_tokens=False)["input_ids"]
        if not self.header or not ends or ends[0] not in tokenizer.all_special_ids:
            raise ValueError(
                f"The chat template opens a user's turn with {header!r:.80} and ends it with {rest!r:.80}: no special "
                f"token tells where the model's own user has finished. {advice}"
            )
        self.end: int = ends[0]


class Writer:
    """Lets a model write batches of documents; each depends on the settings and its number alone.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: Its own.
        settings: What decides the documents.

    Raises:
        ValueError: For a chat template without user's turns where chats are wanted, and documents longer than the
            model's positions.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, settings: ReplaySettings):
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.turns = ChatTurns(tokenizer) if settings.chats else None
        self.start: list[int] = tokenizer("")["input_ids"]  # what begins a text, for some
        self.words = first_words(tokenizer) if settings.chats < 1 else []
        ends = {tokenizer.eos_token_id, *listed(model.generation_config.eos_token_id)} - {None}
        self.ends = sorted(ends | ({self.turns.end} if self.turns else set()))
        if not self.ends:
            raise ValueError("Neither tokenizer nor model name a token that ends a text.")
        vocab_size = model.get_output_embeddings().weight.shape[0]
        unwanted = {*tokenizer.all_special_ids, *range(len(tokenizer), vocab_size)} - set(self.ends)
        self.unwanted = sorted(token for token in unwanted if token < vocab_size)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = len(self.turns.header) + settings.length * 5 // 4 + 64 if self.turns else settings.length + 8
        if positions is not None and longest > positions:
            raise ValueError(f"--length {settings.length} may take {longest} positions, the model has {positions}.")

    def chats(self, number: int, seen: set[str]) -> Iterator[Document | str]:
        """Conversations of a batch, or why one cannot be kept; user's turns of the keys seen get no reply."""
        assert self.turns is not None
        prompts = [self.turns.header] * self.settings.batch_size
        asked: dict[str, str] = {}
        for ids in self._continue(prompts, 2 * number, max(1, self.settings.length // 4)):
            text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            if fault := fault_of(ids, text):
                yield fault
            elif key_of(text) in seen or key_of(text) in asked:
                yield "repeated"
            else:
                asked[key_of(text)] = text
        chats = [[{"role": "user", "content": text}] for text in asked.values()]
        prompts = [self._encode(chat, add_generation_prompt=True) for chat in chats]
        replies = self._continue(prompts, 2 * number + 1, self.settings.length) if prompts else []
        for key, chat, ids in zip(asked, chats, replies, strict=True):
            reply = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
            if fault := fault_of(ids, reply):
                yield fault
                continue
            messages = [*chat, {"role": "assistant", "content": reply}]
            yield Document({"messages": messages}, key, len(self._encode(messages)))

    def prose(self, number: int, seen: set[str]) -> Iterator[Document | str]:
        """Texts of a batch, or why one cannot be kept."""
        generator = torch.Generator().manual_seed(self.settings.seed * 7_368_787 + number)
        drawn = torch.randint(len(self.words), (self.settings.batch_size,), generator=generator).tolist()
        prompts = [[*self.start, self.words[place]] for place in drawn]
        own: set[str] = set()
        for prompt, ids in zip(prompts, self._continue(prompts, 2 * number, self.settings.length), strict=True):
            text = self.tokenizer.decode([*prompt, *ids], skip_special_tokens=True).strip()
            key = key_of(text)
            if fault := fault_of(ids, text):
                yield fault
            elif key in seen or key in own:
                yield "repeated"
            else:
                own.add(key)
                yield Document({"text": text}, key, 1 + len(ids))

    def _encode(self, chat: list[dict], **options: Any) -> list[int]:
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, **options)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[arg-type]  # one chat

    @torch.inference_mode()
    def _continue(self, prompts: Sequence[list[int]], draw: int, length: int) -> list[list[int]]:
        """Up to so many sampled ids after each prompt, without the one that ends them; a draw number is used once."""
        width = max(map(len, prompts))
        padding = self.ends[0]
        input_ids = torch.tensor([[padding] * (width - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        device = self.model.device
        self.model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=length, eos_token_id=self.ends, pad_token_id=padding
        )
        generator = torch.Generator(device).manual_seed(self.settings.seed * 15_485_863 + draw)
        found = self.model.generate(
            input_ids=input_ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=LogitsProcessorList([Draw(self.settings, self.unwanted, generator)]),
        )
        return [until_end(ids, self.ends) for ids in found[:, width:].tolist()]


class Draw(LogitsProcessor):
    """Leaves of each row's logits `(B, V)` one alone, drawn from the likeliest `top_p`: greedy decoding takes it.

    Args:
        settings: Temperature and `top_p`.
        unwanted: Tokens that are never drawn.
        generator: Draws.
    """

    def __init__(self, settings: ReplaySettings, unwanted: list[int], generator: torch.Generator):
        self.temperature, self.top_p = settings.temperature, settings.top_p
        self.unwanted, self.generator = unwanted, generator

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Draw for each row."""
        logits = scores.float() / self.temperature
        logits[:, self.unwanted] = -torch.inf
        log_total = logits.logsumexp(dim=-1, keepdim=True)
        likeliest, tokens = logits.topk(min(MOST_LIKELY, logits.shape[-1]), dim=-1)
        shares = (likeliest - log_total).exp()
        before = shares.cumsum(dim=-1) - shares
        drawn = torch.multinomial(shares * (before < self.top_p), 1, generator=self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens.gather(1, drawn), 0.0)


def until_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """The ids before the first of some."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]


def listed(value: Any) -> list:
    """A value that may be a list of them."""
    return value if isinstance(value, list) else [value]


def first_words(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that are frequent whole words; ValueError where there are none."""
    special = set(tokenizer.all_special_ids)
    found = []
    for token in range(len(tokenizer)):
        word = "" if token in special else tokenizer.decode([token])
        if word.strip().isalpha() and len(word.strip()) > 1:
            found.append(token)
        if len(found) == NUM_FIRST_WORDS:
            break
    if not found:
        raise ValueError("The tokenizer has no token that is a word, from which prose could go on: write --chats 1.")
    return found


def key_of(text: str) -> str:
    """Equal for texts that differ in case and white space only."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).hexdigest()


def fault_of(ids: Sequence[int], text: str) -> str | None:
    """Why a text is of no use, if it is."""
    if not ids or not text:
        return "empty"
    return "in circles" if runs_in_circles(ids) else None


def runs_in_circles(ids: Sequence[int], size: int = 4) -> bool:
    """Whether fewer than half of a text's sequences of `size` tokens are different ones, or those of its last part."""

    def repeats(part: Sequence[int]) -> bool:
        grams = [tuple(part[place : place + size]) for place in range(len(part) - size + 1)]
        return len(grams) >= 2 * size and 2 * len(set(grams)) < len(grams)

    return repeats(ids) or repeats(ids[-8 * size :])


def write_replay(writer: Writer, num_tokens: int, path: Path) -> Progress:
    """Write documents of so many tokens, or go on where an earlier call was interrupted.

    Args:
        writer: Lets the model write.
        num_tokens: About as training will read them; the last document may end beyond.
        path: Appears when it is complete.

    Raises:
        ValueError: When there is such a file, or the unfinished one was begun with other settings.
        StopRunError: When nothing that is written can be kept.
    """
    partial, beside = path.with_name(f"{path.name}.partial"), path.with_name(f"{path.name}.progress")
    if path.exists():
        raise ValueError(f"{path} exists: name another file, or delete it.")
    progress, seen = resume(partial, beside, writer.settings)
    num_empty = 0
    with (
        partial.open("r+b") as file,
        tqdm(total=num_tokens, initial=progress.total, desc=path.name, unit="token", unit_scale=True) as bar,
    ):
        file.truncate(progress.num_bytes)
        file.seek(progress.num_bytes)
        while progress.total < num_tokens:
            before = progress.total
            kind = next_kind(progress)
            for document in getattr(writer, kind)(progress.num_batches, seen):
                if isinstance(document, str):
                    progress.count(document)
                elif progress.total < num_tokens:
                    file.write(json.dumps(document.row, ensure_ascii=False).encode() + b"\n")
                    seen.add(document.key)
                    progress.num_tokens[kind] += document.num_tokens
                    progress.count("kept")
            file.flush()
            os.fsync(file.fileno())
            progress.num_batches += 1
            progress.num_bytes = file.tell()
            progress.save(beside)
            bar.update(progress.total - before)
            bar.set_postfix(progress.counts)
            num_empty = 0 if progress.total > before else num_empty + 1
            if num_empty == MOST_EMPTY_BATCHES:
                raise StopRunError(f"{num_empty} batches in a row gave nothing to keep: {describe(progress)}.")
    rename_durably(partial, path)
    beside.unlink()
    return progress


def next_kind(progress: Progress) -> str:
    """What the next batch holds, so that the shares come out right."""
    wanted = progress.settings.chats
    is_short = progress.num_tokens["chats"] <= wanted * progress.total
    return "chats" if wanted and is_short else "prose" if wanted < 1 else "chats"


def resume(partial: Path, beside: Path, settings: ReplaySettings) -> tuple[Progress, set[str]]:
    """Where an unfinished file stands and the keys of what it holds; begins one where there is none."""
    if not (partial.is_file() and beside.is_file()):
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(b"")
        progress = Progress(settings)
        progress.save(beside)
        return progress, set()
    progress = Progress.load(beside)
    old, new = dataclasses.asdict(progress.settings), dataclasses.asdict(settings)
    changed = [f"{name}: {old[name]} -> {new[name]}" for name in new if old[name] != new[name]]
    if changed:
        raise ValueError(
            f"{partial} was begun with other settings ({'; '.join(changed)}): give those, or delete it and "
            f"{beside.name}."
        )
    with partial.open("rb") as file:
        rows = [json.loads(line) for line in file.read(progress.num_bytes).splitlines()]
    return progress, {key_of(row["text"] if "text" in row else row["messages"][0]["content"]) for row in rows}


def describe(progress: Progress) -> str:
    """Counts in words."""
    others = [f"{count:,} {name}" for name, count in sorted(progress.counts.items()) if name != "kept"]
    return f"{progress.counts.get('kept', 0):,} documents kept; left out: {', '.join(others) or 'none'}"


def load_bare_model(name: str, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """A language model with its tokenizer; of a HoVLE, its own with holistic layers that do nothing."""
    if load_json(Path(name) / "config.json").get("model_type") != HoVLEConfig.model_type:
        with reading(name):
            return load_language_model(name, dtype=dtype).eval(), load_tokenizer(name)
    processor, model = load_processor(name), load_model(name, dtype=dtype).eval()
    for layer in model.model.embedding_layers:
        zero_residual_writers(layer)
    model.config.normalize_encoder_output = False
    processor.tokenizer.chat_template = processor.chat_template
    return model, processor.tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle data replay`."""
    parser.add_argument("model", metavar="MODEL", help="folder of a causal language model or a HoVLE, or asset:NAME")
    parser.add_argument("--tokens", type=positive, required=True, metavar="N", help="tokens to write")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON lines")
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument("--chats", type=float, default=0.5, metavar="R", help="share of the tokens, else prose (0.5)")
    parser.add_argument("--batch", type=positive, default=96, metavar="N", help="documents written together (96)")
    parser.add_argument("--length", type=positive, default=256, metavar="N", help="tokens of a text or reply (256)")
    parser.add_argument("--temperature", type=float, default=1.0, help="below 1 the likelier is preferred (1.0)")
    parser.add_argument("--top-p", type=float, default=0.95, help="draw from the likeliest so much (0.95)")
    parser.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="number format")


def run(args: argparse.Namespace) -> int:
    """Write the file, or the rest of it."""
    if not 0 <= args.chats <= 1 or not 0 < args.top_p <= 1 or not args.temperature > 0:
        raise ValueError("--chats must lie in 0..1, --top-p in 0..1 above 0, and --temperature above 0.")
    name = resolve_asset(args.model)
    refuse_missing_folder(name)
    if not Path(name).is_dir():
        raise ValueError(f"{name} is no folder: `hf download {name} --local-dir FOLDER` makes one.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    beside = args.out.with_name(f"{args.out.name}.progress")
    dtype = args.dtype
    if dtype == "auto":  # measured at most once
        dtype = Progress.load(beside).settings.dtype if beside.is_file() else dtype_name(fastest_dtype(device))
    files = sorted(path for path in Path(name).iterdir() if path.suffix in (".json", ".safetensors", ".jinja"))
    settings = ReplaySettings(
        model=fingerprint_files(files, name),
        seed=args.seed,
        chats=args.chats,
        batch_size=args.batch,
        length=args.length,
        temperature=args.temperature,
        top_p=args.top_p,
        dtype=dtype,
    )
    model, tokenizer = load_bare_model(name, getattr(torch, dtype))
    progress = write_replay(Writer(model.to(device), tokenizer, settings), args.tokens, args.out)
    shares = ", ".join(f"{count:,} tokens of {kind}" for kind, count in progress.num_tokens.items())
    print(f"{args.out}: {shares}; {describe(progress)}")  # noqa: T201 - the output
    return 0
