"""The forward pass, generation and training of HoVLE on tiny random models, against stock transformers models."""

import copy
import functools
import itertools
import json
import math

import pytest
import torch
from safetensors import safe_open
from tiny_models import IMAGE, TEXT, shake
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    Cohere2Config,
    CompileConfig,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
    StaticCache,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.internvl.modeling_internvl import InternVLModel

from hovle import HoVLEConfig, HoVLEForConditionalGeneration
from hovle.model.backbones import CACHE
from hovle.model.holistic_sequence import HolisticLayout
from hovle.model.image_tokens import pixel_shuffle, take_image_tokens
from hovle.model.language_model import add_image_tokens
from hovle.model.modeling_hovle import HoVLEPatchEmbedding

TOKENS = 4  # placeholders of one tile: 56 px give 2 x 2 tokens in all three stems
STEMS = ("pre", "none", "post")
# Measured worst case over all parity tests below: 2.4e-6, on logits of size 3; 1.1e-5 with torch 2.6.
TOLERANCE = {"atol": 2e-5, "rtol": 0.0}


def tiny_config(stem: str = "pre", text: dict | None = None, **fields) -> HoVLEConfig:
    """2 holistic and 3 language layers; a tile of 56 px is 4 tokens."""
    text_config = LlamaConfig(**{**TEXT, "num_hidden_layers": 5, **(text or {})})
    stem_fields = {"patch_size": 28} if stem == "none" else {"patch_size": 14}
    defaults = {"num_embedding_layers": 2, "image_size": 56, "image_token_id": IMAGE, "pixel_shuffle_loc": stem}
    return HoVLEConfig(text_config=text_config, **{**defaults, **stem_fields, **fields})


def tiny_model(stem: str = "pre", text: dict | None = None, **fields) -> HoVLEForConditionalGeneration:
    torch.manual_seed(0)
    return shake(HoVLEForConditionalGeneration(tiny_config(stem, text, **fields))).eval()


@functools.cache
def shared_model(stem: str) -> HoVLEForConditionalGeneration:
    """A model that tests only read."""
    return tiny_model(stem)


@pytest.fixture(params=STEMS)
def stem(request) -> str:
    return request.param


@pytest.fixture
def model(stem) -> HoVLEForConditionalGeneration:
    return shared_model(stem)


def prompt(*parts: int | list[int]) -> torch.Tensor:
    """Token ids of one row; `[n]` stands for the placeholders of n tiles."""
    row: list[int] = []
    for part in parts:
        row += [IMAGE] * (TOKENS * part[0]) if isinstance(part, list) else [part]
    return torch.tensor([row])


