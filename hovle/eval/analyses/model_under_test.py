"""Models that analyses look into: a HoVLE with any number of holistic layers, or transformers' InternVL."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

from ...files.model_folder import short_name
from ...loading import check_chat_template, reading
from ...model.holistic_sequence import HolisticLayout
from .grids import TokenGrid
from .probe import Section

HOLISTIC, LANGUAGE = "holistic layers", "language model"
"""Names of sections; a model without holistic layers has the second only."""


KINDS = ("hovle", "internvl")
"""Model types whose layers and tiles are known here."""


@dataclass
class PromptInputs:
    """A prompt with one picture, as a model reads it."""

    image: Image.Image
    inputs: BatchFeature
    """`input_ids`, `pixel_values`, ... of the prompt."""
    grid: TokenGrid
    """Of the tokens the language model sees."""


class ModelUnderTest:
    """A model, its processor and what they know about each other.

    Args:
        path: Model folder or Hub id.
        loaded: The model and the processor that are there, where they are in memory already.

    Raises:
        ValueError: For a folder without a model, and for a model of another kind.
    """

    def __init__(self, path: str, loaded: tuple[Any, Any] | None = None):
        self.model: Any
        self.processor: Any
        if loaded is not None:
            self.path = path
            self.model, self.processor = loaded
            self.kind = self.model.config.model_type
            return
        with reading(path, weights=False):
            kind = AutoConfig.from_pretrained(path).model_type
        if kind not in KINDS:
            raise ValueError(
                f"{path} is a {kind} model; the layers and tiles of {' and '.join(KINDS)} are known. One with 0 "
                "holistic layers is built by HoVLEForConditionalGeneration.from_language_model."
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.path = path
        self.kind = kind
        with reading(path):
            self.processor = AutoProcessor.from_pretrained(path)
            check_chat_template(self.processor)
            self.model = AutoModelForImageTextToText.from_pretrained(path).to(device).eval()

    @property
    def label(self) -> str:
        """Short name with the count of layers, for charts."""
        name = short_name(self.path)
        if self.kind == "internvl":
            return f"{name} (InternVL, {len(self.language_layers)} layers)"
        return f"{name} (HoVLE, {len(self.holistic_layers)} + {len(self.language_layers)} layers)"

    @property
    def is_hd(self) -> bool:
        """Whether holistic layers see a longer sequence than the language model."""
        return self.kind == "hovle" and self.model.model.is_hd

    @property
    def holistic_layers(self) -> list:
        """Layers below the language model, which it was given to learn to see."""
        return list(self.model.model.embedding_layers) if self.kind == "hovle" else []

    @property
    def language_layers(self) -> list:
        """Layers of the language model."""
        base = self.model.model
        return list(base.language_layers if self.kind == "hovle" else base.language_model.layers)

    def prepare(self, image: Image.Image, question: str, max_tiles: int | None = None) -> PromptInputs:
        """Build the prompt of a question about a picture.

        Args:
            image: As `load_picture` gives it.
            question: The user's words.
            max_tiles: Most tiles of the picture; the model's own limit by default.
        """
        limit_name = "max_tiles" if self.kind == "hovle" else "max_patches"
        limits = {} if max_tiles is None else {limit_name: max_tiles}
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=limits,
        ).to(self.model.device, self.model.dtype)
        columns, rows = self._choose_grid(image, limits)
        num_tokens = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        grid = TokenGrid.from_counts(columns, rows, len(inputs["pixel_values"]), num_tokens)
        return PromptInputs(image, inputs, grid)

    def _choose_grid(self, image: Image.Image, limits: dict) -> tuple[int, int]:
        processor = self.processor.image_processor
        if self.kind == "hovle":
            return processor.choose_grid(image.height, image.width, limits)
        # transformers' InternVLProcessor always cuts into tiles, whatever its image processor says.
        most = limits.get("max_patches", processor.max_patches)
        if most == 1:
            return 1, 1
        size = (processor.size["height"], processor.size["width"])
        return get_optimal_tiled_canvas((image.height, image.width), size, processor.min_patches, most)

    @torch.inference_mode()
    def answer(self, prompt: PromptInputs, max_new_tokens: int) -> torch.Tensor:
        """Answer greedily; ids of shape `(A,)`, at least one, the end of the turn included if it was reached."""
        generated = self.model.generate(**prompt.inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return generated[0, prompt.inputs["input_ids"].shape[1] :]

    def encode(self, text: str) -> torch.Tensor:
        """Ids of an answer given as text, shape `(A,)`; ValueError if there are none."""
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError("The answer to look at is empty; leave it out to have the model answer.")
        return torch.tensor(ids, device=self.model.device)

    def token_text(self, token_id: int) -> str:
        """A token as people read it; what has no characters of its own, as the tokenizer writes it."""
        tokenizer = self.processor.tokenizer
        text = tokenizer.decode([token_id])
        return text.strip() or str(tokenizer.convert_ids_to_tokens(token_id))

    def sections(self, input_ids: torch.Tensor, num_answer_tokens: int) -> list[Section]:
        """Describe the sequences the layers see.

        Args:
            input_ids: Prompt and all answer tokens but the last, shape `(T,)`.
            num_answer_tokens: A, of which the last has no place in `input_ids`.
        """
        image_mask = input_ids == self.model.config.image_token_id
        queries = torch.arange(len(input_ids) - num_answer_tokens, len(input_ids), device=input_ids.device)
        language = Section(LANGUAGE, self.language_layers, image_mask, queries)
        if not self.holistic_layers:
            return [language]
        if not self.is_hd:
            return [Section(HOLISTIC, self.holistic_layers, image_mask, queries), language]
        slots = self.model.config.shuffle_factor**2
        layout = HolisticLayout.from_image_mask(image_mask[None], slots, int(image_mask.sum()))
        return [
            Section(HOLISTIC, self.holistic_layers, layout.image_mask[0], layout.last_slot[0, queries]),
            language,
        ]

    def grid_of(self, section: Section, grid: TokenGrid) -> TokenGrid:
        """How a section's image tokens lie over a picture; those of HoVLE-HD's holistic layers are patches.

        Args:
            section: Of this model.
            grid: Of the tokens the language model sees of the picture.
        """
        if section.name == HOLISTIC and self.is_hd:
            return grid.finer(self.model.config.shuffle_factor)
        return grid
