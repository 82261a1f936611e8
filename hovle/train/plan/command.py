"""Predict memory, speed, hours and cost of training stages before they run.

examples:
  hovle plan demo/distillation demo/alignment demo/instruction_tuning --gpu cpu
  hovle plan hovle-2.6b/distillation hovle-2.6b/alignment hovle-2.6b/instruction_tuning --gpu A100-80G --count 64
  hovle plan my_stage.yaml --gpu RTX-4090-24G rows_per_batch=2 expected.tiles_per_sample=4
  hovle plan my_stage.yaml --check          a few steps with random weights on this CPU: prediction beside measurement

Only configs are read: no weights, no data. What a sample holds is taken from the recipe's `expected` (tiles, text
tokens, supervised tokens); operations and memory follow from shapes (hovle/train/plan/cost.py). Hours assume a share
of the device's peak (--mfu), cost a price (--price): both are printed, and yours are better. `--gpu cpu` measures this
machine's rates first. A stage that starts from a checkpoint that does not exist yet takes its model from the recipe
that will write it: one named before it, or one in the same folder.
"""

import argparse
import bisect
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from tabulate import tabulate

from ...errors import foreign_errors
from ...files.documents import parse_json
from ...machine.speed import choose_dtype, dtype_name
from ...model.configuration_hovle import HoVLEConfig
from ..config import OVERRIDE, StageConfig, find_recipe, load_stage
from ..model.start import with_shipped_model
from .cost import ADAM_BYTES, Memory, StageCost, Workload
from .devices import GIB, GPUS, Device, choose_device, cpu_slack_ratio
from .shapes import model_config, sibling_stages

TOLERANCE = 0.15
"""Largest relative error of a prediction that `--check` accepts."""


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """What one stage needs."""

    name: str
    num_parameters: int
    num_trainable: int
    dtype: str
    workload: Workload
    """One micro-batch of one process."""
    filled_ratio: float
    micro_batches: int
    """Per step."""
    num_steps: int
    count: int
    """Devices."""
    flops: dict[str, float]
    """Of one micro-batch on one device, by part."""
    memory: Memory
    peak_gib: float
    """On one device, with what is held beside tensors."""
    slack_ratio: float
    """Share of the tensors' memory in it that fragmentation takes."""
    largest_rows_per_batch: int
    """0 where not even one row fits."""
    step_seconds: float
    dollars_per_hour: float

    @property
    def samples_per_step(self) -> float:
        """On all devices."""
        return self.workload.num_samples * self.micro_batches * self.count

    @property
    def tokens_per_second(self) -> float:
        """On all devices, without padding, as a run logs them."""
        tokens = self.workload.num_tokens * self.filled_ratio * self.micro_batches * self.count
        return tokens / self.step_seconds

    @property
    def flops_per_step(self) -> float:
        """On all devices."""
        return sum(self.flops.values()) * self.micro_batches * self.count

    @property
    def hours(self) -> float:
        """Of the whole stage."""
        return self.num_steps * self.step_seconds / 3600

    @property
    def dollars(self) -> float:
        """Of the whole stage on all devices."""
        return self.hours * self.count * self.dollars_per_hour

    def to_dict(self) -> dict:
        """Everything as plain values, derived ones included."""
        derived = {
            name: getattr(self, name)
            for name in ("samples_per_step", "tokens_per_second", "flops_per_step", "hours", "dollars")
        }
        total = {"total_samples": self.samples_per_step * self.num_steps, "total_flops": self.total_flops}
        return dataclasses.asdict(self) | derived | total

    @property
    def total_flops(self) -> float:
        """Operations of the whole stage."""
        return self.flops_per_step * self.num_steps


