"""What `from_pretrained` of processor, image processor and tokenizer takes, so that a misspelt argument is refused.

transformers ignores what it does not know, and keeps it in the tokenizer's settings.
"""

import difflib
import inspect
from collections.abc import Collection, Iterable

from transformers import PreTrainedTokenizerBase

LOADING = {
    *("cache_dir", "force_download", "local_files_only", "token", "revision", "code_revision", "subfolder", "proxies"),
    *("trust_remote_code", "use_auth_token", "resume_download", "return_unused_kwargs", "image_processor_filename"),
    *("use_fast", "backend", "config"),
}
"""Where a folder is and how it is read."""

OF_MODELS = {
    *("device", "device_map", "dtype", "torch_dtype", "attn_implementation", "quantization_config", "max_memory"),
    *("low_cpu_mem_usage", "offload_folder", "load_in_4bit", "load_in_8bit", "use_safetensors", "variant"),
}
"""What pipelines, servers and harnesses hand to every part of a checkpoint, though only its model looks at it."""

OF_TOKENIZERS = {
    *(
        "model_max_length",
        "max_len",
        "padding_side",
        "truncation_side",
        "model_input_names",
        "name_or_path",
        "verbose",
    ),
    *("clean_up_tokenization_spaces", "split_special_tokens", "chat_template", "additional_special_tokens"),
    *("extra_special_tokens", "model_specific_special_tokens", "response_template", "response_schema", "from_slow"),
    *("chat_control_tokens", "legacy", "tokenizer_type", "tokenizer_file", "gguf_file", "mistral_format", "errors"),
    *("fix_mistral_regex", "added_tokens_decoder", "add_bos_token", "add_eos_token", "add_prefix_space"),
    *("spaces_between_special_tokens", "verbose"),
}

IN_FILES = {"image_processor_type", "processor_class", "feature_extractor_type", "auto_map", "_valid_processor_keys"}
"""Names in the file of an image processor that say what the file is."""


def tokenizer_arguments(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Names a tokenizer of this class takes when it is loaded, those of its special tokens aside (`..._token`)."""
    inits = [vars(kind)["__init__"] for kind in type(tokenizer).__mro__ if "__init__" in vars(kind)]
    names = {name for init in inits for name in inspect.signature(init).parameters}
    return OF_TOKENIZERS | names - {"self", "args", "kwargs"}


def refuse_unknown_of_tokenizer(names: Iterable[str], tokenizer: PreTrainedTokenizerBase, what: str) -> None:
    """Raise ValueError for names that a tokenizer of this class does not look at."""
    names = [name for name in names if not name.endswith("_token")]
    refuse_unknown(names, LOADING | OF_MODELS | tokenizer_arguments(tokenizer), what)


def refuse_unknown(names: Iterable[str], known: Collection[str], what: str) -> None:
    """Raise ValueError for names that nothing looks at, with what may have been meant.

    Args:
        names: What the caller gave.
        known: What is looked at; names that begin with `_` are transformers' own.
        what: What was to take them, for the message.
    """
    unknown = sorted(name for name in names if name not in known and not name.startswith("_"))
    if unknown:
        meant = {near for name in unknown for near in difflib.get_close_matches(name, known, 2)}
        advice = f"did you mean {' or '.join(sorted(meant))}?" if meant else "leave it out."
        raise ValueError(
            f"{', '.join(unknown)}: no argument of {what}; {advice} Pictures are bounded by tile_size, min_tiles and "
            "max_tiles."
        )
