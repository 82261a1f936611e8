"""StageConfig: one training stage as a frozen value, loaded from YAML; unknown keys are refused."""

import dataclasses
import difflib
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import yaml

from ...language.text_perplexity import RetentionConfig

RECIPES = Path(__file__).parents[2] / "recipes"
"""Recipes that ship with the package; `hovle train demo/alignment` finds `demo/alignment.yaml` here."""

PARAMETER_GROUPS = ("stem", "holistic_layers", "text_embeddings", "language_model")
"""What a stage can train: patch stem; the first N layers; the text table; the LLM's layers, norm and head."""

OVERRIDE = re.compile(r"[a-z_.0-9]+=")
"""How a `key=value` argument starts; a path with an equals sign has a slash before it or is given as ./PATH."""

SMALLEST = {
    "num_steps": 1,
    "rows_per_batch": 1,
    "row_length": 1,
    "packing_window": 1,
    "gradient_accumulation_steps": 1,
    "log_every": 1,
    "num_validation_batches": 1,
    "checkpoint_every": 0,
    "validate_every": 0,
    "keep_last": 1,
    "num_workers": 0,
}
"""Smallest value of each whole-number field of a stage."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Where the stage starts: an existing HoVLE, or a new one around a language model."""

    checkpoint: str | None = None
    """HoVLE folder or Hub id, usually the `model` folder of the previous stage's output."""
    language_model: str | None = None
    """Hub id or folder of a causal language model to build a new HoVLE around; `asset:NAME` is fetched."""
    num_embedding_layers: int = 8
    """New holistic layers below the language model."""
    image_size: int = 448
    """Side of one picture tile in pixels."""
    patch_size: int = 14
    """Side of one patch in pixels."""
    pixel_shuffle_loc: str = "pre"
    """`pre` (HoVLE), `post` (HoVLE-HD) or `none` (plain convolution)."""
    image_attention: str = "causal"
    """`causal` as in the paper, or `bidirectional`: tokens of one picture see each other in the holistic layers."""
    untie_text_embeddings: bool = False
    """Give the holistic layers a text table of their own, as the paper does."""
    max_tiles: int = 12
    """Most tiles a picture is cut into."""
    chat_template: str | None = None
    """Jinja source of a chat template instead of the language model's own; a base model has none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """One source of training samples."""

    source: str
    """`easy_vqa` (the asset), `chat` (JSON lines of messages), `llava` (JSON or JSON lines of conversations as LLaVA
    and InternVL write them), `pictures` (a folder, for distillation) or `huggingface` (read by `datasets`)."""
    path: str | None = None
    """File or folder of the source, or a data set's Hub id (huggingface); the easy_vqa asset needs none."""
    weight: float = 1.0
    """Samples drawn from this source in proportion to those of the others in the list."""
    name: str | None = None
    """What logs and errors call the source; by default its kind and the name of its file."""
    split: str = "train"
    """Part of the asset or data set to read."""
    picture_folder: str | None = None
    """Folder that picture paths are relative to, and which they may not leave (llava); by default the file's own."""
    format: typing.Literal["auto", "parquet", "webdataset", "imagefolder"] = "auto"
    """How local files are laid out (huggingface); `auto` goes by their names, and by the card of a Hub id."""
    subset: str | None = None
    """Which of a data set's configurations to read (huggingface)."""
    revision: str | None = None
    """Commit, branch or tag of a Hub id (huggingface); a commit keeps a run resumable when the data set moves on."""
    streaming: bool = False
    """Read shards one after another instead of preparing all of them on disk first (huggingface)."""
    prompt: str = ""
    """What the user says beside the picture where a row holds a picture and its caption only (huggingface)."""
    questions_per_sample: int = 1
    """Most conversations about the same pictures that share their tokens; each sees the pictures and itself only. In a
    streamed source they must be neighbours."""
    independent_turns: bool = False
    """Every question of a conversation with its reply is one of its own, which sees the first question's pictures and
    no other turn; with `questions_per_sample` they share these (chat, llava, huggingface)."""
    balance_answers: bool = False
    """Draw `questions_per_sample` of a picture's questions anew each time, those less often whose wording gives the
    answer away, so that looking pays (easy_vqa); otherwise every question is asked once an epoch."""

    def __post_init__(self):
        if self.questions_per_sample < 1:
            raise ValueError(f"questions_per_sample must be at least 1, got {self.questions_per_sample}.")
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight must be a number above 0, got {self.weight}; leave a source out to mute it.")
        only_for = {"picture_folder": "llava", "format": "huggingface", "subset": "huggingface"}
        only_for |= {"streaming": "huggingface", "prompt": "huggingface", "revision": "huggingface"}
        for field, source in only_for.items():
            if getattr(self, field) != type(self).__dataclass_fields__[field].default and self.source != source:
                raise ValueError(f"{field} belongs to the source {source}; {self.source!r} does not read it.")
        if self.questions_per_sample > 1 and self.source == "pictures":
            raise ValueError("questions_per_sample belongs to sources with conversations; 'pictures' has none.")
        if self.independent_turns and self.source in ("easy_vqa", "pictures"):
            raise ValueError(f"independent_turns splits conversations of several turns; {self.source!r} has none.")
        if self.revision is not None and Path(str(self.path)).exists():
            raise ValueError(f"revision belongs to a Hub id; {self.path} is a local path.")
        if self.balance_answers and self.source != "easy_vqa":
            raise ValueError(f"balance_answers balances the questions of easy_vqa; {self.source!r} has none.")

    @property
    def label(self) -> str:
        """What logs and errors call the source."""
        return self.name or self.source + (f":{Path(self.path).name}" if self.path else "")