def plan_stage(name: str, config: StageConfig, model: HoVLEConfig, device: Device, count: int = 1) -> StagePlan:
    """Predict one stage.

    Args:
        name: What tables call it.
        config: The stage.
        model: Its model.
        device: What it runs on.
        count: How many of them, each with one process.
    """
    work, dtype = Workload.expected(config, model), planned_dtype(config, device)
    if device.is_cpu:
        device = dataclasses.replace(device, slack_ratio=cpu_slack_ratio(config))
    with foreign_errors(f"{name}: what a {model.text_config.model_type} takes cannot be predicted"):
        cost = StageCost(config, model, dtype)
        flops, memory = cost.flops(work), cost.memory(work, count, device.is_cpu)
    compute_seconds = sum(flops.values()) / (device.flops_per_second * device.mfu)
    optimizer_seconds = ADAM_BYTES * memory.optimizer / 8 / device.bytes_per_second
    largest = _largest_rows(cost, work, device, count)
    return StagePlan(
        name=name,
        num_parameters=cost.num_parameters,
        num_trainable=cost.num_trainable,
        dtype=dtype_name(cost.dtype),
        workload=work,
        filled_ratio=work.num_filled / work.num_tokens,
        micro_batches=config.gradient_accumulation_steps,
        num_steps=config.num_steps,
        count=count,
        flops=flops,
        memory=memory,
        peak_gib=_peak_gib(memory, device),
        slack_ratio=device.slack_ratio,
        largest_rows_per_batch=min(largest, 1) if model.pixel_shuffle_loc == "post" else largest,
        step_seconds=config.gradient_accumulation_steps * compute_seconds + optimizer_seconds,
        dollars_per_hour=device.dollars_per_hour,
    )


def _peak_gib(memory: Memory, device: Device) -> float:
    return memory.peak / GIB * (1 + device.slack_ratio) + device.process_gib


def _largest_rows(cost: StageCost, work: Workload, device: Device, count: int) -> int:
    """Most rows of a micro-batch that fit on a device, up to 1024; 0 for none."""
    return bisect.bisect_right(
        range(1, 1025),
        device.memory_gib,
        key=lambda num_rows: _peak_gib(cost.memory(work.with_rows(num_rows), count, device.is_cpu), device),
    )


def planned_dtype(config: StageConfig, device: Device) -> torch.dtype:
    """Number format of a stage on a device; ValueError for one whose peak the table does not have."""
    if device in GPUS.values():
        if config.dtype == "float32":
            raise ValueError("The table of GPUs holds rates of bfloat16 only: plan with dtype=bfloat16, or --gpu cpu.")
        return torch.bfloat16
    return choose_dtype(config.dtype, torch.device("cpu"))


# Command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command line of `hovle plan`."""
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="CONFIG | key=value",
        help="recipes, in order; fields to replace in all of them",
    )
    parser.add_argument("--gpu", default="H100-80G", metavar="NAME", help="a GPU of the table below, or cpu")
    parser.add_argument("--count", type=int, default=1, help="devices, each with one process (default: 1)")
    parser.add_argument("--mfu", type=float, help="share of the peak that training reaches, for instance 0.4")
    parser.add_argument("--price", type=float, help="dollars per hour of one device")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--check",
        action="store_true",
        help="take a few real steps with random weights and data on this CPU and print prediction beside measurement",
    )
    parser.epilog = "GPUs (prices are assumptions):\n" + _gpu_table()


def run(args: argparse.Namespace) -> int:
    """Print the plan; with `--check` exit code 1 where a prediction is further off than `TOLERANCE`."""
    stages = read_stages(args.arguments)
    if args.check:
        return check_stages(stages, as_json=args.json)
    dtype = choose_dtype(stages[0][1].dtype, torch.device("cpu")) if args.gpu == "cpu" else torch.bfloat16
    device = choose_device(args.gpu, dtype, args.mfu, args.price)
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}.")
    plans = [plan_stage(*stage, device, args.count) for stage in stages]
    text = json.dumps([plan.to_dict() for plan in plans], indent=1) if args.json else report(plans, args.gpu, device)
    print(text)  # noqa: T201 - this is the command's output
    return 0


