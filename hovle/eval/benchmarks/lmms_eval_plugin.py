"""HoVLE as a model of lmms-eval: `lmms-eval --model hovle --model_args pretrained=DIR,max_tiles=12 --tasks ...`.

Installed beside lmms-eval, hovle is found through the entry point group `lmms_eval.models`. `HoVLEChat` speaks the
chat protocol, which is the default; `HoVLESimple` (`--force_simple`) the older one, in which lmms-eval can ask for
likelihoods, too.

Questions that begin with the same pictures are asked one after the other, and the pictures are read once; all others
share batches. In float32 answers depend on neither: prompts are padded on the left, and every answer is read up to its
own end. In bfloat16 padding and what was read before change roundings, and with them now and then an answer.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm.auto import tqdm

from ...inference.answers import answer_lengths
from ...inference.prefixes import NOT_FOR_PREFIXES, PrefixCache
from ...loading import load_model, load_processor
from ...model.backbones import CACHE
from ..results import digest

logger = logging.getLogger(__name__)

WINDOW = 4
"""Batches whose prompts are looked at together, so that prompts of like length share a batch and little is padded."""

SAMPLING = ("temperature", "top_p", "top_k")
"""Arguments that matter only where answers are drawn."""

PASSED_ON = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")
"""Arguments of tasks that `generate` takes as they are."""

WITHOUT_MEANING = ("image_aspect_ratio", "max_agentic_steps")
"""Arguments of tasks that are meant for other models or for the harness itself."""

Pair = tuple[list[dict], str]
"""A chat, and a continuation that is weighed as its reply."""

DEFAULT_STOPS = ["\n\n"]
"""What lmms-eval puts into the settings of every task that names no stops (`TaskConfig.until`)."""


def manifest():
    """What lmms-eval's registry reads: the model id and where its classes are."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="hovle",
        chat_class_path=f"{__name__}.{HoVLEChat.__name__}",
        simple_class_path=f"{__name__}.{HoVLESimple.__name__}",
    )


@dataclass(frozen=True)
class Answer:
    """What the model said to one prompt."""

    text: str
    num_tokens: int
    """Generated tokens up to the end token, which counts."""
    num_prompt_tokens: int


class Likelihood(GenerationResult):
    """Loss and greediness of a reply: unpacks as that pair, and comes through lmms-eval as one.

    Its evaluator (0.7.3) turns a plain pair into a string, which its own multiple-choice tasks cannot read then; what
    a `GenerationResult` holds it hands on untouched.
    """

    def __init__(self, loss: float, is_greedy: bool):
        super().__init__(text=(loss, is_greedy))

    def __iter__(self) -> Iterator:
        return iter(self.text)


