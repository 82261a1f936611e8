"""What the machine can do is tried, not assumed."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from hovle.machine import speed
from hovle.machine.facts import compiler_problem
from hovle.machine.speed import Stopwatch, gemm_peak

ASK = "from hovle.machine.facts import compiler_problem; print(compiler_problem())"


def test_a_compiler_that_does_not_exist_is_a_problem_told_in_one_line(tmp_path):
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() not in ("", "None")
    assert len(result.stdout.strip().splitlines()) == 1


def test_compiling_is_tried_on_the_device_that_will_compile(monkeypatch):
    tried = []

    def compile_nothing(function, **kwargs):
        return lambda values: tried.append(values.device.type)

    monkeypatch.setattr(torch, "compile", compile_nothing)
    for device in ("cpu", "meta"):
        assert compiler_problem(torch.device(device)) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert compiler_problem() is None
    assert tried == ["cpu", "meta", "cpu"]
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda size, device: asked.append(device.type) or torch.zeros(size))
    assert compiler_problem() is None
    assert asked == ["cuda"]


KEEP = """
import resource, torch
from hovle.machine.memory import keep_freed_memory

def faults():
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

assert not keep_freed_memory(torch.device("meta"))
asked_anew = faults()
print(keep_freed_memory(torch.device("cpu")), faults() < asked_anew / 4)
"""


def test_freed_memory_that_is_kept_is_not_asked_for_again():
    result = subprocess.run([sys.executable, "-c", KEEP], capture_output=True, text=True, check=True)
    is_glibc = platform.libc_ver()[0] == "glibc"
    assert result.stdout.split() == [str(is_glibc), str(is_glibc)]


def test_the_peak_counts_multiply_adds_as_two_operations(monkeypatch):
    measured = {}

    def half_a_second(dtype, sizes, device):
        measured.update(dtype=dtype, sizes=sizes, device=device)
        return 0.5

    with monkeypatch.context() as patch:
        patch.setattr(speed, "_matmul_seconds", half_a_second)
        peak = gemm_peak(100, nn.Linear(30, 20), torch.bfloat16, torch.device("cpu"))
    assert measured == {"dtype": torch.bfloat16, "sizes": (100, 30, 20), "device": torch.device("cpu")}
    assert peak == 2 * 100 * 30 * 20 / 0.5
    assert 1e8 < gemm_peak(256, nn.Linear(256, 256), torch.float32, torch.device("cpu")) < 1e15


def test_a_stopwatch_adds_up_and_starts_anew(monkeypatch):
    clock = iter([1.0, 3.0, 10.0, 10.5, 20.0, 21.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    stopwatch = Stopwatch()
    for _ in range(2):
        with stopwatch:
            pass
    assert stopwatch.read() == 2.5
    assert stopwatch.read() == 0
    with stopwatch:
        pass
    assert stopwatch.read() == pytest.approx(1)
