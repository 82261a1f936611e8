"""How long models take to read a prompt and to write an answer, what that costs, and whether the tokens are right."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..inference import PrefixCache
from ..model.backbones import CACHE

CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def clock(device: torch.device, work: Callable[[], Any]) -> float:
    """Seconds that some work takes, until the device is done with it."""
    _wait(device)
    started_at = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - started_at


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def answer(model: Any, inputs: dict, num_new: int) -> torch.Tensor:
    """Greedy tokens of an answer, shape `(B, num_new)`."""
    options = {"max_new_tokens": num_new, "min_new_tokens": num_new, "do_sample": False}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def measure_in_turns(
    models: dict[str, tuple[Any, dict]], num_new: int, num_rounds: int, description: str
) -> dict[str, dict]:
    """Time all models in turns, so that what else the machine does hurts all alike; the median counts.

    Args:
        models: By name, a model and its prompt.
        num_new: Tokens of an answer, two at least.
        num_rounds: Rounds that count, after one that warms up and compiles.
        description: Shown on the progress bar.

    Returns:
        By name: seconds to the first token, seconds for each further one, tokens a second of all rows, the tokens.
    """
    first: dict[str, list[float]] = {name: [] for name in models}
    whole: dict[str, list[float]] = {name: [] for name in models}
    tokens = {}
    for number in tqdm(range(num_rounds + 1), desc=description, unit="round"):
        for name, (model, inputs) in models.items():
            seconds = clock(model.device, lambda: answer(model, inputs, 1))  # noqa: B023 - called at once
            both = clock(model.device, lambda: tokens.update({name: answer(model, inputs, num_new)}))  # noqa: B023
            if number:
                first[name].append(seconds)
                whole[name].append(both)
    found = {}
    for name, (_, inputs) in models.items():
        ttft = statistics.median(first[name])
        per_token = (statistics.median(whole[name]) - ttft) / (num_new - 1)
        found[name] = {
            "ttft_seconds": ttft,
            "seconds_per_token": per_token,
            "tokens_per_second": len(inputs["input_ids"]) / per_token,
            "tokens": tokens[name].tolist(),
        }
    return found


@torch.no_grad()
def costs(model: Any, inputs: dict) -> dict[str, int]:
    """FLOPs of reading a prompt, as torch counts its operators, and bytes of keys and values it leaves."""
    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _count_attention}) as counter:
        cache = model(**inputs, use_cache=True, logits_to_keep=1)[CACHE]
    return {
        "flops": counter.get_total_flops(),
        "kv_bytes": sum(item.nbytes for layer in cache.layers for item in (layer.keys, layer.values)),
    }


def _count_attention(query: tuple, key: tuple, *_args: Any, out_shape: Any = None, **_kwargs: Any) -> int:
    """Both products of attention, all pairs of tokens: torch has no count for what CPUs do."""
    batch_size, num_heads, length, width = query
    return 4 * batch_size * num_heads * length * key[2] * width


def bytes_per_token(model: Any) -> int:
    """Weights that are read for a token: all matrices of layers and head, not the table it is looked up in."""
    head = model.get_output_embeddings().weight
    layers = model.get_decoder().layers
    weights = [head, *(weight for weight in layers.parameters() if weight.dim() == 2)]
    return sum(weight.numel() * _element_size(weight) for weight in weights)


def _element_size(weight: torch.Tensor) -> int:
    return getattr(weight, "qdata", weight).element_size()


@torch.no_grad()
def read_bandwidth(model: Any, num_bytes: int, num_rounds: int = 3) -> float:
    """Bytes a second that can be read here: the best of a sum over a large tensor and of the model's own products.

    Args:
        model: Whose matrices are multiplied with a vector, one after the other.
        num_bytes: Size of the large tensor; 2 GiB and more do not fit any cache.
        num_rounds: Times each is tried.
    """
    device = model.device
    large = torch.ones(num_bytes // 4, device=device)
    matrices = [weight for weight in model.get_decoder().layers.parameters() if weight.dim() == 2]
    vectors = [torch.ones(matrix.shape[1], dtype=matrix.dtype, device=device) for matrix in matrices]
    swept = sum(matrix.nbytes for matrix in matrices)

    def sweep() -> None:
        for matrix, vector in zip(matrices, vectors, strict=True):
            torch.mv(matrix, vector)

    rates = [large.nbytes / clock(device, large.sum) for _ in range(num_rounds)]
    rates += [swept / clock(device, sweep) for _ in range(num_rounds)]
    return max(rates)


def second_question(model: Any, inputs: dict, other: dict, num_rounds: int) -> dict[str, float]:
    """Seconds to the first token of a question about pictures, and of another one about the same.

    Args:
        model: A HoVLE.
        inputs: Pictures and a question.
        other: The same pictures, another question.
        num_rounds: Times it is tried, each with nothing kept.

    Returns:
        Medians of both, and whether the second got the tokens it gets alone.
    """
    prefixes, options = PrefixCache(model), {"max_new_tokens": 1, "do_sample": False}
    seconds: tuple[list[float], list[float]] = ([], [])
    found = None
    for number in range(num_rounds + 1):
        prefixes.clear()
        for kept, question in zip(seconds, (inputs, other), strict=True):
            began = time.perf_counter()
            found = prefixes.generate(question, **options)
            _wait(model.device)
            if number:
                kept.append(time.perf_counter() - began)
    assert found is not None
    medians = [statistics.median(values) for values in seconds]
    return {
        "first_seconds": medians[0],
        "second_seconds": medians[1],
        "ratio": medians[1] / medians[0],
        "same_tokens": torch.equal(found, model.generate(**other, **options)),
    }
