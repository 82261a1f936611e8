"""Weights as they are stored: only what differs from a language model that is fetched, in 8 bits.

A tensor of the trained model is one of four things beside the same tensor of the model it began as:

- the same: nothing is stored;
- the same but for a few rows, as a text table with new tokens: these rows, in 16 bits;
- the same but for a change of low rank, as adapters leave: two factors of the change, each in 8 bits;
- another one: the tensor, matrices in 8 bits, vectors as they are.

8 bits are whole numbers from -127 to 127 with a scale for each row (output channel) in float32.
"""

from collections.abc import Iterator, Mapping

import torch

FEW = 0.01
"""Largest share of rows that counts as a few."""

LOW_RANK_ERROR = 1e-3
"""Largest relative error with which a change counts as of low rank."""

LARGEST_WHOLE = 127

Tensors = dict[str, torch.Tensor]


def store(trained: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], rank: int) -> Tensors:
    """What makes the trained tensors of the base's.

    Args:
        trained: State dict of a trained model.
        base: The same of what it began as; tensors that it lacks, or has in another shape, are stored whole.
        rank: Of the adapters at most; changes of a larger one are stored as whole tensors.

    Returns:
        Tensors by name and kind, `NAME:KIND`.
    """
    stored: Tensors = {}
    for name, tensor in trained.items():
        before = base.get(name)
        for kind, part in _parts(tensor.float(), None if before is None else before.float(), rank):
            stored[f"{name}:{kind}"] = part.contiguous()
    return stored


def _parts(tensor: torch.Tensor, base: torch.Tensor | None, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
    if base is not None and base.shape == tensor.shape:
        if torch.equal(tensor, base):
            return
        if tensor.dim() == 2:
            rows = (tensor != base).any(dim=1).nonzero().flatten()
            if len(rows) <= FEW * len(tensor):
                yield "row_numbers", rows.int()
                yield "rows", tensor[rows].half()
                return
            factors = _factors(tensor - base, rank)
            if factors is not None:
                for kind, factor in zip(("up", "down"), factors, strict=True):
                    yield from _in_8_bits(factor, kind)
                return
    if tensor.dim() < 2:
        yield "plain", tensor
        return
    yield from _in_8_bits(tensor, "whole")


def _factors(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Two factors `(out, rank)`, `(rank, in)` of a change of low rank; None for one of a higher rank."""
    if not rank or rank >= min(change.shape):
        return None
    left, sizes, right = torch.linalg.svd(change, full_matrices=False)
    if sizes[rank:].norm() > LOW_RANK_ERROR * sizes.norm():
        return None
    root = sizes[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _in_8_bits(tensor: torch.Tensor, kind: str) -> Iterator[tuple[str, torch.Tensor]]:
    rows = _rows(tensor)
    scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / LARGEST_WHOLE
    yield kind, (rows / scale).round().to(torch.int8).view(tensor.shape)
    yield f"{kind}_scale", scale.flatten()


def restore(stored: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor]) -> Tensors:
    """Tensors of the trained model in float32: those of the base where nothing is stored.

    Raises:
        ValueError: For what is stored of a tensor that the base lacks.
    """
    kinds: dict[str, Tensors] = {}
    for key, part in stored.items():
        name, _, kind = key.rpartition(":")
        kinds.setdefault(name, {})[kind] = part
    if unknown := sorted(kinds.keys() - base.keys()):
        raise ValueError(
            f"weights are stored for {unknown[0]}, which the model has not; it belongs to another version."
        )
    return {name: _restored(kinds.get(name, {}), tensor.float()) for name, tensor in base.items()}


def _restored(parts: Tensors, base: torch.Tensor) -> torch.Tensor:
    if "plain" in parts:
        return parts["plain"]
    if "whole" in parts:
        return _from_8_bits(parts, "whole")
    if "up" in parts:
        return base + _from_8_bits(parts, "up") @ _from_8_bits(parts, "down")
    if "rows" in parts:
        return base.index_copy(0, parts["row_numbers"].long(), parts["rows"].float())
    return base


def _from_8_bits(parts: Tensors, kind: str) -> torch.Tensor:
    whole = parts[kind]
    return (_rows(whole).float() * parts[f"{kind}_scale"][:, None]).view(whole.shape)


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """What has a scale each: output channels; of a table for all pictures, its places."""
    return tensor.flatten(0, -2) if len(tensor) == 1 else tensor.flatten(1)
