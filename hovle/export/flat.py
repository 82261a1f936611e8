"""Take a flat HoVLE apart: a stock decoder of N + M layers and the patch stem that makes its image embeddings."""

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ..files.checkpoint_files import LICENCE, local_folder
from ..files.model_folder import refuse_missing_folder, short_name
from ..loading import load_config, load_model, load_processor
from ..model.configuration_hovle import HoVLEConfig
from ..model.decoder import STOCK_FAMILIES
from ..model.image_processing_hovle import HoVLEImageProcessor
from ..model.modeling_hovle import HoVLEForConditionalGeneration
from ..model.processing_hovle import HoVLEProcessor
from ..model.rotary import embedding_rope_config


@dataclass
class FlatModel:
    """A HoVLE that is one stock decoder on embeddings of words and images."""

    decoder: PreTrainedModel
    """A causal language model of transformers, in evaluation mode; it shares its weights with `model`."""
    model: HoVLEForConditionalGeneration
    """The whole."""
    image_processor: HoVLEImageProcessor
    """How pictures become tiles."""
    processor: HoVLEProcessor | None
    """Tokenizer and image processor; None where the model was saved without a tokenizer."""
    name: str
    """What to call the model."""
    licence: Path | None
    """The licence file beside the model."""
    remarks: list[str]
    """What the user should know, one sentence each."""

    @property
    def config(self) -> HoVLEConfig:
        return self.model.config

    @property
    def generation_config(self) -> GenerationConfig:
        """How the model generates; never the placeholder of an image, which `generate` of a HoVLE leaves out, too."""
        config = copy.deepcopy(self.model.generation_config)
        config.suppress_tokens = sorted({*(config.suppress_tokens or []), self.config.image_token_id})
        return config

    def save_tokenizer(self, folder: Path) -> PreTrainedTokenizerBase | None:
        """Save the tokenizer with the processor's chat template, where there is one."""
        if self.processor is None:
            return None
        tokenizer = copy.deepcopy(self.processor.tokenizer)
        tokenizer.chat_template = self.processor.chat_template
        tokenizer.save_pretrained(folder)
        return tokenizer


def load_flat(src: str | os.PathLike) -> FlatModel:
    """Load a saved HoVLE and take it apart.

    Args:
        src: Model folder or Hub id.

    Raises:
        ValueError: For what is no HoVLE, for one that is not flat (with what stands in the way and what remains
            possible), and for parts that together do not give the whole's logits.
    """
    refuse_missing_folder(src)
    folder = local_folder(src)
    config = load_config(folder)
    refuse_unless_flat(config, os.fspath(src))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{src} holds quantized weights; export the model it was quantized from.")
    model = load_model(folder, dtype="auto").eval()
    image_processor, processor, remarks = _load_processor(folder, config)
    licence = folder / LICENCE
    decoder = stock_decoder(model)
    check_same_logits(decoder, model)
    return FlatModel(
        decoder,
        model,
        image_processor,
        processor,
        short_name(os.fspath(src)),
        licence if licence.is_file() else None,
        remarks,
    )


def refuse_unless_flat(config: HoVLEConfig, name: str) -> None:
    """Raise ValueError, with each reason, unless a stock decoder can run the whole sequence."""
    reasons = []
    if config.pixel_shuffle_loc == "post":
        reasons.append("it is a HoVLE-HD, whose holistic layers see a longer sequence than the language model")
    if config.normalize_encoder_output:
        reasons.append("normalize_encoder_output divides what enters the language model by its norm")
    if config.image_attention != "causal":
        reasons.append(f"image_attention is {config.image_attention!r}: tokens of a picture see later ones")
    rope = embedding_rope_config(config.text_config, config.embedding_rope_parameters)
    if rope.to_dict() != config.text_config.to_dict():
        reasons.append("embedding_rope_parameters give the holistic layers a rope of their own")
    if config.text_config.model_type not in STOCK_FAMILIES:
        reasons.append(
            f"decoders of model_type {config.text_config.model_type!r} were never compared as a whole (known: "
            f"{', '.join(sorted(STOCK_FAMILIES))})"
        )
    if reasons:
        raise ValueError(
            f"{name} cannot be exported as one stock decoder: {'; '.join(reasons)}. It runs in hovle (`hovle chat`, "
            "`hovle serve`) and in transformers with trust_remote_code=True."
        )


def stock_decoder(model: HoVLEForConditionalGeneration) -> PreTrainedModel:
    """The decoder of a flat HoVLE, holistic layers included, as a causal language model of its own family.

    It is made of the very modules of the model, so no weight is copied.
    """
    with torch.device("meta"):
        decoder = AutoModelForCausalLM.from_config(model.config.text_config)
    setattr(decoder, decoder.base_model_prefix, model.model.language_model)
    decoder.set_output_embeddings(model.lm_head)
    if left := [name for name, tensor in decoder.state_dict().items() if tensor.is_meta]:
        raise ValueError(
            f"{type(decoder).__name__} has weights that HoVLE has no place for: {', '.join(left)}. Such a decoder "
            "cannot be exported."
        )
    return decoder.eval()


@torch.no_grad()
def check_same_logits(decoder: PreTrainedModel, model: HoVLEForConditionalGeneration) -> None:
    """Raise ValueError unless a decoder gives a model's logits on its embeddings of a tile and some words.

    Args:
        decoder: Of the model's own modules.
        model: The whole.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    words = torch.randint(config.text_config.vocab_size, (1, 8), generator=generator)
    words = words[words != config.image_token_id][None]
    image = torch.full((1, config.image_seq_length), config.image_token_id)
    input_ids = torch.cat([words, image, words], dim=1)
    side = config.image_size
    pixels = torch.randn(1, config.num_channels, side, side, generator=generator)
    features = model.get_image_features(pixels).pooler_output
    embeds = decoder.get_input_embeddings()(input_ids)
    embeds[input_ids == config.image_token_id] = features.flatten(0, 1).to(embeds.dtype)
    expected = model(input_ids, pixels, use_cache=False).logits.float()
    found = decoder(inputs_embeds=embeds, use_cache=False).logits.float()
    difference, scale = (found - expected).abs().max(), expected.abs().max().clamp(min=1)
    if not difference <= (1e-5 if model.dtype == torch.float32 else 2e-2) * scale:
        raise ValueError(
            f"As a {type(decoder).__name__} the model's logits differ by {difference:.3g} from its own, so it cannot "
            "be exported as one; please report the model's config.json."
        )


def _load_processor(folder: Path, config: HoVLEConfig) -> tuple[HoVLEImageProcessor, HoVLEProcessor | None, list[str]]:
    """Image processor, whole processor where there is a tokenizer, and what the user should know about them."""
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    if has_tokenizer and any(
        (folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")
    ):
        processor = load_processor(folder)
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"The tokenizer gives {processor.image_token} the id {processor.image_token_id}, the configuration "
                f"says image_token_id={config.image_token_id}: save the processor that belongs to the model."
            )
        return processor.image_processor, processor, []
    remarks = ["The model has no tokenizer beside it, so only weights are exported: prompts have to be made of ids."]
    if (folder / "preprocessor_config.json").is_file():
        return HoVLEImageProcessor.from_pretrained(folder), None, remarks
    remarks.append(
        f"Nor does it say how pictures are cut: tiles of {config.image_size} pixels, 1 to 12 and the thumbnail, "
        "ImageNet mean and deviation, as the published models have them."
    )
    return HoVLEImageProcessor(tile_size=config.image_size), None, remarks
