"""Ways to generate beside plain greedy search, and ways to load: streaming, devices, chunks, compiled graphs."""

import contextlib
import threading

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import ContinuousBatchingConfig, GenerationConfig, TextIteratorStreamer

from hovle import HoVLEForConditionalGeneration

STEMS = ("pre", "post")


@pytest.fixture(params=STEMS)
def model(request, tiny_config) -> HoVLEForConditionalGeneration:
    torch.manual_seed(0)
    return HoVLEForConditionalGeneration(tiny_config(pixel_shuffle_loc=request.param)).eval()


def request_of(model, num_tiles: int = 2) -> dict[str, torch.Tensor]:
    placeholders = [model.config.image_token_id] * (num_tiles * model.config.image_seq_length)
    ids = torch.tensor([[5, *placeholders, *range(6, 16)]])
    pixels = torch.randn(num_tiles, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def greedy(model, **kwargs) -> torch.Tensor:
    return model.generate(**{"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, **kwargs})


def test_a_streamer_hears_the_answer(model, tokenizer):
    request = request_of(model)
    expected = greedy(model, **request)[0, request["input_ids"].shape[1] :]
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(target=greedy, args=(model,), kwargs={**request, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == tokenizer.decode(expected)
    thread.join()


def test_a_device_map_places_the_model(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    expected = greedy(model, **request_of(model))
    for device_map in ("cpu", "auto"):
        loaded = HoVLEForConditionalGeneration.from_pretrained(tmp_path / "model", device_map=device_map)
        assert torch.equal(greedy(loaded, **request_of(model)), expected)


def test_texts_may_share_the_paged_cache_of_continuous_batching(model):
    texts = [[5, 6, 7], [9, 10, 11, 12, 13, 14]]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    memory = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)

    def answer() -> list:
        answers = model.generate_batch(texts, settings, memory, warmup=False)
        return [answers[name] for name in sorted(answers)]

    if Version(transformers.__version__) < Version("5.23"):  # 5.16 looks for the heads of a text model
        assert answer() == []
    elif model.config.pixel_shuffle_loc == "post":
        assert all("HoVLE-HD builds its own masks" in output.error for output in answer())
    else:
        expected = [greedy(model, input_ids=torch.tensor([ids]))[0, len(ids) :] for ids in texts]
        assert [output.generated_tokens for output in answer()] == [ids.tolist() for ids in expected]


def test_prompts_of_text_may_be_read_in_chunks(model):
    ids = torch.arange(5, 37)[None]
    expected = greedy(model, input_ids=ids)
    assert torch.equal(greedy(model, input_ids=ids, prefill_chunk_size=7), expected)


ENCODES_BEFORE_CHUNKS = Version(transformers.__version__) >= Version("5.21")


def test_chunks_of_prompts_with_pictures_give_the_same_tokens_where_they_can(model):
    """transformers cuts encoded pictures into chunks since 5.21; before, and for HD, counts no longer match."""
    request = request_of(model)
    if model.model.is_hd:
        refused = pytest.raises(ValueError, match="prefill_chunk_size would cut pictures")
    elif not ENCODES_BEFORE_CHUNKS:
        refused = pytest.raises(ValueError, match="image tokens")
    else:
        refused = contextlib.nullcontext()
    with refused:
        assert torch.equal(greedy(model, **request, prefill_chunk_size=4), greedy(model, **request))


def test_chunks_would_blind_bidirectional_pictures_and_are_refused(tiny_config):
    model = HoVLEForConditionalGeneration(tiny_config(image_attention="bidirectional")).eval()
    with pytest.raises(ValueError, match="prefill_chunk_size would cut pictures"):
        greedy(model, **request_of(model), prefill_chunk_size=4)
    ids = torch.arange(5, 37)[None]
    assert torch.equal(greedy(model, input_ids=ids, prefill_chunk_size=7), greedy(model, input_ids=ids))


def padded_batch_of(model) -> dict[str, torch.Tensor]:
    """A prompt with a picture of two tiles and one without a picture, padded on the left."""
    request = request_of(model)
    length = request["input_ids"].shape[1]
    ids, mask = torch.zeros(2, length, dtype=torch.long), torch.ones(2, length, dtype=torch.long)
    ids[0], ids[1, 3:] = request["input_ids"][0], torch.arange(20, 17 + length)
    mask[1, :3] = 0
    return {**request, "input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("make", [request_of, padded_batch_of])
def test_the_forward_pass_compiles_as_one_graph(model, make, whole_graph):
    request = make(model)
    torch._dynamo.reset()
    with torch.no_grad(), whole_graph:
        expected = model(**request, use_cache=False).logits
        found = torch.compile(model, fullgraph=True, backend="aot_eager")(**request, use_cache=False).logits
        is_token = request["attention_mask"].bool()
        torch.testing.assert_close(found[is_token], expected[is_token], atol=1e-5, rtol=0)


def test_a_compiled_batch_of_hd_asks_for_the_mask_it_needs(tiny_config, monkeypatch):
    model = HoVLEForConditionalGeneration(tiny_config(pixel_shuffle_loc="post")).eval()
    request = padded_batch_of(model)
    del request["attention_mask"]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the compiler wraps errors, each in its own way
    with torch.no_grad(), pytest.raises(ValueError, match="cannot tell whether a batch without attention_mask"):
        model(**request, use_cache=False)


def test_outputs_per_layer_split_into_the_two_sections(model):
    model.set_attn_implementation("eager")  # the one that tells attentions
    outputs = model(**request_of(model), output_hidden_states=True, output_attentions=True)
    parts = model.config.split_layers(outputs.hidden_states)
    assert (len(parts.holistic), len(parts.language)) == (3, 3)  # what enters two layers, and what each makes of it
    assert parts.holistic[-1] is parts.language[0]
    holistic, language = model.config.split_layers(outputs.attentions)
    assert (len(holistic), len(language)) == (2, 2)
    with pytest.raises(ValueError, match="5 hidden states or 4 values"):
        model.config.split_layers([1, 2, 3])
