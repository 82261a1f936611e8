"""What holds a HoVLE to the bare language model: what enters it, and what it says."""

import torch
from torch import nn

from ...model.modeling_hovle import HolisticEmbeddingOutput, HoVLEForConditionalGeneration
from ..data.batch import PackedBatch
from ..model.bare_language_model import BareLanguageModel


class HeldLanguage(nn.Module):
    """Distance from the bare language model on text without pictures, and around them.

    Args:
        bare: Says what the language model would alone.
        weight: Of the error of what enters the language model.
        kl_weight: Of the distance from what `bare` says; at 0 the language model does not run for it.
        around_images: Whether to hold the text around images, but for replies, too.
    """

    def __init__(
        self, bare: BareLanguageModel, weight: float = 1.0, kl_weight: float = 0.0, around_images: bool = False
    ):
        super().__init__()
        self.bare = bare
        self.weights = {"text_error": weight}
        """Weight of each term."""
        if kl_weight:
            self.weights["language_kl"] = kl_weight
        if around_images:
            names = {"text_error": "prompt_error", "language_kl": "prompt_kl"}
            self.weights |= {names[name]: value for name, value in self.weights.items()}

    def num_rows_through_language_model(self, batch: PackedBatch) -> int:
        """Rows that the language model must read: all but the last ones, where they hold nothing it is asked about."""
        num_rows, length = batch.input_ids.shape
        is_below = "language_kl" not in self.weights and batch.language_length == length
        return num_rows - batch.num_language_rows * is_below

    def counts(self, batch: PackedBatch, image_token_id: int) -> dict[str, torch.Tensor]:
        """Positions each term is summed over."""
        counts = {kind: places.sum() for kind, places in self._places(batch, image_token_id).items()}
        return {name: counts[name.partition("_")[0]] for name in self.weights}

    def _places(self, batch: PackedBatch, image_token_id: int) -> dict[str, torch.Tensor]:
        """Where each kind of text is that is held, shape `(B, T)`; `language_kl` is of text, too."""
        places = {"text": language_places(batch)}
        if "prompt_error" in self.weights:
            places["prompt"] = prompt_places(batch, image_token_id)
        return {**places, "language": places["text"]}

    def terms(
        self,
        model: HoVLEForConditionalGeneration,
        holistic: HolisticEmbeddingOutput,
        hidden_states: torch.Tensor,
        batch: PackedBatch,
    ) -> dict[str, torch.Tensor]:
        """Summed terms.

        Args:
            model: The student.
            holistic: What its holistic layers make of the batch.
            hidden_states: What its language model makes of the rows that it reads, shape `(R, T, D)`.
            batch: Packed.
        """
        entering = holistic.language_inputs_embeds
        assert entering is not None
        places = self._places(batch, model.config.image_token_id)
        terms = {}
        for name in self.weights:
            kind, _, what = name.partition("_")
            if what == "error":
                held = places[kind]
                terms[name] = embedding_error(entering[held], self.bare.embeds(model, batch.input_ids[held]))
        if "language_kl" in self.weights:
            terms["language_kl"] = self._language_kl(model, hidden_states, batch)
        if "prompt_kl" in self.weights:
            terms["prompt_kl"] = self._prompt_kl(model, holistic, hidden_states, batch, places["prompt"])
        return terms

    def _language_kl(
        self, model: HoVLEForConditionalGeneration, hidden_states: torch.Tensor, batch: PackedBatch
    ) -> torch.Tensor:
        """Sum of KL(bare language model || model) in nats over the tokens of text without pictures."""
        if not batch.num_language_rows:
            return hidden_states.new_zeros((), dtype=torch.float32)
        input_ids, position_ids = (batch.language_part(item) for item in (batch.input_ids, batch.position_ids))
        expected = self.bare(model, input_ids, position_ids)
        return divergence(expected, model.compute_logits(batch.language_part(hidden_states)))

    def _prompt_kl(
        self,
        model: HoVLEForConditionalGeneration,
        holistic: HolisticEmbeddingOutput,
        hidden_states: torch.Tensor,
        batch: PackedBatch,
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Sum of KL(bare language model, shown the same images || model) in nats over the text around images."""
        images = holistic.image_hidden_states
        expected = self.bare(
            model,
            batch.input_ids,
            batch.position_ids,
            image_hidden_states=None if images is None else images.detach(),
            attention_mask=batch.attention_mask,
            places=places,
        )
        return divergence(expected, model.compute_logits(hidden_states[places]))


def language_places(batch: PackedBatch) -> torch.Tensor:
    """True at text without pictures, shape `(B, T)`."""
    places = torch.zeros_like(batch.is_sample)
    batch.language_part(places).fill_(True)
    return places


def prompt_places(batch: PackedBatch, image_token_id: int) -> torch.Tensor:
    """True at text around images, but for replies, shape `(B, T)`.

    Replies have their own targets, text without images its own term, and where an image follows, no word does.
    """
    is_image = batch.input_ids == image_token_id
    places = batch.is_sample & ~(is_image | is_image.roll(-1, dims=1) | batch.is_supervised)
    return places & ~language_places(batch)


def embedding_error(entering: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Sum over positions of the squared error over the squared length of the embedding, of `(..., D)` each.

    A cosine hardly sees it, and it needs no pass of the language model.
    """
    entering, embeds = entering.float(), embeds.float()
    squared_error = (entering - embeds).square().sum(dim=-1)
    return (squared_error / embeds.square().sum(dim=-1).clamp(min=1e-12)).sum()


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Sum over positions of KL(expected || found) in nats, of logits `(..., V)`."""
    expected, found = (logits.float().log_softmax(dim=-1) for logits in (expected, found))
    return nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
