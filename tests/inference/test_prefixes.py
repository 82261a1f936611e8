"""Prompts that begin alike: the same answers, and only what is new is read."""

import functools
import threading

import pytest
import torch
from PIL import Image
from tiny_models import shake
from transformers import GenerationConfig, MistralConfig

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.inference import ImageSession, PrefixCache
from hovle.inference.prefixes import copy_cache

NUM_NEW = 6


@pytest.fixture(params=["flat", "two sections", "hd", "bidirectional", "sliding window"])
def model(request, tiny_config) -> HoVLEForConditionalGeneration:
    torch.manual_seed(0)
    fields = {
        "flat": {},
        "two sections": {"normalize_encoder_output": True},
        "hd": {"pixel_shuffle_loc": "post"},
        "bidirectional": {"image_attention": "bidirectional"},
        "sliding window": {},
    }[request.param]
    if request.param == "sliding window":
        text = {key: value for key, value in tiny_config().text_config.to_dict().items() if key in SIZES}
        config = tiny_config()
        config.text_config = MistralConfig(**text, sliding_window=24, head_dim=16)
        return shake(HoVLEForConditionalGeneration(config)).eval()
    return shake(HoVLEForConditionalGeneration(tiny_config(**fields))).eval()


SIZES = {
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
}


@pytest.fixture
def processor(make_tokenizer, model) -> HoVLEProcessor:
    return HoVLEProcessor.from_language_model(make_tokenizer(), model.config, max_tiles=4)


@pytest.fixture
def read(model, monkeypatch) -> list[int]:
    """Tokens of every pass with more than one."""
    lengths = []
    forward = type(model).forward

    @functools.wraps(forward)  # `generate` takes what its signature names
    def counted(self, *args, **kwargs):
        if kwargs["input_ids"].shape[1] > 1:
            lengths.append(kwargs["input_ids"].shape[1])
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    return lengths


def prompt(processor, *turns, color="red", size=(150, 100)):
    """A conversation about one picture, ready for the model."""
    picture = {"type": "image", "image": Image.new("RGB", size, color)}
    messages = [
        {"role": ("user", "assistant")[number % 2], "content": [{"type": "text", "text": text}]}
        for number, text in enumerate(turns)
    ]
    messages[0]["content"].insert(0, picture)
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def answer(model, inputs):
    return model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False)


def test_a_second_question_reads_its_own_words_only(model, processor, read):
    prefixes = PrefixCache(model)
    first, second = prompt(processor, "what is it?"), prompt(processor, "where does it stand now?")
    expected = [answer(model, inputs) for inputs in (first, second)]
    read.clear()
    found = [prefixes.generate(inputs, max_new_tokens=NUM_NEW, do_sample=False) for inputs in (first, second)]
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one, other)
    shared = int((first["input_ids"][0, :30] == second["input_ids"][0, :30]).long().cumprod(dim=0).sum())
    can_cut = model.config.get_text_config().to_dict().get("sliding_window") is None
    assert prefixes.num_reused == (shared if can_cut else 0)
    assert read[1] == second["input_ids"].shape[1] - prefixes.num_reused


def test_the_next_turn_of_a_conversation_goes_on(model, processor, read):
    prefixes = PrefixCache(model)
    first = prompt(processor, "what is it?")
    generated = prefixes.generate(first, max_new_tokens=NUM_NEW, do_sample=False)
    reply = processor.decode(generated[0, first["input_ids"].shape[1] :], skip_special_tokens=True)
    second = prompt(processor, "what is it?", reply, "and now?")
    expected = answer(model, second)
    assert torch.equal(prefixes.generate(second, max_new_tokens=NUM_NEW, do_sample=False), expected)
    if model.config.get_text_config().to_dict().get("sliding_window") is None:
        assert prefixes.num_reused >= first["input_ids"].shape[1]


def test_another_picture_of_the_same_size_is_read(model, processor):
    prefixes = PrefixCache(model)
    for color in ("red", "blue", "red"):
        inputs = prompt(processor, "what is it?", color=color)
        found = prefixes.generate(inputs, max_new_tokens=NUM_NEW, do_sample=False)
        assert torch.equal(found, answer(model, inputs))
    image_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    if model.config.get_text_config().to_dict().get("sliding_window") is None:
        assert prefixes.num_reused > image_tokens  # the first red one is still there


def test_a_picture_is_never_cut(model, processor):
    prefixes = PrefixCache(model)
    prefixes.generate(prompt(processor, "a", size=(150, 100)), max_new_tokens=2, do_sample=False)
    inputs = prompt(processor, "a", size=(300, 100))  # more tiles; some of them may be the same
    assert torch.equal(
        prefixes.generate(inputs, max_new_tokens=4, do_sample=False),
        model.generate(**inputs, max_new_tokens=4, do_sample=False),
    )
    is_image = inputs["input_ids"][0] == model.config.image_token_id
    border = prefixes.num_reused
    assert not (border and is_image[border] and is_image[border - 1])