def read_stages(arguments: Sequence[str]) -> list[tuple[str, StageConfig, HoVLEConfig]]:
    """Name, stage and model of every recipe on a command line; its `key=value` arguments change all of them."""
    overrides = [argument for argument in arguments if OVERRIDE.match(argument)]
    names = [argument for argument in arguments if argument not in overrides]
    if not names:
        raise ValueError("Name at least one recipe.")
    stages = [with_shipped_model(load_stage(name, overrides)) for name in names]
    for name, stage in zip(names, stages, strict=True):
        if not stage.num_steps:
            raise ValueError(
                f"{name} says num_epochs, and a plan reads no data to count the steps: add num_steps=N for it; `hovle "
                "train --dry-run` counts them."
            )
    named = []
    for number, (name, stage) in enumerate(zip(names, stages, strict=True)):
        others = [*reversed(stages[:number]), *sibling_stages(find_recipe(name), overrides)]
        named.append((name.removesuffix(".yaml"), stage, model_config(stage, others)))
    return named


def report(plans: Sequence[StagePlan], name: str, device: Device) -> str:
    """A plan for people: assumptions, one line a stage, then what each stage's operations and memory are."""
    count = plans[0].count
    measured = "measured" if name == "cpu" else "makers' figures"
    lost = " or ".join(f"{ratio:.0%}" for ratio in sorted({plan.slack_ratio for plan in plans}))
    lines = [
        f"{count} x {name}: {device.flops_per_second / 1e12:,.1f} TFLOP/s in {plans[0].dtype}, "
        f"{device.memory_gib:.0f} GiB, {device.bytes_per_second / 1e9:,.0f} GB/s each ({measured})",
        f"assumed: {device.mfu:.0%} of the peak reached (--mfu), ${device.dollars_per_hour:.2f} per hour and device "
        f"(--price), uncompiled layers, {device.process_gib:.1f} GiB beside tensors and {lost} lost",
        "",
    ]
    rows: list[tuple[str, ...]] = [
        ("stage", "GiB each", "rows/batch", "fit", "samples/step", "steps", "tokens/s", "FLOP", "hours", "cost")
    ]
    rows += [_row(plan) for plan in plans]
    if len(plans) > 1:
        total, flops, dollars = (
            sum(getattr(plan, field) for plan in plans) for field in ("hours", "total_flops", "dollars")
        )
        rows.append(("total", "", "", "", "", "", "", f"{flops:.2e}", f"{total:,.1f}", f"${dollars:,.0f}"))
    lines.append(_aligned(rows))
    for plan in plans:
        lines += ["", *_details(plan, device)]
    return "\n".join(lines)


def _row(plan: StagePlan) -> tuple[str, ...]:
    return (
        plan.name,
        f"{plan.peak_gib:.1f}",
        str(plan.workload.num_rows),
        str(plan.largest_rows_per_batch),
        f"{plan.samples_per_step:,.0f}",
        f"{plan.num_steps:,}",
        f"{plan.tokens_per_second:,.0f}",
        f"{plan.total_flops:.2e}",
        f"{plan.hours:,.1f}",
        f"${plan.dollars:,.0f}",
    )


