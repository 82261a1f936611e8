"""Processes and shards: what training needs to know of either, so that loop and stage need not.

With several processes each holds the whole model (`sharding: none`, DDP) or a piece of every tensor (`full`, FSDP2).
Functions marked "all ranks" talk to the other processes: all must call them, in the same order.
"""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import StopRunError

PATIENCE = timedelta(hours=1)
"""How long processes wait for one that writes a large model before they give it up for dead."""


class OneProcess:
    """What training asks of an accelerator, for a single process without a launcher.

    Args:
        device: Where it computes.
    """

    num_processes = 1
    process_index = 0
    is_main_process = True
    print = staticmethod(print)

    def __init__(self, device: torch.device):
        self.device = device

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        """The tensor itself: there is nothing to add."""
        return tensor

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model


def make_accelerator():
    """Processes and devices as the launcher set them up, on CPU where there is no CUDA device."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs  # an extra

    # Buffers hold the text table and the teacher's statistics, which never change.
    handlers = [DistributedDataParallelKwargs(broadcast_buffers=False), InitProcessGroupKwargs(timeout=PATIENCE)]
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers)
    if accelerator.distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise ValueError(
            f"accelerate is configured for {accelerator.distributed_type.value}, but the recipe decides how a model "
            "is spread: launch with torchrun or `accelerate launch --multi_gpu`, and set `sharding: full` to shard."
        )
    return accelerator


def wrap_data_parallel(objective: nn.Module, sharding: str, accelerator) -> nn.Module:
    """Replicate an objective that is on its device, or shard it over all processes."""
    if sharding == "full" and accelerator.num_processes > 1:
        _shard(objective, accelerator)
        return objective
    return accelerator.prepare_model(objective)


def _shard(objective: Any, accelerator) -> None:
    """Cut every parameter into one piece per process, in place; a decoder layer is whole only while it runs.

    torch's own call instead of accelerate's plugin, which would replicate on CPU processes without a word.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if not can_shard(accelerator.device):
        raise ValueError(
            f"sharding: full does not work on {accelerator.device.type} processes with torch {torch.__version__}; "
            "install a newer torch, or set `sharding: none`."
        )
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in objective.model.model.language_model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(objective, mesh=mesh)


def can_shard(device: torch.device) -> bool:
    """Whether this torch can shard on a device; on CPU processes 2.6 cannot."""
    return device.type != "cpu" or hasattr(torch.cpu.Stream, "record_event")


def reshard(objective: nn.Module) -> None:
    """Give up the whole tensors that a forward pass without a backward pass has left in place of the pieces."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(objective, FSDPModule):
        objective.reshard()


@contextlib.contextmanager
def unsharded(objective: nn.Module) -> Iterator[None]:
    """Hold whole what lies in no layer, so that the model runs without its objective around it (all ranks)."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(objective, FSDPModule):
        objective.unshard()
    try:
        yield
    finally:
        reshard(objective)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or the one its pieces make (all ranks)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or this process's piece of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_exchange(objective: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """Context of one micro-batch: replicas exchange gradients after the last one only.

    Shards do so every time, because nobody has room for whole gradients.
    """
    if isinstance(objective, nn.parallel.DistributedDataParallel) and not is_last:
        return objective.no_sync()
    return contextlib.nullcontext()


def optimizer_state(objective: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """State by parameter name, whole and on the CPU of the main process (all ranks)."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(objective, optimizer, options=options)  # type: ignore[return-value]


def load_optimizer_state(objective: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Put a whole state back, cut as this run is (all ranks).

    The state's tensors may be mapped files: none of them stays in use.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

    set_optimizer_state_dict(objective, optimizer, state, options=StateDictOptions(full_state_dict=True))
    for values in optimizer.state.values():
        for name, item in values.items():
            if isinstance(item, torch.Tensor) and item.device.type == "cpu":
                values[name] = item.clone()


def gather(items: list) -> list:
    """Join the lists of all processes, in the order of the processes (all ranks)."""
    from accelerate.utils import gather_object

    return gather_object(items)


@contextlib.contextmanager
def fail_on_all_ranks() -> Iterator[None]:
    """Let an error in this block end every process (all ranks), instead of leaving the others to wait for one."""
    from accelerate import PartialState
    from accelerate.utils import reduce

    error = None
    try:
        yield
    except Exception as caught:  # whatever it is, the others must hear of it
        error = caught
    num_failed = reduce(torch.tensor(int(error is not None), device=PartialState().device), "sum")
    if not num_failed:  # a single number, so that it may be asked in every step
        return
    problems = gather([_describe(error)])
    if error is not None:
        raise error
    raise StopRunError(
        next(f"Process {rank}: {problem}" for rank, problem in enumerate(problems) if problem is not None)
    )


def _describe(error: Exception | None) -> str | None:
    is_told = isinstance(error, ValueError | OSError | StopRunError)  # the others' messages seldom stand alone
    return None if error is None else str(error) if is_told else f"{type(error).__name__}: {error}"
