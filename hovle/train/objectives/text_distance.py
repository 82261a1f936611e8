"""How far text has moved on its way through the holistic layers, as the language model feels it: three measures.

Distillation holds text by one of them. Each knows the language model better, and costs more: the squared error of what
enters it; the same in the directions it is sensitive to; what it would say.
"""

import math
from typing import NamedTuple

import torch
from torch import nn

from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..data.language import LanguageText
from ..model.bare_language_model import as_released, bare_logits, language_logits

TOKENS_PER_DIMENSION = 8
"""Gradients of so many tokens for each channel of the hidden size make the estimate of `FisherDistance`."""


class HeldText(NamedTuple):
    """Text without pictures behind the holistic layers."""

    entering: torch.Tensor
    """What enters the language model, shape `(B, T, D)`."""
    embeds: torch.Tensor
    """Its embeddings in the bare language model, same shape."""
    position_ids: torch.Tensor
    """0 where a document begins, shape `(B, T)`."""


class TextDistance(nn.Module):
    """Measures a text's distance from the bare language model."""

    term: str
    """What the log calls it."""

    def forward(self, model: HoVLEForConditionalGeneration, text: HeldText) -> torch.Tensor:
        """Sum over the tokens, 0 where nothing has moved.

        Args:
            model: The student, whose language model is frozen.
            text: Behind its holistic layers.
        """
        raise NotImplementedError  # subclasses say


class RelativeDistance(TextDistance):
    """Squared error over the squared length of the embedding: what a cosine hardly sees."""

    term = "text_error"

    def forward(self, model: HoVLEForConditionalGeneration, text: HeldText) -> torch.Tensor:
        squared_error = (text.entering.float() - text.embeds.float()).square().sum(dim=-1)
        return (squared_error / text.embeds.float().square().sum(dim=-1).clamp(min=1e-12)).sum()


class FisherDistance(TextDistance):
    """Squared error weighted by how much each direction changes what the language model says.

    The weights are the Fisher matrix of its next-token distributions with respect to its input embeddings. Half of
    `delta^T F delta` is the second-order approximation of the KL divergence that an error `delta` causes; here it is
    scaled so that an error of no particular direction costs what `RelativeDistance` says.
    """

    term = "fisher_error"

    def __init__(self, hidden_size: int):
        super().__init__()
        self.root: torch.Tensor
        """Its square root, shape `(D, D)`; of no particular direction until it is estimated."""
        self.register_buffer("root", torch.eye(hidden_size), persistent=False)

    def forward(self, model: HoVLEForConditionalGeneration, text: HeldText) -> torch.Tensor:
        return ((text.entering.float() - text.embeds.float()) @ self.root).square().sum()

    def estimate(
        self, model: HoVLEForConditionalGeneration, text_table: torch.Tensor, text: LanguageText, seed: int
    ) -> str:
        """Measure on a text what the language model is sensitive to.

        Args:
            model: Its language model is as released.
            text_table: Input embeddings, shape `(V, D)`.
            text: Windows of it are read from the beginning.
            seed: Of the tokens that the model's own distributions give.

        Returns:
            What was found, in a line.
        """
        num_windows = math.ceil(TOKENS_PER_DIMENSION * len(self.root) / text.length)
        generator = torch.Generator(text_table.device).manual_seed(seed)
        fisher = torch.zeros_like(self.root)
        squared_length = 0.0
        for number in range(num_windows):
            window = text.window_at(number)
            ids, position_ids = (item[None].to(text_table.device) for item in (window.input_ids, window.position_ids))
            embeds = nn.functional.embedding(ids, text_table).float()
            with as_released(model.model.language_layers, model.training):
                gradients = _sampled_gradients(model, embeds, position_ids, generator)
            fisher += gradients.T @ gradients
            squared_length += float(embeds.square().sum(dim=-1).mean()) / num_windows
        values, directions = torch.linalg.eigh(fisher / fisher.trace())
        values = values.clamp(min=0)  # rounding alone makes one negative
        self.root.copy_(directions * (values * len(values) / squared_length).sqrt())
        num_half = int((values.flip(0).cumsum(0) < 0.5).sum()) + 1
        return (
            f"What the language model is sensitive to, measured on {num_windows * text.length:,} tokens: half of it "
            f"lies in {num_half} of {len(values)} directions."
        )


def _sampled_gradients(
    model: HoVLEForConditionalGeneration, embeds: torch.Tensor, position_ids: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Gradients of the log-likelihood of tokens drawn from the model's own distributions, shape `(tokens, D)`."""
    embeds = embeds.detach().requires_grad_()
    logits = language_logits(model, embeds, position_ids).float().flatten(0, 1)
    drawn = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator).flatten()
    log_likelihood = -nn.functional.cross_entropy(logits, drawn, reduction="sum")
    [gradients] = torch.autograd.grad(log_likelihood, embeds)
    return gradients.flatten(0, 1)


class LanguageDivergence(TextDistance):
    """KL divergence from the bare language model, through its frozen layers."""

    term = "language_kl"

    def forward(self, model: HoVLEForConditionalGeneration, text: HeldText) -> torch.Tensor:
        expected = bare_logits(model, text.embeds, text.position_ids)
        return divergence(expected, language_logits(model, text.entering, text.position_ids))


def divergence(expected: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """Sum over positions of KL(expected || found) in nats, of logits `(..., V)`."""
    expected, found = (logits.float().log_softmax(dim=-1) for logits in (expected, found))
    return nn.functional.kl_div(found, expected, reduction="sum", log_target=True)
