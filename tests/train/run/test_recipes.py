"""Shipped recipes of sizes that no test can train: each is set up with tiny stand-ins for model and data.

What runs is the recipe's own objective, trained parts, optimizer and data pipeline; model, teacher, sources, rows and
workers are replaced. That the real parts exist and fit is for `hovle plan` and a machine with a network to say.
"""

import itertools
import re

import pytest
from places import ROOT

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.cli import main
from hovle.train.config import RECIPES, load_stage

FOLDERS = ("hovle-2.6b", "hovle-2.6b-hd", "smollm2-360m", "smollm2-360m-photographs", "smollm2-1.7b")

SMALL = ["rows_per_batch=1", "row_length=192", "packing_window=4", "num_workers=0", "dtype=float32", "compile=off"]


@pytest.fixture(scope="module")
def starts(tmp_path_factory, language_models) -> dict[str, str]:
    """Tiny HoVLE and HoVLE-HD with a text table of their own, as a first stage would leave them."""
    folders = {}
    for location in ("pre", "post"):
        folder = tmp_path_factory.mktemp(location)
        model = HoVLEForConditionalGeneration.from_language_model(
            language_models["untied"], 2, image_size=56, pixel_shuffle_loc=location
        )
        model.save_pretrained(folder)
        HoVLEProcessor.from_language_model(language_models["untied"], model.config, max_tiles=4).save_pretrained(
            folder
        )
        folders[location] = str(folder)
    return folders


def held_text(recipe: str) -> str:
    """The override that stands for the text a recipe is held on, where it is held."""
    return "language.source=python_docs" if load_stage(recipe).language else "language=null"


@pytest.mark.parametrize("stage", ["distillation", "alignment", "instruction_tuning"])
def test_a_stage_script_tells_what_its_recipe_says(stage):
    told = re.sub(r"\s+", " ", (ROOT / "train" / f"{stage}.py").read_text())
    config = load_stage(f"demo/{stage}")
    assert f" trains {', '.join(config.trainable)};" in told
    assert f" towards {config.objective.name}:" in told
    assert f'default="demo/{stage}"' in told


@pytest.mark.parametrize("folder", FOLDERS)
def test_distillation_recipes_run_dry_with_stand_ins(folder, language_models, data, teacher_weights, capsys):
    teacher = f"{{name: test_efficientnet, checkpoint: {teacher_weights}, image_size: 64, standardize: true}}"
    stand_ins = [
        f"model.language_model={language_models['untied']}",
        "model.num_embedding_layers=2",
        "model.image_size=56",
        f"data={{source: pictures, path: {data / 'pictures'}}}",
    ]
    teachers = load_stage(f"{folder}/distillation").teacher
    stand_ins += [held_text(f"{folder}/distillation"), f"teacher={', '.join([teacher] * len(teachers)).join('[]')}"]
    assert main(["train", f"{folder}/distillation", *stand_ins, *SMALL, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "trains          stem, holistic_layers, text_embeddings" in printed
    assert " 1 samples in 1 rows of 192 tokens, 1 tiles" in printed


@pytest.mark.parametrize("stage", ["alignment", "instruction_tuning"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_later_recipes_run_dry_with_stand_ins(folder, stage, starts, data, capsys):
    start = starts["post" if folder.endswith("hd") else "pre"]
    stand_ins = [f"model.checkpoint={start}", f"data={{source: chat, path: {data / 'chat.jsonl'}}}"]
    stand_ins.append(held_text(f"{folder}/{stage}"))
    assert main(["train", f"{folder}/{stage}", *stand_ins, *SMALL, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert ("language_model" in printed.split("trains")[1].splitlines()[0]) == (stage == "instruction_tuning")


@pytest.mark.parametrize("stage", ["distillation", "alignment", "instruction_tuning"])
@pytest.mark.parametrize("folder", [*FOLDERS, "demo"])
def test_every_recipe_holds_data_out_that_it_does_not_learn_from(folder, stage):
    config = load_stage(f"{folder}/{stage}")
    assert config.validation is not None
    read = [
        [getattr(data, name, None) for name in ("source", "path", "subset", "split")]
        for data in (*config.data, config.validation)
    ]
    assert read[-1] not in read[:-1]
    assert config.image_ablation
    assert config.language is not None  # every shipped recipe keeps the language
    assert (config.retention is not None) == (folder != "demo")  # there it would cost more than a validation
    assert folder == "demo" or config.validate_every == config.checkpoint_every  # the demo validates at its ends only


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_stage_starts_where_the_one_before_it_ends(folder):
    first, second, third = (
        load_stage(f"{folder}/{name}") for name in ("distillation", "alignment", "instruction_tuning")
    )
    assert second.model.checkpoint == f"{first.output}/model"
    assert third.model.checkpoint == f"{second.output}/model"


@pytest.mark.parametrize("folder", ["hovle-2.6b", "hovle-2.6b-hd"])
def test_the_papers_values_are_the_papers(folder):
    rates = [load_stage(f"{folder}/{name}").learning_rate for name in ("distillation", "alignment")]
    assert [*rates, load_stage(f"{folder}/instruction_tuning").learning_rate] == [3e-4, 5e-5, 4e-5]
    first = load_stage(f"{folder}/distillation")
    assert (first.model.num_embedding_layers, first.model.image_size, first.objective.num_random_tokens) == (
        8,
        448,
        50,
    )
    assert first.model.pixel_shuffle_loc == ("post" if folder.endswith("hd") else "pre")


@pytest.mark.parametrize("folder", ["hovle-2.6b", "hovle-2.6b-hd"])
@pytest.mark.parametrize("stage", ["distillation", "alignment", "instruction_tuning"])
def test_every_number_of_the_papers_recipes_says_whose_it_is(folder, stage):
    body = (RECIPES / folder / f"{stage}.yaml").read_text()
    body = body.replace("[ours]: not published; our choice, with the reason", "")
    for above, line in itertools.pairwise(body.splitlines()):
        for reason in line.split("[ours]")[1:]:
            assert len(re.findall("[A-Za-z]{2,}", reason.split("[paper]")[0])) > 1, line
        key, _, value = line.strip().partition(": ")
        if key == "output" or line.startswith(("#", "  - ")) or not value or "checkpoint:" in line:
            continue
        marked = line + above if above.startswith("#") else line
        if any(mark in marked for mark in ("[paper]", "[ours]")) or key in ("source", "path", "format", "streaming"):
            continue
        assert key in ("gradient_accumulation_steps",), line  # explained with rows_per_batch