def _details(plan: StagePlan, device: Device) -> list[str]:
    work, memory = plan.workload, plan.memory
    total = sum(plan.flops.values())
    shares = ", ".join(f"{name} {count / total:.0%}" for name, count in plan.flops.items())
    held = {
        "weights": memory.weights,
        "joined shards": memory.joined,
        "teacher and its text table": memory.teacher,
        "optimizer": memory.optimizer,
        "gradients": sum(memory.gradients),
        "activations": sum(memory.activations),
        "working": max(memory.working),
    }
    lines = [
        f"{plan.name}: {plan.num_trainable / 1e6:,.1f} M of {plan.num_parameters / 1e6:,.1f} M parameters learn",
        f"  one batch   {work.num_samples:,.1f} samples in {work.num_rows} rows of {work.row_length} tokens, "
        f"{work.num_tiles:,.1f} tiles, {work.num_supervised:,.0f} supervised tokens (as the recipe expects)",
        f"  operations  {total:.2e} a batch on one device: {shares}",
        "  memory GiB  " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in held.items() if size),
    ]
    if plan.peak_gib > device.memory_gib:
        fits = plan.largest_rows_per_batch
        advice = f"rows_per_batch={fits}" if fits else "activation_checkpointing, sharding, shorter rows or lora"
        lines.append(f"  DOES NOT FIT into {device.memory_gib:.0f} GiB: try {advice}")
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of them heads, as text: names on the left, figures at the right of their columns."""
    sides = ["left", *["right"] * (len(rows[0]) - 1)]
    return tabulate(rows, tablefmt="plain", disable_numparse=True, colalign=sides)


def _gpu_table() -> str:
    rows = [("name", "GiB", "TFLOP/s dense bfloat16", "GB/s", "$/hour")]
    rows += [
        (
            name,
            f"{device.memory_gib:.0f}",
            f"{device.flops_per_second / 1e12:.0f}",
            f"{device.bytes_per_second / 1e9:.0f}",
            f"{device.dollars_per_hour:.2f}",
        )
        for name, device in GPUS.items()
    ]
    return _aligned(rows)


# Prediction against measurement


def check_stages(stages: Sequence[tuple[str, StageConfig, HoVLEConfig]], as_json: bool = False) -> int:
    """Take steps of every stage in its own process and print prediction beside measurement; 1 if any is far off."""
    results = [{"stage": name, **check_stage(config, model)} for name, config, model in stages]
    if as_json:
        print(json.dumps(results, indent=1))  # noqa: T201 - this is the command's output
    else:
        rows = [("stage", "dtype", "", "predicted", "measured", "ratio")]
        for result in results:
            for label, key, unit in (("TFLOP a batch", "flops", 1e12), ("peak GiB", "peak_bytes", GIB)):
                predicted, measured = result["predicted"][key], result["measured"][key]
                cells = (f"{predicted / unit:.3f}", f"{measured / unit:.3f}", f"{predicted / measured:.3f}")
                rows.append((result["stage"], result["dtype"], label, *cells))
        print(_aligned(rows))  # noqa: T201 - this is the command's output
    return int(any(abs(error) > TOLERANCE for result in results for error in result["errors"].values()))


def check_stage(config: StageConfig, model: HoVLEConfig) -> dict:
    """Predicted and measured operations of one micro-batch and peak memory of a process on this CPU.

    What the process holds before it has a model is measured, the rest predicted.
    """
    dtype = choose_dtype(config.dtype, torch.device("cpu"))
    measured = _measure_in_own_process(config, model, dtype)
    work = Workload(**measured["workload"])
    cost = StageCost(config, model, dtype)
    predicted = {
        "flops": sum(cost.flops(work).values()),
        "peak_bytes": cost.memory(work, on_cpu=True).peak * (1 + cpu_slack_ratio(config)) + measured["process_bytes"],
    }
    errors = {key: value / measured[key] - 1 for key, value in predicted.items()}
    return {"dtype": dtype_name(dtype), "predicted": predicted, "measured": measured, "errors": errors}


def _measure_in_own_process(config: StageConfig, model: HoVLEConfig, dtype: torch.dtype) -> dict:
    with tempfile.TemporaryDirectory(prefix="hovle-plan-") as folder:
        (Path(folder) / "recipe.yaml").write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
        (Path(folder) / "config.json").write_text(model.to_json_string(use_diff=False), encoding="utf-8")
        command = [sys.executable, "-m", "hovle.train.plan.random_step", folder, dtype_name(dtype)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = result.stderr.strip().splitlines() or [f"exit code {result.returncode}; out of memory?"]
        raise ValueError(f"The steps to check the plan with stopped: {reason[-1]}")
    return parse_json(result.stdout.splitlines()[-1], "what the steps to check the plan with said")