def tiles(num_tiles: int, seed: int = 0, size: int = 56) -> torch.Tensor:
    return torch.randn(num_tiles, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pad_left(*rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch rows of shape `(1, T)` with padding on the left; ids and mask."""
    length = max(row.shape[1] for row in rows)
    ids = torch.cat([nn.functional.pad(row, (length - row.shape[1], 0)) for row in rows])
    mask = torch.cat([nn.functional.pad(torch.ones_like(row), (length - row.shape[1], 0)) for row in rows])
    return ids, mask


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE)


PROMPTS = [
    prompt(5, [1], 6, 7, 8),
    prompt(9, 10, [3], 11, [1], 12),
    prompt(13, 14, 15, 16, 17),
]
PICTURES = [tiles(1, 1), tiles(4, 2), None]


def batch() -> dict[str, torch.Tensor]:
    """Three left-padded prompts: one tile, two pictures of three and one tiles, text only."""
    input_ids, attention_mask = pad_left(*PROMPTS)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "pixel_values": torch.cat(PICTURES[:2])}


# ---------------------------------------------------------------------------------------------- references


def stock_sections(model: HoVLEForConditionalGeneration) -> tuple[LlamaModel, LlamaModel]:
    """The two sections as independent stock Llama models, the first without a final norm."""
    config = model.config
    sections = []
    state = model.model.language_model.state_dict()
    bounds = (0, config.num_embedding_layers, config.text_config.num_hidden_layers)
    for first, last in itertools.pairwise(bounds):
        section_config = copy.deepcopy(config.text_config)
        section_config.num_hidden_layers = last - first
        if first == 0 and config.embedding_rope_parameters is not None:
            rope = dict(config.embedding_rope_parameters)
            section_config.max_position_embeddings = rope.pop(
                "max_position_embeddings", section_config.max_position_embeddings
            )
            section_config.rope_parameters = rope
        section = LlamaModel(section_config).eval()
        renamed = {name: tensor for name, tensor in state.items() if not name.startswith("layers.")}
        for index in range(first, last):
            prefix = f"layers.{index}."
            for name, tensor in state.items():
                if name.startswith(prefix):
                    renamed[f"layers.{index - first}.{name.removeprefix(prefix)}"] = tensor
        section.load_state_dict(renamed)
        sections.append(section)
    sections[0].norm = nn.Identity()
    return sections[0], sections[1]


def reference_patches(model: HoVLEForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """Patches of tiles of the configured size, cut and multiplied by hand."""
    stem, size = model.model.patch_embedding, model.config.patch_size
    blocks = pixel_values.unfold(2, size, size).unfold(3, size, size)  # (N, C, H, W, size, size)
    blocks = blocks.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    return blocks @ stem.projection.weight.flatten(1).T + stem.projection.bias + stem.position_embedding


def reference_projector(model: HoVLEForConditionalGeneration, patches: torch.Tensor) -> torch.Tensor:
    side = int(patches.shape[1] ** 0.5)
    grid = patches.view(len(patches), side, side, -1)
    joined = InternVLModel.pixel_shuffle(None, grid, scale_factor=0.5).flatten(1, 2)
    projector = model.model.projector
    return projector.linear_2(nn.functional.gelu(projector.linear_1(joined)))


def reference_logits(model, input_ids: torch.Tensor, pixel_values: torch.Tensor | None) -> torch.Tensor:
    """Logits of one unpadded prompt from two stock models and hand-made sequences."""
    holistic, language = stock_sections(model)
    table = model.get_input_embeddings().weight
    is_hd = model.config.pixel_shuffle_loc == "post"
    features = None if pixel_values is None else reference_patches(model, pixel_values)
    if features is not None and model.config.pixel_shuffle_loc == "pre":
        features = reference_projector(model, features)
    image_rows = [] if features is None else list(features.flatten(0, 1))
    sequence, owners = [], []
    for position, token in enumerate(input_ids[0].tolist()):
        num_slots = (4 if is_hd else 1) if token == IMAGE else 1
        for _ in range(num_slots):
            sequence.append(image_rows.pop(0) if token == IMAGE else table[token])
            owners.append(position)
    hidden = holistic(inputs_embeds=torch.stack(sequence)[None], use_cache=False).last_hidden_state[0]
    if is_hd:
        is_image = [input_ids[0, owner].item() == IMAGE for owner in owners]
        text = [row for row, image in zip(hidden, is_image, strict=True) if not image]
        image = [row for row, image in zip(hidden, is_image, strict=True) if image]
        image = (
            list(reference_projector(model, torch.stack(image).unflatten(0, (-1, 16))).flatten(0, 1)) if image else []
        )
        short = [image.pop(0) if token == IMAGE else text.pop(0) for token in input_ids[0].tolist()]
        hidden = torch.stack(short)
    if model.config.normalize_encoder_output:
        hidden = nn.functional.normalize(hidden, dim=-1)
    return model.lm_head(language(inputs_embeds=hidden[None], use_cache=False).last_hidden_state)


# ---------------------------------------------------------------------------------------------- stem


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_pixel_shuffle_is_bit_equal_to_internvl(factor):
    patches = torch.randn(3, 64, 5)
    expected = InternVLModel.pixel_shuffle(None, patches.view(3, 8, 8, 5), scale_factor=1 / factor)
    assert torch.equal(pixel_shuffle(patches, factor), expected.flatten(1, 2))


@pytest.mark.parametrize(("stride", "size"), [(14, 56), (28, 56), (32, 64), (7, 21)])
def test_a_plain_convolution_of_any_stride_gives_one_token_per_patch(stride, size):
    model = tiny_model("none", patch_size=stride, image_size=size)
    pixel_values = tiles(2, size=size)
    features = model.get_image_features(pixel_values).pooler_output
    assert features.shape == (2, (size // stride) ** 2, 32)
    assert model.config.image_seq_length == features.shape[1]
    assert model.model.projector is None
    assert_close(features, reference_patches(model, pixel_values))


def test_the_pre_stem_shuffles_then_projects():
    model = shared_model("pre")
    pixel_values = tiles(3)
    expected = reference_projector(model, reference_patches(model, pixel_values))
    assert_close(model.get_image_features(pixel_values).pooler_output, expected)


def test_the_post_stem_hands_patches_to_the_holistic_layers():
    model = shared_model("post")
    pixel_values = tiles(3)
    assert_close(model.get_image_features(pixel_values).pooler_output, reference_patches(model, pixel_values))


def test_other_tile_sizes_interpolate_the_position_embedding():
    stem = HoVLEPatchEmbedding(tiny_config())
    with torch.no_grad():
        stem.position_embedding.normal_()
    grid = stem.position_embedding.detach().view(4, 4, 32).permute(2, 0, 1)[None]
    expected = nn.functional.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False)
    assert_close(stem.positions_for(6), expected.permute(0, 2, 3, 1).reshape(1, 36, 32))
    assert stem.positions_for(4) is stem.position_embedding
    stem.position_embedding.data[:] = torch.arange(32.0)
    assert_close(stem.positions_for(8), torch.arange(32.0).expand(1, 64, 32))


def test_a_larger_tile_runs_through_the_whole_model(stem):
    model = shared_model(stem)
    input_ids = torch.cat([prompt(5), torch.full((1, 9), IMAGE), prompt(6)], dim=1)  # 84 px: 3 x 3 tokens
    logits = model(input_ids, tiles(1, size=84)).logits
    assert logits.shape == (1, 11, 64)
    assert model.config.tokens_per_tile(84) == 9


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 56, 84), "square, got 56 x 84"),
        ((1, 4, 56, 56), r"\(tiles, 3, size, size\), got \(1, 4, 56, 56\)"),
        ((1, 1, 3, 56, 56), r"got \(1, 1, 3, 56, 56\)"),
        ((1, 3, 60, 60), r"image_size \(60\) must be a positive multiple of 28 pixels.*56 and 84"),
    ],
)
def test_impossible_tiles_are_refused_with_the_reason(model, shape, message):
    with pytest.raises(ValueError, match=message):
        model(prompt(5, [1], 6), torch.zeros(shape))


# ---------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize(
    ("input_ids", "pixel_values"), list(zip(PROMPTS, PICTURES, strict=True)), ids=["one-tile", "two-pictures", "text"]
)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_two_stock_models_on_hand_made_sequences(stem, attention, input_ids, pixel_values):
    model = shared_model(stem) if attention == "sdpa" else tiny_model(stem, attn_implementation="eager")
    assert model.model.language_model.config._attn_implementation == attention
    with torch.no_grad():
        assert_close(model(input_ids, pixel_values).logits, reference_logits(model, input_ids, pixel_values))


ROPES = {
    "theta": {"rope_type": "default", "rope_theta": 100.0},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    # The prompt of 20 tokens goes beyond 8, so the scaling acts.
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0, "max_position_embeddings": 8},
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "max_position_embeddings": 32,
    },
}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("language_theta", [1e4, 1e6])
def test_the_two_sections_keep_their_own_rotary_parameters(stem, rope, language_theta):
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": language_theta}}
    model = tiny_model(stem, text, embedding_rope_parameters=ROPES[rope])
    with torch.no_grad():
        found = model(PROMPTS[1], PICTURES[1]).logits
        assert_close(found, reference_logits(model, PROMPTS[1], PICTURES[1]))
        model.model.embedding_rotary_emb = model.model.language_model.rotary_emb
        assert not torch.allclose(found, model(PROMPTS[1], PICTURES[1]).logits, atol=1e-3)


def test_a_scaled_language_rope_is_shared_by_default(stem):
    text = {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        "max_position_embeddings": 8,
    }
    model = tiny_model(stem, text)
    with torch.no_grad():
        assert_close(model(PROMPTS[1], PICTURES[1]).logits, reference_logits(model, PROMPTS[1], PICTURES[1]))


def test_normalised_output_enters_the_language_model_with_length_one(stem):
    model = tiny_model(stem, normalize_encoder_output=True)
    with torch.no_grad():
        assert_close(model(PROMPTS[0], PICTURES[0]).logits, reference_logits(model, PROMPTS[0], PICTURES[0]))
        entering = model.get_holistic_embeddings(PROMPTS[0], PICTURES[0]).language_inputs_embeds
    assert_close(entering.norm(dim=-1), torch.ones(entering.shape[:2]))


def test_without_holistic_layers_the_stem_feeds_the_language_model():
    model = tiny_model("pre", num_embedding_layers=0)
    assert len(model.model.embedding_layers) == 0
    with torch.no_grad():
        _, language = stock_sections(model)
        embeds = model.get_input_embeddings()(PROMPTS[0]).clone()
        embeds[0, 1:5] = model.get_image_features(PICTURES[0]).pooler_output
        expected = model.lm_head(language(inputs_embeds=embeds).last_hidden_state)
        assert_close(model(PROMPTS[0], PICTURES[0]).logits, expected)
    kwargs = {"pixel_values": PICTURES[0], "max_new_tokens": 4}
    assert torch.equal(greedy(model, PROMPTS[0], **kwargs), greedy(model, PROMPTS[0], **kwargs, use_cache=False))


def test_holistic_embeddings_are_what_the_language_model_receives(model):
    with torch.no_grad():
        outputs = model.get_holistic_embeddings(PROMPTS[1], PICTURES[1])
        full = model(PROMPTS[1], PICTURES[1], output_hidden_states=True)
    long_length = PROMPTS[1].shape[1] + (3 * TOKENS * 4 if model.model.is_hd else 0)
    assert outputs.last_hidden_state.shape == (1, long_length, 32)
    assert outputs.image_hidden_states.shape == (4, TOKENS, 32)
    assert_close(outputs.language_inputs_embeds[PROMPTS[1] == IMAGE], outputs.image_hidden_states.flatten(0, 1))
    assert_close(full.image_hidden_states, outputs.image_hidden_states)
    if not model.model.is_hd:
        assert_close(outputs.language_inputs_embeds, full.hidden_states[2])


def test_old_names_are_refused_with_the_new_ones():
    model = shared_model("pre")
    with torch.no_grad(), pytest.raises(AttributeError, match="is called language_inputs_embeds"):
        _ = model.get_holistic_embeddings(PROMPTS[2]).inputs_embeds
    with pytest.raises(AttributeError, match=r"is called input_embedding_matrix\(\)"):
        model.model.text_table()


def test_image_tokens_come_back_tile_by_tile_in_reading_order():
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]).bool()
    hidden_states = torch.arange(8.0).view(2, 4, 1)
    assert take_image_tokens(hidden_states, mask, 2, 2).flatten().tolist() == [1, 2, 4, 7]


def test_the_layout_of_hd_gives_each_placeholder_its_slots():
    mask = torch.tensor([[0, 1, 0], [0, 0, 0]]).bool()
    layout = HolisticLayout.from_image_mask(mask, 4, 1)
    assert layout.source.tolist() == [[0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 1, 2]]
    assert layout.is_token.tolist() == [[True] * 6, [False, False, False, True, True, True]]
    assert layout.last_slot.tolist() == [[0, 4, 5], [3, 4, 5]]
    assert layout.image_mask.tolist() == [[False, True, True, True, True, False], [False] * 6]
    single = HolisticLayout.from_image_mask(mask[:1], 4, 1)
    assert single.source.tolist() == [[0, 1, 1, 1, 1, 2]]


def test_a_batch_gives_each_prompt_the_logits_it_has_alone(model):
    with torch.no_grad():
        logits = model(**batch()).logits
        for row, (input_ids, pixel_values) in enumerate(zip(PROMPTS, PICTURES, strict=True)):
            alone = model(input_ids, pixel_values).logits[0]
            assert_close(logits[row, -len(alone) :], alone)


def test_right_padding_changes_nothing_before_it(model):
    input_ids = nn.functional.pad(PROMPTS[0], (0, 3))
    mask = nn.functional.pad(torch.ones_like(PROMPTS[0]), (0, 3))
    with torch.no_grad():
        padded = model(input_ids, PICTURES[0], mask).logits[:, :-3]
        assert_close(padded, model(PROMPTS[0], PICTURES[0]).logits)


def test_one_prompts_pictures_never_reach_another(model):
    inputs = batch()
    with torch.no_grad():
        before = model(**inputs).logits
        inputs["pixel_values"] = torch.cat([PICTURES[0] + 1, PICTURES[1]])
        after = model(**inputs).logits
    assert not torch.allclose(before[0], after[0], atol=1e-3)
    assert torch.equal(before[1:], after[1:])


def test_each_tile_changes_what_follows_it_and_nothing_before(model):
    with torch.no_grad():
        before = model(PROMPTS[1], PICTURES[1]).logits[0]
        changed = PICTURES[1].clone()
        changed[3] += 1  # the second picture; its placeholders start at 15
        after = model(PROMPTS[1], changed).logits[0]
    assert torch.equal(before[:15], after[:15])
    assert ((before - after).abs().amax(dim=-1)[15:] > 1e-4).all()


def test_eager_and_sdpa_attention_agree(stem):
    eager = tiny_model(stem, attn_implementation="eager")
    with torch.no_grad():
        mask = batch()["attention_mask"].bool()
        assert_close(eager(**batch()).logits[mask], shared_model(stem)(**batch()).logits[mask])


def test_inputs_embeds_stand_in_for_text_only(model):
    embeds = model.get_input_embeddings()(PROMPTS[2])
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeds).logits, model(PROMPTS[2]).logits)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(PROMPTS[2], inputs_embeds=embeds)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="Pictures need input_ids"):
        model(inputs_embeds=embeds, pixel_values=tiles(1))


@pytest.mark.parametrize(
    ("input_ids", "num_tiles", "message"),
    [
        (prompt(5, [1], 6), 2, "hold 4 image tokens but the 2 tiles fill 8"),
        (prompt(5, [2], 6), 1, "hold 8 image tokens but the 1 tiles fill 4"),
        (prompt(5, [1], 6)[:, 1:-2], 1, "hold 3 image tokens but the 1 tiles fill 4"),
        (prompt(5, 6), 1, "hold 0 image tokens but the 1 tiles fill 4"),
        (prompt(5, [1], 6), 0, "hold 4 image tokens but the 0 tiles fill 0"),
    ],
)
def test_a_mismatch_of_placeholders_and_tiles_names_both_counts(model, input_ids, num_tiles, message):
    with pytest.raises(ValueError, match=message):
        model(input_ids, tiles(num_tiles) if num_tiles else None)


def test_a_tile_torn_apart_is_refused(model):
    two_rows = torch.tensor([[5, *[IMAGE] * 6, 6], [7, *[IMAGE] * 2, 8, 9, 10, 11, 12]])
    one_row = torch.tensor([[*prompt([1], 5)[0], 6, *[IMAGE] * 3, 7, IMAGE]])
    for ids in (two_rows, one_row):
        with pytest.raises(ValueError, match="Row 0 of the prompts holds image tokens that are no whole number"):
            model(ids, tiles(2))
        with pytest.raises(ValueError, match="Row 0 of the prompts holds image tokens that are no whole number"):
            greedy(model, ids, pixel_values=tiles(2), max_new_tokens=2)


def test_pictures_may_come_as_features_or_pixels_but_not_both(model):
    features = model.get_image_features(PICTURES[0])
    with torch.no_grad():
        expected = model(PROMPTS[0], PICTURES[0]).logits
        assert torch.equal(model(PROMPTS[0], mm_encoder_outputs={"image": features}).logits, expected)
    with pytest.raises(ValueError, match="pixel_values or mm_encoder_outputs, not both"):
        model(PROMPTS[0], PICTURES[0], mm_encoder_outputs={"image": features})


def test_logits_to_keep_takes_the_last_or_the_named_positions(model):
    with torch.no_grad():
        full = model(PROMPTS[0], PICTURES[0]).logits
        assert_close(model(PROMPTS[0], PICTURES[0], logits_to_keep=2).logits, full[:, -2:])
        assert_close(model(PROMPTS[0], PICTURES[0], logits_to_keep=torch.tensor([1, 6])).logits, full[:, [1, 6]])


def test_hidden_states_and_attentions_cover_every_layer(stem):
    model = tiny_model(stem, attn_implementation="eager")
    with torch.no_grad():
        outputs = model(PROMPTS[0], PICTURES[0], output_hidden_states=True, output_attentions=True)
        last_hidden_state = model.model(PROMPTS[0], PICTURES[0]).last_hidden_state
    assert len(outputs.hidden_states) == 6
    assert len(outputs.attentions) == 5
    assert torch.equal(outputs.hidden_states[-1], last_hidden_state)
    length = PROMPTS[0].shape[1]
    long_length = length + (12 if model.model.is_hd else 0)
    assert [weights.shape[-1] for weights in outputs.attentions] == [long_length] * 2 + [length] * 3
    for weights in outputs.attentions:
        assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    assert model(PROMPTS[0], PICTURES[0]).hidden_states is None


def test_a_tuple_is_returned_on_request(model):
    with torch.no_grad():
        outputs = model(PROMPTS[2], labels=PROMPTS[2], return_dict=False)
        assert_close(outputs[1], model(PROMPTS[2]).logits)


# ---------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_mean_over_supervised_text(model):
    labels = PROMPTS[1].clone()
    labels[0, 1] = -100
    with torch.no_grad():
        outputs = model(PROMPTS[1], PICTURES[1], labels=labels)
    keep = (labels[0, 1:] != -100) & (labels[0, 1:] != IMAGE)
    expected = nn.functional.cross_entropy(outputs.logits[0, :-1][keep], labels[0, 1:][keep])
    assert_close(outputs.loss, expected)


def test_labels_at_image_positions_never_change_the_loss(model):
    first, second = PROMPTS[1].clone(), PROMPTS[1].clone()
    second[second == IMAGE] = 3
    with torch.no_grad():
        losses = [model(PROMPTS[1], PICTURES[1], labels=labels).loss for labels in (first, second)]
    assert torch.equal(*losses)
    assert (first == IMAGE).sum() == 16  # the caller's labels are left alone


def test_the_loss_divides_by_the_items_of_the_whole_step(model):
    with torch.no_grad():
        mean = model(PROMPTS[2], labels=PROMPTS[2]).loss
        shared = model(PROMPTS[2], labels=PROMPTS[2], num_items_in_batch=torch.tensor(8)).loss
    assert_close(shared, mean * 4 / 8)


# ---------------------------------------------------------------------------------------------- caching and generation


SAMPLING = {"eos_token_id": None, "pad_token_id": 0}


def greedy(model, *args, **kwargs) -> torch.Tensor:
    return model.generate(*args, do_sample=False, **{**SAMPLING, **kwargs})


@pytest.mark.parametrize("row", range(3))
def test_cached_generation_equals_uncached(model, row):
    kwargs = {} if PICTURES[row] is None else {"pixel_values": PICTURES[row]}
    cached = greedy(model, PROMPTS[row], **kwargs, max_new_tokens=8)
    assert torch.equal(cached, greedy(model, PROMPTS[row], **kwargs, max_new_tokens=8, use_cache=False))
    assert torch.equal(cached[:, : PROMPTS[row].shape[1]], PROMPTS[row])


@pytest.mark.parametrize("make_cache", [lambda _: None, lambda _: DynamicCache(), lambda c: DynamicCache(config=c)])
def test_decoding_by_hand_equals_one_full_forward(model, make_cache):
    continuation = prompt(20, 21, 22, 23)
    for row, pixel_values in enumerate(PICTURES):
        with torch.no_grad():
            full = model(torch.cat([PROMPTS[row], continuation], dim=1), pixel_values).logits
            outputs = model(PROMPTS[row], pixel_values, cache=make_cache(model.config), use_cache=True)
            logits = [outputs.logits]
            for token in continuation[0]:
                outputs = model(token.view(1, 1), cache=outputs[CACHE])
                logits.append(outputs.logits)
        assert_close(torch.cat(logits, dim=1), full)
        assert outputs[CACHE].get_seq_length() == full.shape[1]


def test_decoding_a_padded_batch_by_hand_equals_each_prompt_alone(model):
    inputs, continuation = batch(), torch.tensor([[20, 21], [22, 23], [24, 25]])
    mask = inputs["attention_mask"]
    with torch.no_grad():
        outputs = model(**inputs, use_cache=True)
        logits = []
        for step in range(2):
            mask = nn.functional.pad(mask, (0, 1), value=1)
            token = continuation[:, step : step + 1]
            outputs = model(token, attention_mask=mask, cache=outputs[CACHE])
            logits.append(outputs.logits)
        for row in range(3):
            alone = model(torch.cat([PROMPTS[row], continuation[row : row + 1]], dim=1), PICTURES[row]).logits
            assert_close(torch.cat(logits, dim=1)[row], alone[0, -2:])


def test_batched_generation_equals_single(model):
    found = greedy(model, **batch(), max_new_tokens=6)
    for row in range(3):
        kwargs = {} if PICTURES[row] is None else {"pixel_values": PICTURES[row]}
        alone = greedy(model, PROMPTS[row], **kwargs, max_new_tokens=6)
        assert found[row, -6:].tolist() == alone[0, -6:].tolist()


@pytest.mark.parametrize("use_cache", [True, False])
def test_several_returned_sequences_all_see_their_own_tiles(model, use_cache):
    expected = greedy(model, **batch(), max_new_tokens=3)
    kwargs = {"max_new_tokens": 3, "do_sample": True, "top_k": 1, "num_return_sequences": 2, "use_cache": use_cache}
    nearly_greedy = model.generate(**batch(), **kwargs, **SAMPLING)
    assert torch.equal(nearly_greedy, expected.repeat_interleave(2, dim=0))


def test_beams_are_scored_with_their_own_prompt(model):
    outputs = greedy(
        model,
        **batch(),
        max_new_tokens=3,
        num_beams=2,
        num_return_sequences=2,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    with torch.no_grad():
        for row in range(6):
            beam = outputs.sequences[row, -3:]
            prompt_ids = torch.cat([PROMPTS[row // 2], beam[None]], dim=1)
            logits = model(prompt_ids, PICTURES[row // 2]).logits[0, -4:-1]
            score = logits.log_softmax(dim=-1).gather(1, beam[:, None]).sum()
            assert_close(outputs.sequences_scores[row], score)


def test_sampling_follows_the_models_distribution_and_the_seed(model):
    kwargs = {"pixel_values": PICTURES[0], "max_new_tokens": 5, "do_sample": True, **SAMPLING}
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model.generate(PROMPTS[0], **kwargs, num_return_sequences=3))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert len({tuple(row.tolist()) for row in draws[0]}) > 1


def test_a_second_turn_continues_the_cache_with_a_new_picture(model):
    second = prompt(30, [2], 31)
    with torch.no_grad():
        first = model.generate(
            PROMPTS[0],
            pixel_values=PICTURES[0],
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            **SAMPLING,
        )
        history = torch.cat([first.sequences, second], dim=1)
        all_pixels = torch.cat([PICTURES[0], tiles(2, 5)])
        expected = greedy(model, history, pixel_values=all_pixels, max_new_tokens=4)
        continued = greedy(model, history, pixel_values=tiles(2, 5), max_new_tokens=4, **{CACHE: first[CACHE]})
    assert torch.equal(continued, expected)


def test_a_second_turn_in_a_padded_batch_equals_one_forward(model):
    inputs, second = batch(), [prompt(30, [2], 31), prompt(32, 33), prompt(34, [1])]
    ids, mask = pad_left(*second)
    both_mask = torch.cat([inputs["attention_mask"], mask], dim=1)
    with torch.no_grad():
        outputs = model(**inputs, use_cache=True)
        new_pixels = torch.cat([tiles(2, 5), tiles(1, 6)])
        logits = model(ids, new_pixels, both_mask, cache=outputs[CACHE]).logits
        new_tiles = [tiles(2, 5), None, tiles(1, 6)]
        for row in range(3):
            pixels = [pixels for pixels in (PICTURES[row], new_tiles[row]) if pixels is not None]
            alone = model(torch.cat([PROMPTS[row], second[row]], dim=1), torch.cat(pixels)).logits[0]
            length = second[row].shape[1]
            assert_close(logits[row, -length:], alone[-length:])


def test_prompt_chunks_equal_one_prefill(stem):
    model = shared_model(stem)
    cut = 6  # after the picture
    with torch.no_grad():
        full = model(PROMPTS[0], PICTURES[0]).logits
        outputs = model(PROMPTS[0][:, :cut], PICTURES[0], use_cache=True)
        rest = model(PROMPTS[0][:, cut:], cache=outputs[CACHE]).logits
    assert_close(torch.cat([outputs.logits, rest], dim=1), full)


@pytest.mark.parametrize("image_attention", ["causal", "bidirectional"])
def test_a_static_cache_generates_the_same_tokens(stem, image_attention):
    model = tiny_model(stem, image_attention=image_attention)
    dynamic = greedy(model, **batch(), max_new_tokens=5)
    static = greedy(model, **batch(), max_new_tokens=5, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


SHUFFLE = 4  # patches HoVLE-HD's holistic layers see where the language model sees one image token


def cache_lengths(cache) -> tuple[int, int]:
    """Slots of a static cache in HoVLE-HD's language layers and in its holistic layers, as allocated."""
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == [lengths[0]] * 3 + [lengths[-1]] * 2
    assert lengths == [layer.max_cache_len for layer in cache.layers]
    return lengths[0], lengths[-1]


@pytest.mark.parametrize(
    ("rows", "added"),
    [
        ([0], 1),
        ([1], 4),
        ([2], 0),
        ([0, 1, 2], 4),  # the row of two pictures has 4 tiles; all five of the batch are in no row
        ([0, 2], 1),
    ],
)
def test_hd_s_static_cache_is_as_long_as_the_longest_row(rows, added):
    model = shared_model("post")
    input_ids, attention_mask = pad_left(*[PROMPTS[row] for row in rows])
    pictures = [PICTURES[row] for row in rows if PICTURES[row] is not None]
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs |= {"pixel_values": torch.cat(pictures)} if pictures else {}
    expected = greedy(model, **inputs, max_new_tokens=5)
    model._previous_max_cache_length = -1  # what other tests asked for
    found = greedy(
        model,
        **inputs,
        max_new_tokens=5,
        cache_implementation="static",
        disable_compile=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(found.sequences, expected)
    length = input_ids.shape[1] + 5 - 1  # the last token is not read again
    assert cache_lengths(found[CACHE]) == (length, length + added * TOKENS * (SHUFFLE - 1))


def test_hd_s_static_cache_serves_beam_search():
    model = shared_model("post")
    options = {**batch(), "max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    expected = model.generate(**options)
    model._previous_max_cache_length = -1
    found = model.generate(
        **options, cache_implementation="static", disable_compile=True, return_dict_in_generate=True
    )
    assert torch.equal(found.sequences, expected)
    assert cache_lengths(found[CACHE]) == (24, 24 + 4 * TOKENS * (SHUFFLE - 1))
    assert found[CACHE].layers[0].keys.shape[0] == 9


def test_a_static_cache_of_one_s_own_counts_the_language_model_s_tokens():
    model = shared_model("post")
    expected = greedy(model, **batch(), max_new_tokens=5)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=30)
    assert torch.equal(greedy(model, **batch(), max_new_tokens=5, **{CACHE: cache}, disable_compile=True), expected)
    assert cache_lengths(cache) == (30, 30 + 4 * TOKENS * (SHUFFLE - 1))
    cache.reset()  # the same prompts fit again, and the padding of the first ones is forgotten
    assert torch.equal(greedy(model, **batch(), max_new_tokens=5, **{CACHE: cache}, disable_compile=True), expected)


def test_a_static_cache_forgets_padding_when_it_is_reset():
    model = shared_model("post")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=30)
    greedy(model, **batch(), max_new_tokens=2, **{CACHE: cache}, disable_compile=True)
    cache.reset()
    other = {"input_ids": torch.arange(5, 35).view(3, 10)}
    expected = greedy(model, **other, max_new_tokens=5)
    found = greedy(model, **other, max_new_tokens=5, **{CACHE: cache}, disable_compile=True)
    assert torch.equal(found, expected)


def test_pictures_beyond_a_used_static_cache_are_refused_with_the_lengths():
    model = shared_model("post")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=12)
    with torch.no_grad():
        model(PROMPTS[2], cache=cache)  # 5 tokens of text give both parts 12 slots
        with pytest.raises(ValueError, match=r"12 slots in HoVLE-HD's holistic layers.* needs 23.* 11 more tokens"):
            model(prompt(5, [1], 6), PICTURES[0], cache=cache)


def test_a_second_picture_uses_what_room_a_static_cache_has():
    model = shared_model("post")
    second = prompt(30, [1], 31)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=40)
    with torch.no_grad():
        model(PROMPTS[2], cache=cache)
        found = model(second, PICTURES[0], cache=cache).logits
        expected = model(torch.cat([PROMPTS[2], second], dim=1), PICTURES[0]).logits
    assert_close(found, expected[:, -second.shape[1] :])


