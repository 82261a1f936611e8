"""What one step of a stage consists of, put together once: for runs, benchmarks and plans alike."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from ...model.modeling_hovle import HoVLEForConditionalGeneration
from ..config import StageConfig
from ..data.batch import PackedBatch
from ..model.adapters import add_lora, merged_state_dict
from ..model.layers import checkpoint_activations, compile_layers
from ..model.parameters import select_trainable, store_parameters
from ..model.quantization import in_full_precision, quantize_language_model
from ..objectives.base import Objective
from ..parallel import gather, local_part, reshard, wrap_data_parallel
from .optimizer import make_optimizer, set_learning_rate
from .train_step import NonFiniteLossError, RuinedWeightsError, StepResult, train_step


@dataclass(frozen=True)
class TrainableModel:
    """A model in the form in which a stage trains it."""

    model: HoVLEForConditionalGeneration
    text_table: torch.Tensor
    """The language model's input embeddings before training, shape `(V, D)`."""
    peft_model: Any
    """The `PeftModel` around it, None without adapters."""
    originals: dict[str, nn.Linear]
    """Exact maps of the language model that quantised ones stand in for, by name."""


def prepare_model(
    model: HoVLEForConditionalGeneration, config: StageConfig, dtype: torch.dtype, device: torch.device
) -> TrainableModel:
    """Freeze what the stage does not train, add its adapters and choose how weights are stored, in place.

    Args:
        model: In float32, as it starts.
        config: The stage.
        dtype: Number format of matrix products.
        device: Where quantised weights go; all others stay where they are.
    """
    text_table = model.model.input_embedding_matrix()
    select_trainable(model, config)
    peft_model = add_lora(model, config.lora) if config.lora else None
    store_parameters(model, dtype)
    originals = {}
    if config.quantize_frozen != "none":
        originals = quantize_language_model(model, config.quantize_frozen, dtype, device)
    return TrainableModel(model, text_table, peft_model, originals)


class TrainableStep:
    """A stage's step: objective, optimizer and the form in which the layers run.

    Until `distribute` is called the model is whole on every process and may be run by itself.

    Args:
        trainable: The prepared model.
        objective: Over that model; it goes to the device of the process.
        config: The stage.
        accelerator: Knows processes and device.
        dtype: Number format of matrix products.
    """

    wrapped: nn.Module
    """The objective, wrapped for data parallelism; steps go through it."""
    optimizer: torch.optim.Optimizer
    """Over the trainable parameters."""
    learning_rate: float
    """Of the last step, for parts without one of their own."""

    def __init__(
        self,
        trainable: TrainableModel,
        objective: Objective,
        config: StageConfig,
        accelerator: Any,
        dtype: torch.dtype,
    ):
        self.trainable = trainable
        self.objective: Objective = objective.to(accelerator.device).train()
        self.config = config
        self.accelerator = accelerator
        self.dtype = dtype
        if config.activation_checkpointing:
            checkpoint_activations(self.model)
        self.is_compiled = compile_layers(self.model, config.compile, accelerator.print)

    @property
    def model(self) -> HoVLEForConditionalGeneration:
        """What learns."""
        return self.trainable.model

    @property
    def autocast(self) -> torch.autocast:
        """Context in which matrix products run in the step's number format."""
        return number_format(self.accelerator.device, self.dtype)

    def distribute(self) -> Self:
        """Spread the objective over all processes and give it an optimizer (all ranks)."""
        self.wrapped = wrap_data_parallel(self.objective, self.config.sharding, self.accelerator)
        self.optimizer = make_optimizer(self.objective, self.config)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        return self

    def step(self, number: int, micro_batches: list[PackedBatch]) -> StepResult:
        """Do one optimizer step at the learning rate of its place in the schedule (all ranks).

        Args:
            number: Steps done before it.
            micro_batches: This process's share, on any device.

        Raises:
            NonFiniteLossError: As `train_step`.
            RuinedWeightsError: When that is because an update before it ruined the weights.
        """
        self.learning_rate = set_learning_rate(self.optimizer, self.peaks, self.config, number)
        try:
            return train_step(
                self.wrapped,
                self.optimizer,
                [batch.to(self.accelerator.device) for batch in micro_batches],
                self.config.max_gradient_norm,
                self.autocast,
                reduce_sum=lambda tensor: self.accelerator.reduce(tensor, "sum"),
                num_processes=self.accelerator.num_processes,
            )
        except NonFiniteLossError:
            self.refuse_ruined_weights(number)
            raise

    @torch.no_grad()
    def refuse_ruined_weights(self, num_steps: int) -> None:
        """Raise RuinedWeightsError where anything that learns holds NaN or infinity after so many steps (all ranks).

        Losses cannot tell: the last update comes after the last of them.
        """
        learns = {name: item for name, item in self.objective.named_parameters() if item.requires_grad}
        ruined = sorted({*gather([name for name, item in learns.items() if not _is_finite(local_part(item))])})
        if ruined:
            shown = ", ".join(ruined[:3]) + (f" and {len(ruined) - 3} more" if len(ruined) > 3 else "")
            raise RuinedWeightsError(
                f"After step {num_steps} {len(ruined)} of {len(learns)} tensors that learn hold NaN or infinity: "
                f"{shown}. They are not saved. Start anew with a lower learning_rate, or a smaller max_gradient_norm; "
                "the newest checkpoint, if there is one, is from before and can be its model.checkpoint."
            )

    def weights(self) -> dict[str, torch.Tensor]:
        """Plain float32 weights of the model on the main process, nothing on the others (all ranks)."""
        reshard(self.objective)
        with in_full_precision(self.model, self.trainable.originals):
            return merged_state_dict(self.model, keep=self.accelerator.is_main_process)


def _is_finite(tensor: torch.Tensor) -> bool:
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def number_format(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Reusable context in which matrix products run in a number format."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
