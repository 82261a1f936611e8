"""Answers that come piece by piece."""

import threading

import pytest
import torch

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.chat import stream_answer


@pytest.fixture(scope="module")
def model_and_processor(make_tokenizer, tiny_config):
    torch.manual_seed(0)
    config = tiny_config()
    model = HoVLEForConditionalGeneration(config).eval()
    return model, HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4)


def inputs_of(processor: HoVLEProcessor, *texts: str) -> dict:
    chats = [[{"role": "user", "content": text}] for text in texts]
    return dict(
        processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
    )


class StopsHereError(Exception):
    """Raised on purpose."""


class RaiseAt:
    """A logits processor that makes the answer "a a a ..." and fails at one of its tokens."""

    def __init__(self, num_tokens: int | None, letter_id: int):
        self.num_tokens, self.letter_id, self.num_seen = num_tokens, letter_id, 0

    def __call__(self, input_ids, scores):
        if self.num_seen == self.num_tokens:
            raise StopsHereError
        self.num_seen += 1
        scores[:, self.letter_id] = 1e4
        return scores


def letters(processor: HoVLEProcessor, fails_at: int | None = None) -> RaiseAt:
    return RaiseAt(fails_at, processor.tokenizer.convert_tokens_to_ids("a"))


def test_the_pieces_are_the_answer(model_and_processor):
    model, processor = model_and_processor
    inputs = inputs_of(processor, "what is it?")
    generated = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    whole = processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(stream_answer(model, processor, **inputs, max_new_tokens=12, do_sample=False)) == whole


@pytest.mark.parametrize("fails_at", [0, 3])
def test_what_generate_raises_is_raised_by_the_loop(model_and_processor, fails_at):
    model, processor = model_and_processor
    failing = [letters(processor, fails_at)]
    answer = stream_answer(model, processor, **inputs_of(processor, "?"), max_new_tokens=9, logits_processor=failing)
    pieces: list[str] = []
    with pytest.raises(StopsHereError):
        pieces.extend(answer)
    assert "".join(pieces) == "a" * fails_at


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [({"max_new_tokens": -1}, "max_new_tokens"), ({"num_beams": 2}, "beam"), ({"no_such_one": 1}, "no_such_one")],
)
def test_arguments_that_generate_refuses_end_the_loop(model_and_processor, wrong, reason):
    model, processor = model_and_processor
    with pytest.raises(ValueError, match=reason):
        list(stream_answer(model, processor, **{**inputs_of(processor, "?"), "max_new_tokens": 3, **wrong}))


def test_two_prompts_at_once_are_refused(model_and_processor):
    model, processor = model_and_processor
    with pytest.raises(ValueError, match="batch size 1"):
        list(stream_answer(model, processor, **inputs_of(processor, "a", "b"), max_new_tokens=3))


def test_who_leaves_the_loop_ends_generation(model_and_processor):
    model, processor = model_and_processor
    counter = letters(processor)
    before = threading.active_count()
    pieces = stream_answer(
        model, processor, **inputs_of(processor, "?"), max_new_tokens=900, logits_processor=[counter]
    )
    next(pieces)
    pieces.close()
    assert counter.num_seen < 900
    assert threading.active_count() == before