def test_an_answer_longer_than_a_used_static_cache_is_refused_with_the_lengths():
    model = shared_model("post")
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=12)
    with torch.no_grad():
        model(PROMPTS[2], cache=cache)
    cache.reset()
    with pytest.raises(ValueError, match=r"12 slots in HoVLE-HD's holistic layers.* needs 13"):
        greedy(model, PROMPTS[2], max_new_tokens=9, **{CACHE: cache}, disable_compile=True)


def test_hd_s_static_cache_stays_within_a_sliding_window():
    bare = bare_language_model(MistralConfig, sliding_window=12)
    model = shake(
        HoVLEForConditionalGeneration.from_language_model(
            bare, 1, image_size=56, image_token_id=IMAGE, pixel_shuffle_loc="post"
        )
    ).eval()
    expected = greedy(model, **batch(), max_new_tokens=5)
    static = greedy(
        model,
        **batch(),
        max_new_tokens=5,
        cache_implementation="static",
        disable_compile=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(static.sequences, expected)
    assert {layer.keys.shape[2] for layer in static[CACHE].layers} == {12}


EQUALLY_LONG = torch.cat([PROMPTS[0], prompt(13, 14, 15, 16, 17, 18, 19, 20)])
"""A prompt with a picture and one without, of the same length: no padding, so `generate` drops their mask."""


@pytest.mark.parametrize(
    "inputs",
    [
        {"input_ids": PROMPTS[0], "pixel_values": PICTURES[0]},
        batch(),
        {
            "input_ids": EQUALLY_LONG,
            "pixel_values": PICTURES[0],
            "attention_mask": torch.ones_like(EQUALLY_LONG),
        },
    ],
    ids=["one", "padded", "equally long"],
)
def test_decoding_with_hd_s_static_cache_compiles_as_one_graph(inputs, whole_graph):
    model = tiny_model("post")
    expected = greedy(model, **inputs, max_new_tokens=4)
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    torch._dynamo.reset()
    with whole_graph:
        found = greedy(model, **inputs, max_new_tokens=4, cache_implementation="static", compile_config=config)
        assert torch.equal(found, expected)
    assert hasattr(model, "_compiled_call")


def test_a_static_cache_works_with_one_sliding_window_in_all_layers():
    bare = bare_language_model(MistralConfig, sliding_window=4)
    model = shake(HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56, image_token_id=IMAGE))
    dynamic = greedy(model.eval(), **batch(), max_new_tokens=5)
    static = greedy(model, **batch(), max_new_tokens=5, cache_implementation="static", disable_compile=True)
    assert torch.equal(dynamic, static)