@dataclass(frozen=True, kw_only=True)
class LayerMatch:
    """One teacher layer and the holistic layer that learns to reproduce it, both counted as in Python lists."""

    teacher: int = -1
    """Feature map or block of the teacher: 0 is its first, -1 its last."""
    student: int = -1
    """Holistic layer: 0 is the first, -1 the last."""


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The image teacher of distillation."""

    kind: typing.Literal["timm", "open_clip", "transformers", "internvit"] = "timm"
    """Library that loads it; `internvit` is the vision tower of an InternVL model in transformers' layout."""
    name: str
    """timm or OpenCLIP model name (`tf_efficientnet_lite0`, `ViT-L-14`, `hf-hub:OWNER/NAME`); for `transformers` and
    `internvit` a folder or Hub id."""
    checkpoint: str | None = None
    """timm: local weights file, `asset:NAME` is fetched; None: timm's own pretrained weights from the Hub. OpenCLIP:
    local weights file or pretrained tag. The other kinds find their weights beside their config."""
    image_size: int
    """Side in pixels at which the teacher sees a tile; its feature grid is pooled to the student's."""
    layers: tuple[LayerMatch, ...] = (LayerMatch(),)
    """Which teacher layer each of some holistic layers reproduces; by default the last one the last one."""
    projected: bool = False
    """Match what InternVL's pixel shuffle and MLP make of the features, in its language model's width (internvit)."""
    standardize: bool = False
    """Subtract each feature channel's mean over some pictures and divide by its deviation. What all pictures share
    makes most of a raw cosine, and a short run learns little else; the paper does not mention it."""
    cache: str | None = None
    """Folder that keeps the teacher's features of every picture: computed once before the first step, read in every
    epoch and by later runs. For small sets seen several times."""
    max_cache_gib: float = 20.0
    """Refuse to fill a cache larger than this."""

    def __post_init__(self):
        if not self.layers:
            raise ValueError("teacher.layers is empty: nothing would be matched.")
        if self.projected and self.kind != "internvit":
            raise ValueError(f"teacher.projected is InternVL's own MLP; a {self.kind} teacher has none.")
        if self.checkpoint is not None and self.kind in ("transformers", "internvit"):
            raise ValueError(f"A {self.kind} teacher has its weights in the folder teacher.name; drop checkpoint.")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What the stage minimises."""

    name: typing.Literal["distillation", "next_token"]
    """`distillation`: teacher features at picture positions and the text table elsewhere. `next_token`: cross-entropy
    of replies."""
    num_random_tokens: int = 50
    """Random ordinary tokens after the picture, and as many again in the reply (distillation)."""
    image_loss: typing.Literal["cosine", "smooth_l1", "info_nce"] = "cosine"
    """How picture outputs are compared with teacher features: negative cosine as in the paper; smooth L1, mean over
    channels; cross-entropy in nats of finding each patch's own feature among those of its tile set (distillation)."""
    temperature: float = 0.07
    """Divides the cosines of info_nce."""
    tiles_per_set: int = 16
    """Tiles whose patches compete in info_nce: so many consecutive ones of a micro-batch, the rest in a last set. A
    batch cut between sets has the same loss; 1 allows any cut."""
    text_weight: float = 1.0
    """Weight of the text cosine beside the image cosine (distillation)."""
    scale_weight: float = 0.1
    """Weight of the squared log ratio of output norms to text-embedding norms; a cosine alone leaves image outputs
    far too long for the LLM (distillation)."""

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"objective.temperature must be above 0, got {self.temperature}.")
        if self.tiles_per_set < 1:
            raise ValueError(f"objective.tiles_per_set must be at least 1, got {self.tiles_per_set}.")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters on the language model's layers instead of full updates (needs peft)."""

    rank: int = 16
    """Rank of the update."""
    alpha: float = 32.0
    """The update is scaled by alpha / rank."""
    dropout: float = 0.0
    """Dropout before the adapter."""


