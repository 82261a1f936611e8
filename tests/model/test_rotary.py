"""Rotary tables: documents of one batch rotate as each does alone, whatever scaling their family has."""

import pytest
import torch
from tiny_models import IMAGE, TEXT, shake
from torch import nn
from transformers import LlamaConfig, Phi3Config

from hovle import HoVLEConfig, HoVLEForConditionalGeneration
from hovle.model.rotary import rotary_table

SWITCH = 16
"""Tokens beyond which scaling that depends on the length begins."""

SCALINGS = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": SWITCH},
    "llama3": {
        "factor": 2.0,
        "original_max_position_embeddings": SWITCH,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "longrope": {
        "factor": 4.0,
        "original_max_position_embeddings": SWITCH,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0, 4.0, 8.0, 16.0],
    },
}

TOLERANCE = {"atol": 2e-5, "rtol": 0.0}


def scaled_model(scaling: str) -> HoVLEForConditionalGeneration:
    torch.manual_seed(0)
    positions = SWITCH if scaling == "dynamic" else 4 * SWITCH
    rope = {"rope_type": scaling, "rope_theta": 1e4, **SCALINGS[scaling]}
    fields = {**TEXT, "num_hidden_layers": 4, "max_position_embeddings": positions, "rope_parameters": rope}
    text_config = (
        Phi3Config(**fields, original_max_position_embeddings=SWITCH)
        if scaling == "longrope"
        else LlamaConfig(**fields)
    )
    config = HoVLEConfig(text_config=text_config, num_embedding_layers=2, image_size=56, image_token_id=IMAGE)
    return shake(HoVLEForConditionalGeneration(config)).eval()


def documents(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 60, (1, length), generator=generator) for length in lengths]


def positions(*lengths: int) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


@pytest.mark.parametrize("scaling", SCALINGS)
@torch.no_grad()
def test_packed_documents_have_the_logits_each_has_alone(scaling):
    model = scaled_model(scaling)
    lengths = (10, SWITCH, 40, 7, SWITCH + 1, 40, 25)
    docs = documents(*lengths)
    alone = [model(doc, use_cache=False).logits for doc in docs]
    again = [model(doc, use_cache=False).logits for doc in docs]  # whatever was seen before
    row, places = torch.cat(docs, dim=1), positions(*lengths)
    packed = model(row, position_ids=places, use_cache=False).logits.split(lengths, dim=1)
    for first, second, found in zip(alone, again, packed, strict=True):
        torch.testing.assert_close(second, first, **TOLERANCE)
        torch.testing.assert_close(found, first, **TOLERANCE)


@pytest.mark.parametrize("scaling", ["dynamic", "longrope"])
@torch.no_grad()
def test_a_long_prompt_changes_no_shorter_one_of_its_batch(scaling):
    model = scaled_model(scaling)
    short, long = documents(9, 40)
    ids = torch.cat([nn.functional.pad(short, (31, 0)), long])
    mask = torch.cat([nn.functional.pad(torch.ones_like(short), (31, 0)), torch.ones_like(long)])
    found = model(ids, attention_mask=mask, use_cache=False).logits
    torch.testing.assert_close(found[:1, 31:], model(short, use_cache=False).logits, **TOLERANCE)
    torch.testing.assert_close(found[1:], model(long, use_cache=False).logits, **TOLERANCE)


@torch.no_grad()
def test_the_language_model_rotates_a_long_text_as_transformers_does():
    for scaling in ("dynamic", "longrope"):
        model = scaled_model(scaling).model
        for length in (SWITCH - 1, SWITCH, SWITCH + 1, 40):
            [doc] = documents(length)
            embeds = model.get_input_embeddings()(doc)
            table = type(model.language_model.rotary_emb)(model.language_model.rotary_emb.config)
            places = positions(length)
            ours = rotary_table(model.language_model.rotary_emb, embeds, places)
            for found, expected in zip(ours, table(embeds, places), strict=True):
                assert torch.equal(found, expected), (scaling, length)
