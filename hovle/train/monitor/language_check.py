"""Does it forget its language? Perplexity on held-out text during a run, beside the bare language model's."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ...errors import StopRunError
from ...model.modeling_hovle import IGNORE_INDEX
from ..data.language import LanguageText
from ..parallel import unsharded
from ..step.assembly import TrainableStep

NUM_TOKENS = 4096
"""Held-out tokens that are measured, in whole windows; fewer where the text ends."""

Logits = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Next-token logits, `(B, T, V)`, of token ids and their positions."""


class ForgettingError(StopRunError):
    """The model loses its language; the message says by how much, and what to change."""


class LanguageCheck:
    """Measures a run's language against that of the bare language model, which is measured once.

    Args:
        step: Of the run, distributed.
        text: Held-out windows.
    """

    def __init__(self, step: TrainableStep, text: LanguageText):
        self.step = step
        count = min(len(text.starts), math.ceil(NUM_TOKENS / text.length))
        windows = [text.window_at(number) for number in range(count)]
        config = step.config  # no more at once than it trains on
        rows = max(1, min(config.rows_per_batch, config.row_length // text.length))
        self.input_ids = torch.stack([window.input_ids for window in windows]).split(rows)
        self.position_ids = torch.stack([window.position_ids for window in windows]).split(rows)
        self._bare_nats: float | None = None

    def perplexity_ratio(self) -> float:
        """Perplexity of the model as it stands over that of the bare language model (all ranks)."""
        if self._bare_nats is None:
            self._bare_nats = self._mean_nats(self.step.objective.bare_logits)
        return float(torch.tensor(self._mean_nats(self._own_logits) - self._bare_nats).exp())

    def _own_logits(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return self.step.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits

    @torch.no_grad()
    def _mean_nats(self, logits_of: Logits) -> float:
        """Mean `-log p(token)` over all tokens but the first of each document in a window."""
        objective, accelerator = self.step.objective, self.step.accelerator
        sums = torch.zeros(2, device=accelerator.device)  # nats, tokens
        objective.eval()
        # As in validation: batches are dealt out, all processes run as many, and layers run uncompiled.
        num_rounds = math.ceil(len(self.input_ids) / accelerator.num_processes)
        with unsharded(objective), self.step.autocast, torch.compiler.set_stance("force_eager"):
            for number in range(num_rounds):
                place = number * accelerator.num_processes + accelerator.process_index
                batch = (items[place % len(items)] for items in (self.input_ids, self.position_ids))
                input_ids, position_ids = (item.to(accelerator.device) for item in batch)
                logits = logits_of(input_ids, position_ids)[:, :-1].float()
                targets = input_ids[:, 1:].masked_fill(position_ids[:, 1:] == 0, IGNORE_INDEX)
                if place < len(self.input_ids):
                    sums[0] += nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
                    sums[1] += (targets != IGNORE_INDEX).sum()
        objective.train()
        nats, num_tokens = accelerator.reduce(sums, "sum")
        return float(nats / num_tokens)
