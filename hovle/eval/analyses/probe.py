"""Read attention while a model runs, without ever holding a layer's whole matrix.

An attention function of our own computes a block of queries at a time, reduces the block to a few numbers and goes
on: T = 4,000 tokens in 32 heads would be 2 GB a layer in float32, a block is a few megabytes. Each row of attention,
one query in one head, is reduced to:

  mass      how its attention, which sums to 1, falls on image tokens, the first token of the prompt (where models
            park attention they have no use for) and all other tokens
  entropy   of its attention among the n image tokens it can see, rescaled to sum to 1 there, in units of log(n):
            1 is even, 0 is all on one token
  sparsity  share of those n image tokens that get less than a tenth of an even share, 1 / n

Rows that see no image token count nowhere; entropy and sparsity need two.

Axis legend: H heads   T tokens   Q queries of a block   S image tokens   A answer tokens
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.llama.modeling_llama import repeat_kv

NAME = "hovle_probe"
"""Our attention function's name among transformers' own."""

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}
"""Attention weights held at once: 4 MB in float32, and what keeps a GPU busy. A few such blocks exist at a
time."""

EVEN_SHARE_FRACTION = 0.1
"""An image token below this fraction of an even share counts as not looked at."""

MASS = ("image", "first_token", "other")
"""Where attention may fall, in the order of `RowStatistics.mass`."""


@dataclass
class Section:
    """Layers that run on one and the same sequence."""

    name: str
    layers: Sequence[Any]
    """Decoder layers with an attention module `self_attn`."""
    image_mask: torch.Tensor
    """True at image tokens, shape `(T,)`, bool."""
    answer_queries: torch.Tensor
    """Position whose output predicts each answer token, shape `(A,)`."""


@dataclass
class RowStatistics:
    """Means over the rows of one kind of query, image or not, that see image tokens."""

    num_queries: int
    """Queries that see an image token; the mean runs over these in all heads."""
    mass: torch.Tensor
    """By head, on image tokens, first token and others, shape `(H, 3)`; nan without queries."""
    entropy: torch.Tensor
    """By head, shape `(H,)`, in units of log(visible image tokens)."""
    sparsity: torch.Tensor
    """By head, shape `(H,)`."""

    def means(self) -> dict[str, float]:
        """Means over heads: the shares of `MASS`, `entropy` and `sparsity`."""
        shares = dict(zip(MASS, self.mass.mean(dim=0).tolist(), strict=True))
        return {**shares, "entropy": float(self.entropy.mean()), "sparsity": float(self.sparsity.mean())}


@dataclass
class LayerReading:
    """What one layer's attention came to."""

    text: RowStatistics
    """Of all queries that are no image tokens and stand behind one."""
    image: RowStatistics
    """Of image tokens."""
    answer_maps: torch.Tensor
    """Attention from each answer token's query to each image token, mean over heads, shape `(A, S)`."""


class Probe:
    """Gathers a reading from every layer of some sections.

    Args:
        sections: Whose layers to read.
    """

    def __init__(self, sections: Sequence[Section]):
        self.sections = sections
        self._place = {
            id(layer.self_attn): (section, number)
            for section in sections
            for number, layer in enumerate(section.layers)
        }
        self._readings: dict[tuple[str, int], LayerReading] = {}

    def readings(self, section: Section) -> list[LayerReading]:
        """One reading per layer of a section, from the bottom up; ValueError for a layer that did not run."""
        keys = [(section.name, number) for number in range(len(section.layers))]
        missing = [number for key, number in zip(keys, range(len(keys)), strict=True) if key not in self._readings]
        if missing:
            raise ValueError(
                f"Layers {missing} of the {section.name} did not go through transformers' attention interface, so "
                "nothing could be read."
            )
        return [self._readings[key] for key in keys]

    def section_of(self, module: nn.Module) -> tuple[Section, int] | None:
        """Section and number of the layer an attention module belongs to, if it is read."""
        return self._place.get(id(module))

    def keep(self, section: Section, number: int, reading: LayerReading) -> None:
        """Take a layer's reading."""
        self._readings[section.name, number] = reading


_ACTIVE: ContextVar[Probe | None] = ContextVar("active_probe", default=None)


@contextlib.contextmanager
def probing(sections: Sequence[Section]) -> Iterator[Probe]:
    """Read the attention of some layers in forward passes inside; their number format and masks stay as they are.

    Args:
        sections: Whose layers to read. Forward passes must hold one prompt and no cache.
    """
    configs = {id(layer.self_attn.config): layer.self_attn.config for section in sections for layer in section.layers}
    before = [(config, config._attn_implementation) for config in configs.values()]
    probe = Probe(sections)
    token = _ACTIVE.set(probe)
    try:
        for config, _ in before:
            config._attn_implementation = NAME
        yield probe
    finally:
        for config, name in before:
            config._attn_implementation = name
        _ACTIVE.reset(token)


