"""The engine of `hovle serve`: what waits joins, what nobody waits for leaves, and nothing holds up the rest."""

import asyncio
import copy
import threading
import time
import types
from collections.abc import Callable

import pytest
import torch

from hovle import HoVLEForConditionalGeneration
from hovle.inference import Batch
from hovle.inference.batch import ROOM
from hovle.serve import app as serving
from hovle.serve.engine import BatchingEngine, Engine, SerialEngine, engine_of
from hovle.serve.failures import RequestError
from hovle.serve.generation import Settings
from hovle.serve.limits import BatchLimits
from hovle.serve.metrics import Metrics


@pytest.fixture(scope="module")
def model(tiny_config):
    torch.manual_seed(0)
    return HoVLEForConditionalGeneration(tiny_config()).eval()


@pytest.fixture
def make_engine(model, tokenizer):
    engines = []

    def make(**limits) -> Engine:
        engines.append(engine_of(model, tokenizer, Metrics(), BatchLimits(**limits)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def settings(model, num_new: int = 8, **fields) -> Settings:
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, max_new_tokens=num_new, eos_token_id=None)
    return Settings(config, **fields)


def prompt(*ids: int) -> dict:
    return {"input_ids": torch.tensor([ids])}


async def text_of(answer) -> str:
    return "".join([piece async for piece in answer])


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@pytest.fixture
def batch_sizes(monkeypatch) -> list[int]:
    sizes = []
    step = Batch.step

    def counted(batch):
        sizes.append(len(batch.rows))
        return step(batch)

    monkeypatch.setattr(Batch, "step", counted)
    return sizes


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({}, 5), ({"num_rows": 2}, 2), ({"cache_bytes": 1}, 1), ({"cache_bytes": 3 * (43 + ROOM) * 1024}, 3)],
)
def test_as_many_answers_grow_together_as_the_limits_allow(make_engine, model, batch_sizes, limits, expected):
    async def scenario() -> list[str]:
        engine = make_engine(**limits)
        answers = [engine.start(prompt(3, 4, 5 + number), settings(model, 40)) for number in range(5)]
        return await asyncio.gather(*map(text_of, answers))

    together = asyncio.run(scenario())
    assert max(batch_sizes) == expected  # a token takes 1 KiB: 4 layers, 2 heads of 16, keys and values
    alone = [model.generate(**prompt(3, 4, 5 + n), generation_config=settings(model, 40).config) for n in range(5)]
    assert len(set(together)) == 5
    assert [len(ids[0]) for ids in alone] == [43] * 5


def test_a_client_that_hangs_up_ends_its_answer(make_engine, model):
    async def scenario():
        engine = make_engine()

        async def work():
            return await text_of(engine.start(prompt(3, 4, 5), settings(model, 100_000)))

        async def hang_up() -> dict:
            await until(lambda: engine.num_in_work == 1)
            return {"type": "http.disconnect"}

        response = await serving._while_connected(types.SimpleNamespace(receive=hang_up), work())
        assert response.status_code == 499
        await until(lambda: engine.num_in_work == 0)

    asyncio.run(scenario())


def test_who_hangs_up_while_waiting_leaves_the_queue_before_its_turn(make_engine, model):
    async def scenario():
        engine = make_engine(num_rows=1)
        working = engine.start(prompt(3, 4, 5), settings(model, 100_000))
        waiting = [engine.start(prompt(3, 4, 6), settings(model)) for _ in range(3)]
        await until(lambda: engine.num_in_work == 1)
        waiting[1].abandon()
        await until(lambda: engine.num_waiting == 2)
        assert waiting[1].begun.is_set()
        assert not waiting[0].begun.is_set()
        working.abandon()
        assert await text_of(waiting[0]) == await text_of(waiting[2]) != ""

    asyncio.run(scenario())