@dataclass(frozen=True, kw_only=True)
class ExpectedData:
    """What `hovle plan` assumes of the data, which it does not read; training ignores it."""

    tiles_per_sample: float = 1.0
    """Picture tiles, thumbnail included."""
    text_tokens_per_sample: float = 60.0
    """Tokens that are not picture, chat template included; in distillation without the random ones."""
    supervised_tokens_per_sample: float = 20.0
    """Those of them that are replies."""
    filled_ratio: float = 0.95
    """Share of packed rows that is not padding."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training stage."""

    output: str
    """Run folder: log, checkpoints and, at the end, `model`. One run per folder."""
    model: ModelConfig
    """Where the stage starts."""
    objective: ObjectiveConfig
    """What it minimises."""
    data: tuple[DataConfig, ...]
    """What it reads: one source, or a list of sources mixed by `weight`."""
    validation: DataConfig | None = None
    """Held-out data, measured before the first step, every `validate_every` steps and after the last."""
    num_validation_batches: int = 4
    """Packed batches of it, all processes and micro-batches together, fewer where the source ends: the same samples
    whatever their number, each once."""
    validate_every: int = 0
    """Steps between validations; 0: only before the first step and after the last."""
    blind_check: bool = True
    """With every validation after the first, measure blank and shuffled pictures too (next_token)."""
    min_picture_gap: float = 0.01
    """Nats per reply token by which such pictures must raise the loss; below it, an alarm is raised after warm-up."""
    stop_when_blind: bool = False
    """End the run on that alarm instead of warning; after the last step the model is saved first."""
    retention: RetentionConfig | None = None
    """Whether the model still knows its language; None: not measured."""
    tracking: tuple[str, ...] = ()
    """Trackers of accelerate that receive the log beside `log.jsonl`: tensorboard, trackio, wandb, ..."""
    trainable: tuple[str, ...]
    """Parameter groups that receive gradients: stem, holistic_layers, text_embeddings, language_model."""
    teacher: TeacherConfig | None = None
    """Image teacher, for distillation."""
    lora: LoraConfig | None = None
    """Adapters on the language model; then `language_model` must not be in `trainable`."""
    expected: ExpectedData | None = None
    """Average sample, for `hovle plan` only."""

    num_steps: int
    """Optimizer steps, not micro-batches."""
    rows_per_batch: int
    """Packed rows of one micro-batch on one process."""
    row_length: int
    """Tokens of one packed row; samples are packed, never cut."""
    packing_window: int = 64
    """Samples drawn ahead to choose from when rows are packed; more of them waste less padding."""
    max_tiles_per_batch: int | None = None
    """Most picture tiles of one micro-batch on one process, where pictures would overflow the memory."""
    max_skip_fraction: float = 0.001
    """The run stops when a larger share of the samples (of the first thousand at least) had to be skipped."""
    max_tiles_per_picture: int | None = None
    """Most tiles a picture is cut into in this stage; by default what the model's processor allows, which stays."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step."""
    learning_rate: float
    """Peak learning rate."""
    final_learning_rate_ratio: float = 0.1
    """Learning rate at the last step over the peak, reached by a cosine."""
    warmup_ratio: float = 0.03
    """Share of the steps with a linear warm-up."""
    adam_betas: tuple[float, ...] = (0.9, 0.95)
    """AdamW's betas."""
    weight_decay: float = 0.05
    """AdamW's weight decay, on matrices only."""
    max_gradient_norm: float = 1.0
    """Gradients are clipped to this norm."""
    seed: int = 0
    """Seeds new weights, sample order and random text."""

    dtype: typing.Literal["auto", "bfloat16", "float32"] = "auto"
    """Number format of matrix products; `auto` takes bfloat16 where this machine is faster with it."""
    compile: typing.Literal["auto", "on", "off"] = "auto"
    """Compile decoder layers; `auto` runs eager, and says so, where there is no working C++ compiler."""
    sharding: typing.Literal["none", "full"] = "none"
    """With several processes: each holds the whole model (`none`), or a piece of each of its tensors (`full`)."""
    activation_checkpointing: bool = False
    """Run each decoder layer again in the backward pass instead of keeping what it computed: saves memory."""
    quantize_frozen: typing.Literal["none", "int8", "int4"] = "none"
    """Hold the frozen language model's layers in 8 or 4 bits while training (needs bitsandbytes); the saved model has
    its weights as they were."""
    num_workers: int = 0
    """0: the training process prepares the batches; 1: a process of its own does; more: one of them tokenises and
    packs, the others read pictures. The batches are the same."""
    log_every: int = 10
    """Steps between log lines."""
    checkpoint_every: int = 0
    """Steps between resumable checkpoints; 0 for none."""
    keep_last: int = 1
    """Newest checkpoints to keep."""
    keep_best: bool = False
    """Measure the validation loss at every checkpoint and keep the one with the smallest, too; `best` names it."""

    def __post_init__(self):
        unknown = sorted(set(self.trainable) - set(PARAMETER_GROUPS))
        if unknown:
            raise ValueError(f"trainable names {unknown}; known parameter groups: {', '.join(PARAMETER_GROUPS)}.")
        if not self.trainable and self.lora is None:
            raise ValueError("trainable is empty and lora is not set: nothing would learn.")
        if self.lora is not None and "language_model" in self.trainable:
            raise ValueError("lora adapts a frozen language model: take language_model out of trainable.")
        if (self.model.checkpoint is None) == (self.model.language_model is None):
            raise ValueError(
                "model needs exactly one of checkpoint (an existing HoVLE) and language_model (a new one)."
            )
        if (self.objective.name == "distillation") != (self.teacher is not None):
            raise ValueError("A teacher goes with the distillation objective, and only with it.")
        if self.objective.name == "distillation" and (self.lora is not None or "language_model" in self.trainable):
            raise ValueError("Distillation does not run the language model: it can train neither it nor lora.")
        if self.validate_every and self.validation is None:
            raise ValueError(f"validate_every is {self.validate_every}, but there is no validation source.")
        if self.stop_when_blind and (not self.blind_check or self.validation is None or self.teacher is not None):
            raise ValueError(
                "stop_when_blind needs blind_check, a validation source and the next_token objective: nothing would "
                "be checked."
            )
        self._check_quantization()
        if self.keep_best and (self.validation is None or not self.checkpoint_every):
            raise ValueError("keep_best compares checkpoints by validation loss: set validation and checkpoint_every.")
        for name, smallest in SMALLEST.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} must be at least {smallest}, got {getattr(self, name)}.")
        if not self.data:
            raise ValueError("data is an empty list: name at least one source.")
        labels = [data.label for data in self.data]
        repeated = sorted({label for label in labels if labels.count(label) > 1})
        if repeated:
            raise ValueError(f"data names several sources {', '.join(repeated)}: give each a `name` of its own.")
        for name in ("max_tiles_per_batch", "max_tiles_per_picture"):
            if (limit := getattr(self, name)) is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}.")
        if not 0 <= self.max_skip_fraction <= 1:
            raise ValueError(f"max_skip_fraction must lie in [0, 1], got {self.max_skip_fraction}.")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError(f"warmup_ratio must lie in [0, 1), got {self.warmup_ratio}.")
        if len(self.adam_betas) != 2:
            raise ValueError(f"adam_betas needs two numbers, got {list(self.adam_betas)}.")

    def _check_quantization(self) -> None:
        if self.quantize_frozen == "none":
            return
        if self.objective.name == "distillation" or self.lora is not None or "language_model" in self.trainable:
            raise ValueError(
                f"quantize_frozen is {self.quantize_frozen}, which is for next_token stages whose language model is "
                "frozen and has no lora: distillation does not run it, the others change it."
            )
        if self.retention is not None:
            raise ValueError(
                "retention would measure the quantised language model, not the saved one: take it out, or set "
                "quantize_frozen to none."
            )
        if self.sharding == "full":
            raise ValueError("quantize_frozen cannot be cut into pieces: take it out, or set sharding to none.")

    def to_dict(self) -> dict:
        """Plain values, as written to the run folder's `recipe.yaml`."""
        return _plain(dataclasses.asdict(self))


