"""StageConfig: one training stage as a frozen value."""

import dataclasses
import math
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, Strict, TypeAdapter

from ...language.text_perplexity import RetentionConfig
from .data import DataConfig, ExpectedData
from .language import LanguageConfig
from .model import LoraConfig, ModelConfig
from .objective import ObjectiveConfig, TeacherConfig
from .section import (
    MOST,
    Count,
    CountOrNone,
    Many,
    Number,
    PositiveOrZero,
    Section,
    Share,
    number_in,
    refuse_unknown_keys,
    section,
)

Beta = Annotated[Number, Field(ge=0, lt=1)]
LearningRate = Annotated[Number, Field(ge=0, le=10)]

ParameterGroup = Literal["stem", "holistic_layers", "text_embeddings", "language_model"]

Part = Literal["stem", "holistic_layers", "text_embeddings", "language_model", "lora", "projections", "words"]
"""What learns with a learning rate of its own: parameter groups, adapters, and distillation's maps."""

PARAMETER_GROUPS: tuple[str, ...] = get_args(ParameterGroup)
"""What a stage can train: patch stem; the first N layers; the text table; the LLM's layers, norm and head."""


def _switch(value: Any) -> Any:
    """YAML reads on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _none(value: Any) -> Any:
    """What one may leave out may also be null."""
    return () if value is None else value


def _norm(value: Any) -> Any:
    """A norm of gradients; YAML reads off as a boolean."""
    return math.inf if value is False or value == "off" else number_in(value)


@section
class StageConfig(Section):
    """One training stage."""

    output: str
    """Run folder: log, checkpoints and, at the end, `model`. One run per folder."""
    model: ModelConfig
    """Where the stage starts."""
    objective: ObjectiveConfig
    """What it minimises."""
    data: Annotated[Many[DataConfig], Field(min_length=1)]
    """What it reads: one source, or a list of sources mixed by `weight`."""
    validation: DataConfig | None = None
    """Held-out data, measured before the first step, every `validate_every` steps and after the last; None: what
    `held_out` of the sources keeps from training, if anything."""
    num_validation_batches: Count = 4
    """Packed batches of it, all processes and micro-batches together, fewer where the source ends: the same samples
    whatever their number, each once."""
    validate_every: CountOrNone = 0
    """Steps between validations; 0: only before the first step and after the last."""
    patience: CountOrNone = 0
    """End the run after so many validations in a row without a smaller loss; 0: never. `keep_best` keeps the best."""
    image_ablation: bool = True
    """With every validation after the first, measure blank and shuffled pictures too (next_token)."""
    min_picture_gap: Annotated[float, BeforeValidator(number_in), Field(ge=-math.inf, le=MOST)] = 0.01
    """Nats per reply token by which such pictures must raise the loss; below it, an alarm is raised after warm-up."""
    stop_when_images_ignored: bool = False
    """End the run on that alarm instead of warning; first it is saved, after the last step as a model."""
    retention: Annotated[RetentionConfig, BeforeValidator(partial(refuse_unknown_keys, RetentionConfig))] | None = None
    """Whether the model still knows its language; None: not measured."""
    language: LanguageConfig | None = None
    """Text in every batch on which the model is held to the bare language model; None: nothing holds its language."""
    stop_when_forgetting: Annotated[Number, Field(gt=1, le=MOST)] | None = None
    """End the run where after warm-up perplexity on held-out text of `language.source` is so many times the
    bare LLM's, as every validation measures it (`perplexity_ratio`); first it is saved, as above. None: never."""
    tracking: Many[str] = ()
    """Trackers of accelerate that receive the log beside `log.jsonl`: tensorboard, trackio, wandb, ..."""
    trainable: Many[ParameterGroup]
    """Parameter groups that receive gradients: stem, holistic_layers, text_embeddings, language_model."""
    teacher: Annotated[Many[TeacherConfig], BeforeValidator(_none)] = ()
    """Image teachers, for distillation: one, or a list of them whose features lie side by side."""
    lora: LoraConfig | None = None
    """Adapters on the language model; then `language_model` must not be in `trainable`."""
    expected: ExpectedData | None = None
    """Average sample, for `hovle plan` only."""

    num_steps: CountOrNone = 0
    """Optimizer steps, not micro-batches; 0: as many as num_epochs takes."""
    num_epochs: PositiveOrZero = 0.0
    """Instead of num_steps: how many times the data are read. With several sources one time is as many samples as they
    hold together. The steps are counted before the first one, by packing the data once without their pictures."""
    rows_per_batch: Count
    """Packed rows of one micro-batch on one process."""
    row_length: Count
    """Tokens of one packed row; samples are packed, never cut."""
    packing_window: Count = 64
    """Samples drawn ahead to choose from when rows are packed; more of them waste less padding."""
    max_tiles_per_batch: Count | None = None
    """Most picture tiles of one micro-batch on one process, where pictures would overflow the memory."""
    max_skip_fraction: Share = 0.001
    """The run stops when a larger share of the samples (of the first thousand at least) had to be skipped."""
    max_tiles_per_picture: Count | None = None
    """Most tiles a picture is cut into in this stage; by default what the model's processor allows, which stays."""
    gradient_accumulation_steps: Count = 1
    """Micro-batches per optimizer step."""
    learning_rate: LearningRate
    """Peak learning rate."""
    learning_rates: dict[Part, LearningRate] = dataclasses.field(default_factory=dict)
    """Peak learning rates of parts that shall have another one: trainable groups, `lora`, `projections`, the maps to a
    teacher's width, and `words`, the head that tells characters."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    final_learning_rate_ratio: Share = 0.1
    """Learning rate at the last step over the peak; a constant one stays at the peak."""
    warmup_ratio: Annotated[Number, Field(ge=0, lt=1)] = 0.03
    """Share of the steps with a linear warm-up."""
    adam_betas: Annotated[tuple[Beta, Beta], Strict(False)] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: Annotated[Number, Field(ge=0, le=10)] = 0.05
    """AdamW's weight decay, on matrices only."""
    max_gradient_norm: Annotated[float, BeforeValidator(_norm), Field(gt=0, le=math.inf)] = 1.0
    """Gradients are clipped to this norm; `off`, which is infinity: they are not."""
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    """Seeds new weights, sample order and random text."""

    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of matrix products; `auto` takes bfloat16 where this machine is faster with it."""
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    """Compile decoder layers; `auto` runs eager, and says so, where there is no working C++ compiler."""
    sharding: Literal["none", "full"] = "none"
    """With several processes: each holds the whole model (`none`), or a piece of each of its tensors (`full`)."""
    activation_checkpointing: bool = False
    """Run each decoder layer again in the backward pass instead of keeping what it computed: saves memory."""
    quantize_frozen: Literal["none", "int8", "int4"] = "none"
    """Hold the frozen language model's layers in 8 or 4 bits while training (needs bitsandbytes); the saved model has
    its weights as they were, with `lora` (QLoRA) plus the adapters."""
    save_dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights in `model`; checkpoints, from which runs go on, keep float32."""
    num_workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """0: the training process prepares the batches; 1: a process of its own does; more: one of them tokenises and
    packs, the others read pictures. The batches are the same."""
    log_every: Count = 10
    """Steps between log lines."""
    checkpoint_every: CountOrNone = 0
    """Steps between resumable checkpoints; 0 for none."""
    keep_last: Count = 1
    """Newest checkpoints to keep."""
    keep_best: bool = False
    """Measure the validation loss at every checkpoint and keep the one with the smallest, too; `best` names it."""

    def __post_init__(self):
        if not self.num_steps and not self.num_epochs:
            raise ValueError("how long the stage is, is missing: set num_steps, or num_epochs.")
        if not self.trainable and self.lora is None:
            raise ValueError("trainable is empty and lora is not set: nothing would learn.")
        if self.lora is not None and "language_model" in self.trainable:
            raise ValueError("lora adapts a frozen language model: take language_model out of trainable.")
        if (self.objective.name == "distillation") != bool(self.teacher):
            raise ValueError("A teacher goes with the distillation objective, and only with it.")
        self._check_teachers()
        if self.objective.name == "distillation" and (self.lora is not None or "language_model" in self.trainable):
            raise ValueError("Distillation does not run the language model: it can train neither it nor lora.")
        self._check_held_out()
        if self.validate_every and not self.holds_out:
            raise ValueError(f"validate_every is {self.validate_every}, but there is no validation source.")
        if self.stop_when_images_ignored and not (self.image_ablation and self.holds_out and not self.teacher):
            raise ValueError(
                "stop_when_images_ignored needs image_ablation, a validation source and the next_token objective: "
                "nothing would be checked."
            )
        if self.stop_when_forgetting is not None and self.language is None:
            raise ValueError("stop_when_forgetting needs a language block, whose held-out text it measures.")
        words = getattr(self.objective, "words", None)
        others = {"lora": self.lora, "projections": self.teacher, "words": words and words.characters}
        learning = {*self.trainable, *(part for part, learns in others.items() if learns)}
        if idle := [part for part in self.learning_rates if part not in learning]:
            raise ValueError(
                f"learning_rates names {', '.join(idle)}, which this stage does not train; it trains "
                f"{', '.join(sorted(learning))}."
            )
        if self.patience and not (self.validate_every and self.holds_out):
            raise ValueError("patience counts validations: set validation and validate_every.")
        self._check_quantization()
        if self.language is not None:
            self._check_language(self.language)
        if self.keep_best and not (self.holds_out and self.checkpoint_every):
            raise ValueError("keep_best compares checkpoints by validation loss: set validation and checkpoint_every.")
        labels = [data.label for data in self.data]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"data names several sources {', '.join(repeated)}: give each a `name` of its own.")

    def _check_language(self, language: LanguageConfig) -> None:
        if self.language_length < 2:
            raise ValueError(
                f"language.share ({language.share}) of {self.rows_per_batch} rows of {self.row_length} tokens is "
                "less than two tokens: raise share, rows_per_batch or row_length."
            )
        if self.objective.name == "distillation":
            if language.around_images:
                raise ValueError(
                    "language.around_images is for next_token: in distillation, text there is random tokens."
                )
            if language.kl_weight:
                raise ValueError(
                    f"language.kl_weight is {language.kl_weight}, but distillation does not run the language model: "
                    "leave it out, language.weight holds the text there."
                )
        if not language.weight and not self.language_kl_weight:
            raise ValueError("language.weight and language.kl_weight are both 0: nothing would be held.")

    def _check_teachers(self) -> None:
        if len(self.teacher) > 1 and not all(teacher.standardize for teacher in self.teacher):
            raise ValueError(
                f"{len(self.teacher)} teachers stand side by side, so the one with the largest features would count "
                "most: set standardize to true on each."
            )
        student_layers = [tuple(match.student for match in teacher.layers) for teacher in self.teacher]
        if len({*student_layers}) > 1:
            raise ValueError(
                f"teachers side by side must be reproduced by the same holistic layers; teacher.layers names the "
                f"student layers {', '.join(map(str, student_layers))}."
            )

    def _check_held_out(self) -> None:
        shares = [source.label for source in self.data if source.held_out]
        if shares and self.validation is not None:
            raise ValueError(
                f"validation names held-out data, and so does held_out of {', '.join(shares)}: take one of them out."
            )
        if self.validation is not None and self.validation.held_out:
            raise ValueError("validation.held_out has no meaning: all of that source is held out.")

    @property
    def holds_out(self) -> bool:
        """Whether there are data that are never trained on, to measure."""
        return self.validation is not None or any(source.held_out for source in self.data)

    def _check_quantization(self) -> None:
        if self.quantize_frozen == "none":
            return
        if self.objective.name == "distillation" or "language_model" in self.trainable:
            raise ValueError(
                f"quantize_frozen is {self.quantize_frozen}, which is for next_token stages whose language model is "
                "frozen, with or without lora: distillation does not run it, and what learns cannot be quantised."
            )
        if self.retention is not None:
            raise ValueError(
                "retention would measure the quantised language model, not the saved one: take it out, or set "
                "quantize_frozen to none."
            )
        if self.sharding == "full":
            raise ValueError("quantize_frozen cannot be cut into pieces: take it out, or set sharding to none.")

    @property
    def num_language_rows(self) -> int:
        """Last rows of a batch that begin with text without pictures."""
        return 0 if self.language is None else self.language.layout(self.rows_per_batch, self.row_length)[0]

    @property
    def language_kl_weight(self) -> float:
        """Weight of the KL divergence from the bare language model, as `language.kl_weight` says or by default."""
        if self.language is None or self.language.kl_weight is not None:
            return (self.language and self.language.kl_weight) or 0.0
        return float("language_model" in self.trainable or self.lora is not None)

    @property
    def language_length(self) -> int:
        """Tokens of such text in each of these rows."""
        return 0 if self.language is None else self.language.layout(self.rows_per_batch, self.row_length)[1]

    @property
    def longest_sample(self) -> int:
        """Most tokens of a sample: what an emptiest row has room for."""
        is_everywhere = self.num_language_rows == self.rows_per_batch
        return self.row_length - self.language_length if is_everywhere else self.row_length

    def to_dict(self) -> dict:
        """Plain values, as written to the run folder's `recipe.yaml`."""
        return TypeAdapter(StageConfig).dump_python(self, mode="json")