def test_a_model_that_holds_one_sequence_answers_one_request_after_another(model, tokenizer):
    calls = []

    class OneSequence:  # as that of llama.cpp
        def generate(self, **kwargs):
            calls.append(threading.current_thread().name)
            return model.generate(**kwargs)

    async def scenario() -> None:
        metrics = Metrics()
        serial = engine_of(OneSequence(), tokenizer, metrics, BatchLimits())
        together = engine_of(model, tokenizer, Metrics(), BatchLimits())
        try:
            assert (type(serial), type(together)) == (SerialEngine, BatchingEngine)
            found = []
            for engine in (serial, together):
                drawn = settings(model, seed=3)
                drawn.config.update(do_sample=True, temperature=1.5)
                kinds = [settings(model), drawn, settings(model, logit_bias={40: 100.0})]
                answers = [engine.start(prompt(3, 4, 5), kind) for kind in kinds]
                found.append(await asyncio.gather(*map(text_of, answers)))
            assert found[0] == found[1]
            assert len(set(found[0])) == 3
            assert calls == ["hovle-generation"] * 3
            left = serial.start(prompt(3, 4, 5), settings(model, 100_000))
            await left.begun.wait()
            left.abandon()
            assert await text_of(serial.start(prompt(3, 4, 5), settings(model))) == found[0][0]
            assert "hovle_answer_tokens_total" in metrics.text()[0].decode()
            with pytest.raises(ValueError, match="unused"):
                await text_of(serial.start({**prompt(3), "unused": 1}, settings(model)))
        finally:
            serial.close()
            together.close()

    asyncio.run(scenario())


def test_an_error_of_one_answer_leaves_the_others_alone(make_engine, model):
    async def scenario():
        engine = make_engine()
        calm = engine.start(prompt(3, 4, 5), settings(model, 30))
        broken = engine.start(prompt(3, 4, 5), settings(model, 30))
        broken._text.feed = None  # it cannot be told
        with pytest.raises(TypeError):
            await text_of(broken)
        unread = engine.start({"input_ids": torch.ones(2, 3, dtype=torch.long)}, settings(model))
        with pytest.raises(ValueError, match="One prompt without padding"):
            await text_of(unread)
        assert await text_of(calm) != ""

    asyncio.run(scenario())


def test_an_error_of_a_step_ends_all_answers_in_work_and_the_engine_goes_on(make_engine, model, monkeypatch):
    async def scenario():
        engine = make_engine()
        with monkeypatch.context() as patched:
            patched.setattr(Batch, "step", lambda _: (_ for _ in ()).throw(MemoryError()))
            answers = [engine.start(prompt(3, 4, 5), settings(model, 30)) for _ in range(3)]
            found = await asyncio.gather(*map(text_of, answers), return_exceptions=True)
            assert [type(error) for error in found] == [MemoryError] * 3
        assert await text_of(engine.start(prompt(3, 4, 5), settings(model, 30))) != ""

    asyncio.run(scenario())


def test_a_closed_engine_tells_those_who_wait_and_takes_nothing_more(make_engine, model):
    async def scenario():
        engine = make_engine(num_rows=1)
        answers = [engine.start(prompt(3, 4, 5), settings(model, 100_000)) for _ in range(2)]
        await until(lambda: engine.num_in_work == 1)
        await asyncio.to_thread(engine.close)
        for answer in answers:
            with pytest.raises(RequestError, match="shut down"):
                await text_of(answer)
        with pytest.raises(RequestError, match="shutting down"):
            engine.start(prompt(3, 4, 5), settings(model))

    asyncio.run(scenario())
    assert "hovle-generation" not in [thread.name for thread in threading.enumerate()]


def test_room_before_longrope_switches_is_counted_in_the_long_sequence_of_hd(tiny_config, tokenizer):
    switch = {"original_max_position_embeddings": 60, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **switch}
    config = tiny_config(text_config={"rope_parameters": rope}, pixel_shuffle_loc="post")
    model = HoVLEForConditionalGeneration(config).eval()
    inputs = {**prompt(5, *[config.image_token_id] * 12, 9, 17), "pixel_values": torch.randn(3, 3, 56, 56)}
    engine = BatchingEngine(model, tokenizer, Metrics(), BatchLimits())
    try:
        room = engine.most_new_tokens(inputs["input_ids"])
        assert room == 60 - (3 + 12 * 4) + 1

        async def scenario(num_new: int) -> int:
            answer = engine.start(inputs, settings(model, num_new))
            await text_of(answer)
            return len(answer.ids)

        assert asyncio.run(scenario(int(room))) == room
        with pytest.raises(ValueError, match=f"at most {room} new tokens"):
            asyncio.run(scenario(int(room) + 1))
        assert engine.most_new_tokens(torch.arange(10, 30)[None]) == 41
        assert engine.most_new_tokens(torch.arange(10, 90)[None]) == float("inf")
    finally:
        engine.close()
