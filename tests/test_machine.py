"""What the machine can do is tried, not assumed."""

import os
import subprocess
import sys

import torch

from hovle.machine import fastest_dtype

ASK = "from hovle.machine import compiler_problem; print(compiler_problem())"


def test_a_compiler_that_does_not_exist_is_a_problem_told_in_one_line(tmp_path):
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() not in ("", "None")
    assert len(result.stdout.strip().splitlines()) == 1


def test_the_fastest_format_is_one_a_model_can_use():
    assert fastest_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)
