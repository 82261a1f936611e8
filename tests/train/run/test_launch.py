"""Files that start runs on many GPUs: they parse, and the commands in them exist."""

import re
import shlex
import subprocess

import pytest
import yaml
from places import ROOT

from hovle.cli import main
from hovle.train.config import find_recipe

LAUNCH = ROOT / "train" / "launch"

SKY_KEYS = {"name", "num_nodes", "resources", "workdir", "envs", "secrets", "file_mounts", "setup", "run"}
"""Top-level fields of a SkyPilot task."""


def command_of(script: str) -> list[str]:
    """Words of the one torchrun call of a shell script, variables as they stand."""
    joined = script.replace("\\\n", " ")
    [line] = [line for line in joined.splitlines() if "torchrun" in line and not line.lstrip().startswith("#")]
    words = shlex.split(line)
    return words[next(place for place, word in enumerate(words) if word.endswith("torchrun")) + 1 :]


def scripts() -> dict[str, str]:
    return {
        "slurm": (LAUNCH / "8nodes.sbatch").read_text(),
        "sky": yaml.safe_load((LAUNCH / "sky.yaml").read_text())["run"],
    }


@pytest.mark.parametrize("name", scripts())
def test_scripts_are_valid_shell(name, tmp_path):
    path = tmp_path / "script.sh"
    path.write_text(scripts()[name])
    result = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", scripts())
def test_torchrun_understands_its_options_and_starts_our_module(name):
    from torch.distributed.run import get_args_parser

    words = [re.sub(r"\$\w+", "8", word) for word in command_of(scripts()[name])]
    args = get_args_parser().parse_args(words)
    assert args.module
    assert args.training_script == "hovle.train"
    assert (args.nnodes, str(args.nproc_per_node)) == ("8", "8")


def test_the_sky_task_has_known_fields_and_a_recipe_that_exists():
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    assert set(task) <= SKY_KEYS
    assert set(task["resources"]) <= {"accelerators", "disk_size", "use_spot"}
    assert find_recipe(task["envs"]["RECIPE"]).is_file()
    assert re.fullmatch(r"[A-Z0-9-]+:8", task["resources"]["accelerators"].replace("GB", ""))


def test_the_slurm_script_asks_for_what_it_uses():
    script = (LAUNCH / "8nodes.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", script, flags=re.MULTILINE))
    assert (options["nodes"], options["gpus-per-node"], options["ntasks-per-node"]) == ("8", "8", "1")


def test_without_a_recipe_the_slurm_script_explains_itself():
    result = subprocess.run(
        ["bash", str(LAUNCH / "8nodes.sbatch")], capture_output=True, text=True, check=False, cwd=LAUNCH
    )
    assert result.returncode == 2
    assert "usage: sbatch" in result.stderr


def test_accelerate_reads_its_config():
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(LAUNCH / "8gpu.yaml"))
    assert config.num_processes == 8
    assert str(config.distributed_type) in ("MULTI_GPU", "DistributedType.MULTI_GPU")


def test_recipes_named_in_comments_exist_and_our_options_are_real(capsys):
    for path in LAUNCH.iterdir():
        names = re.findall(r"[a-z0-9.-]+/(?:distillation|alignment|instruction_tuning)\b", path.read_text())
        assert names, path
        assert all(find_recipe(name).is_file() for name in names)
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "--resume" in capsys.readouterr().out
