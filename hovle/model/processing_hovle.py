"""Turn chat messages with pictures into what HoVLE reads: `input_ids`, `attention_mask` and `pixel_values`.

`chat_rendering.py` turns messages into one string in the language model's own template, in which a user's text cannot
pose as a special token; the processor turns strings and pictures into ids and tiles.

Two ways in:

- `processor.apply_chat_template(messages, tokenize=True, return_dict=True, ...)`: the template's special tokens are
  special; the same characters typed in a message stay text, token for token.
- `processor(images=..., text=...)`: the string is a rendered prompt. Special tokens in it are parsed, and one
  `<IMG_CONTEXT>` stands for one picture. Do not put a stranger's words into such a string.
"""

import inspect
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from numbers import Real
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import MultiModalData, ProcessorMixin, TextKwargs

from .chat_pictures import check_nesting, flatten_pictures, pictures_of, with_labels
from .chat_rendering import ChatRenderer, Prompt, SpecialTokens, check_unicode, tool_schemas, unused_characters
from .configuration_hovle import HoVLEConfig, count_tile_tokens
from .image_processing_hovle import HoVLEImageProcessor
from .language_model import IMAGE_TOKENS, add_image_tokens, load_tokenizer
from .loading_arguments import LOADING, OF_MODELS, refuse_unknown_of_tokenizer

TEXT_DEFAULTS = {"padding_side": "left", "add_special_tokens": False, "return_token_type_ids": False}
"""Arguments of the tokenizer where the caller says nothing. A chat template writes the special tokens itself, so none
are added; right padding would make a batch generate from padding."""

WITHOUT_MEANING = {
    "load_audio_from_video",
    "enable_thinking",  # a variable of templates that can think
}
"""Arguments that servers and harnesses pass to every model; where nothing takes them, they are dropped."""

OF_GENERATE = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
"""Arguments that pipelines give to the processor though `generate` is to have them; they are among its outputs."""

RENAMED = {"label_pictures": "label_images", "text_after_picture": "text_after_image"}
"""Arguments by the names they had in version 0.1.0, and by today's."""


def refuse_renamed(names: Iterable[str], where: str = "") -> None:
    """Raise for an argument that is given by its old name."""
    for name in names:
        if name in RENAMED:
            raise ValueError(f"{where}{name} is called {RENAMED[name]} now.")