def test_attention_that_would_ignore_a_mask_is_refused():
    model = tiny_model("pre", image_attention="bidirectional")
    length = PROMPTS[0].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="bidirectional pictures need"):
        model(PROMPTS[0], PICTURES[0])
    model.config.text_config._attn_implementation = "flex_attention"
    with pytest.raises(ValueError, match="needs sdpa or eager"):
        model(PROMPTS[0], PICTURES[0], attention_mask=mask)


def test_prompt_lookup_decoding_gives_the_greedy_tokens():
    model = shared_model("pre")
    ids = torch.cat([PROMPTS[0], PROMPTS[2], PROMPTS[2]], dim=1)  # repeats, so that guesses are accepted
    expected = greedy(model, ids, pixel_values=PICTURES[0], max_new_tokens=12)
    found = greedy(model, ids, pixel_values=PICTURES[0], max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("num_tokens", [1, 10])
def test_prompt_lookup_never_proposes_a_picture(num_tokens):
    model = shared_model("pre")
    ids = prompt(7, 8, [1], 9, 7, 8)  # what followed the last words is a picture
    expected = greedy(model, ids, pixel_values=tiles(1), max_new_tokens=6)
    found = greedy(model, ids, pixel_values=tiles(1), max_new_tokens=6, prompt_lookup_num_tokens=num_tokens)
    assert torch.equal(found, expected)


def test_no_placeholder_is_generated_whatever_the_generation_config_says():
    model = tiny_model("pre")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[[7, IMAGE]] = model(PROMPTS[2], output_hidden_states=True).hidden_states[-1][0, -1]
        model.lm_head.weight[IMAGE] *= 2  # what greedy search would take, then token 7
    assert greedy(model, PROMPTS[2], max_new_tokens=1)[0, -1] == 7
    assert model.generate(PROMPTS[2], max_new_tokens=1, do_sample=False, suppress_tokens=[7])[0, -1] not in (7, IMAGE)


def test_assisted_decoding_that_would_go_wrong_is_refused():
    kwargs = {"pixel_values": PICTURES[0], "max_new_tokens": 4}
    with pytest.raises(ValueError, match="HoVLE-HD cannot take back tokens"):
        greedy(shared_model("post"), PROMPTS[0], prompt_lookup_num_tokens=2, **kwargs)
    with pytest.raises(ValueError, match="assistant_early_exit would leave out"):
        greedy(shared_model("pre"), PROMPTS[0], assistant_early_exit=2, **kwargs)


def text_assistant(**fields) -> LlamaForCausalLM:
    torch.manual_seed(1)
    return shake(LlamaForCausalLM(LlamaConfig(**{**TEXT, "num_hidden_layers": 1, **fields}))).eval()


@pytest.mark.parametrize("image_attention", ["causal", "bidirectional"])
@pytest.mark.parametrize("row", range(len(PROMPTS)))
def test_a_small_text_model_may_assist(row, image_attention):
    model = tiny_model("pre", image_attention=image_attention)
    pictures = {} if PICTURES[row] is None else {"pixel_values": PICTURES[row]}
    generate = functools.partial(greedy, model, PROMPTS[row], **pictures, max_new_tokens=12)
    expected = generate()
    assistants = [text_assistant(), text_assistant(vocab_size=58)]
    with pytest.raises(ValueError, match="different tokenizers"):
        generate(assistant_model=assistants[1])
    assistants[1].resize_token_embeddings(TEXT["vocab_size"], mean_resizing=False)  # rows for the picture tokens
    for assistant in assistants:
        assert torch.equal(generate(assistant_model=assistant), expected)


@pytest.mark.parametrize("assistant_stem", STEMS)
def test_a_small_hovle_assists_with_text_and_is_refused_with_pictures(assistant_stem):
    model = shared_model("pre")
    assistant = tiny_model(assistant_stem, {"num_hidden_layers": 3}, num_embedding_layers=1)
    found = greedy(model, PROMPTS[2], max_new_tokens=12, assistant_model=assistant)
    assert torch.equal(found, greedy(model, PROMPTS[2], max_new_tokens=12))
    with pytest.raises(ValueError, match="HoVLEForConditionalGeneration cannot assist with pictures"):
        greedy(model, PROMPTS[0], pixel_values=PICTURES[0], max_new_tokens=12, assistant_model=assistant)


def test_inputs_embeds_generate_like_their_ids(model):
    embeds = model.get_input_embeddings()(PROMPTS[2]).detach()
    found = greedy(model, inputs_embeds=embeds, max_new_tokens=5)
    assert torch.equal(found, greedy(model, PROMPTS[2], max_new_tokens=5)[:, -5:])


# ---------------------------------------------------------------------------------------------- bidirectional pictures


def picture_gradients(model, input_ids, pixel_values) -> torch.Tensor:
    """How strongly the holistic output of each token depends on the embedding of each, `(T, T)`."""
    model = copy.deepcopy(model)
    features = model.get_image_features(pixel_values).pooler_output.detach().requires_grad_(True)
    outputs = model.get_holistic_embeddings(input_ids, image_features=features).image_hidden_states.flatten(0, 1)
    rows = [torch.autograd.grad(row.sum(), features, retain_graph=True)[0].flatten(0, 1) for row in outputs]
    return torch.stack(rows).abs().sum(dim=-1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bidirectional_pictures_see_themselves_whole_and_each_other_causally(attention):
    kwargs = {"attn_implementation": attention}
    input_ids, pixel_values = PROMPTS[1], PICTURES[1]  # pictures of three tiles and of one, four tokens each
    causal = picture_gradients(tiny_model("pre", **kwargs), input_ids, pixel_values) > 0
    assert torch.equal(causal, torch.ones(16, 16, dtype=torch.bool).tril())
    both = picture_gradients(tiny_model("pre", image_attention="bidirectional", **kwargs), input_ids, pixel_values) > 0
    expected = torch.ones(16, 16, dtype=torch.bool).tril()
    expected[:12, :12] = expected[12:, 12:] = True
    assert torch.equal(both, expected)


def test_bidirectional_pictures_keep_the_invariants(stem, tmp_path):
    model = tiny_model(stem, image_attention="bidirectional")
    with torch.no_grad():
        logits = model(**batch()).logits
        assert not torch.allclose(logits, shared_model(stem)(**batch()).logits)
        for row in (0, 1, 2):  # padding and the batch change nothing
            alone = model(PROMPTS[row], PICTURES[row]).logits[0]
            assert_close(logits[row, -len(alone) :], alone)
        packed = model(
            torch.cat(PROMPTS, dim=1),
            torch.cat(PICTURES[:2]),
            position_ids=torch.cat([torch.arange(row.shape[1]) for row in PROMPTS])[None],
        ).logits
        alone = [model(ids, pixels).logits for ids, pixels in zip(PROMPTS, PICTURES, strict=True)]
        assert_close(packed, torch.cat(alone, dim=1))
        assert torch.equal(reload(model, tmp_path)(**batch()).logits, logits)
    kwargs = {"pixel_values": PICTURES[1], "max_new_tokens": 5}
    assert torch.equal(greedy(model, PROMPTS[1], **kwargs), greedy(model, PROMPTS[1], **kwargs, use_cache=False))


def test_bidirectional_pictures_of_a_later_turn_see_themselves():
    model = tiny_model("pre", image_attention="bidirectional")
    ids, pixels = torch.cat([PROMPTS[0], PROMPTS[1]], dim=1), torch.cat(PICTURES[:2])
    with torch.no_grad():
        first = model(PROMPTS[0], PICTURES[0], use_cache=True)
        second = model(PROMPTS[1], PICTURES[1], cache=first[CACHE]).logits
        assert_close(second, model(ids, pixels).logits[:, -second.shape[1] :])


def test_a_mask_of_ones_own_lets_bidirectional_pictures_see_themselves():
    model = tiny_model("pre", image_attention="bidirectional")
    length = PROMPTS[1].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with torch.no_grad():
        found = model(PROMPTS[1], PICTURES[1], attention_mask=mask).logits
        assert_close(found, model(PROMPTS[1], PICTURES[1]).logits)


# ---------------------------------------------------------------------------------------------- packed documents


@pytest.mark.parametrize(
    ("training", "attention", "use_cache"),
    [(True, "sdpa", None), (True, "eager", None), (False, "sdpa", None), (False, "eager", True), (True, "sdpa", True)],
)
def test_packed_documents_do_not_see_each_other(stem, training, attention, use_cache):
    model = tiny_model(stem, attn_implementation=attention).train(training)
    packed_ids = torch.cat(PROMPTS, dim=1)
    position_ids = torch.cat([torch.arange(row.shape[1]) for row in PROMPTS])[None]
    with torch.no_grad():
        outputs = model(packed_ids, torch.cat(PICTURES[:2]), position_ids=position_ids, use_cache=use_cache)
        alone = [model(ids, pixels).logits for ids, pixels in zip(PROMPTS, PICTURES, strict=True)]
    assert_close(outputs.logits, torch.cat(alone, dim=1))
    assert (CACHE not in outputs) == (use_cache is False or (use_cache is None and training))


def test_packed_rows_of_one_length_may_share_a_batch(model):
    rows = [torch.cat([PROMPTS[0], PROMPTS[2]], dim=1), torch.cat([PROMPTS[2], PROMPTS[0]], dim=1)]
    lengths = [(8, 5), (5, 8)]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in pair]) for pair in lengths])
    with torch.no_grad():
        logits = model(torch.cat(rows), torch.cat([PICTURES[0]] * 2), position_ids=position_ids).logits
        alone = torch.cat([model(PROMPTS[0], PICTURES[0]).logits[0], model(PROMPTS[2]).logits[0]])
    assert_close(logits[0], alone)
    assert_close(logits[1], torch.cat([alone[8:], alone[:8]]))


