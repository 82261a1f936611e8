"""Implementations of attention beside sdpa and eager: the same numbers, or a clear refusal."""

import pytest
import torch

from hovle import HoVLEForConditionalGeneration

# transformers' own call of torch.
pytestmark = pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")

PLACEHOLDER = 402
"""As in `tiny_config`; a tile is 4 of them."""

KINDS = {
    "pre": {},
    "bidirectional": {"image_attention": "bidirectional"},
    "hd": {"pixel_shuffle_loc": "post"},
    "hd bidirectional": {"pixel_shuffle_loc": "post", "image_attention": "bidirectional"},
}


def build_model(tiny_config, kind: str) -> HoVLEForConditionalGeneration:
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(tiny_config(**KINDS[kind])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # attention that matters
    return model


@pytest.fixture(params=KINDS)
def model(request, tiny_config) -> HoVLEForConditionalGeneration:
    return build_model(tiny_config, request.param)


def row(*parts: int | str) -> list[int]:
    """Token ids; "tile" stands for the placeholders of one tile."""
    return [token for part in parts for token in ([PLACEHOLDER] * 4 if part == "tile" else [part])]


ROWS = [row(5, "tile", 6, 7), row(8, "tile", "tile", 9, "tile", 10, 11), row(12, 13, 14, 15)]
NUM_TILES = 4
FORMS = {"batch": [7, 16, 4], "packed": [7, 16, 4], "packed rows": [7, 6, 13]}
"""Ways to give documents to a model, with the tokens of each document."""


def inputs_of(form: str) -> dict[str, torch.Tensor]:
    """The three rows as a "batch" padded on the left or "packed" into one row; or others, "packed rows"."""
    pixels = torch.randn(NUM_TILES, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    if form == "packed rows":
        return {
            "input_ids": torch.tensor([row(5, "tile", 6, 7, 8, "tile", 9), row(8, "tile", "tile", 9, 10, 11, 12)]),
            "position_ids": torch.tensor([[*range(7), *range(6)], [*range(13)]]),
            "pixel_values": pixels,
        }
    if form == "packed":
        positions = [position for ids in ROWS for position in range(len(ids))]
        ids = [token for ids in ROWS for token in ids]
        return {
            "input_ids": torch.tensor([ids]),
            "position_ids": torch.tensor([positions]),
            "pixel_values": pixels,
        }
    length = max(map(len, ROWS))
    return {
        "input_ids": torch.tensor([[0] * (length - len(ids)) + ids for ids in ROWS]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in ROWS]),
        "pixel_values": pixels,
    }


def logits_of(model, attention: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at real tokens."""
    model.set_attn_implementation(attention)
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits
    return logits[inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("form", FORMS)
def test_flex_attention_gives_the_numbers_of_sdpa(model, form):
    """Its masks, that is; compiling its kernels takes minutes and is left to the test below."""
    inputs = inputs_of(form)
    expected = logits_of(model, "sdpa", inputs)
    with torch.compiler.set_stance("force_eager"):
        found = logits_of(model, "flex_attention", inputs)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bidirectional", "hd"])
def test_compiled_flex_attention_gives_the_numbers_of_sdpa(tiny_config, kind):
    model, inputs = build_model(tiny_config, kind), inputs_of("batch")
    expected = logits_of(model, "sdpa", inputs)
    torch.testing.assert_close(logits_of(model, "flex_attention", inputs), expected, atol=2e-5, rtol=0)


def test_flash_attention_without_its_package_is_refused_by_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    with pytest.raises(ImportError, match="the package for FlashAttention2"):
        HoVLEForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


def test_bidirectional_pictures_refuse_flash_attention(tiny_config):
    for kind in ("bidirectional", "hd bidirectional"):
        model = build_model(tiny_config, kind)
        model.config.text_config._attn_implementation = "flash_attention_2"
        with pytest.raises(ValueError, match="bidirectional pictures need sdpa, eager or flex_attention"):
            model(**inputs_of("batch"))


class FlashAttentionOnCPU:
    """flash-attn's two functions in plain torch, by its documentation, to see what a model gives them."""

    def __init__(self):
        self.documents = []  # of each call of the function for packed sequences

    def dense(self, q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)):
        """`(B, T, heads, head_dim)`; the last query looks at the last key."""
        lengths = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1], torch.arange(k.shape[1])
        distance = lengths[0] - lengths[1]
        seen = torch.ones_like(distance, dtype=torch.bool)
        if causal:
            seen &= distance >= 0
        if window_size[0] >= 0:
            seen &= distance <= window_size[0]
        q, k, v = (states.transpose(1, 2) for states in (q, k, v))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        scores = q @ k.transpose(2, 3) * (softmax_scale or q.shape[-1] ** -0.5)
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)

    def packed(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        """`(sum of T, heads, head_dim)`, each document alone."""
        self.documents.append(cu_seqlens_q.diff().tolist())
        assert max_seqlen_q >= cu_seqlens_q.diff().max()
        assert max_seqlen_k >= cu_seqlens_k.diff().max()
        parts = [
            (q[q_start:q_end][None], k[k_start:k_end][None], v[k_start:k_end][None])
            for q_start, q_end, k_start, k_end in zip(
                cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True
            )
        ]
        return torch.cat([self.dense(*part, **options)[0] for part in parts])


@pytest.fixture
def flash(monkeypatch) -> FlashAttentionOnCPU:
    from transformers import modeling_flash_attention_utils as utils

    kernels = FlashAttentionOnCPU()
    functions = kernels.dense, kernels.packed, None, utils._pad_input, utils._unpad_input
    monkeypatch.setattr(utils, "_lazy_imports", lambda *args, **kwargs: functions)
    for name in [
        name for name in vars(utils) if name.startswith(("_flash_", "_loaded", "_process", "_pad", "_unpad"))
    ]:
        monkeypatch.setattr(utils, name, vars(utils)[name])  # what it remembers is forgotten after the test
    utils._loaded_implementation = None
    return kernels


@pytest.mark.parametrize("kind", ["pre", "hd"])
@pytest.mark.parametrize("form", FORMS)
def test_flash_attention_is_given_what_sdpa_is_given(tiny_config, kind, form, flash):
    """The kernels need a GPU; that padding, documents and positions reach them does not."""
    model, inputs = build_model(tiny_config, kind), inputs_of(form)
    expected = logits_of(model, "sdpa", inputs)
    model.config.text_config._attn_implementation = "flash_attention_2"  # unchecked: the package is not there
    with torch.no_grad():
        found = model(**inputs, use_cache=False).logits
    found = found[inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()]
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    assert len(flash.documents) == model.config.text_config.num_hidden_layers
    assert flash.documents[-1] == FORMS[form]


@pytest.mark.parametrize("kind", ["pre", "hd"])
def test_flash_attention_generates_what_sdpa_generates(tiny_config, kind, flash):
    model, inputs = build_model(tiny_config, kind), inputs_of("batch")
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    model.config.text_config._attn_implementation = "flash_attention_2"
    assert model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist() == expected.tolist()
    assert flash.documents


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["pre", "hd"])
@pytest.mark.parametrize("form", FORMS)
def test_flash_attention_gives_the_numbers_of_sdpa(tiny_config, kind, form):
    """Needs flash-attn; both in bfloat16, the only format they share here."""
    model = build_model(tiny_config, kind).to("cuda", torch.bfloat16)
    inputs = {name: values.cuda() for name, values in inputs_of(form).items()}
    expected = logits_of(model, "sdpa", inputs)
    torch.testing.assert_close(logits_of(model, "flash_attention_2", inputs), expected, atol=0.05, rtol=0.05)