class HoVLEProcessor(ProcessorMixin):
    """Tokenizer and image processor of HoVLE in one.

    Args:
        image_processor: Cuts pictures into tiles.
        tokenizer: The language model's tokenizer, with the picture tokens `<img>`, `</img>`, `<IMG_CONTEXT>`.
        pixels_per_token_side: Side of the square of pixels that becomes one token, `patch_size x shuffle factor`; 28
            by default.
        image_seq_length: Tokens of one tile of the default size; another way to give `pixels_per_token_side`.
        chat_template: Jinja template of conversations; the tokenizer's by default.
        text_after_image: What a chat writes after each picture unless the message goes on with it; the released
            models saw a line break.
    """

    in_pipeline = False
    """Whether a pipeline loaded it, which joins prompts in batches and needs the same outputs for each."""

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        pixels_per_token_side: int | None = None,
        image_seq_length: int | None = None,
        chat_template=None,
        text_after_image: str = "",
        **unknown,
    ):
        refuse_renamed(unknown)
        if chat_template is None:
            chat_template = getattr(tokenizer, "chat_template", None)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **unknown)
        if not hasattr(tokenizer, "context_image_token"):
            known = tokenizer.get_vocab()
            missing = [token for token in IMAGE_TOKENS.values() if token not in known]
            if missing:
                raise ValueError(
                    f"The tokenizer lacks {', '.join(missing)}. Use HoVLEProcessor.from_language_model, or call "
                    "hovle.model.language_model.add_image_tokens(tokenizer) if the model has rows for them."
                )
            add_image_tokens(tokenizer)  # the ids are there already; this only gives them their names
        tokenizer.padding_side = "left"  # for direct use of the tokenizer; the processor pads so by itself
        self.start_image_token = tokenizer.start_image_token
        self.end_image_token = tokenizer.end_image_token
        self.image_token = tokenizer.context_image_token
        self.start_image_token_id = tokenizer.convert_tokens_to_ids(self.start_image_token)
        self.end_image_token_id = tokenizer.convert_tokens_to_ids(self.end_image_token)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.image_token_ids = [self.image_token_id, self.start_image_token_id, self.end_image_token_id]
        self.text_after_image = text_after_image
        self.pixels_per_token_side = self._side_from(pixels_per_token_side, image_seq_length)

    def _side_from(self, pixels_per_token_side: int | None, image_seq_length: int | None) -> int:
        tile_size = self.image_processor.tile_size
        if image_seq_length is None:
            return pixels_per_token_side or 28
        side = max(tile_size // max(round(image_seq_length**0.5), 1), 1)
        if (tile_size // side) ** 2 != image_seq_length or pixels_per_token_side not in (None, side):
            raise ValueError(
                f"image_seq_length ({image_seq_length}) does not fit tiles of {tile_size} pixels"
                + (f" with {pixels_per_token_side} pixels per token side." if pixels_per_token_side else ".")
            )
        return side

    @classmethod
    def from_language_model(
        cls,
        name_or_path: str | PreTrainedTokenizerBase,
        config: HoVLEConfig | None = None,
        *,
        min_tiles: int = 1,
        max_tiles: int = 12,
        text_after_image: str = "",
        **kwargs,
    ) -> "HoVLEProcessor":
        """Build the processor that goes with `HoVLEForConditionalGeneration.from_language_model`.

        Args:
            name_or_path: Hub id or folder of the language model's tokenizer, or the tokenizer, which then learns the
                picture tokens.
            config: Configuration of the model; it gives tile and patch size, and its `image_token_id` is checked
                against the tokenizer.
            min_tiles: Fewest tiles of a picture.
            max_tiles: Most tiles of a picture, the thumbnail not counted.
            text_after_image: What a chat writes after each picture.
            **kwargs: Without `config`, fields of `HoVLEConfig` that give the geometry (`image_size`, `patch_size`,
                `pixel_shuffle_loc`, `downsample_ratio`, `image_mean`, `image_std`); all others go to
                `AutoTokenizer.from_pretrained`.

        Raises:
            ValueError: When the tokenizer gives `<IMG_CONTEXT>` another id than the configuration.
        """
        refuse_renamed(kwargs)
        fields = {key: kwargs.pop(key) for key in list(kwargs) if key in HoVLEConfig.__dataclass_fields__}
        if config is not None and fields:
            raise ValueError(f"Give config or {', '.join(fields)}, not both.")
        if isinstance(name_or_path, PreTrainedTokenizerBase):
            if kwargs:
                raise ValueError(f"{', '.join(kwargs)}: no use beside a tokenizer that is loaded already.")
            tokenizer = name_or_path
        else:
            tokenizer = load_tokenizer(name_or_path, **kwargs)
            refuse_unknown_of_tokenizer(kwargs, tokenizer, "HoVLEProcessor.from_language_model")
        add_image_tokens(tokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        geometry = config or HoVLEConfig(**fields)
        statistics = {"image_mean": list(geometry.image_mean), "image_std": list(geometry.image_std)}
        image_processor = HoVLEImageProcessor(
            tile_size=geometry.image_size, min_tiles=min_tiles, max_tiles=max_tiles, **statistics
        )
        side = geometry.patch_size * geometry.shuffle_factor
        processor = cls(image_processor, tokenizer, side, text_after_image=text_after_image)
        if config is not None and processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"The tokenizer gives {processor.image_token} the id {processor.image_token_id}, the configuration "
                f"says image_token_id={config.image_token_id}. Build the model with the tokenizer's id."
            )
        return processor

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load from a folder or the Hub; settings given beside it replace the saved ones, unknown ones are refused."""
        loaded = super().from_pretrained(*args, **kwargs)
        if kwargs.get("_from_pipeline") is not None:
            (loaded[0] if isinstance(loaded, tuple) else loaded).in_pipeline = True
        return loaded

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs) -> list:
        """Load both parts by name; through `AutoImageProcessor`, transformers 5.16 would ask for torchvision."""
        of_images = {*HoVLEImageProcessor.valid_kwargs.__annotations__}
        own = {*inspect.signature(cls.__init__).parameters, *RENAMED} - {"chat_template"}
        of_both = {name: value for name, value in kwargs.items() if name in LOADING or name.startswith("_")}
        images_kwargs = {name: value for name, value in kwargs.items() if name in of_images}
        text_kwargs = {name: value for name, value in kwargs.items() if name not in of_images | own | OF_MODELS}
        of_both.pop("return_unused_kwargs", None)
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **{**text_kwargs, **of_both})
        if not kwargs.get("return_unused_kwargs"):
            refuse_unknown_of_tokenizer(text_kwargs, tokenizer, cls.__name__)
        image_processor = HoVLEImageProcessor.from_pretrained(
            pretrained_model_name_or_path, **{**images_kwargs, **of_both}
        )
        return [image_processor, tokenizer]

    @classmethod
    def from_args_and_dict(cls, args, processor_dict: dict[str, Any], **kwargs):
        """Build from a saved dictionary, which may be of a version with other names."""
        refuse_renamed(kwargs)
        saved = {RENAMED.get(name, name): value for name, value in processor_dict.items()}
        if saved.get("pixels_per_token_side") is not None:
            saved.pop("image_seq_length", None)  # follows from the tile size, which may be another one now
        return super().from_args_and_dict(args, saved, **kwargs)

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def image_seq_length(self) -> int:
        """Tokens of one tile of the default size."""
        return self.tokens_per_tile(self.image_processor.tile_size)

    def tokens_per_tile(self, tile_size: int) -> int:
        """Count the tokens of a square tile with this side in pixels; sizes that leave a rest raise `ValueError`."""
        return count_tile_tokens(tile_size, self.pixels_per_token_side)

    def to_dict(self) -> dict[str, Any]:
        """Serialise; `image_seq_length` is written for readers of the file."""
        saved = {name: value for name, value in super().to_dict().items() if name != "in_pipeline"}
        return {**saved, "image_seq_length": self.image_seq_length}

    def _take_for_generate(self, *given: dict, template: str = "") -> dict:
        """Take out of a call's arguments what `generate` is to have of them."""
        names = {name for arguments in given for name in OF_GENERATE & arguments.keys()} - self._known_kwargs
        names = {name for name in names if not _is_variable(name, template)}
        return {name: arguments.pop(name) for arguments in given for name in names & arguments.keys()}

    def _completed(self, batch: BatchFeature, for_generate: dict, call_kwargs: dict) -> BatchFeature:
        """Add what `generate` is to have and, in a pipeline, that there are no tiles where there are none."""
        batch.update({name: value for name, value in for_generate.items() if value is not None})
        if self.in_pipeline and "pixel_values" not in batch:
            side = self.image_processor.tile_size
            gives_bytes = self.image_processor.gives_bytes({**call_kwargs, **(call_kwargs.get("images_kwargs") or {})})
            # Joined with tiles of another dtype, bytes would pass for normalised numbers.
            batch["pixel_values"] = torch.empty(0, 3, side, side, dtype=torch.uint8 if gives_bytes else torch.float32)
        return batch

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Count placeholders and tiles of pictures from their sizes alone.

        Args:
            image_sizes: Height and width of each upright picture in pixels.
            **kwargs: Arguments of a call, for instance `max_tiles`.

        Returns:
            `num_image_tokens` with `<img>` and `</img>`, and `num_image_patches`, the tiles.
        """
        if image_sizes is None:
            return MultiModalData()
        images_kwargs = self._merge(kwargs)["images_kwargs"]
        per_tile = self.tokens_per_tile(self.image_processor.grid_settings(images_kwargs)["size"].height)
        num_tiles = [
            self.image_processor.get_number_of_image_patches(height, width, images_kwargs)
            for height, width in image_sizes
        ]
        return MultiModalData(num_image_tokens=[2 + per_tile * num for num in num_tiles], num_image_patches=num_tiles)

    def _merge(self, kwargs: dict) -> dict:
        """Sort the arguments of a call into `text_kwargs` and `images_kwargs`."""
        return self._merge_kwargs(self.valid_processor_kwargs, **kwargs)  # type: ignore[arg-type]

    def _merge_kwargs(self, *args, tokenizer_init_kwargs: dict | None = None, **kwargs) -> dict:
        self._refuse_unknown(kwargs)  # the base class drops what it does not know
        return super()._merge_kwargs(*args, tokenizer_init_kwargs=tokenizer_init_kwargs, **kwargs)

    @property
    def _known_kwargs(self) -> set[str]:
        """Names of the arguments of a call, flat or in one of the dictionaries of a part."""
        return {
            "common_kwargs",
            *self.valid_processor_kwargs.__annotations__,
            *TextKwargs.__annotations__,
            *self.image_processor.valid_kwargs.__annotations__,
        }

    def _refuse_unknown(self, kwargs: dict, template: str = "") -> None:
        """Raise for arguments that neither the processor nor its parts nor the chat template would look at."""
        nested = [kwargs.get(name) or {} for name in ("common_kwargs", "text_kwargs", "images_kwargs")]
        names = {name for arguments in (kwargs, *nested) for name in arguments} - self._known_kwargs
        names -= WITHOUT_MEANING | OF_GENERATE
        unknown = sorted(name for name in names if not _is_variable(name, template))
        if unknown:
            raise ValueError(
                f"{', '.join(unknown)}: no argument of the tokenizer or the image processor"
                + (", and no variable of the chat template." if template else ".")
            )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Write what stands in the prompt for one picture: `<img>`, a placeholder per token of its tiles, `</img>`."""
        num_tokens = self._num_placeholders(image_inputs)[image_idx]
        return f"{self.start_image_token}{self.image_token * num_tokens}{self.end_image_token}"

    def _num_placeholders(self, image_inputs: dict) -> list[int]:
        """Count the placeholders of each picture from the tiles it really has."""
        per_tile = self.tokens_per_tile(image_inputs["pixel_values"][0].shape[-1])
        return [int(num_tiles) * per_tile for num_tiles in image_inputs["num_patches"]]

    @property
    def unused_input_names(self) -> list[str]:
        """Outputs of the image processor that the model does not take."""
        return ["num_patches"]

    def spread_tiles(
        self, image_sizes: Sequence[tuple[int, int]], max_image_tokens: int, **kwargs
    ) -> tuple[list[int], list[int]]:
        """Share a budget of image tokens between the pictures of one prompt; whoever has most tiles gives way first.

        Args:
            image_sizes: Height and width of each upright picture in pixels.
            max_image_tokens: Tokens all pictures together may take, `<img>` and `</img>` included.
            **kwargs: Arguments of a call, for instance `max_tiles`.

        Returns:
            `max_tiles` for each picture, and the tokens each then takes.

        Raises:
            ValueError: When even the fewest tiles take more; pictures are never cut.
        """
        if not isinstance(max_image_tokens, Real):
            raise ValueError(f"max_image_tokens must be a number of tokens, got {max_image_tokens!r}.")
        images_kwargs = self._merge(kwargs)["images_kwargs"]
        per_tile = self.tokens_per_tile(self.image_processor.grid_settings(images_kwargs)["size"].height)
        return self.image_processor.spread_tiles(image_sizes, max_image_tokens, per_tile, images_kwargs)

    def _load_within_budget(
        self, pictures: list, counts: list[int], max_image_tokens: int, kwargs: dict
    ) -> tuple[list, list[int]]:
        """The pictures, read, and `max_tiles` of each, for a batch of prompts that hold so many pictures each."""
        pictures = self.image_processor.fetch_images(pictures)
        own = kwargs.get("tile_limits")
        limits: list[int] = []
        for count in counts:
            part = slice(len(limits), len(limits) + count)
            sizes = [(picture.height, picture.width) for picture in pictures[part]]
            given = kwargs if own is None else {**kwargs, "tile_limits": own[part]}
            limits += self.spread_tiles(sizes, max_image_tokens, **given)[0]
        return pictures, limits

    # --- rendered prompts --------------------------------------------------------------------------------------------

    def __call__(
        self, images=None, text=None, videos=None, audio=None, max_image_tokens: int | None = None, **kwargs
    ) -> BatchFeature:
        """Encode rendered prompts and their pictures.

        Args:
            images: Pictures as `load_picture` reads them, in prompt order: one, a list, or one list per prompt.
            text: One prompt or a list of prompts. Special tokens in them are parsed; one `<IMG_CONTEXT>` marks one
                picture.
            videos: Must be `None`.
            audio: Must be `None`.
            max_image_tokens: Tokens the pictures of one prompt may take together; see `spread_tiles`.
            **kwargs: `min_tiles`, `max_tiles`, `tile_size` and other arguments of the image processor; arguments of
                the tokenizer. Prompts are padded on the left as soon as `return_tensors` is given; no special tokens
                are added unless `add_special_tokens=True`.

        Returns:
            `input_ids` and `attention_mask` of shape `(B, T)`, and `pixel_values` of shape `(all tiles, 3, s, s)` if
            there are pictures.

        Raises:
            ValueError: When pictures and marks do not match, when a picture cannot be read, when `tile_size` does not
                divide into tokens, or when truncation would cut a picture out.
        """
        if videos is not None or audio is not None:
            raise ValueError("HoVLE reads pictures and text, no videos and no audio.")
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            if not all(isinstance(prompt, str) for prompt in text):
                raise ValueError("text must be a prompt or a list of prompts; messages go to apply_chat_template.")
            if not text:
                raise ValueError("text is an empty list; give at least one prompt.")
            for prompt in text:
                check_unicode(prompt)
        pictures = flatten_pictures(images)
        if text is not None:
            self._check_picture_counts(text, images, len(pictures))
        if max_image_tokens is not None and pictures:
            counts = [len(pictures)] if text is None else [prompt.count(self.image_token) for prompt in text]
            pictures, kwargs["tile_limits"] = self._load_within_budget(pictures, counts, max_image_tokens, kwargs)
        kwargs = _with_text_defaults(kwargs)
        for_generate = self._take_for_generate(kwargs)
        return self._completed(super().__call__(images=pictures or None, text=text, **kwargs), for_generate, kwargs)

    def _check_picture_counts(self, text: list[str], images: Any, num_pictures: int) -> None:
        """Compare marks and pictures, prompt by prompt where the pictures come that way."""
        num_marks = [prompt.count(self.image_token) for prompt in text]
        check_nesting(num_marks, images)
        if sum(num_marks) != num_pictures:
            raise ValueError(
                f"The prompts mark {sum(num_marks)} pictures with {self.image_token} but {num_pictures} are given."
            )

    def _check_special_mm_tokens(self, text: list[str], text_inputs: Any, modalities: list[str]) -> None:
        """Refuse ids in which truncation has cut a picture; the base class calls this after tokenising."""
        expected = [[prompt.count(token) for token in self._picture_tokens] for prompt in text]
        self._check_picture_ids(expected, text_inputs["input_ids"])

    @property
    def _picture_tokens(self) -> list[str]:
        return [self.image_token, self.start_image_token, self.end_image_token]

    def _check_picture_ids(self, expected: list[list[int]], input_ids: Any) -> None:
        for number, (counts, ids) in enumerate(zip(expected, input_ids, strict=False), start=1):
            ids = ids.tolist() if hasattr(ids, "tolist") else ids
            found = [ids.count(token_id) for token_id in self.image_token_ids]
            if found != counts:
                raise ValueError(
                    f"Truncation would cut a picture out of prompt {number}: {found[0]} of {counts[0]} image tokens "
                    "would be left. Raise max_length, or use fewer tiles (max_tiles)."
                )

    # --- chats -------------------------------------------------------------------------------------------------------

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation,
        chat_template: str | None = None,
        tools=None,
        documents=None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors=None,
        return_dict: bool = False,
        processor_kwargs: dict | None = None,
        label_images: bool = False,
        **kwargs,
    ):
        """Render conversations with the language model's chat template and, with `tokenize`, encode them.

        Args:
            conversation: A list of messages, or a list of such lists. `content` is a string or a list of items:
                `{"type": "text", "text": ...}` and `{"type": "image", KEY: ...}` with KEY `image` (anything
                `load_picture` reads), `bytes`, `url` (http, https or `data:`), `path` or `base64`; OpenAI's
                `image_url` too.
                A picture stands in the prompt exactly where its item stands, followed by `text_after_image`.
            chat_template: Another template, or the name of one of several.
            tools: As in `tokenizer.apply_chat_template`.
            documents: As in `tokenizer.apply_chat_template`.
            add_generation_prompt: End with the start of an assistant message.
            continue_final_message: Leave the last message open.
            return_assistant_tokens_mask: Not supported.
            tokenize: Return ids; without it, the prompt as a string with one `<IMG_CONTEXT>` per picture, in which
                typed special tokens are no longer told apart.
            return_tensors: "pt" or "np".
            return_dict: Return everything the model needs instead of the ids alone.
            processor_kwargs: Arguments of a call (`min_tiles`, `max_tiles`, `max_image_tokens`, `tile_size`,
                `padding`, ...) and `label_images`; `images` gives the pictures of items that carry none, in the
                items' order.
            label_images: Write "Image-1: " before the first picture of a conversation, "Image-2: " before the
                second, ..., and a line break after each, so that a question can name them.
            **kwargs: The same arguments, and variables of the template.

        Returns:
            A string (or one per conversation), ids, or a `BatchFeature` as `__call__` gives.

        Raises:
            ValueError: As in `__call__`; also for unknown items, and for picture items without a picture.
        """
        if return_assistant_tokens_mask:
            raise ValueError(
                "return_assistant_tokens_mask is not supported: compare the ids with and without the answer instead."
            )
        refuse_renamed([*kwargs, *(processor_kwargs or {})])
        template = self._resolve_template(chat_template, tools)
        processor_kwargs = dict(processor_kwargs or {})
        for_generate = self._take_for_generate(kwargs, processor_kwargs, template=template)
        call_kwargs, template_kwargs = self._split_chat_kwargs(template, kwargs)
        call_kwargs = {**call_kwargs, **processor_kwargs}
        chats, is_batched = _as_batch(conversation)
        if call_kwargs.pop("label_images", label_images):
            chats = [with_labels(chat) for chat in chats]
        prompts = self._render(
            template,
            chats,
            tools,
            documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **template_kwargs,
        )
        if not tokenize:
            texts = [prompt.text(self.image_token) for prompt in prompts]
            return texts if is_batched else texts[0]
        if return_tensors not in (None, "auto"):
            call_kwargs["return_tensors"] = return_tensors
        pictures = pictures_of(prompts, call_kwargs.pop("images", None))
        if all(prompt.is_plain for prompt in prompts):
            texts = [prompt.text(self.image_token) for prompt in prompts]
            batch = self(images=pictures or None, text=texts, **call_kwargs)
        else:
            batch = self._encode_pieces_batch(prompts, pictures, **call_kwargs)
        return self._completed(batch, for_generate, call_kwargs) if return_dict else batch["input_ids"]

    def _render(self, template: str, chats: Sequence[Sequence[dict]], tools=None, documents=None, **kwargs):
        """Render chats with characters for breaking up and marking that none of their strings contains."""
        tools = tool_schemas(tools)
        unused = unused_characters([chats, tools, documents, template, kwargs])
        renderer = ChatRenderer(self.tokenizer, template, *unused, self.text_after_image)
        return renderer.render(chats, tools, documents, **kwargs)

    def _resolve_template(self, chat_template: str | None, tools: Any) -> str:
        templates = self.chat_template if isinstance(self.chat_template, dict) else {"default": self.chat_template}
        name = "tool_use" if tools and "tool_use" in templates else "default"
        template = templates.get(chat_template or name, chat_template)
        if template is None:
            raise ValueError(
                "The tokenizer has no chat template. Pass chat_template=..., or set processor.chat_template."
            )
        return template

    def _split_chat_kwargs(self, template: str, kwargs: dict) -> tuple[dict, dict]:
        """Tell arguments of a call from variables of the template; refuse what is neither."""
        kwargs.pop("sanitize_control_tokens", None)  # always on here
        own = {name: kwargs.pop(name) for name in ("images", "max_image_tokens") if name in kwargs}
        self._refuse_unknown(kwargs, template)
        call_kwargs = {name: value for name, value in kwargs.items() if name in self._known_kwargs}
        others = {name: value for name, value in kwargs.items() if name not in call_kwargs}
        return {**own, **call_kwargs}, {name: value for name, value in others.items() if _is_variable(name, template)}

    def encode_chats(self, chats: Sequence[Sequence[dict]], num_tiles: Sequence[int], **kwargs) -> list[list[int]]:
        """Encode conversations without touching their pictures, as `apply_chat_template` would with them.

        Args:
            chats: Conversations; their picture items need no picture.
            num_tiles: Tiles of each picture of a conversation, in order; the same for all (a conversation may end
                early and use fewer).
            **kwargs: `add_generation_prompt` and variables of the template.
        """
        prompts = self._render(self._resolve_template(None, None), chats, **kwargs)
        num_placeholders = [self.image_seq_length * count for count in num_tiles]
        return [self._encode_pieces(prompt, num_placeholders) for prompt in prompts]

    # --- prompts in which special tokens were typed ------------------------------------------------------------------

    def _encode_pieces_batch(
        self, prompts: list[Prompt], pictures: list, max_image_tokens: int | None = None, **kwargs
    ) -> BatchFeature:
        """Encode prompts piece by piece, as `__call__` would if typed special tokens were ordinary words."""
        options = self._merge(_with_text_defaults(kwargs))
        text_kwargs = options["text_kwargs"]
        refused = [
            name
            for name in ("return_offsets_mapping", "return_overflowing_tokens", "return_special_tokens_mask", "stride")
            if text_kwargs.get(name)
        ]
        if refused:
            raise ValueError(f"{', '.join(refused)}: not available while a message contains special tokens as text.")
        with_type_ids = options.get("return_mm_token_type_ids") or text_kwargs.get("return_mm_token_type_ids")
        image_inputs: dict = {}
        num_placeholders: list[int] = []
        if pictures:
            if max_image_tokens is not None:
                counts = [len(prompt.pictures) for prompt in prompts]
                pictures, limits = self._load_within_budget(pictures, counts, max_image_tokens, kwargs)
                options["images_kwargs"]["tile_limits"] = limits
            image_inputs = dict(self.image_processor(pictures, **options["images_kwargs"]))
            num_placeholders = self._num_placeholders(image_inputs)
        input_ids = []
        remaining = iter(num_placeholders)
        for prompt in prompts:
            ids = self._encode_pieces(prompt, [next(remaining) for _ in prompt.pictures])
            input_ids.append(ids)
        expected = [[prompt_ids.count(token_id) for token_id in self.image_token_ids] for prompt_ids in input_ids]
        input_ids = [self._truncate(ids, text_kwargs) for ids in input_ids]
        self._check_picture_ids(expected, input_ids)
        names = ["padding", "pad_to_multiple_of", "padding_side", "return_attention_mask"]
        if text_kwargs.get("padding") == "max_length":
            names.append("max_length")
        padding = {name: text_kwargs[name] for name in names if name in text_kwargs}
        data = {**self.tokenizer.pad({"input_ids": input_ids}, **padding), **image_inputs}
        data.pop("num_patches", None)
        if with_type_ids:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        return BatchFeature(data, tensor_type=text_kwargs.get("return_tensors"))

    def _encode_pieces(self, prompt: Prompt, num_placeholders: list[int]) -> list[int]:
        """Encode the text between the template's special tokens without looking for special tokens in it."""
        special = SpecialTokens.of(self.tokenizer)
        remaining = iter(num_placeholders)
        ids: list[int] = []
        for index, piece in enumerate(prompt.pieces):
            if prompt.is_mark(index):
                ids += [self.start_image_token_id, *[self.image_token_id] * next(remaining), self.end_image_token_id]
            elif index % 2:
                ids.append(self.tokenizer.convert_tokens_to_ids(piece))
            else:
                before = prompt.pieces[index - 1] if index else None
                after = prompt.pieces[index + 1] if index + 1 < len(prompt.pieces) else None
                piece = piece.lstrip() if before in special.strip_right else piece
                piece = piece.rstrip() if after in special.strip_left else piece
                text_ids = self._encode_text(piece, at_start=index == 0)
                for name in special.names:
                    if name in piece and self.tokenizer.convert_tokens_to_ids(name) in text_ids:
                        raise ValueError(f"The tokenizer cannot encode {name} as text; take it out of the messages.")
                ids += text_ids
        return ids

    def _encode_text(self, text: str, at_start: bool) -> list[int]:
        """Encode a stretch of text in which nothing is special."""

        def encode(text: str) -> list[int]:
            return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

        if not text:
            return []
        ids = encode(text)
        if not at_start and self._needs_context:
            # This tokenizer marks the start of a string. Put something before the text that merges with nothing.
            for prefix in ("\x01", "\n"):
                prefix_ids, joint_ids = encode(prefix), encode(prefix + text)
                if joint_ids[: len(prefix_ids)] == prefix_ids:
                    ids = joint_ids[len(prefix_ids) :]
                    break
        return ids

    @cached_property
    def _needs_context(self) -> bool:
        """Whether text after a special token is encoded unlike text at the start of a string."""
        probe = "a b"
        alone = self.tokenizer(probe, add_special_tokens=False)["input_ids"]
        after = self.tokenizer(self.end_image_token + probe, add_special_tokens=False)["input_ids"]
        return after[-len(alone) :] != alone or len(after) != len(alone) + 1

    def _truncate(self, ids: list[int], text_kwargs: dict) -> list[int]:
        truncation = text_kwargs.get("truncation")
        if truncation in (None, False, "do_not_truncate"):
            return ids
        max_length = text_kwargs.get("max_length") or self.tokenizer.model_max_length
        if len(ids) <= max_length:
            return ids
        return ids[-max_length:] if self.tokenizer.truncation_side == "left" else ids[:max_length]


def _is_variable(name: str, template: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _as_batch(conversation: Any) -> tuple[list[list[dict]], bool]:
    """Return a list of chats, and whether the caller gave several."""
    conversation = getattr(conversation, "messages", conversation)
    is_batched = isinstance(conversation, list | tuple) and not any(isinstance(part, dict) for part in conversation)
    chats = [getattr(chat, "messages", chat) for chat in (conversation if is_batched else [conversation])]
    if not all(isinstance(chat, Sequence) and not isinstance(chat, str) for chat in chats):
        raise ValueError("A conversation must be a list of messages, a batch a list of conversations.")
    if not chats or not all(chats):
        raise ValueError("The conversation is empty; give at least one message.")
    for chat in chats:
        for message in chat:
            if not isinstance(message, dict):
                raise ValueError(f'A message must be {{"role": ..., "content": ...}}, got {message!r:.80}.')
    return [list(chat) for chat in chats], is_batched


def _with_text_defaults(kwargs: dict) -> dict:
    """Add the defaults of this processor where the caller, flat or nested, says nothing.

    They are passed as arguments because a tokenizer's saved settings (`padding_side`) would overrule class defaults.
    """
    said = {**kwargs, **(kwargs.get("common_kwargs") or {}), **(kwargs.get("text_kwargs") or {})}
    defaults = {**TEXT_DEFAULTS, "padding": said.get("return_tensors") is not None}
    return {**{name: value for name, value in defaults.items() if name not in said}, **kwargs}


__all__ = ["HoVLEProcessor"]