def test_hd_refuses_masks_it_would_have_to_guess_from():
    length = PROMPTS[0].shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"two sequences: give a 2-D attention_mask \(batch, tokens\), or none\.$"):
        shared_model("post")(PROMPTS[0], PICTURES[0], attention_mask=mask)


def test_hd_refuses_packed_rows_of_different_long_lengths():
    rows = torch.cat([torch.cat([PROMPTS[0], PROMPTS[2]], dim=1), torch.arange(3, 16)[None]])
    position_ids = torch.cat([torch.arange(8), torch.arange(5)]).expand(2, -1)
    with pytest.raises(ValueError, match="Pack into one row"):
        shared_model("post")(rows, PICTURES[0], position_ids=position_ids)


# ---------------------------------------------------------------------------------------------- saving


def test_hd_refuses_positions_its_long_sequence_would_not_follow():
    model, ids = shared_model("post"), PROMPTS[2]
    mask = torch.ones_like(ids)
    for attention_mask in (None, mask):
        with torch.no_grad(), pytest.raises(ValueError, match="position_ids must go on by 1, or restart at 0"):
            model(ids, attention_mask=attention_mask, position_ids=torch.tensor([[0, 1, 2, 50, 51]]))
        with torch.no_grad():
            shifted = model(ids, attention_mask=attention_mask, position_ids=torch.arange(7, 12)[None]).logits
            assert_close(shifted, model(ids).logits)


