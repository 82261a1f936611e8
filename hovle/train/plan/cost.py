"""What one step of a stage costs: floating-point operations and memory, by part, from shapes alone.

Operations are counted the way `torch.utils.flop_counter` counts them: a multiply-add is two, attention over a packed
row of T tokens is a full T x T product, because the document mask is applied to the scores. Elementwise work is left
out. A product costs once for the forward pass, once more for the gradient of its weight where that learns, and once
more for the gradient of its input where anything before it learns; a frozen language model above trained layers is
such a case.

Memory counts tensors; `memory.py` finds what autograd keeps. What settings change:

- `activation_checkpointing`: a layer keeps its input only; the backward pass runs it once more, up to the last
  product, and so needs one layer's activations beside what it works with anyway.
- `sharding: full`: each of P processes holds a Pth of all weights, gradients and moments, and beside them what is
  joined while it is used: one decoder layer, and from the first forward to the last backward product all that is in
  no decoder layer (stem, tables, head, teacher), whose gradients are cut up at the end. Exchange takes no time here.
- `quantize_frozen`: weights of the language model's linear maps in 8 or 4 bits with their scales, on a CPU beside the
  exact ones; products count as before.
- `teacher.cache`: a step has no teacher; what filling the cache costs is not in it.
- `language`: text takes places in the rows; the bare language model passes over it, and both heads run there. What of
  the language model learns is there twice.
- `objective.words`: pieces are found among candidates and characters told by a head, as many as `expected` says, and
  looked at by a guide in all tiles. That a teacher need not look at tiles full of words is left out.
"""

import dataclasses
import functools
from dataclasses import dataclass

import torch
from torch import nn

from ...model.configuration_hovle import HoVLEConfig
from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..config import PARAMETER_GROUPS, ExpectedData, StageConfig
from ..data.batch import PackedBatch
from ..data.words import NO_WORD
from ..model.adapters import adapted_maps
from ..model.parameters import parameter_groups
from ..objectives.words import kinds_of_tokens, num_character_classes
from .memory import Activations, measure_activations, tied_table_learns
from .shapes import guide_shapes, teacher_shapes

ATTENTION_BACKWARD = 2.5
"""Backward over forward products of fused attention: five (it computes the scores again) instead of two."""

FROM_LANGUAGE_MODEL = ("language_model", "text_embeddings")
"""Parameter groups whose frozen weights are as released."""

QUANTIZED_BYTES = {"int8": 1.0, "int4": 0.5 + 1 / 64 + 4 / (64 * 256)}
"""Bytes per weight in bitsandbytes' formats; NF4 has an 8-bit scale per block of 64 and a float32 per 256 scales."""

KEPT_OF_DIVERGENCE = 8
"""Bytes kept per word of the vocabulary at each position where two distributions are compared: both, in float32."""

KEPT_OF_CHOICE, WORKING_OF_CHOICE = 4, 8
"""Bytes for each candidate of a word's piece or a character: log-probabilities, and two gradients of them."""

INT8_ROW_BYTES = 4
"""LLM.int8's scale of each row."""

ADAM_BYTES = 28
"""Bytes AdamW moves per parameter: it reads weight, gradient and two moments and writes all but the gradient."""