def find_recipe(name_or_path: str) -> Path:
    """Locate a recipe: a YAML file, or the name of one that ships with the package."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = RECIPES / f"{name_or_path.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(str(file.relative_to(RECIPES).with_suffix("")) for file in RECIPES.rglob("*.yaml")))
    raise ValueError(f"No recipe {name_or_path!r}: it is neither a file nor one of the shipped recipes ({names}).")


def load_stage(name_or_path: str, overrides: typing.Sequence[str] = ()) -> StageConfig:
    """Read one stage from YAML.

    Args:
        name_or_path: YAML file or the name of a shipped recipe.
        overrides: `key=value` strings that replace fields, dots for nested ones: `model.image_size=224`,
            `data.0.weight=2` for the first of a list.

    Raises:
        ValueError: For unknown or missing keys and values of the wrong type, naming the key.
    """
    path = find_recipe(name_or_path)
    values = _read_yaml(path.read_text(), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values.")
    for override in overrides:
        _override(values, override)
    return _build(StageConfig, values, str(path))


def with_new_fields(values: dict) -> dict:
    """A recipe that an older version wrote, with the defaults of fields that are new since.

    One that this version cannot read stays as it is.
    """
    try:
        return _build(StageConfig, values, "recipe of a run").to_dict()
    except ValueError:
        return values


def _read_yaml(text: str, where: str):
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no plain YAML: {error}") from error


def _override(values: dict, override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"Overrides read key=value, got {override!r}.")
    *parents, last = key.split(".")
    for parent in parents:
        if isinstance(values, dict) and values.get(parent) is None:
            values[parent] = {}
        values = values[_place(values, parent, key)]
        if not isinstance(values, (dict, list)):
            raise ValueError(f"{key}: {parent} has no fields to override.")
    values[_place(values, last, key)] = _read_yaml(text, override)


def _place(values: dict | list, name: str, key: str) -> str | int:
    """A field of a mapping, or the number of an item of a list."""
    if isinstance(values, dict):
        return name
    if not name.isdecimal() or int(name) >= len(values):
        raise ValueError(f"{key}: {name!r} is none of the list's {len(values)} items; they count from 0.")
    return int(name)


def _build(cls, values: dict, where: str):
    """Make a config dataclass from a mapping, checking names and types of its fields."""
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(fields)}."
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
    missing = [name for name, item in fields.items() if name not in values and _is_required(item)]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}.")
    hints = typing.get_type_hints(cls)
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _is_required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _convert(hint, value, where: str):
    """Check a YAML value against a field's annotation and give it the annotated type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _convert(next(item for item in arguments if item is not type(None)), value, where)
    if origin is typing.Literal:
        value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        if value not in arguments:
            raise ValueError(f"{where} must be one of {', '.join(arguments)}, got {value!r}.")
        return value
    if origin is tuple:
        if dataclasses.is_dataclass(arguments[0]):
            if isinstance(value, dict):
                return (_convert(arguments[0], value, where),)  # one needs no list
            where += " item"
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}.")
        return tuple(_convert(arguments[0], item, where) for item in value)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping, got {value!r}.")
        return _build(hint, value, where)
    if hint is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 3e-4 as text
        except ValueError:
            pass
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{where} must be {hint.__name__}, got {value!r}.")
    return value


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
