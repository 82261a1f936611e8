"""Rows of a batch as `generate` gives them."""

import pytest
import torch
from transformers import GenerationConfig

from hovle.inference.answers import answer_lengths, ends_itself


@pytest.mark.parametrize(
    ("ends", "lengths"), [(7, [2, 4, 1]), ([7, 9], [2, 4, 1]), ([9, 3], [4, 1, 4]), (None, [4, 4, 4])]
)
def test_an_answer_ends_at_its_first_end_token(ends, lengths):
    generated = torch.tensor([[5, 7, 0, 7], [3, 4, 5, 6], [7, 0, 0, 0]])
    assert answer_lengths(generated, GenerationConfig(eos_token_id=ends)).tolist() == lengths


@pytest.mark.parametrize(
    ("ids", "ends", "expected"),
    [([5, 2], 2, True), ([5, 2], [3, 2], True), ([2, 5], 2, False), ([], [2], False), ([5], None, False)],
)
def test_an_answer_ends_itself_with_a_token_that_ends_answers(ids, ends, expected):
    assert ends_itself(ids, GenerationConfig(eos_token_id=ends)) is expected