@pytest.mark.parametrize("model", ["flat"], indirect=True)
def test_memory_is_bounded_and_the_last_used_stay(model, processor):
    one = PrefixCache(model)
    one.generate(prompt(processor, "what is it?"), max_new_tokens=NUM_NEW, do_sample=False)
    prefixes = PrefixCache(model, max_bytes=int(2.5 * one.num_bytes))
    for color in ("red", "blue", "red", "green"):  # blue has not been used for longest
        prefixes.generate(prompt(processor, "what is it?", color=color), max_new_tokens=NUM_NEW, do_sample=False)
        assert prefixes.num_bytes <= prefixes.max_bytes
    for color, is_kept in (("red", True), ("blue", False)):
        inputs = prompt(processor, "what is it?", color=color)
        prefixes.generate(inputs, max_new_tokens=NUM_NEW, do_sample=False)
        assert (prefixes.num_reused > int((inputs["input_ids"] == model.config.image_token_id).sum())) == is_kept
    num_kept = len(prefixes._reads)
    prefixes.max_bytes = 1
    prefixes.generate(prompt(processor, "long", color="pink"), max_new_tokens=NUM_NEW, do_sample=False)
    assert len(prefixes._reads) == num_kept  # it is larger than all that may be kept
    prefixes.clear()
    assert prefixes.num_bytes == 0


@pytest.mark.parametrize("model", ["flat", "hd"], indirect=True)
def test_threads_share_what_was_read(model, processor):
    prefixes = PrefixCache(model)
    questions = ["what is it?", "where?", "how many?", "which colour has it?"]
    prompts = [prompt(processor, text) for text in questions]
    expected = [answer(model, inputs) for inputs in prompts]
    found = {}

    def ask(number: int) -> None:
        for _ in range(3):
            found[number] = prefixes.generate(prompts[number], max_new_tokens=NUM_NEW, do_sample=False)

    threads = [threading.Thread(target=ask, args=[number]) for number in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], expected[number]) for number in range(len(prompts)))


@pytest.mark.parametrize("model", ["flat"], indirect=True)
def test_what_is_kept_is_never_changed(model, processor):
    prefixes = PrefixCache(model)
    prefixes.generate(prompt(processor, "what is it?"), max_new_tokens=NUM_NEW, do_sample=False)
    [read] = prefixes._reads
    before = [layer.keys.clone() for layer in read.cache.layers]
    cut = copy_cache(read.cache, -3)
    assert cut.get_seq_length() == read.cache.get_seq_length() - 3
    prefixes.generate(prompt(processor, "where is that?"), max_new_tokens=NUM_NEW, do_sample=False)
    assert all(torch.equal(old, layer.keys) for old, layer in zip(before, read.cache.layers, strict=True))


@pytest.mark.parametrize("model", ["flat"], indirect=True)
@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"num_return_sequences": 2}, {"cache_implementation": "static"}]
)
def test_what_needs_a_cache_of_its_own_is_refused(model, processor, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PrefixCache(model).generate(prompt(processor, "what is it?"), max_new_tokens=2, **options)


@pytest.mark.parametrize("model", ["flat"], indirect=True)
def test_a_generation_config_is_followed_and_refused_as_options_are(model, processor):
    prefixes, inputs = PrefixCache(model), prompt(processor, "what is it?")
    for _ in range(2):
        config = GenerationConfig(max_new_tokens=3, do_sample=False)
        found = prefixes.generate(inputs, generation_config=config)
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=3, do_sample=False))
    assert prefixes.num_reused == inputs["input_ids"].shape[1] - 1
    with pytest.raises(ValueError, match="num_beams needs a cache of its own"):
        prefixes.generate(inputs, generation_config=GenerationConfig(max_new_tokens=3, num_beams=2))
    as_dict = GenerationConfig(max_new_tokens=3, return_dict_in_generate=True)
    for options in ({"generation_config": as_dict}, {"return_dict_in_generate": True}):
        with pytest.raises(ValueError, match="return_dict_in_generate would give away the cache"):
            prefixes.generate(inputs, **options)
    model.generation_config.return_dict_in_generate = True
    assert torch.equal(prefixes.generate(inputs, max_new_tokens=3, do_sample=False), found)


@pytest.mark.parametrize("model", ["flat"], indirect=True)
def test_a_model_whose_settings_search_by_beams_answers_as_alone(model, processor):
    model.generation_config.num_beams = 3
    prefixes = PrefixCache(model)
    for text in ("what is it?", "where is it?"):
        inputs = prompt(processor, text)
        found = prefixes.generate(inputs, max_new_tokens=NUM_NEW)
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=NUM_NEW))
    assert prefixes.num_bytes == prefixes.num_reused == 0