def probed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' functions compute it, in float32 and read on the way.

    Args:
        module: The attention module.
        query: Shape `(1, H, T, head size)`.
        key: Shape `(1, key heads, T, head size)`.
        value: As `key`.
        attention_mask: True where a query may look, shape `(1, 1, T, T)`, or None for causal.
        scaling: Of the scores; by default one over the root of the head size.
        softcap: Limit of the scores (Gemma 2).
        **kwargs: Of other attention functions.

    Raises:
        ValueError: For several prompts, cached keys or attention sinks, which are no tokens.
    """
    probe = _ACTIVE.get()
    place = None if probe is None else probe.section_of(module)
    if probe is None or place is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    section, number = place
    num_tokens = query.shape[2]
    if len(query) != 1 or key.shape[2] != num_tokens or len(section.image_mask) != num_tokens:
        raise ValueError(
            f"Attention is read for one prompt of {len(section.image_mask)} tokens without a cache, got "
            f"{len(query)} of {num_tokens} tokens with {key.shape[2]} keys."
        )
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{type(module).__name__} has attention sinks that are no tokens; they cannot be read.")
    groups = module.num_key_value_groups
    keys, values = (repeat_kv(states, groups)[0].float() for states in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    block = max(1, BLOCK_ELEMENTS[query.device.type] // (query.shape[1] * num_tokens))
    rows = _Rows(section, query.shape[1])
    outputs = torch.empty_like(query[0], dtype=torch.float32)
    for start in range(0, num_tokens, block):
        places = torch.arange(start, min(start + block, num_tokens), device=query.device)
        scores = query[0, :, places].float() @ keys.transpose(1, 2) * scale  # (H, Q, T)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        is_visible = _visible(attention_mask, places, num_tokens)
        scores.masked_fill_(~is_visible, -torch.inf)
        total = scores.logsumexp(dim=-1)
        weights = (scores - total[..., None]).exp_()
        outputs[:, places] = weights @ values
        rows.add(places, scores, weights, is_visible)
    probe.keep(section, number, rows.reading())
    return outputs.transpose(0, 1)[None].to(query.dtype), None


def _visible(attention_mask: torch.Tensor | None, places: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Which keys each query of a block sees, shape `(Q, T)`, bool."""
    if attention_mask is None:
        return torch.arange(num_tokens, device=places.device) <= places[:, None]
    return attention_mask[0, 0, places]


class _Rows:
    """Reduces one layer's attention, block by block, into tensors that are there from the beginning."""

    def __init__(self, section: Section, num_heads: int):
        self.section = section
        self.image_places = section.image_mask.nonzero().flatten()
        num_tokens, device = len(section.image_mask), section.image_mask.device
        is_first = torch.arange(num_tokens, device=device) == 0
        image_mask = section.image_mask
        self.kinds = torch.stack([image_mask, ~image_mask & is_first, ~image_mask & ~is_first], dim=1).float()
        self.mass = torch.empty(num_heads, num_tokens, len(MASS), device=device)
        self.entropy = torch.empty(num_heads, num_tokens, device=device)
        self.sparsity = torch.empty(num_heads, num_tokens, device=device)
        self.num_seen = torch.empty(num_tokens, dtype=torch.long, device=device)
        self.maps = torch.empty(len(section.answer_queries), len(self.image_places), device=device)

    def add(self, places, scores, weights, is_visible) -> None:
        """Reduce a block: scores and weights, shape `(H, Q, T)`, and what each query sees, `(Q, T)`."""
        self.mass[:, places] = weights @ self.kinds
        seen = is_visible[:, self.image_places]
        num_seen = seen.sum(dim=-1)
        self.num_seen[places] = num_seen
        scores = scores[..., self.image_places]
        # Rows that see no image token are left out by `num_seen`; the zero keeps them from spreading nan.
        total = scores.logsumexp(dim=-1).masked_fill(num_seen == 0, 0.0)
        shares = (scores - total[..., None]).exp_()
        is_idle = (shares < EVEN_SHARE_FRACTION / num_seen.clamp(min=1)[:, None]) & seen
        self.sparsity[:, places] = is_idle.sum(dim=-1) / num_seen.clamp(min=1)
        entropy = total - scores.masked_fill_(~seen, 0.0).mul_(shares).sum(dim=-1)
        self.entropy[:, places] = entropy / num_seen.clamp(min=2).log()
        for number, query in enumerate(self.section.answer_queries.tolist()):
            if places[0] <= query <= places[-1]:
                self.maps[number] = weights[:, query - places[0], self.image_places].mean(dim=0)

    def reading(self) -> LayerReading:
        """What all blocks came to."""
        image_mask = self.section.image_mask

        def mean_of(is_asked: torch.Tensor) -> RowStatistics:
            has_one, has_two = is_asked & (self.num_seen > 0), is_asked & (self.num_seen > 1)
            return RowStatistics(
                int(has_one.sum()),
                *(
                    values[:, rows].cpu().double().mean(dim=1)
                    for values, rows in ((self.mass, has_one), (self.entropy, has_two), (self.sparsity, has_two))
                ),
            )

        return LayerReading(mean_of(~image_mask), mean_of(image_mask), self.maps.cpu())


AttentionInterface.register(NAME, probed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
