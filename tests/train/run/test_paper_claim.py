"""`dev/paper_claim.py` in miniature: what its arms share, how they go on, and what is said of made-up figures."""

import importlib
import io
import json
import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import yaml
from PIL import Image
from places import ROOT
from safetensors.torch import load_file
from torch import nn

from hovle import HoVLEForConditionalGeneration
from hovle.eval.skills.items import Item
from hovle.files.documents import load_yaml
from hovle.loading import load_config
from hovle.synthesis.samples import Question
from hovle.train.data.batch import TileBatch
from hovle.train.data.tiles import PixelNormalization
from hovle.train.objectives.teachers import side_by_side


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module, with those beside it."""
    sys.path.insert(0, str(ROOT / "dev"))
    try:
        return importlib.import_module("paper_claim")
    finally:
        sys.path.remove(str(ROOT / "dev"))


@pytest.fixture
def study(script, tmp_path, distillation_values, next_token_values, data):
    """All arms around a tiny language model, on chats that pass for clocks."""
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    teachers = [{**distillation_values["teacher"], "standardize": True}] * 2
    distillation = {**distillation_values, "teacher": teachers, "validation": distillation_values["data"]}
    held_out = {"source": "chat", "path": str(data / "chat.jsonl"), "name": "held out"}
    chats = {
        **next_token_values,
        "data": {**held_out, "name": "clocks"},
        "validation": held_out,
        "num_validation_batches": 1,
    }
    contents = {"distillation": distillation, "alignment": chats, "instruction_tuning": {**chats, "seed": 1}}
    for name, content in contents.items():
        (recipes / f"{name}.yaml").write_text(yaml.safe_dump({"output": "unused", **content}))
    content = load_yaml(script.ARMS)
    return script.Study(tmp_path / "out", content["arms"], content["every_stage"], str(recipes), minutes=0.1)


class DrawnClocks:
    """Two pictures in the place of a drawer's."""

    def items(self, bar, count: int) -> list[Item]:
        found = []
        for number in range(count):
            written = io.BytesIO()
            Image.new("RGB", (60, 60), "red").save(written, "PNG")
            question = Question("What time is it?", "ten", "time")
            found.append(Item(f"clocks/{number}/0", question, written.getvalue(), str(number)))
        return found


@pytest.mark.parametrize("recipes", ["smol", "demo"])
def test_arms_share_data_validation_and_sizes(script, tmp_path, recipes):
    content = load_yaml(script.ARMS)
    study = script.Study(tmp_path, content["arms"], content["every_stage"], recipes, 10.0)
    shared = ("data", "validation", "rows_per_batch", "row_length", "num_validation_batches", "seed", "language")
    for stage in ("alignment", "instruction_tuning"):
        configs = [study.config(arm, stage) for arm in study.arms if stage in study.arms[arm]["stages"]]
        for name in shared:
            assert len({repr(getattr(config, name)) for config in configs}) == 1, name
    assert not any(teacher.cache for teacher in study.config("hovle", "distillation").teacher)
    assert all(sum(stage["share"] for stage in arm["stages"].values()) == 1 for arm in study.arms.values())


def test_every_arm_trains_for_the_budget_answers_and_is_judged(script, study, monkeypatch, capsys):
    monkeypatch.setattr(script, "probe", lambda *_: 1.5)
    monkeypatch.setattr(script, "training_seconds", lambda run: 1.5 * run.recipe["num_steps"])
    monkeypatch.setattr(script, "Drawer", lambda *_, **__: DrawnClocks())
    command = ["paper_claim", str(study.out), "--minutes", "0.1", "--recipes", study.recipes, "--items", "2"]
    monkeypatch.setattr(sys, "argv", command)
    assert script.main() == 0
    plans = {
        arm: [json.loads((study.out / arm / f"{stage}.json").read_text())["num_steps"] for stage in values["stages"]]
        for arm, values in study.arms.items()
    }
    assert plans == {"hovle": [1, 2, 1], "compositional": [1, 3], "monolithic": [4], "no_distillation": [3, 1]}
    result = json.loads((study.out / "result.json").read_text())
    assert {arm["minutes"] for arm in result["arms"].values()} == {0.1}
    looks = [len(arm["curve"]) for arm in result["arms"].values()]
    assert looks == [5, 6, 5, 6]  # of each stage but distillation before its first step and after each
    for claim in result["claims"].values():
        assert claim["verdict"] == "undecided"
        assert claim["sentence"] in (study.out / "README.md").read_text()
        assert "HoVLE answers no better than with white pictures" in claim["sentence"]
    assert (study.out / "claim.png").is_file()
    models = {arm: load_config(study.model(arm)) for arm in study.arms}
    assert [model.num_embedding_layers for model in models.values()] == [2, 0, 0, 2]
    assert models["monolithic"].pixel_shuffle_loc == "none"
    capsys.readouterr()
    assert script.main() == 0
    assert capsys.readouterr().out.count("is finished: nothing to resume") == 8
    assert json.loads((study.out / "result.json").read_text()) == result
    monkeypatch.setattr(sys, "argv", [*command, "--items", "3"])
    with pytest.raises(ValueError, match=r"was begun with .*'items': 2"):
        script.main()


