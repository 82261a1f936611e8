"""What cannot work is refused in one line before data are opened and weights loaded."""

import json
import shutil
from pathlib import Path

import pytest

from hovle.cli import main
from hovle.train import run_stage


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """`refused(config, match)`: the stage ends with this message before its data are opened, and leaves nothing."""
    monkeypatch.setattr("hovle.train.run.stage.open_mixture", lambda *_: pytest.fail("the data were opened"))

    def run(config, match: str) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            run_stage(config)
        assert len(str(caught.value).splitlines()) == 1
        assert not (tmp_path / "run").exists()

    return run


def quantized(folder: str, target: Path, settings: dict, inside: str | None = None) -> str:
    """A copy of a model folder whose config says that its weights are quantised."""
    copy = Path(shutil.copytree(folder, target))
    config = json.loads((copy / "config.json").read_text())
    (config[inside] if inside else config)["quantization_config"] = settings
    (copy / "config.json").write_text(json.dumps(config))
    return str(copy)


FORMS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "gptq": {"quant_method": "gptq", "bits": 4},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lora", [(), ("trainable=[]", "lora.rank=2")], ids=["full", "lora"])
def test_a_quantised_folder_is_no_start(
    form, lora, refused, next_token_config, checkpoints, language_models, tmp_path
):
    message = rf"the weights of \S+ are quantised \({form}\), .* Name the model they were made of"
    folder = quantized(checkpoints["tied"], tmp_path / "hovle", FORMS[form])
    refused(next_token_config(f"model.checkpoint={folder}", *lora), "model.checkpoint: " + message)
    inside = quantized(checkpoints["tied"], tmp_path / "inside", FORMS[form], "text_config")
    refused(next_token_config(f"model.checkpoint={inside}", *lora), "model.checkpoint: " + message)
    bare = quantized(language_models["tied"], tmp_path / "bare", FORMS[form])
    changes = ("model.checkpoint=null", f"model.language_model={bare}", *lora)
    refused(next_token_config(*changes), "model.language_model: " + message)


def test_a_misspelt_teacher_is_no_start(refused, distillation_config):
    config = distillation_config("teacher.name=test_efficentnet")
    refused(config, r"teacher.name: timm knows no model 'test_efficentnet'; did you mean test_efficientnet, ")
    wrong_tag = distillation_config("teacher.name=resnet18.no_such_weights", "teacher.checkpoint=null")
    refused(wrong_tag, r"timm cannot load resnet18.no_such_weights, whose weights teacher.checkpoint may name: ")


def test_a_teacher_of_the_hub_is_no_start_offline(refused, distillation_config, offline):
    config = distillation_config("teacher.name=resnet18.a1_in1k", "teacher.checkpoint=null")
    refused(config, r"timm cannot load resnet18.a1_in1k, whose weights teacher.checkpoint may name: ")


def test_retention_without_anything_to_compare_with_is_no_start(refused, next_token_config, language_models):
    size = ("retention.num_tokens=64", "retention.window=32")
    refused(next_token_config(*size), r"does not record the bare .* Name the model as retention\.language_model")
    missing = next_token_config(*size, "retention.language_model=./nowhere")
    refused(missing, r"No model in \./nowhere, as there is no such folder")


def test_a_missing_package_is_told_before_anything_is_read(next_token_config, tmp_path, monkeypatch, capsys):
    next_token_config()
    monkeypatch.setattr("hovle.train.run.stage.open_mixture", lambda *_: pytest.fail("the data were opened"))
    for package, change in (("peft", "lora.rank=2"), ("bitsandbytes", "quantize_frozen=int4")):
        with monkeypatch.context() as patch:
            patch.setattr("hovle.train.run.start.installed_version", lambda name, gone=package: name != gone or None)
            assert main(["train", str(tmp_path / "next_token.yaml"), change]) == 1
        assert f"needs {package}: pip install 'hovle[" in capsys.readouterr().err