class HoVLEChat(lmms):
    """A HoVLE answering lmms-eval's chat requests.

    Attributes:
        num_reused: Tokens of prompts answered or weighed by the last call that did not have to be read again.

    Args:
        pretrained: Model folder or Hub id.
        device: Such as "cuda:1"; by default this process's GPU, or the CPU.
        dtype: Number format: "float32", "bfloat16", or "auto" for that of the checkpoint.
        batch_size: Prompts generated together.
        attn_implementation: As in `from_pretrained`.
        min_tiles: Fewest tiles of a picture; the model's own limit by default.
        max_tiles: Most tiles of a picture, the thumbnail not counted; the model's own limit by default.
        max_image_tokens: Tokens the pictures of one prompt may take together.
        label_pictures: Number the pictures in the prompt.
        system_prompt: Text, or a file with it, put before conversations that have no system message.
        max_new_tokens: Longest answer in tokens where a task sets no limit.
        keep_loaded: Keep the model when an evaluation ends; lmms-eval drops it to make room for a local judge.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        attn_implementation: str | None = None,
        min_tiles: int | None = None,
        max_tiles: int | None = None,
        max_image_tokens: int | None = None,
        label_pictures: bool = False,
        system_prompt: str = "",
        max_new_tokens: int = 1024,
        keep_loaded: bool = False,
    ):
        super().__init__()
        self.batch_size = _whole_number(batch_size, "batch_size")
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        # lmms-eval would start one even for a single process, and with it a state all of the process shares.
        self.accelerator = _accelerator() if self._world_size > 1 else None
        local = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        self.device = torch.device(device or (local if torch.cuda.is_available() else "cpu"))
        arguments = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
        self.processor = load_processor(pretrained)
        self.model = load_model(pretrained, dtype=dtype, **arguments).to(self.device).eval()
        self.prefixes = PrefixCache(self.model)
        self.num_reused = 0
        self.label_pictures = label_pictures
        self.system_prompt = self._resolve_system_prompt(system_prompt)
        self.max_new_tokens = max_new_tokens
        self.keep_loaded = keep_loaded
        self.prompts_shown: list[str] = []
        """Digests of the chats answered or weighed so far, with their settings; whoever reads them may clear them."""
        self.set_tiles(min_tiles=min_tiles, max_tiles=max_tiles, max_image_tokens=max_image_tokens)

    def set_tiles(self, **limits: int | None) -> None:
        """Change `min_tiles`, `max_tiles` and `max_image_tokens`; what is None or missing is the model's own."""
        self.tile_limits = {name: limit for name, limit in limits.items() if limit is not None}

    def clean(self) -> None:
        """Called by lmms-eval when all answers are there."""
        if not self.keep_loaded:
            super().clean()

    # --- what lmms-eval calls ----------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer one prompt each, in the order of the requests."""
        answers = self._answer(requests, lambda place: self._first_chat(requests[place]), "Answering")
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], self._settings(request)), answer.text)
        return [_result(answer) for answer in answers]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Hold a conversation each whose next prompt the task makes from the answers so far; all advance together.

        Returns:
            Every request's answers, one per round.
        """
        replies: list[list[str]] = [[] for _ in requests]
        notes: list[Any] = [None] * len(requests)
        chats: dict[int, list[dict]] = {place: self._first_chat(request) for place, request in enumerate(requests)}
        while chats:
            asked = [requests[place] for place in chats]
            answers = self._answer(asked, list(chats.values()).__getitem__, "Answering a round")
            places, chats = list(chats), {}
            for place, answer in zip(places, answers, strict=True):
                replies[place].append(answer.text)
                chat, notes[place] = self._next_chat(requests[place], replies[place], notes[place])
                if chat is not None:
                    chats[place] = chat
        return replies

    def loglikelihood(self, requests: list[Instance]) -> list[Likelihood]:
        """Measure how likely each continuation is as the model's reply.

        Returns:
            For each request the mean negative log-likelihood of the continuation's tokens in nats, which is what
            lmms-eval's multiple-choice tasks compare (the smallest wins), and whether greedy decoding would give it.
        """
        results: dict[int, Likelihood] = {}
        waiting: dict[int, Pair] = {}
        self.num_reused = 0

        def weigh_waiting() -> None:
            results.update(zip(waiting, self._weigh(list(waiting.values())), strict=True))
            waiting.clear()

        pairs = enumerate(self._likelihood_chat(request) for request in requests)
        with tqdm(total=len(requests), desc="Weighing", disable=self.rank != 0) as bar:
            for _, run in itertools.groupby(pairs, key=lambda item: beginning(item[1][0]) or item[0]):
                batch = dict(run)  # neighbours that begin alike, such as the choices of one question
                self.prompts_shown += [digest([outline(chat), continuation]) for chat, continuation in batch.values()]
                if len(batch) > 1:
                    results |= {place: self._weigh_behind(*pair) for place, pair in batch.items()}
                    self.prefixes.clear()
                else:
                    waiting |= batch
                if len(waiting) == self.batch_size:
                    weigh_waiting()
                bar.update(len(batch))
        if waiting:
            weigh_waiting()
        return [results[place] for place in range(len(requests))]

    # --- requests to chats -------------------------------------------------------------------------------------------

    def _document(self, request: Instance) -> Any:
        doc_id, task, split = request.args[-3:]
        return self.task_dict[task][split][doc_id]

    def _settings(self, request: Instance) -> dict:
        return request.args[2] or {}

    def _first_chat(self, request: Instance) -> list[dict]:
        return self._with_system(as_chat(request.args[1](self._document(request))))

    def _next_chat(self, request: Instance, replies: list[str], notes: Any) -> tuple[list[dict] | None, Any]:
        """Ask the task for the chat of the next round; None when it says the conversation is over."""
        given = request.args[1](
            self._document(request), round_idx=len(replies), previous_output=list(replies), previous_round_info=notes
        )
        if not (isinstance(given, tuple) and len(given) == 4):
            return None, notes
        messages, is_over, _, notes = given
        return (None if is_over else self._with_system(as_chat(messages))), notes

    def _likelihood_chat(self, request: Instance) -> tuple[list[dict], str]:
        """The chat before the continuation, and the continuation."""
        context, target, visuals = request.args[:3]
        continuation = target if isinstance(target, str) else target(self._document(request))
        pictures = visuals(self._document(request)) if callable(visuals) else None
        return self._with_system(_chat_of(context, pictures)), continuation

    def _with_system(self, chat: list[dict]) -> list[dict]:
        if not self.system_prompt or (chat and chat[0]["role"] == "system"):
            return chat
        return [{"role": "system", "content": [{"type": "text", "text": self.system_prompt}]}, *chat]

    # --- chats to answers --------------------------------------------------------------------------------------------

    def _answer(
        self, requests: Sequence[Instance], chat_of: Callable[[int], list[dict]], description: str
    ) -> list[Answer]:
        """Answer requests batch by batch.

        Args:
            requests: Their generation settings count; those of a batch have the same.
            chat_of: Gives the chat of the request at a place; called for a few at a time, as they hold pictures.
            description: Shown on the progress bar.
        """
        groups: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(repr(sorted(self._settings(request).items())), []).append(place)
        answers: dict[int, Answer] = {}
        elapsed, self.num_reused = 0.0, 0
        with tqdm(total=len(requests), desc=description, disable=self.rank != 0) as bar:
            for places in groups.values():
                arguments, stops = generation_arguments(self._settings(requests[places[0]]), self.max_new_tokens)
                together, others = self._about_the_same(places, chat_of, arguments)
                singly = ({place: chat_of(place)} for place in together)
                for batch in itertools.chain(singly, self._batches(others, chat_of)):
                    self.prompts_shown += [digest([outline(chat), arguments, stops]) for chat in batch.values()]
                    started_at = time.perf_counter()
                    said = self._generate(
                        list(batch.values()), arguments, stops, go_on=together.keys() >= batch.keys()
                    )
                    elapsed += time.perf_counter() - started_at
                    answers |= dict(zip(batch, said, strict=True))
                    bar.update(len(batch))
                self.prefixes.clear()
        self._report_speed(list(answers.values()), elapsed)
        return [answers[place] for place in range(len(requests))]

    def _about_the_same(
        self, places: list[int], chat_of: Callable[[int], list[dict]], arguments: dict
    ) -> tuple[dict[int, None], list[int]]:
        """Places of chats that begin as others do, pictures included, side by side; and all other places.

        Only where answers are certain: what is drawn would be drawn in another order, and beams need several rows.
        """
        if arguments["do_sample"] or any(arguments.get(name) not in (None, 1) for name in NOT_FOR_PREFIXES):
            return {}, places
        groups: dict[str, list[int]] = {}
        for place in places:
            groups.setdefault(beginning(chat_of(place)) or f"alone {place}", []).append(place)
        together = [place for group in groups.values() if len(group) > 1 for place in group]
        return dict.fromkeys(together), [group[0] for group in groups.values() if len(group) == 1]

    def _batches(self, places: list[int], chat_of: Callable[[int], list[dict]]) -> Iterator[dict[int, list[dict]]]:
        """Chats by place, in batches of prompts of like length, longest first so that memory runs out early."""
        size = WINDOW * self.batch_size
        for start in range(0, len(places), size):
            window = {place: chat_of(place) for place in places[start : start + size]}
            lengths = {place: self._length(chat) for place, chat in window.items()}
            order = sorted(window, key=lengths.__getitem__, reverse=True)
            for begin in range(0, len(order), self.batch_size):
                yield {place: window[place] for place in order[begin : begin + self.batch_size]}

    def _length(self, chat: list[dict]) -> int:
        """About how many tokens a prompt has: exact for pictures, four characters a token for text."""
        items = [item for message in chat for item in message["content"]]
        sizes = [item["image"].size[::-1] for item in items if hasattr(item.get("image"), "size")]
        limits = {name: limit for name, limit in self.tile_limits.items() if name != "max_image_tokens"}
        counts = self.processor._get_num_multimodal_tokens(image_sizes=sizes, **limits)
        return sum(counts.num_image_tokens) + sum(len(item.get("text", "")) for item in items) // 4

    @torch.inference_mode()
    def _generate(self, chats: list[list[dict]], arguments: dict, stops: list[str], go_on: bool) -> list[Answer]:
        """Answer chats at once; `go_on` from what was read of an earlier one, which wants one chat at a time."""
        inputs = self._encode(chats)
        if go_on:
            generated = self.prefixes.generate(inputs, **arguments)
            self.num_reused += self.prefixes.num_reused
        else:
            generated = self.model.generate(**inputs, **arguments)
        generated = generated[:, inputs["input_ids"].shape[1] :]
        lengths = answer_lengths(generated, self.model.generation_config).tolist()
        prompt_lengths = inputs["attention_mask"].sum(dim=1).tolist()
        texts = self.processor.batch_decode(
            [row[:length] for row, length in zip(generated, lengths, strict=True)], skip_special_tokens=True
        )
        return [
            Answer(cut_at(text.strip(), stops), length, prompt_length)
            for text, length, prompt_length in zip(texts, lengths, prompt_lengths, strict=True)
        ]

    def _encode(self, chats: list[list[dict]]):
        """Ids with padding on the left, and tiles, on the model's device."""
        return self.processor.apply_chat_template(
            chats,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            label_images=self.label_pictures,
            processor_kwargs={"padding": True, **self.tile_limits},
        ).to(self.device, self.model.dtype)

    def _report_speed(self, answers: list[Answer], elapsed_seconds: float) -> None:
        """Tell lmms-eval how fast it went; it puts `throughput` into its results."""
        from lmms_eval.models.model_utils.gen_metrics import log_metrics

        if not answers:
            return
        num_tokens = sum(answer.num_tokens for answer in answers)
        log_metrics(
            total_elapsed_time=elapsed_seconds,
            total_gen_tokens=num_tokens,
            avg_speed=num_tokens / elapsed_seconds if elapsed_seconds else 0.0,
            additional_metrics={
                "prompt_tokens": sum(answer.num_prompt_tokens for answer in answers) / len(answers),
                "answer_tokens": num_tokens / len(answers),
                "reused_prompt_tokens": self.num_reused / len(answers),
                "answers_per_second": len(answers) / elapsed_seconds if elapsed_seconds else 0.0,
            },
        )

    @torch.inference_mode()
    def _weigh(self, pairs: list[tuple[list[dict], str]]) -> list[Likelihood]:
        """Mean negative log-likelihood of replies; padded on the right, where a causal model never looks."""
        inputs = self._encode([chat for chat, _ in pairs])
        prompts = [ids[mask.bool()] for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)]
        replies = [self._reply_ids(continuation) for _, continuation in pairs]
        rows = [torch.cat(both) for both in zip(prompts, replies, strict=True)]
        padding = self.processor.tokenizer.pad_token_id
        inputs["input_ids"] = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        places = torch.arange(inputs["input_ids"].shape[1], device=self.device)
        inputs["attention_mask"] = (places < lengths[:, None]).long()
        logits = self.model(**inputs, use_cache=False).logits
        rows_of = zip(logits, prompts, replies, strict=True)
        return [
            _likelihood(row[len(prompt) - 1 : len(prompt) - 1 + len(reply)], reply) for row, prompt, reply in rows_of
        ]

    @torch.inference_mode()
    def _weigh_behind(self, chat: list[dict], continuation: str) -> Likelihood:
        """As `_weigh`, for one reply behind what was read of earlier prompts."""
        inputs, reply = self._encode([chat]), self._reply_ids(continuation)
        begun = self.prefixes.begin(inputs, len(reply))
        ids = torch.cat([inputs["input_ids"][0], reply])
        rest = {name: begun.inputs[name] for name in ("pixel_values", CACHE) if name in begun.inputs}
        if not len(rest.get("pixel_values", ())):
            rest.pop("pixel_values", None)
        logits = self.model(
            input_ids=ids[None, begun.num_reused :], logits_to_keep=len(reply) + 1, use_cache=True, **rest
        ).logits
        self.prefixes.keep(begun, ids, begun.cache)
        self.num_reused += begun.num_reused
        return _likelihood(logits[0, :-1], reply)

    def _reply_ids(self, continuation: str) -> torch.Tensor:
        """Ids of a reply; the space that separates it from a plain text has no place after a chat's prompt."""
        ids = self.processor.tokenizer(continuation.strip(), add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError("A continuation without a single token has no likelihood.")
        return torch.tensor(ids, device=self.device)


class HoVLESimple(HoVLEChat):
    """A HoVLE for lmms-eval's older protocol: all pictures, then the text, as one message."""

    is_simple = True

    def _settings(self, request: Instance) -> dict:
        return request.args[1] or {}

    def _first_chat(self, request: Instance) -> list[dict]:
        context, _, visuals = request.args[:3]
        pictures = visuals(self._document(request)) if callable(visuals) else None
        return self._with_system(_chat_of(context, pictures))

    def _next_chat(self, request: Instance, replies: list[str], notes: Any) -> tuple[list[dict] | None, Any]:
        given = request.args[3](
            self._document(request), round_idx=len(replies), previous_output=list(replies), previous_round_info=notes
        )
        if not (isinstance(given, tuple) and len(given) == 5):
            return None, notes
        visuals, text, is_over, _, notes = given
        return (None if is_over else self._with_system(_chat_of(text, visuals))), notes


def as_chat(messages: Sequence[dict]) -> list[dict]:
    """Turn lmms-eval's messages into the processor's: pictures come as `url` there, whatever they are.

    Raises:
        ValueError: For videos and sound, which HoVLE does not read.
    """

    def item_of(item: dict) -> dict:
        if item["type"] == "text":
            return {"type": "text", "text": item["text"]}
        if item["type"] == "image":
            return {"type": "image", "image": item["url"]}
        raise ValueError(f"The task shows a {item['type']}; HoVLE reads pictures and text.")

    return [
        {"role": message["role"], "content": [item_of(item) for item in message["content"]]} for message in messages
    ]


def _chat_of(text: str, pictures: Any) -> list[dict]:
    """One message: pictures, which may be nested or missing, then the text."""
    content: list[dict] = [{"type": "image", "image": picture} for picture in _flat(pictures)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def outline(chat: list[dict]) -> list[list]:
    """Who says what in a chat, in JSON: texts as they are, and `None` where a picture stands."""
    return [[message["role"], *(item.get("text") for item in message["content"])] for message in chat]


def beginning(chat: list[dict]) -> str:
    """A name of all that stands in a chat up to its last picture, empty without pictures.

    It tells which questions to ask side by side; whether their tiles are the same is for `PrefixCache` to see.
    """
    items = [(message["role"], item) for message in chat for item in message["content"]]
    last = max((place for place, (_, item) in enumerate(items) if item["type"] == "image"), default=-1)
    return digest([[role, item.get("text") or _name(item["image"])] for role, item in items[: last + 1]]) * (last >= 0)


def _name(picture: Any) -> str:
    if not hasattr(picture, "tobytes"):
        return repr(picture)
    return hashlib.blake2b(picture.tobytes(), digest_size=16).hexdigest()


def _likelihood(logits: torch.Tensor, reply: torch.Tensor) -> Likelihood:
    """Of a reply, shape `(T,)`, by the logits that predict its tokens, `(T, V)`."""
    loss = torch.nn.functional.cross_entropy(logits.float(), reply)
    return Likelihood(loss.item(), bool((logits.argmax(dim=-1) == reply).all()))


def _flat(pictures: Any) -> list:
    if pictures is None:
        return []
    if isinstance(pictures, list | tuple):
        return [one for picture in pictures for one in _flat(picture)]
    return [pictures]


def _result(answer: Answer) -> GenerationResult:
    counts = TokenCounts(input_tokens=answer.num_prompt_tokens, output_tokens=answer.num_tokens)
    return GenerationResult(text=answer.text, token_counts=counts)


def generation_arguments(settings: dict, max_new_tokens: int) -> tuple[dict, list[str]]:
    """Turn a task's generation settings into arguments of `generate` and strings that end an answer.

    Args:
        settings: As in a task's `generation_kwargs`. `do_sample: false` and a temperature of 0 both mean greedy.
        max_new_tokens: Where the settings give no limit.
    """
    settings = dict(settings)
    stops = settings.pop("until", None) or []
    stops = [stops] if isinstance(stops, str) else list(stops)
    if stops == DEFAULT_STOPS:
        # No task asked for it: it separates the examples of a few-shot prompt and would cut an answer at its first
        # blank line. lmms-eval's own chat models ignore it. The few tasks that name exactly this stop cannot be told
        # apart here, and end their answers there for those models no more than for ours.
        stops = []
    temperature = settings.pop("temperature", None)
    draws = settings.pop("do_sample", temperature is not None and temperature > 0) and temperature != 0
    arguments = {"max_new_tokens": settings.pop("max_new_tokens", max_new_tokens), "do_sample": draws}
    drawing = {"temperature": temperature, **{name: settings.pop(name, None) for name in SAMPLING[1:]}}
    if draws:
        arguments |= {name: value for name, value in drawing.items() if value is not None}
    arguments |= {name: settings.pop(name) for name in PASSED_ON if name in settings}
    unknown = sorted(set(settings) - set(WITHOUT_MEANING))
    if unknown:
        logger.warning("The task's generation settings %s mean nothing to HoVLE.", ", ".join(unknown))
    return arguments, stops


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Keep what stands before the first of the strings that end an answer."""
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text


def _whole_number(value: int | str, name: str) -> int:
    with contextlib.suppress(ValueError):
        if int(value) >= 1:
            return int(value)
    raise ValueError(f"{name} ({value!r}) must be a whole number from 1; HoVLE does not search for one.")


def _accelerator():
    from accelerate import Accelerator

    return Accelerator()