COUNTS = ("num_filled", "num_samples", "num_tiles", "num_supervised", "num_language", "num_pieces", "num_read")
"""What of a workload grows with its rows."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one micro-batch of one process holds."""

    num_rows: int
    row_length: int
    num_filled: float
    """Positions that are not padding."""
    num_samples: float
    num_tiles: float
    num_supervised: float
    """Positions with a target, at which the head runs."""
    num_language: float = 0
    """Positions of text without pictures, on which the language is held."""
    num_pieces: float = 0
    """Image tokens that say a piece of a word."""
    num_read: float = 0
    """Image tokens whose characters are told."""

    @property
    def num_tokens(self) -> int:
        """Positions computed, padding included."""
        return self.num_rows * self.row_length

    @classmethod
    def of_batch(cls, batch: PackedBatch) -> "Workload":
        """Count a packed batch."""
        num_rows, row_length = batch.input_ids.shape
        return cls(
            num_rows=num_rows,
            row_length=row_length,
            num_filled=batch.num_tokens,
            num_samples=len(batch.names),
            num_tiles=len(batch.pixel_values),
            num_supervised=int(batch.is_supervised.sum()),
            num_language=batch.num_language_rows * batch.language_length,
            num_pieces=0 if batch.word_ids is None else int(kinds_of_tokens(batch)[1].sum()),
            num_read=0 if batch.character_ids is None else int((batch.character_ids != NO_WORD).any(dim=-1).sum()),
        )

    @classmethod
    def expected(cls, config: StageConfig, model: HoVLEConfig) -> "Workload":
        """Estimate it from a recipe alone; ValueError where one sample fills more than a row."""
        data = config.expected or ExpectedData()
        text_tokens = data.text_tokens_per_sample
        if config.objective.name == "distillation":
            text_tokens = text_tokens + 2 * config.objective.num_random_tokens
        length = data.tiles_per_sample * model.image_seq_length + text_tokens
        if length > config.longest_sample:
            raise ValueError(
                f"A sample of {length:.0f} tokens (expected.tiles_per_sample x {model.image_seq_length} + text) does "
                f"not fit into row_length ({config.row_length}), language text aside: samples are never cut."
            )
        num_language = config.num_language_rows * config.language_length
        num_sampled = (config.rows_per_batch * config.row_length - num_language) * data.filled_ratio
        samples = num_sampled / length
        supervised = samples * data.supervised_tokens_per_sample if config.objective.name == "next_token" else 0
        return cls(
            num_rows=config.rows_per_batch,
            row_length=config.row_length,
            num_filled=num_language + num_sampled,
            num_samples=samples,
            num_tiles=samples * data.tiles_per_sample,
            num_supervised=supervised,
            num_language=num_language,
            num_pieces=samples * data.word_pieces_per_sample * teaches_words(config),
            num_read=samples * data.read_tokens_per_sample * teaches_words(config),
        )

    def with_rows(self, num_rows: int) -> "Workload":
        """The same mixture of data in more or fewer rows."""
        ratio = num_rows / self.num_rows
        counts = {name: getattr(self, name) * ratio for name in COUNTS}
        return dataclasses.replace(self, num_rows=num_rows, **counts)

    def holistic_length(self, model: HoVLEConfig) -> float:
        """Tokens of a row as the holistic layers see it: longer for HoVLE-HD."""
        if model.pixel_shuffle_loc != "post":
            return self.row_length
        extra = model.image_seq_length * (model.shuffle_factor**2 - 1)
        return self.row_length + extra * self.num_tiles / self.num_rows


@dataclass(frozen=True)
class Learning:
    """Which parts of the model a stage trains, and so where gradients must go."""

    stem: bool
    holistic: bool
    table: bool
    language: bool
    lora: bool

    @classmethod
    def of(cls, config: StageConfig, model: HoVLEConfig) -> "Learning":
        """Read it from a recipe; a text table tied to the head learns with the language model."""
        stem, holistic, table, language = (name in config.trainable for name in PARAMETER_GROUPS)
        return cls(stem, holistic, table or tied_table_learns(config, model), language, config.lora is not None)

    @property
    def before_loss(self) -> bool:
        """Whether what enters the head needs one."""
        return self.before_language or self.language or self.lora

    @property
    def before_holistic(self) -> bool:
        """Whether what enters the holistic layers needs a gradient."""
        return self.stem or self.table

    @property
    def before_language(self) -> bool:
        """Whether what enters the language model needs one."""
        return self.before_holistic or self.holistic


