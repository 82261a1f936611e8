"""Is it learning to see? Validation during a run, with true, blank and shuffled pictures.

A model that ignores its pictures can still lower its loss, because wording alone tells much. So the held-out loss is
measured again with white pictures and with pictures of other samples: where neither raises it, nobody looks.
"""

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from tqdm.auto import tqdm

from ...errors import StopRunError
from ...model.configuration_hovle import HoVLEConfig
from ...model.image_tokens import number_pictures
from ...model.modeling_hovle import IGNORE_INDEX
from ..data.batch import PackedBatch
from ..step.assembly import TrainableStep
from ..step.train_step import NonFiniteLossError
from ..step.validation import validate
from .language_check import ForgettingError, LanguageCheck

CAUSES = (
    "Can wording alone give the answers away, or do pictures and questions not belong together? Are picture outputs "
    "far longer or shorter than text (image_norm_ratio)? Do gradients reach the stem (gradient_norm_stem)? Is the "
    "learning rate so high that the layers forgot what distillation taught them?"
)
"""What to look at when pictures do not matter."""


class BlindPicturesError(StopRunError):
    """The model answers as well without its pictures; the message says by how much, and what to look at."""


@dataclass
class Waiting:
    """For a smaller validation loss."""

    smallest: float | None = None
    """So far."""
    num_validations: int = 0
    """Since then."""


@dataclass
class Examiner:
    """Measures held-out batches and text during a run and says when pictures do not matter or language is lost."""

    step: TrainableStep
    """Of the run, distributed."""
    batches: list[PackedBatch]
    """Held-out batches, the same ones on every process; empty: nothing is measured with them."""
    log: Callable[[dict], None]
    language: LanguageCheck | None = None
    """On held-out text; None where the recipe holds none."""
    last: tuple[int, dict[str, float]] | None = None
    """Step and terms of the last validation; asked again after the same step, they are still right."""
    waiting: Waiting = field(default_factory=Waiting)
    """What `patience` goes by."""

    def warn_where_blind(self) -> None:
        """Show a warning where the recipe wants the effect of pictures checked and nothing held out tells it."""
        if not self.step.config.image_ablation or self.step.config.objective.name != "next_token":
            return
        token = self.step.model.config.image_token_id
        if any(only_after_pictures(batch, token).is_supervised.any() for batch in self.batches):
            return
        found = "no held-out reply follows a picture" if self.batches else "there is no validation source"
        self._show(
            f"WARNING: nothing will tell whether the model looks at its pictures: {found}. Name held-out "
            "conversations about pictures as `validation`, or set image_ablation to false."
        )

    def examine(self, step: int) -> StopRunError | None:
        """Log the held-out terms after so many steps and, once training has begun, the effect of the pictures.

        Returns:
            Why the recipe wants the run to end now, if it does.
        """
        if not self.batches and self.language is None:
            return None
        terms = self._validate(step)
        ends = self._check_pictures(step, terms), self._check_language(step, terms)
        return ends[0] or ends[1]

    def _check_pictures(self, step: int, terms: dict[str, float]) -> StopRunError | None:
        config = self.step.config
        if not (step and self.batches and config.image_ablation and config.objective.name == "next_token"):
            return None
        effect = self._effect_of_pictures(terms["cross_entropy"])
        self.log({"event": "image_ablation", "step": step, **effect})
        alarm = self._alarm(step, effect) if effect["num_pictures"] else None
        return BlindPicturesError(alarm) if alarm and config.stop_when_images_ignored else None

    def _check_language(self, step: int, terms: dict[str, float]) -> StopRunError | None:
        most = self.step.config.stop_when_forgetting
        if most is None or terms["perplexity_ratio"] <= most or self._is_warming_up(step):
            return None
        message = (
            f"The language is being lost: perplexity on held-out text is {terms['perplexity_ratio']:.3f} times the "
            f"bare language model's; stop_when_forgetting is {most}. Raise language.weight or language.share, lower "
            "the learning rate, or hold a wider text."
        )
        self._warn(step, message)
        return ForgettingError(message)

    def _is_warming_up(self, step: int) -> bool:
        config = self.step.config
        return step <= math.ceil(config.num_steps * config.warmup_ratio) < config.num_steps

    def has_waited_enough(self, step: int) -> bool:
        """Whether the run shall end, as `patience` validations in a row had no smaller loss; asked once after each."""
        if not self.batches:
            return False
        loss, waiting = self.held_out_loss(step), self.waiting
        if waiting.smallest is None or loss < waiting.smallest:
            self.waiting = Waiting(loss)
            return False
        waiting.num_validations += 1
        if not 0 < self.step.config.patience <= waiting.num_validations:
            return False
        message = (
            f"the validation loss, {loss:.5g}, has not fallen below {waiting.smallest:.5g} for "
            f"{waiting.num_validations} validations: the run ends here (patience)."
        )
        self.log({"event": "early_stop", "step": step, "message": message})
        self._show(f"After step {step}, {message}")
        return True

    def held_out_loss(self, step: int) -> float:
        """Log the held-out terms after so many steps and weigh them as training does."""
        terms = self._validate(step)
        return sum(weight * terms[name] for name, weight in self.step.objective.weights.items())

    def _validate(self, step: int) -> dict[str, float]:
        if self.last is None or self.last[0] != step:
            terms = self._measure(self.batches) if self.batches else {}
            if self.language is not None:
                terms["perplexity_ratio"] = self.language.perplexity_ratio()
            self.last = step, terms
            self.log({"event": "validation", "step": step, **self.last[1]})
            if wrong := [f"{name} is {value}" for name, value in self.last[1].items() if not math.isfinite(value)]:
                raise NonFiniteLossError(
                    f"Validation after step {step}: {', '.join(wrong)}. The model is not saved; lower the learning "
                    "rate, set dtype to float32, or look at the held-out samples."
                )
        return self.last[1]

    def _measure(self, batches: list[PackedBatch]) -> dict[str, float]:
        return validate(self.step.wrapped, batches, self.step.autocast, self.step.accelerator)

    def _effect_of_pictures(self, nats: float) -> dict[str, float]:
        """Held-out loss behind true, blank and shuffled pictures; `nats` is what all replies have."""
        token = self.step.model.config.image_token_id
        batches = [only_after_pictures(batch, token) for batch in self.batches]
        same_targets = all(
            torch.equal(old.targets, new.targets) for old, new in zip(self.batches, batches, strict=True)
        )
        shuffled, num_pictures, num_shuffled = shuffle_pictures(batches, self.step.model.config)
        if not any(batch.is_supervised.any() for batch in batches):
            return {"num_pictures": 0, "num_shuffled": 0}
        if not same_targets:
            nats = self._measure(batches)["cross_entropy"]
        blank = self._measure(blank_pictures(batches))["cross_entropy"]
        moved = self._measure(shuffled)["cross_entropy"]
        return {
            "true_nats": nats,
            "blank_nats": blank,
            "shuffled_nats": moved,
            "blank_gap": blank - nats,
            "shuffled_gap": moved - nats,
            "num_pictures": num_pictures,
            "num_shuffled": num_shuffled,
        }

    def _alarm(self, step: int, effect: dict[str, float]) -> str | None:
        """Log and show a warning where pictures hardly matter, once warm-up is over."""
        gaps = {"blank": effect["blank_gap"]}
        if effect["num_shuffled"]:
            gaps["shuffled"] = effect["shuffled_gap"]
        too_small = {name: gap for name, gap in gaps.items() if not gap >= self.step.config.min_picture_gap}
        if not too_small or self._is_warming_up(step):
            return None
        found = " and ".join(f"{gap:.4f} nats per token with {name} ones" for name, gap in too_small.items())
        message = (
            f"Pictures hardly matter: the held-out loss ({effect['true_nats']:.4f} with the true ones) rises by "
            f"{found}; min_picture_gap is {self.step.config.min_picture_gap}. {CAUSES}"
        )
        self._warn(step, message)
        return message

    def _warn(self, step: int, message: str) -> None:
        self.log({"event": "warning", "step": step, "message": message})
        self._show(f"WARNING after step {step}: {message}")

    def _show(self, message: str) -> None:
        if self.step.accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)