def reload(model, folder, **kwargs):
    model.save_pretrained(folder, **{key: kwargs.pop(key) for key in ("max_shard_size",) if key in kwargs})
    loaded, info = HoVLEForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_is_bit_equal(stem, tied, tmp_path):
    model = tiny_model(stem, {"tie_word_embeddings": tied})
    loaded = reload(model, tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != tied  # noqa: SIM118 - not a dict
        assert not [name for name in file.keys() if "inv_freq" in name]  # noqa: SIM118
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    assert torch.equal(greedy(loaded, **batch(), max_new_tokens=4), greedy(model, **batch(), max_new_tokens=4))


def test_shards_load_to_the_same_model(stem, tmp_path):
    model = tiny_model(stem)
    loaded = reload(model, tmp_path, max_shard_size="40KB")
    assert len(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]) > 10
    for (name, first), (_, second) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert torch.equal(first, second), name


@pytest.mark.parametrize("rope", ROPES)
def test_own_rotary_tables_survive_loading(stem, rope, tmp_path):
    model = tiny_model(stem, embedding_rope_parameters=ROPES[rope])
    loaded = reload(model, tmp_path)
    first, second = model.model.embedding_rotary_emb, loaded.model.embedding_rotary_emb
    assert second.inv_freq.dtype == torch.float32
    assert torch.equal(first.inv_freq, second.inv_freq)
    with torch.no_grad():
        assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)


def test_bfloat16_is_kept_and_the_rotary_tables_stay_exact(stem, tmp_path):
    model = tiny_model(stem)
    model.save_pretrained(tmp_path)
    half = HoVLEForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.embedding_rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        logits = half(**batch()).logits
    assert logits.dtype == torch.bfloat16
    again = reload(half, tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(again(**batch()).logits, logits)


def test_a_resized_vocabulary_keeps_the_old_logits(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**batch()).logits
        model.resize_token_embeddings(70, mean_resizing=False)
        assert_close(model(**batch()).logits[..., :64], before)
    assert model.config.text_config.vocab_size == 70


# ---------------------------------------------------------------------------------------------- training


def gradients(model) -> dict[str, torch.Tensor]:
    model.zero_grad()
    inputs = batch()
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_loss_reaches_every_weight(stem):
    model = tiny_model(stem).train()
    for name, gradient in gradients(model).items():
        assert gradient.isfinite().all(), name
        assert gradient.abs().sum() > 0, name


def test_gradient_checkpointing_gives_the_same_gradients(stem):
    model = tiny_model(stem).train()
    expected = gradients(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    found = gradients(model)
    for name, gradient in expected.items():
        assert_close(found[name], gradient)


def test_holistic_module_and_language_model_train_apart(stem):
    """What the distillation and alignment stages freeze: the language model's layers, norm and head."""
    model = tiny_model(stem).train()
    frozen = [*model.model.language_layers.parameters(), *model.model.language_model.norm.parameters()]
    frozen += [*model.lm_head.parameters()]
    for parameter in frozen:
        parameter.requires_grad_(False)
    holistic = [*model.model.embedding_layers.parameters(), *model.model.patch_embedding.parameters()]
    holistic += [*model.get_input_embeddings().parameters()]
    holistic += [] if model.model.projector is None else [*model.model.projector.parameters()]
    assert not {id(p) for p in frozen} & {id(p) for p in holistic}
    assert {id(p) for p in frozen} | {id(p) for p in holistic} == {id(p) for p in model.parameters()}
    model(**batch(), labels=batch()["input_ids"]).loss.backward()
    assert all(parameter.grad is None for parameter in frozen)
    assert all(parameter.grad is not None for parameter in holistic)


def test_holistic_embeddings_train_without_the_language_model(stem):
    model = tiny_model(stem).train()
    outputs = model.get_holistic_embeddings(PROMPTS[1], PICTURES[1])
    (outputs.image_hidden_states.square().mean() + outputs.language_inputs_embeds.square().mean()).backward()
    assert all(parameter.grad is None for parameter in model.model.language_layers.parameters())
    assert model.model.patch_embedding.projection.weight.grad.abs().sum() > 0
    assert model.model.embedding_layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


SLOW = pytest.mark.slow  # 6 s each on one thread; the one with the most parts runs by default


@pytest.mark.parametrize(
    ("stem", "packed", "backend"),
    [
        ("post", True, "eager"),
        *(pytest.param(stem, packed, "aot_eager", marks=SLOW) for stem in STEMS for packed in (False, True)),
    ],
)
def test_the_training_step_compiles_as_one_graph(stem, packed, backend, whole_graph):
    model = tiny_model(stem).train()
    torch._dynamo.reset()
    input_ids = torch.cat(PROMPTS, dim=1) if packed else PROMPTS[1]
    position_ids = torch.cat([torch.arange(row.shape[1]) for row in PROMPTS]) if packed else torch.arange(20)
    inputs = {
        "input_ids": input_ids,
        "pixel_values": torch.cat(PICTURES[:2]) if packed else PICTURES[1],
        "position_ids": position_ids[None],
        "labels": input_ids,
    }
    expected = model(**inputs)
    expected.loss.backward()
    reference = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with whole_graph:
        found = torch.compile(model, fullgraph=True, backend=backend)(**inputs)
        found.loss.backward()
        assert_close(found.logits, expected.logits)
        for name, parameter in model.named_parameters():
            assert_close(parameter.grad, reference[name])


# ---------------------------------------------------------------------------------------------- from a language model


def bare_language_model(config_class=LlamaConfig, dtype=torch.float32, **fields):
    torch.manual_seed(0)
    config = config_class(**{**TEXT, "num_hidden_layers": 4, **fields})
    return shake(AutoModelForCausalLM.from_config(config, dtype=dtype)).eval()


TEXT_IDS = torch.randint(3, 59, (2, 24), generator=torch.Generator().manual_seed(3))


def assert_same_text(model, bare) -> None:
    """Logits, padded logits and greedy text of HoVLE and of the bare language model."""
    vocab_size = bare.get_input_embeddings().num_embeddings
    mask = torch.ones_like(TEXT_IDS)
    mask[1, :5] = 0
    with torch.no_grad():
        assert_close(model(TEXT_IDS).logits[..., :vocab_size], bare(TEXT_IDS).logits)
        found = model(TEXT_IDS, attention_mask=mask).logits[..., :vocab_size]
        assert_close(found[mask.bool()], bare(TEXT_IDS, attention_mask=mask).logits[mask.bool()])
    kwargs = {"attention_mask": mask, "max_new_tokens": 5, "suppress_tokens": None}
    assert torch.equal(greedy(model, TEXT_IDS, **kwargs), greedy(bare, TEXT_IDS, **kwargs))


@pytest.mark.parametrize(
    ("tied", "stem_name", "num_embedding_layers"),
    [(True, "pre", 3), (False, "pre", 0), (False, "none", 2), (False, "post", 3), (True, "post", 0)],
)
def test_text_starts_as_the_bare_language_model(tied, stem_name, num_embedding_layers, tmp_path):
    bare = bare_language_model(tie_word_embeddings=tied)
    bare.save_pretrained(tmp_path)
    model = HoVLEForConditionalGeneration.from_language_model(
        tmp_path, num_embedding_layers, image_size=56, pixel_shuffle_loc=stem_name
    ).eval()
    assert (model.config.num_embedding_layers, model.config.num_language_layers) == (num_embedding_layers, 4)
    assert_same_text(model, bare)
    for index, layer in enumerate(bare.model.layers):
        copied = model.model.language_layers[index].state_dict()
        for name, tensor in layer.state_dict().items():
            assert torch.equal(copied[name], tensor), name
    assert torch.equal(model.model.language_model.norm.weight, bare.model.norm.weight)


def test_the_holistic_layers_start_as_the_identity_but_not_as_zeros(stem):
    bare = bare_language_model(attention_bias=True, mlp_bias=True)
    model = HoVLEForConditionalGeneration.from_language_model(
        bare, 2, image_size=56, pixel_shuffle_loc=stem, patch_size=14
    ).eval()
    for layer in model.model.embedding_layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            assert not projection.weight.any()
            assert not projection.bias.any()
        assert layer.self_attn.q_proj.weight.any()
        assert layer.mlp.up_proj.weight.any()
    with torch.no_grad():
        embeds = model.get_input_embeddings()(TEXT_IDS)
        assert torch.equal(model.get_holistic_embeddings(TEXT_IDS).language_inputs_embeds, embeds)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("untie", [True, False])
def test_new_tokens_get_new_rows_and_old_rows_stay(tied, untie, tmp_path):
    bare = bare_language_model(tie_word_embeddings=tied)
    model = HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56, untie_text_embeddings=untie)
    table, head = model.get_input_embeddings().weight, model.lm_head.weight
    assert table.shape == head.shape == (67, 32)
    assert model.config.text_config.vocab_size == 67
    assert model.config.image_token_id == 66
    assert torch.equal(table[:64], bare.get_input_embeddings().weight)
    assert torch.equal(head[:64], bare.get_output_embeddings().weight)
    assert (table is head) == (tied and not untie)
    assert model.config.tie_word_embeddings == (tied and not untie)
    new_rows = table[64:]
    assert len(new_rows.unique(dim=0)) == 3
    assert (new_rows.norm(dim=1) < table[:64].norm(dim=1).max()).all()
    loaded = reload(model, tmp_path)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (tied and not untie)
    with torch.no_grad():
        assert torch.equal(loaded(TEXT_IDS).logits, model.eval()(TEXT_IDS).logits)
    again = HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56)
    assert torch.equal(again.get_input_embeddings().weight, table)  # new rows do not depend on chance