class StageCost:
    """Operations and memory of a stage's steps.

    Args:
        config: The stage.
        model: Its model.
        dtype: Number format of matrix products.
    """

    def __init__(self, config: StageConfig, model: HoVLEConfig, dtype: torch.dtype):
        self.config = config
        self.model_config = model
        self.dtype = dtype
        self.learning = Learning.of(config, model)
        self.runs_language_model = config.objective.name == "next_token"
        with torch.device("meta"):
            self.model = HoVLEForConditionalGeneration._from_config(model)
        self.groups = {name: _count(items) for name, items in parameter_groups(self.model).items()}
        self.num_adapters = _num_adapters(self.model, config)
        shapes = [teacher_shapes(teacher) for teacher in config.teacher]
        self._widths = [sum(widths) for widths in zip(*(item.widths for item in shapes), strict=True)]
        self._guide = guide_shapes(config, model)
        # In its steps: a cache stands for the others.
        self._teachers = [item for item, teacher in zip(shapes, config.teacher, strict=True) if teacher.cache is None]

    # Parameters

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, without teacher and adapters."""
        return _count(self.model.parameters())

    @property
    def num_trainable(self) -> int:
        """Parameters that learn, adapters and the training-only projection included."""
        learning = sum(self.groups[name] for name in self.config.trainable)
        return learning + self.num_adapters + self._num_projection + self._num_telling

    @property
    def _num_projection(self) -> int:
        hidden = self.model_config.text_config.hidden_size
        return sum(width * hidden for width in self._widths if width != hidden)

    @property
    def _num_telling(self) -> int:
        hidden, num_logits = self.model_config.text_config.hidden_size, self._character_logits
        head = (hidden * num_logits + num_logits + hidden) * bool(num_logits)  # a map with its bias, and a norm
        return head + self._guide.num_parameters

    @property
    def _character_logits(self) -> int:
        """Of an image token; 0 where characters are not told."""
        words = self.config.objective.words if self.config.objective.name == "distillation" else None
        if words is None or words.characters is None:
            return 0
        return words.characters.per_token * num_character_classes(words.characters)

    # Operations

    def flops(self, work: Workload) -> dict[str, float]:
        """Operations of forward and backward pass over one micro-batch, by part."""
        learning, model = self.learning, self.model.model
        holistic_tokens = work.holistic_length(self.model_config) * work.num_rows
        flops = {
            "stem": self._stem_flops(work.num_tiles),
            "holistic layers": _products(model.embedding_layers, self.model_config)
            * holistic_tokens
            * _passes(learning.holistic, learning.before_holistic, self.model_config.num_embedding_layers),
            "holistic attention": self._attention_flops(
                work.num_rows,
                work.holistic_length(self.model_config),
                self.model_config.num_embedding_layers,
                learning.before_language,
            ),
        }
        if self.runs_language_model:
            flops |= self._language_model_flops(work)
        else:
            flops |= self._teacher_flops(work) | {"words": self._word_flops(work)}
        if work.num_language:
            flops |= self._held_language_flops(work)
        if self.config.activation_checkpointing:
            flops["layers run again"] = self._recomputed_flops(work)
        return {name: count for name, count in flops.items() if count}

    def _stem_flops(self, num_tiles: float) -> float:
        config, learning = self.model_config, self.learning
        hidden = config.text_config.hidden_size
        num_patches = (config.image_size // config.patch_size) ** 2
        convolution = 2 * num_patches * config.num_channels * config.patch_size**2 * hidden
        total = convolution * _passes(learning.stem, False)
        if self.model.model.projector is not None:
            projector = 2 * config.image_seq_length * (hidden**2 * config.shuffle_factor**2 + hidden**2)
            before = learning.before_language if config.pixel_shuffle_loc == "post" else learning.stem
            total += projector * _passes(learning.stem, before)
        return num_tiles * total

    def _attention_flops(self, num_rows: float, length: float, num_layers: int, learns: bool) -> float:
        text = self.model_config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        forward = 4 * num_rows * length**2 * text.num_attention_heads * head_dim * num_layers
        return forward * (1 + ATTENTION_BACKWARD * learns)

    def _language_model_flops(self, work: Workload) -> dict[str, float]:
        learning, text = self.learning, self.model_config.text_config
        layers, num_layers = self.model.model.language_layers, self.model_config.num_language_layers
        passes = _passes(learning.language, learning.before_language or learning.lora, num_layers)
        num_rows = self._rows_through_language_model(work)
        num_tokens = num_rows * work.row_length
        return {
            "language model": _products(layers, self.model_config) * num_tokens * passes,
            "language model attention": self._attention_flops(
                num_rows, work.row_length, num_layers, learning.before_loss
            ),
            "adapters": 2 * self.num_adapters * num_tokens * 3,
            "head": 2
            * text.hidden_size
            * text.vocab_size
            * work.num_supervised
            * _passes(learning.language, learning.before_loss),
        }

    def _held_language_flops(self, work: Workload) -> dict[str, float]:
        """What comparing distributions adds: passes of the bare language model, and heads of it and of ours."""
        language, learning, text = self.config.language, self.learning, self.model_config.text_config
        assert language is not None
        if not self.config.language_kl_weight:
            return {}
        num_rows = work.num_language / self.config.language_length
        head = 2 * text.hidden_size * text.vocab_size * self._num_divergences(work)
        bare = self._bare_pass(num_rows, self.config.language_length)
        bare += self._bare_pass(work.num_rows, work.row_length) * language.around_images
        own = head * _passes(learning.language, learning.before_loss)
        return {"held text": own, "bare language model": bare + head}

    def _bare_pass(self, num_rows: float, length: int) -> float:
        """A pass of the bare language model's layers, without gradient."""
        layers, num_layers = self.model.model.language_layers, self.model_config.num_language_layers
        forward = _products(layers, self.model_config) * num_rows * length
        return forward + self._attention_flops(num_rows, length, num_layers, learns=False)

    def _rows_through_language_model(self, work: Workload) -> float:
        """None in distillation; else all but whole rows of text that is held below it."""
        if not self.runs_language_model:
            return 0
        is_below = not self.config.language_kl_weight and self.config.language_length == work.row_length
        return work.num_rows - work.num_language / work.row_length * is_below

    def _num_prompts(self, work: Workload) -> float:
        """Positions of text around images that are held too; the few before an image are none."""
        if self.config.language is None or not self.config.language.around_images:
            return 0
        num_images = work.num_tiles * self.model_config.image_seq_length
        return work.num_filled - work.num_language - num_images - work.num_supervised

    def _recomputed_flops(self, work: Workload) -> float:
        """One more forward pass of the layers whose activations the backward pass needs, but for its last product.

        The first layer of a section that learns from its own inputs on is among them.
        """
        config, learning, text = self.model_config, self.learning, self.model_config.text_config
        length = work.holistic_length(config)
        last_product = 2 * text.hidden_size * text.intermediate_size
        total = 0.0
        if learning.before_language:
            layers, num_layers = self.model.model.embedding_layers, config.num_embedding_layers
            per_token = _products(layers, config) - num_layers * last_product
            total += per_token * length * work.num_rows
            total += self._attention_flops(work.num_rows, length, num_layers, learns=False)
        if learning.before_loss and self.runs_language_model:
            layers, num_layers = self.model.model.language_layers, config.num_language_layers
            per_token = _products(layers, config) + 2 * self.num_adapters
            per_token -= 0 if learning.lora else num_layers * last_product  # adapters come after what they adapt
            num_rows = self._rows_through_language_model(work)
            total += per_token * num_rows * work.row_length
            total += self._attention_flops(num_rows, work.row_length, num_layers, learns=False)
        return total

    def _teacher_flops(self, work: Workload) -> dict[str, float]:
        tokens = work.num_tiles * self.model_config.image_seq_length
        return {
            "teacher": work.num_tiles * sum(item.flops_per_tile for item in self._teachers),
            "projection": 2 * tokens * self._num_projection * 3,
        }

    def _word_flops(self, work: Workload) -> float:
        """Pieces found among others, whose embeddings are given; characters told by a head that learns."""
        hidden = self.model_config.text_config.hidden_size
        found = 2 * hidden * work.num_pieces * self._num_candidates(work) * _passes(False, True)
        told = 2 * hidden * self._character_logits * work.num_read * _passes(True, True)
        return found + told + self._guide.flops_per_tile * self._num_guided(work)

    @staticmethod
    def _num_guided(work: Workload) -> float:
        """Tiles with a line of text: all of them, where there is any."""
        return work.num_tiles * bool(work.num_read)

    def _num_candidates(self, work: Workload) -> float:
        """Different entries of the vocabulary among which a piece is found, were pieces as random as the others."""
        if not work.num_pieces:
            return 0
        assert self.config.objective.name == "distillation"
        assert self.config.objective.words is not None
        vocab_size = self.model_config.text_config.vocab_size
        num_drawn = work.num_pieces + self.config.objective.words.num_others
        return vocab_size * (1 - (1 - 1 / vocab_size) ** num_drawn)

    # Memory

    def memory(self, work: Workload, num_processes: int = 1, on_cpu: bool = False) -> "Memory":
        """Bytes on one device in a step after the first.

        Args:
            work: One micro-batch of one process.
            num_processes: Among how many `sharding: full` cuts.
            on_cpu: Whether that device also holds what a GPU would leave in the CPU's memory.
        """
        config = self.model_config
        learns = {name: size * (name in self.config.trainable) for name, size in self.groups.items()}
        head = config.text_config.hidden_size * config.text_config.vocab_size
        head_learns = head * self.learning.language
        gradients = (
            learns["stem"] + learns["text_embeddings"],
            learns["holistic_layers"],
            learns["language_model"] - head_learns + self.num_adapters,
            head_learns + self._num_projection + self._num_telling,
        )
        tied_gradient = 4 * head if self.learning.language and config.tie_word_embeddings else 0
        activations, working = self._kept_and_working(work)
        plain = Memory(
            weights=self._weight_bytes(on_cpu),
            teacher=0 if self.runs_language_model else 4 * (head + self._num_teacher),
            optimizer=8 * self.num_trainable,
            gradients=tuple(4 * count for count in gradients),
            activations=activations,
            working=(max(tied_gradient, working[0]), *working[1:]),
            keeps_gradients=self.config.gradient_accumulation_steps > 1,
        )
        is_cut = self.config.sharding == "full" and num_processes > 1
        return self._in_pieces(plain, num_processes) if is_cut else plain

    @property
    def _num_teacher(self) -> int:
        return sum(item.num_parameters for item in self._teachers)

    def _weight_bytes(self, on_cpu: bool) -> float:
        """Model and adapters. What the optimizer changes is in float32; frozen weights are as they are stored."""
        frozen: float = sum(
            size * self._frozen_bytes(name) for name, size in self.groups.items() if name not in self.config.trainable
        )
        bits = self.config.quantize_frozen
        if bits != "none":
            linear = [module for module in self.model.model.language_layers.modules() if isinstance(module, nn.Linear)]
            weights = sum(module.weight.numel() for module in linear)
            frozen += weights * QUANTIZED_BYTES[bits]
            frozen += INT8_ROW_BYTES * sum(module.out_features for module in linear) * (bits == "int8")
            frozen -= 0 if on_cpu else weights * self.dtype.itemsize
        return 4 * self.num_trainable + frozen + self._bare_bytes

    @property
    def _bare_bytes(self) -> float:
        """The copy of what learns of the language model, to which the language is held."""
        if self.config.language is None or not self.runs_language_model:
            return 0
        copied = [name for name in FROM_LANGUAGE_MODEL if name in self.config.trainable]
        return self.dtype.itemsize * sum(self.groups[name] for name in copied)

    def _frozen_bytes(self, group: str) -> int:
        """Bytes of a frozen weight: what rounds to nothing, the released ones, is in the format of the products."""
        return self.dtype.itemsize if group in FROM_LANGUAGE_MODEL else 4

    def _kept_and_working(self, work: Workload) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """What autograd keeps of stem, holistic layers, language model and head, and what each needs beside it."""
        config = self.model_config
        length = round(work.holistic_length(config))
        kept = self._activations(work.row_length, length)
        sections = []
        language_rows = self._rows_through_language_model(work)
        for line, num_layers, num_rows, num_tokens in (
            (kept.holistic_layer, config.num_embedding_layers, work.num_rows, length),
            (kept.language_layer, config.num_language_layers * bool(language_rows), language_rows, work.row_length),
        ):
            layer = line.at(num_rows)
            if not num_layers or not layer:
                sections.append((0.0, 0.0))
            elif self.config.activation_checkpointing:
                entering = 4 * config.text_config.hidden_size * num_tokens * num_rows
                sections.append((entering * num_layers, 2 * layer))
            else:
                sections.append((layer * num_layers, layer))
        num_positions = work.num_supervised if self.runs_language_model else work.num_tokens
        num_held = self._num_divergences(work)
        num_logits = max(num_positions * self.runs_language_model, num_held)
        loss_working = 10 * config.text_config.vocab_size * num_logits
        held = KEPT_OF_DIVERGENCE * config.text_config.vocab_size * num_held
        num_told = work.num_pieces * self._num_candidates(work) + work.num_read * self._character_logits
        loss_working = max(loss_working, WORKING_OF_CHOICE * num_told)
        held += KEPT_OF_CHOICE * num_told + 4 * self._guide.kept_per_tile * self._num_guided(work)
        (holistic, holistic_working), (language, language_working) = sections
        return (
            (kept.stem.at(work.num_tiles), holistic, language, kept.loss.at(num_positions) + held),
            (0.0, holistic_working, language_working, loss_working),
        )

    def _num_divergences(self, work: Workload) -> float:
        """Positions at which two distributions are compared."""
        return (work.num_language + self._num_prompts(work)) * bool(self.config.language_kl_weight)

    def _in_pieces(self, plain: "Memory", num_processes: int) -> "Memory":
        """The same where every process holds a piece of each tensor and joins those it uses."""
        holistic, language = self.model.model.embedding_layers, self.model.model.language_layers
        layers = [
            _count(layer.parameters()) * (4 if name in self.config.trainable else self._frozen_bytes(name))
            + 4 * num_adapters
            for name, section, num_adapters in (
                ("holistic_layers", holistic, 0),
                ("language_model", language, self.num_adapters / max(1, len(language))),
            )
            for layer in section
        ]
        teacher = 4 * self._num_teacher
        biggest = [
            4 * max((_count(layer.parameters()) for layer in section), default=0) * learns
            for section, learns in (
                (holistic, "holistic_layers" in self.config.trainable),
                (language, self.learning.language),
            )
        ]
        stem, in_holistic, in_language, head = plain.gradients
        return dataclasses.replace(
            plain,
            weights=plain.weights / num_processes,
            teacher=plain.teacher - teacher + teacher / num_processes,
            optimizer=plain.optimizer / num_processes,
            gradients=(stem, in_holistic / num_processes, in_language / num_processes, head),
            working=(
                plain.working[0],
                plain.working[1] + biggest[0],
                plain.working[2] + biggest[1],
                plain.working[3],
            ),
            joined=plain.weights - sum(layers) + max(layers, default=0) + teacher,
        )

    @functools.cache  # noqa: B019 - few sizes, and the object lives as long as its plan
    def _activations(self, row_length: int, holistic_length: int) -> Activations:
        return measure_activations(self.config, self.model_config, self.dtype, row_length, holistic_length)


