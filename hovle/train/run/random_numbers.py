"""Random numbers of a run: seeded, saved and continued."""

import random

import numpy
import torch


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random."""
    torch.manual_seed(seed)
    numpy.random.seed(seed)  # noqa: NPY002 - libraries below use the global generator
    random.seed(seed)


def continue_random_numbers(state: dict | None, seed: int, rank: int) -> None:
    """Undo what set-up drew from the generators, or give each process numbers of its own in a new run.

    Args:
        state: What the checkpoint to resume from holds, or None.
        seed: Of the run.
        rank: This process.
    """
    saved = state["rng"] if state else []
    if rank < len(saved):
        restore_rng(saved[rank])
    else:
        seed_everything(seed + rank)


def rng_state() -> dict:
    """States of the random generators training uses, as tensors."""
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict) -> None:
    """Undo what set-up drew from the generators."""
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