def test_new_rows_of_a_table_in_bfloat16_stay_in_bfloat16():
    bare = bare_language_model()
    known = bare.get_input_embeddings().weight
    known.data = known.data.bfloat16().float()
    model = HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56)
    table = model.get_input_embeddings().weight
    assert len(table) > 64
    assert torch.equal(table.bfloat16().float(), table)


def test_an_untied_text_table_trains_without_the_head():
    bare = bare_language_model(tie_word_embeddings=True)
    model = HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56, untie_text_embeddings=True)
    head = model.lm_head.weight.detach().clone()
    model.lm_head.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(TEXT_IDS, labels=TEXT_IDS).loss.backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight, head)
    assert not torch.equal(model.get_input_embeddings().weight, head)


def test_the_placeholder_comes_from_the_tokenizer_beside_the_model(tokenizer, tmp_path):
    bare = bare_language_model(vocab_size=len(tokenizer))
    bare.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = HoVLEForConditionalGeneration.from_language_model(tmp_path, 1, image_size=56)
    assert model.config.image_token_id == len(tokenizer) + 2
    assert model.config.text_config.vocab_size == len(tokenizer) + 3


def test_spare_rows_of_a_padded_vocabulary_are_used_before_new_ones(tokenizer, tmp_path):
    bare = bare_language_model(vocab_size=len(tokenizer) + 20)
    bare.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = HoVLEForConditionalGeneration.from_language_model(tmp_path, 1, image_size=56)
    assert model.config.image_token_id == len(tokenizer) + 2
    assert torch.equal(model.get_input_embeddings().weight, bare.get_input_embeddings().weight)


@pytest.mark.parametrize("config_class", [LlamaConfig, Qwen2Config])
def test_a_folder_without_tokenizer_gets_three_rows_after_the_vocabulary(config_class, tmp_path):
    """For some model types transformers hands out an empty tokenizer, whose next id would be an old token's."""
    bare_language_model(config_class).save_pretrained(tmp_path)
    model = HoVLEForConditionalGeneration.from_language_model(tmp_path, 1, image_size=56)
    assert model.config.image_token_id == 66
    assert model.config.text_config.vocab_size == 67


def test_picture_tokens_are_saved_under_their_names(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    old = len(tokenizer)
    add_image_tokens(tokenizer)
    add_image_tokens(tokenizer)
    assert len(tokenizer) == old + 3
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.start_image_token, loaded.end_image_token) == ("<img>", "</img>")
    assert loaded.context_image_token_id == old + 2
    ids = loaded("a<img><IMG_CONTEXT></img>b").input_ids
    assert ids[1:4] == [old, old + 2, old + 1]
    assert loaded.decode(ids, skip_special_tokens=True) == "ab"