def teaches_words(config: StageConfig) -> bool:
    """Whether a stage has `objective.words`."""
    return config.objective.name == "distillation" and config.objective.words is not None


def _count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _passes(learns: bool, before_learns: bool, num_layers: int | None = None) -> float:
    """Products of a weight matrix per step: forward, gradient of the weight, gradient of the input.

    Where a section of layers learns and nothing before it does, all of its layers but the first need the last.
    """
    if before_learns:
        return 2 + learns
    return 1 + learns * (2 - 1 / num_layers) if num_layers else 1 + learns


def _products(layers: nn.ModuleList, config: HoVLEConfig) -> float:
    """Operations of a token's forward pass through the matrices of some layers, attention scores aside."""
    text = config.text_config
    num_experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 1
    share = (getattr(text, "num_experts_per_tok", None) or 1) / num_experts
    weights = [parameter for parameter in layers.parameters() if parameter.dim() > 1]
    return 2 * sum(weight.numel() * (share if weight.dim() == 3 else 1) for weight in weights)


def _num_adapters(model: HoVLEForConditionalGeneration, config: StageConfig) -> int:
    if config.lora is None:
        return 0
    linear = adapted_maps(model, config.lora).values()
    return sum(config.lora.rank * (module.in_features + module.out_features) for module in linear)


@dataclass(frozen=True)
class Memory:
    """Bytes of tensors on one device during a step, in the order the forward pass makes them."""

    weights: float
    """Model and adapters."""
    teacher: float
    """Teacher and the text table distillation compares with."""
    optimizer: float
    """Two moments of every parameter that learns."""
    gradients: tuple[float, ...]
    """Of stem, holistic layers, language model, head."""
    activations: tuple[float, ...]
    """What autograd keeps of the same four."""
    working: tuple[float, ...]
    """Most the backward pass of each of the four needs at once beside these."""
    keeps_gradients: bool
    """Whether gradients of earlier micro-batches are there while a step's last one runs."""
    joined: float = 0.0
    """Whole tensors that pieces are joined to while they are used."""

    @property
    def peak(self) -> float:
        """The most at any time: while the backward pass goes from part to part, activations go and gradients come."""
        moments = []
        for part in range(len(self.activations)):
            kept = sum(self.activations[: part + 1]) + self.working[part]
            gradients = self.gradients if self.keeps_gradients else self.gradients[part + 1 :]
            moments.append(kept + sum(gradients))
        held = self.weights + self.teacher + self.optimizer + self.joined
        return held + max(*moments, sum(self.gradients))