def test_an_interrupted_compositional_stage_goes_on_to_the_same_weights(script, study, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "step_seconds", lambda _: 1.5)
    alignment = {**study.arms["compositional"]["stages"]["alignment"], "share": 1.0}
    arms = {"compositional": {"teacher_features": True, "stages": {"alignment": alignment}}}
    whole, cut = (replace(study, out=tmp_path / name, arms=arms) for name in ("whole", "cut"))
    script.train(whole, "compositional")
    teacher, folder = cut.teacher, cut.out / "compositional" / "alignment"
    targets = teacher.targets

    def unplugged(*arguments):
        if (folder / "checkpoint-000002").is_dir():
            raise OSError("unplugged")
        return targets(*arguments)

    monkeypatch.setattr(teacher, "targets", unplugged)
    with pytest.raises(OSError, match="unplugged"):
        script.train(cut, "compositional")
    monkeypatch.setattr(teacher, "targets", targets)
    script.train(cut, "compositional")
    assert not (cut.out / "probe").exists()
    [run] = cut.runs("compositional")
    assert [entry["step"] for entry in run.events("start")] == [0, 2]
    first, second = (load_file(item.model("compositional") / "model.safetensors") for item in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_features_reach_the_projector_whether_pixels_are_normalised_or_not(script, study, parts):
    model, teacher = parts[0], study.teacher
    script.show_features(model, teacher)
    tiles = torch.randint(256, (2, 3, 56, 56), dtype=torch.uint8)
    normal = PixelNormalization()(tiles)
    found, same = (model.get_image_features(item).pooler_output for item in (tiles, normal))
    projector = model.model.projector
    features = teacher.targets(TileBatch(pixel_values=tiles), 2)
    padded = nn.functional.pad(features, (0, projector.linear_1.in_features - features.shape[-1]))
    expected = projector.linear_2(projector.act(projector.linear_1(padded)))
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, same)
    found.sum().backward()
    assert not any(item.grad.any() for item in model.model.patch_embedding.parameters())
    assert projector.linear_1.weight.grad.any()
    with pytest.raises(ValueError, match="the projector takes 256: name fewer"):
        script.show_features(model, side_by_side([teacher] * 9))


def test_image_tokens_of_a_matrix_begin_as_long_as_words(script, language_models, parts):
    sizes = {"image_size": 448, "patch_size": 28, "pixel_shuffle_loc": "none"}
    model = HoVLEForConditionalGeneration.from_language_model(language_models["tied"], 0, dtype=torch.float32, **sizes)
    words = model.model.input_embedding_matrix().std()
    tiles = torch.randn(2, 3, 448, 448)
    assert model.get_image_features(tiles).pooler_output.std() > 5 * words
    script.begin_as_long_as_words(model)
    positions = model.config.initializer_range
    torch.testing.assert_close(
        model.get_image_features(tiles).pooler_output.std(), (words**2 + positions**2).sqrt(), rtol=0.1, atol=0
    )
    projected, before = parts[0], {name: item.clone() for name, item in parts[0].state_dict().items()}
    script.begin_as_long_as_words(projected)
    assert all(torch.equal(item, before[name]) for name, item in projected.state_dict().items())


def made_rows(*right: str) -> list[dict]:
    """A row for each letter, of one ability for each word: y is right, n is wrong; white pictures are never right."""
    letters = [(ability, number, letter) for ability, word in enumerate(right) for number, letter in enumerate(word)]
    return [
        {"ability": str(ability), "source": str(number), "right": letter == "y", "blank": False}
        for ability, number, letter in letters
    ]


def test_differences_are_paired_and_each_ability_counts_the_same(script):
    ours, theirs = made_rows("yyyyyyyyyy", "nn"), made_rows("nnnnnnnnnn", "nn")
    assert script.gain(ours, "right") == {"score": 0.5, "interval": [0.5, 0.5]}
    assert script.gain(ours, "right", theirs)["score"] == 0.5
    mixed = made_rows("ynynynynyn")
    assert script.gain(mixed, "right", mixed) == {"score": 0.0, "interval": [0.0, 0.0]}
    low, high = script.gain(made_rows("yyyyyynnnn"), "right", made_rows("ynnnnnnnnn"))["interval"]
    assert 0 < low < 0.5 < high < 1
    low, _ = script.gain(made_rows("ynnnnnnnnn"), "right", made_rows("nnnnnnnnnn"))["interval"]
    assert low == 0  # one question is no proof


@pytest.mark.parametrize(
    ("more_than", "interval", "sees", "problem", "said"),
    [
        (0.0, [0.01, 0.05], True, "", "agrees"),
        (0.0, [0.0, 0.05], True, "", "undecided"),
        (0.0, [-0.05, -0.01], True, "", "disagrees"),
        (-0.02, [-0.01, 0.01], True, "", "agrees"),
        (-0.02, [-0.03, 0.01], True, "", "undecided"),
        (-0.02, [-0.05, -0.03], True, "", "disagrees"),
        (-0.02, [0.0, 0.0], False, "", "undecided"),  # two blind models are no finding
        (0.0, [-0.05, -0.01], False, "", "disagrees"),
        (0.0, [0.01, 0.05], True, "other machines", "undecided"),
        (0.0, [-0.05, -0.01], True, "other machines", "undecided"),
    ],
)
def test_a_verdict_follows_the_rule(script, more_than, interval, sees, problem, said):
    assert script.verdict(more_than, interval, sees, problem) == said


def test_budgets_must_be_equal(script):
    arms = [{"title": "A", "minutes": 8.6, "machines": [{"dtype": "float32"}]}]
    arms.append({"title": "B", "minutes": 11.4, "machines": [{"dtype": "float32"}] * 2})
    assert script.problem_of(arms, 10) == ""
    assert script.problem_of([arms[0], {**arms[1], "minutes": 11.6}], 10) == "B was trained for 11.6 of 10 minutes"
    other = {**arms[1], "machines": [{"dtype": "float32"}, {"dtype": "bfloat16"}]}
    assert script.problem_of([arms[0], other], 10) == "runs were on different machines"


def test_data_must_teach_something_that_can_be_asked(script, study):
    with pytest.raises(ValueError, match="The sources chats teach no ability"):
        script.taught(replace(study, every_stage=[*study.every_stage, "data.name=chats"]))
