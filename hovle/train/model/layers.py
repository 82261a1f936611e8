"""How the decoder layers run in training: compiled, and again in the backward pass instead of remembered."""

from collections.abc import Callable

from ...machine.facts import compiler_problem
from ...model.modeling_hovle import HoVLEForConditionalGeneration


def checkpoint_activations(model: HoVLEForConditionalGeneration) -> None:
    """Let each decoder layer run again in the backward pass instead of keeping what it computed."""
    # transformers 5.23 renamed it; the old name goes away in 6.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # It also lets what enters the first layer require a gradient, which only re-entrant checkpoints need: gradients
    # would be computed through frozen layers that nothing before needs.
    model.disable_input_require_grads()


def compile_layers(model: HoVLEForConditionalGeneration, mode: str, say: Callable[[str], object] = print) -> bool:
    """Compile the decoder layers, which share one graph; `auto` runs eager, and says so, where that is impossible."""
    if mode == "off":
        return False
    problem = compiler_problem(model.device)
    if problem is not None:
        if mode == "on":
            raise ValueError(f"compile is on, but torch.compile does not work here: {problem}")
        say(f"Decoder layers run uncompiled, which is slower: torch.compile does not work here ({problem}).")
        return False
    if model.device.type == "cpu":
        # The fused CPU attention has a slow backward pass; spelt out, the compiler fuses all but its matrix products.
        model.set_attn_implementation("eager")
    for layer in model.model.language_model.layers:
        layer.compile()
    return True