def only_after_pictures(batch: PackedBatch, image_token_id: int) -> PackedBatch:
    """The batch without targets behind tokens that have seen no picture in their sample."""
    is_image = batch.input_ids == image_token_id
    num_seen = is_image.cumsum(dim=1)
    is_start = batch.position_ids == 0
    num_before_sample = torch.where(is_start, num_seen - is_image.long(), 0).cummax(dim=1).values
    return dataclasses.replace(batch, targets=batch.targets.masked_fill(num_seen == num_before_sample, IGNORE_INDEX))


def blank_pictures(batches: list[PackedBatch]) -> list[PackedBatch]:
    """The batches with white pictures."""
    return [dataclasses.replace(batch, pixel_values=torch.full_like(batch.pixel_values, 255)) for batch in batches]


def shuffle_pictures(batches: list[PackedBatch], config: HoVLEConfig) -> tuple[list[PackedBatch], int, int]:
    """Give every picture's place to another picture: the next different one with as many tiles, else any other.

    A picture with another number of tiles is repeated or cut to fit; where all pictures are the same one, it stays.

    Returns:
        The batches, how many pictures they hold, and how many of them were replaced.
    """
    pictures = [picture for batch in batches for picture in split_pictures(batch, config)]
    others = [_other_picture(pictures, place) for place in range(len(pictures))]
    num_shuffled = sum(other is not None for other in others)
    tiles = iter(picture if other is None else other for picture, other in zip(pictures, others, strict=True))
    shuffled = []
    for batch in batches:
        taken = [next(tiles) for _ in split_pictures(batch, config)]
        shuffled.append(dataclasses.replace(batch, pixel_values=torch.cat([batch.pixel_values[:0], *taken])))
    return shuffled, len(pictures), num_shuffled


def split_pictures(batch: PackedBatch, config: HoVLEConfig) -> list[torch.Tensor]:
    """Tiles of each picture of a batch in reading order; a picture is an unbroken run of placeholders."""
    numbers = number_pictures(batch.input_ids == config.image_token_id)
    tokens_per_tile = config.tokens_per_tile(batch.pixel_values.shape[-1])
    counts = [count // tokens_per_tile for row in numbers for count in torch.bincount(row[row >= 0]).tolist()]
    return list(batch.pixel_values.split(counts)) if counts else []


def _other_picture(pictures: list[torch.Tensor], place: int) -> torch.Tensor | None:
    """The next picture that differs from the one at `place`, as many tiles if there is one, else made to fit."""
    own = pictures[place]
    following = [*pictures[place + 1 :], *pictures[:place]]
    for other in sorted(following, key=lambda picture: len(picture) != len(own)):  # stable: the next one comes first
        fitted = other[torch.arange(len(own)) % len(other)] if len(other) != len(own) else other
        if not torch.equal(fitted, own):
            return fitted
    return None