def test_picture_tokens_the_tokenizer_has_keep_their_ids(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<IMG_CONTEXT>", "<other>"]})
    bare = bare_language_model(vocab_size=len(tokenizer))
    bare.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = HoVLEForConditionalGeneration.from_language_model(tmp_path, 1, image_size=56)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert model.config.text_config.vocab_size == len(tokenizer) + 2


def test_a_given_placeholder_id_is_used():
    bare = bare_language_model()
    assert HoVLEForConditionalGeneration.from_language_model(bare, 1, image_token_id=5).config.image_token_id == 5
    model = HoVLEForConditionalGeneration.from_language_model(bare, 1, image_token_id=70)
    assert model.config.text_config.vocab_size == 71


def test_config_fields_and_loading_options_find_their_place(tmp_path):
    bare_language_model().save_pretrained(tmp_path)
    rope = {"rope_type": "default", "rope_theta": 123.0}
    model = HoVLEForConditionalGeneration.from_language_model(
        tmp_path,
        1,
        image_size=64,
        patch_size=32,
        pixel_shuffle_loc="none",
        embedding_rope_parameters=rope,
        dtype=torch.bfloat16,
        attn_implementation="eager",
    )
    assert (model.config.image_size, model.config.patch_size) == (64, 32)
    assert model.config.embedding_rope_parameters == rope
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.language_model.config._attn_implementation == "eager"
    with torch.no_grad():
        logits = model.eval()(torch.cat([TEXT_IDS[:1], torch.full((1, 4), 66)], dim=1), tiles(1, size=64)).logits
    assert logits.isfinite().all()


def test_half_precision_starts_exactly_as_the_bare_model():
    """The rotary tables must not be rounded with the weights: at position 200 that moves the logits."""
    bare = bare_language_model(dtype=torch.bfloat16)
    model = HoVLEForConditionalGeneration.from_language_model(bare, 2, image_size=56).eval()
    assert model.model.language_model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.model.embedding_rotary_emb.inv_freq.dtype == torch.float32
    input_ids = torch.randint(3, 59, (1, 200))
    with torch.no_grad():
        found, expected = model(input_ids).logits[..., :64], bare(input_ids).logits
    # Measured worst case: 0.0; a rounded table gives 0.1.
    assert (found - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_the_generation_defaults_of_the_language_model_are_kept():
    bare = bare_language_model()
    bare.generation_config.temperature = 0.3
    model = HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56)
    assert model.generation_config.temperature == 0.3
    assert model.generation_config.eos_token_id == 2


BACKBONES = {
    "llama3-rope": (
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2": (Qwen2Config, {}),
    "qwen2-sliding": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}),
    "qwen3": (Qwen3Config, {"head_dim": 8}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mistral-sliding": (MistralConfig, {"sliding_window": 4}),
    "smollm3": (SmolLM3Config, {"no_rope_layer_interval": 2}),
    "phi3-sliding": (Phi3Config, {"sliding_window": 4}),
    "olmo": (OlmoConfig, {}),
    "olmo2": (Olmo2Config, {}),
    "olmo3": (Olmo3Config, {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "gemma": (GemmaConfig, {"head_dim": 8}),
    "gemma2": (Gemma2Config, {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma3": (
        Gemma3TextConfig,
        {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "granite": (
        GraniteConfig,
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    ),
    "cohere2": (Cohere2Config, {"sliding_window": 4, "logit_scale": 0.5}),
    "phi": (PhiConfig, {"partial_rotary_factor": 0.5}),
    "starcoder2": (Starcoder2Config, {"sliding_window": None}),
    "mixtral": (MixtralConfig, {"num_local_experts": 2, "num_experts_per_tok": 1}),
}
if "internlm3" in CONFIG_MAPPING:  # transformers 5.16 does not have it yet
    BACKBONES["internlm3"] = (CONFIG_MAPPING["internlm3"], {"head_dim": 8})


@pytest.mark.parametrize("name", BACKBONES)
def test_other_decoders_start_as_the_bare_language_model(name, tmp_path):
    config_class, fields = BACKBONES[name]
    bare = bare_language_model(config_class, **fields)
    model = HoVLEForConditionalGeneration.from_language_model(bare, 2, image_size=56, image_token_id=IMAGE).eval()
    assert_same_text(model, bare)
    shake(model)
    with torch.no_grad():
        logits = model(**batch(), output_hidden_states=True)
        assert len(logits.hidden_states) == 7
        for row in (0, 1):
            alone = model(PROMPTS[row], PICTURES[row]).logits[0]
            assert_close(logits.logits[row, -len(alone) :], alone)
        assert torch.equal(reload(model, tmp_path)(**batch()).logits, logits.logits)
    kwargs = {"pixel_values": PICTURES[1], "max_new_tokens": 5}
    assert torch.equal(greedy(model, PROMPTS[1], **kwargs), greedy(model, PROMPTS[1], **kwargs, use_cache=False))


@pytest.mark.parametrize("name", BACKBONES)
def test_other_decoders_learn_with_the_language_model_frozen(name):
    config_class, fields = BACKBONES[name]
    bare = bare_language_model(config_class, **fields)
    model = HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56, image_token_id=IMAGE).train()
    model.model.language_layers.requires_grad_(False)
    frozen = {key: value.clone() for key, value in model.model.language_layers.state_dict().items()}
    learning = dict(model.model.embedding_layers.named_parameters(prefix="layers"))
    learning |= dict(model.model.patch_embedding.named_parameters(prefix="stem"))
    before = {key: value.detach().clone() for key, value in learning.items()}
    optimizer = torch.optim.AdamW(learning.values(), lr=1e-3)
    for _ in range(2):  # in the first step zero output projections hide the gradient from what comes before them
        loss = model(PROMPTS[1], PICTURES[1], labels=PROMPTS[1]).loss
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # A mixture of experts may leave an expert without a token.
    still = [key for key, value in learning.items() if torch.equal(value, before[key]) and ".experts." not in key]
    assert not still
    for key, value in model.model.language_layers.state_dict().items():
        assert torch.equal(value, frozen[key]), key


@pytest.mark.parametrize("name", ["llama3-rope", "qwen2", "gemma3", "granite", "phi"])
def test_normalised_output_survives_padding_whose_row_is_zero(name):
    config_class, fields = BACKBONES[name]
    bare = bare_language_model(config_class, **fields)
    options = {"image_size": 56, "image_token_id": IMAGE, "normalize_encoder_output": True}
    model = HoVLEForConditionalGeneration.from_language_model(bare, 2, **options).train()
    table = model.get_input_embeddings().weight
    table.data[0] = 0
    found = gradients(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    with torch.no_grad():
        logits = model(**batch()).logits
        assert logits.isfinite().all()
        for row in range(3):
            alone = model(PROMPTS[row], PICTURES[row]).logits[0]
            assert_close(logits[row, -len(alone) :], alone)


def test_the_auxiliary_loss_of_routers_is_refused_instead_of_left_out():
    config_class, fields = BACKBONES["mixtral"]
    bare = bare_language_model(config_class, **fields)
    model = HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56, image_token_id=IMAGE)
    with pytest.raises(ValueError, match="without the routers' auxiliary loss"):
        model(PROMPTS[2], labels=PROMPTS[2], output_router_logits=True)
    assert model(PROMPTS[2], labels=PROMPTS[2], output_router_logits=False).loss.isfinite()
    bare.config.output_router_logits = True
    with pytest.raises(ValueError, match="set it to False in the language model's config"):
        HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56)


def test_separate_rope_is_refused_where_each_pattern_has_its_own():
    text_config = Gemma3TextConfig(num_hidden_layers=3, hidden_size=32, intermediate_size=64, head_dim=8)
    config = HoVLEConfig(
        text_config=text_config, num_embedding_layers=1, embedding_rope_parameters={"rope_theta": 5e4}
    )
    with pytest.raises(ValueError, match="embedding_rope_parameters cannot be combined with gemma3_text"):
        HoVLEForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("config_class", "fields"),
    [
        (PhiConfig, {"partial_rotary_factor": 0.5}),
        (StableLmConfig, {"partial_rotary_factor": 0.25}),
        (Phi3Config, {"partial_rotary_factor": 0.5}),
    ],
)
def test_separate_rope_rotates_what_the_language_model_rotates(config_class, fields):
    bare = bare_language_model(config_class, **fields)
    options = {"image_size": 56, "image_token_id": IMAGE, "embedding_rope_parameters": {"rope_theta": 100.0}}
    model = HoVLEForConditionalGeneration.from_language_model(bare, 2, **options).eval()
    own, language = model.model.embedding_rotary_emb.inv_freq, model.model.language_model.rotary_emb.inv_freq
    assert own.shape == language.shape
    assert_close(own, language ** (math.log(100.0) / math.log(1e4)))
    with torch.no_grad():
        assert shake(model)(**batch()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("language", "own", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 5e3}, {"rope_type": "linear", "factor": 4}, 5e3),
        ({"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}, {"rope_theta": 7e3}, 7e3),
        ({"rope_type": "linear", "rope_theta": 5e3, "factor": 2.0}, {"factor": 4.0, "rope_theta": None}, 5e3),
    ],
)
def test_separate_rope_says_only_what_differs(language, own, expected):
    model = tiny_model("pre", {"rope_parameters": language}, embedding_rope_parameters=own)
    reference = LlamaModel(
        tiny_config(
            text={"rope_parameters": {"rope_type": "linear", "rope_theta": expected, "factor": 4.0}}
        ).text_config
    )
    assert torch.equal(model.model.embedding_rotary_emb.inv_freq, reference.rotary_emb.inv_freq)


def test_another_rope_type_keeps_no_scaling_of_the_language_model():
    text = {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e3, "factor": 4.0}}
    model = tiny_model("pre", text, embedding_rope_parameters={"rope_type": "default"})
    assert torch.equal(model.model.embedding_rotary_emb.inv_freq, model.model.language_model.rotary_emb.inv_freq * 4)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"rope_type": "spiral"}, "rope_type must be one of default, dynamic, linear.*, got 'spiral'"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
        ({"rope_theta": "10"}, "rope_theta must be a positive number, got '10'"),
        ({"rope_type": "linear", "factor": float("nan")}, "factor must be a positive number, got nan"),
        ({"rope_type": "linear"}, "incomplete: Missing required keys .*'linear': {'factor'}"),
        ({"rope_type": "longrope", "short_factor": 1.0}, "short_factor must be a list of positive numbers, got 1.0"),
        ({"rope_type": "yarn", "truncate": 1}, "truncate"),
        ({"rope_thet": 5.0}, "hold 'rope_thet', which is none of .*rope_theta"),
        ({"partial_rotary_factor": 0.5}, "rotate 0.5 of each attention head, the language model 1.0"),
    ],
)
def test_separate_rope_that_cannot_work_is_refused_by_name(own, message):
    with pytest.raises(ValueError, match=f"embedding_rope_parameters.*{message}"):
        tiny_model("pre", embedding_rope_parameters=own)


def test_hd_runs_with_one_sliding_window_in_all_layers():
    bare = bare_language_model(MistralConfig, sliding_window=4)
    model = HoVLEForConditionalGeneration.from_language_model(
        bare, 2, image_size=56, image_token_id=IMAGE, pixel_shuffle_loc="post"
    ).eval()
    assert_same_text(model, bare)
    shake(model)
    with torch.no_grad():
        logits = model(**batch()).logits
        for row in (0, 1):
            alone = model(PROMPTS[row], PICTURES[row]).logits[0]
            assert_close(logits[row, -len(alone) :], alone)
    cached = greedy(model, **batch(), max_new_tokens=8)
    for row in (0, 1):
        kwargs = {"pixel_values": PICTURES[row], "max_new_tokens": 8, "use_cache": False}
        assert cached[row, -8:].tolist() == greedy(model, PROMPTS[row], **kwargs)[0, -8:].tolist()


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (
            GPT2Config,
            {"n_embd": 32, "n_layer": 2, "n_head": 4},
            "GPT2Model.*lacks embed_tokens, layers, rotary_emb, norm",
        ),
        (BartConfig, {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4}, "BartDecoder.*rotary_emb"),
        (GPTNeoXConfig, {}, "GPTNeoXModel.*lacks embed_tokens"),
    ],
)
def test_a_backbone_that_cannot_work_is_refused_by_name(config_class, fields, message):
    bare = bare_language_model(config_class, **fields)
    with pytest.raises(ValueError, match=message):
        HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"global_head_dim": 16}, "its layers differ in head_dim"),
        (
            {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
            r"embed_tokens_per_layer.weight has shape \(64, 48\) instead of \(64, 32\)",
        ),
        ({"num_kv_shared_layers": 2}, "need more than Llama's"),
    ],
)
def test_a_gemma_4_that_cannot_work_is_refused_with_the_reason(fields, message):
    own = {"head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0, "sliding_window": 4}
    own["layer_types"] = ["sliding_attention", "full_attention"] * 2
    bare = bare_language_model(CONFIG_MAPPING["gemma4_text"], **{**own, **fields})
    with pytest.raises(ValueError, match=f"Gemma4.* cannot be the backbone of HoVLE.*{message}"):
        HoVLEForConditionalGeneration.from_language_model(bare, 2, image_size=56)


def test_hd_refuses_a_backbone_of_mixed_attention_patterns():
    bare = bare_language_model(Qwen2Config, use_sliding_window=True, sliding_window=4, max_window_layers=2)
    with pytest.raises(ValueError, match="qwen2 mixes full_attention and sliding_attention"):
        HoVLEForConditionalGeneration.from_language_model(bare, 1, image_size=56, pixel_shuffle_loc="post")
