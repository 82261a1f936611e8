"""Does the next stage start with the very model the previous one ended with? A probe of logits tells."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..data.batch import PackedBatch
from ..data.tiles import PixelNormalization

HANDOFF_PROBE = "handoff_probe.tensors"
"""A safetensors file by another name: engines such as vLLM take whatever ends in `.safetensors` for weights."""


@torch.no_grad()
def make_probe(
    model: HoVLEForConditionalGeneration, batch: PackedBatch, normalize: PixelNormalization
) -> dict[str, torch.Tensor]:
    """Record what a trained model says of the start of a batch, for the next stage to compare itself with.

    Args:
        model: In float32.
        batch: A packed batch on the CPU.
        normalize: What makes its tiles the model's pixels.

    Returns:
        What the model receives of the batch's first row without its padding, with `logits` in float32 and without a
        compiler: behind the last picture, where pictures show, and at the end.
    """
    length = int(batch.is_sample[0].sum())
    input_ids = batch.input_ids[:1, :length].clone()
    tokens_per_tile = model.config.tokens_per_tile(batch.pixel_values.shape[-1])
    num_tiles = int((input_ids == model.config.image_token_id).sum()) // tokens_per_tile
    probe = {
        "input_ids": input_ids,
        "position_ids": batch.position_ids[:1, :length].clone(),
        "pixel_values": normalize(batch.pixel_values[:num_tiles]).contiguous(),
    }
    if batch.attention_mask is not None:
        probe["attention_mask"] = batch.attention_mask[:1, :, :length, :length].clone()
    is_image = input_ids[0] == model.config.image_token_id
    behind_picture = int(is_image.nonzero().max()) + 1 if is_image.any() else 0
    starts = range(behind_picture, min(behind_picture + 4, length))
    probe["logits_to_keep"] = torch.tensor(sorted({*starts, *range(max(0, length - 4), length)}))
    probe["logits"] = probe_logits(model, probe)
    return probe


def write_probe(folder: Path, probe: dict[str, torch.Tensor]) -> None:
    """Save a probe beside the weights it was made with."""
    save_file(probe, folder / HANDOFF_PROBE)


@torch.no_grad()
def probe_logits(model: HoVLEForConditionalGeneration, probe: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits of a probe's prompt where it says so, shape `(1, up to 8, V)`, float32; older probes keep the last 8."""
    was_training = model.training
    model.eval()
    inputs: dict = {name: tensor.to(model.device) for name, tensor in probe.items() if name != "logits"}
    with torch.compiler.set_stance("force_eager"):
        outputs = model(**{"logits_to_keep": 8, **inputs}, use_cache=False)
    model.train(was_training)
    return outputs.logits.float().cpu()


def check_handoff(model: HoVLEForConditionalGeneration, checkpoint: Path, tolerance: float = 1e-3) -> float | None:
    """Compare a loaded model with what it said when its stage ended.

    Returns:
        Largest difference relative to the largest magnitude, or None when the folder holds no probe.

    Raises:
        ValueError: When the difference exceeds `tolerance`: the stage would start from other weights than it should.
    """
    path = checkpoint / HANDOFF_PROBE
    if not path.is_file():
        return None
    probe = load_file(path)
    expected = probe["logits"]
    found = probe_logits(model, probe)
    difference = float((found - expected).abs().max() / expected.abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"Hand-off check failed: the model loaded from {checkpoint} differs from the one its stage ended with by "
            f"{difference:.2e} of the largest output (allowed {tolerance:.0e}). Its files are damaged or changed."
        )
    return difference