@pytest.mark.parametrize("model", ["flat"], indirect=True)
def test_several_prompts_and_padding_are_refused(model, processor):
    inputs = prompt(processor, "what is it?")
    with pytest.raises(ValueError, match="2 rows"):
        PrefixCache(model).generate({"input_ids": inputs["input_ids"].repeat(2, 1)}, max_new_tokens=2)
    mask = inputs["attention_mask"].clone()
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="1 places of padding"):
        PrefixCache(model).generate({**inputs, "attention_mask": mask}, max_new_tokens=2)


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 40,
    "short_factor": [1.0] * 8,
    "long_factor": [3.0] * 8,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}


@pytest.mark.parametrize("rope", [LONGROPE, DYNAMIC], ids=["longrope", "dynamic"])
def test_nothing_is_reused_where_positions_turn(tiny_config, rope):
    positions = {"max_position_embeddings": 40} if rope is DYNAMIC else {}
    config = tiny_config(text_config={"rope_parameters": rope, **positions})
    model = shake(HoVLEForConditionalGeneration(config)).eval()
    prefixes = PrefixCache(model)
    short = torch.arange(10, 30)[None]
    long = torch.cat([short, torch.arange(30, 60)[None]], dim=1)
    for ids in (short, long):
        found = prefixes.generate({"input_ids": ids}, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, model.generate(ids, max_new_tokens=4, do_sample=False))
    assert prefixes.num_reused == 0
    prefixes.clear()
    for ids in (long, short):  # in the long one the beginning was turned, too
        found = prefixes.generate({"input_ids": ids}, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, model.generate(ids, max_new_tokens=4, do_sample=False))


@pytest.mark.parametrize("says", ["max_new_tokens", "max_length"])
@pytest.mark.parametrize("says_how_many", ["option", "generation config", "model"])
def test_an_answer_that_fills_the_room_before_positions_turn_reuses(tiny_config, says_how_many, says):
    model = shake(HoVLEForConditionalGeneration(tiny_config(text_config={"rope_parameters": LONGROPE}))).eval()
    prefixes, ids = PrefixCache(model), torch.arange(10, 30)[None]

    def generate(num_new: int) -> torch.Tensor:
        asked = {says: num_new if says == "max_new_tokens" else ids.shape[1] + num_new}
        if says_how_many == "option":
            return prefixes.generate({"input_ids": ids}, do_sample=False, **asked)
        config = GenerationConfig(do_sample=False)
        holder = config if says_how_many == "generation config" else model.generation_config
        holder.update(**asked)
        return prefixes.generate({"input_ids": ids}, generation_config=config)

    model.generation_config.eos_token_id = None
    for num_new in (4, 21):  # the last one is read by nobody
        found = generate(num_new)
    assert prefixes.num_reused == 19
    assert torch.equal(found, model.generate(ids, max_new_tokens=21, do_sample=False))
    with pytest.raises(ValueError, match="at most 21 new tokens"):
        generate(22)


def test_nor_where_those_of_the_long_sequence_turn(tiny_config):
    config = tiny_config(
        text_config={"rope_parameters": DYNAMIC, "max_position_embeddings": 40}, pixel_shuffle_loc="post"
    )
    model = shake(HoVLEForConditionalGeneration(config)).eval()
    prefixes = PrefixCache(model)
    beginning = [5, *[config.image_token_id] * 12, 9, 17]  # 51 tokens in the holistic layers
    tiles = torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    for end in ([30], [31, 33, 35, 36]):
        inputs = {"input_ids": torch.tensor([[*beginning, *end]]), "pixel_values": tiles}
        found = prefixes.generate(inputs, max_new_tokens=NUM_NEW, do_sample=False)
        assert torch.equal(found, model.generate(**inputs, max_new_tokens=NUM_NEW, do_sample=False))


@pytest.mark.parametrize("model", ["flat"], indirect=True)
def test_a_session_answers_as_the_model_alone(model, processor):
    picture = Image.new("RGB", (150, 100), "red")
    session = ImageSession(model, processor, [picture])
    for text in ("what is it?", "where is it?"):
        inputs = prompt(processor, text)
        expected = answer(model, inputs)[0, inputs["input_ids"].shape[1] :]
        found = session.ask(text, max_new_tokens=NUM_NEW, do_sample=False)
        assert found == processor.decode(expected, skip_special_tokens=True).strip()
    assert session.prefixes.num_reused > 0


@pytest.mark.parametrize("asked", [{"max_new_tokens": 30}, {"max_length": 50}])
def test_an_answer_in_which_positions_turn_reuses_nothing(tiny_config, asked):
    text = {"rope_parameters": DYNAMIC, "max_position_embeddings": 40}
    model = shake(HoVLEForConditionalGeneration(tiny_config(text_config=text))).eval()
    model.generation_config.eos_token_id = None
    prefixes, ids = PrefixCache(model), torch.arange(10, 30)[None]
    prefixes.generate({"input_ids": ids}, max_new_tokens=4, do_sample=False)
    found = prefixes.generate({"input_ids": ids}, do_sample=False, **asked)
    assert prefixes.num_reused == 0
    assert torch.equal(found, model.generate(ids, do_sample=False, **asked))
