"""Recipes: what loads, what is refused, and what the refusal says."""

import dataclasses

import pytest
import yaml
from places import ROOT

from hovle.train.config import RECIPES, StageConfig, find_recipe, load_stage

SHIPPED = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


def minimal(**changes) -> dict:
    values = {
        "output": "runs/x",
        "model": {"checkpoint": "somewhere"},
        "objective": {"name": "next_token"},
        "data": {"source": "easy_vqa"},
        "trainable": ["stem"],
        "num_steps": 4,
        "rows_per_batch": 2,
        "row_length": 64,
        "learning_rate": 1e-3,
    }
    return {**values, **changes}


@pytest.fixture
def load(tmp_path):
    """`load({...}, "key=value", ...)` writes a recipe and loads it."""

    def write_and_load(values: object, *overrides: str) -> StageConfig:
        path = tmp_path / "recipe.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return load_stage(str(path), overrides)

    return write_and_load


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_loads_by_its_name(name):
    config = load_stage(name)
    assert config.num_steps > 0
    assert find_recipe(name) == RECIPES / f"{name}.yaml"


def test_the_three_demo_stages_are_shipped():
    assert {"demo/distillation", "demo/alignment", "demo/instruction_tuning"} <= set(SHIPPED)


def test_a_resolved_recipe_loads_as_the_same_stage(load):
    for name in SHIPPED:
        config = load_stage(name)
        assert load(config.to_dict()) == config


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(ValueError, match=r"No recipe 'demo/aligment'.*demo/alignment, demo/distillation"):
        find_recipe("demo/aligment")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean learning_rate?"),
        (
            {"objective": {"name": "next_token", "text_wieght": 1}},
            "objective: unknown key 'text_wieght'; did you mean",
        ),
        ({"zzz": 1}, "unknown key 'zzz'; known: output, model"),
        ({1: 2}, "unknown key 1; known"),
    ],
)
def test_unknown_keys_are_refused_with_a_hint(load, changes, message):
    with pytest.raises(ValueError, match="unknown key") as caught:
        load(minimal() | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": "ten"}, "num_steps must be int, got 'ten'"),
        ({"num_steps": 1.5}, "num_steps must be int, got 1.5"),
        ({"num_steps": True}, "num_steps must be int, got True"),
        ({"learning_rate": "fast"}, "learning_rate must be float, got 'fast'"),
        ({"learning_rate": True}, "learning_rate must be float, got True"),
        ({"trainable": "stem"}, "trainable must be a list, got 'stem'"),
        ({"trainable": [3]}, "trainable must be str, got 3"),
        ({"model": "somewhere"}, "model must be a mapping, got 'somewhere'"),
        ({"model": {"checkpoint": "x", "image_size": "big"}}, "model: image_size must be int, got 'big'"),
        ({"objective": {"name": "next"}}, "objective: name must be one of distillation, next_token, got 'next'"),
        ({"dtype": "float16"}, "dtype must be one of auto, bfloat16, float32, got 'float16'"),
        ({"data": {"source": 3}}, "data: source must be str, got 3"),
        ({"model": {"checkpoint": 5}}, "model: checkpoint must be str, got 5"),
        ({"output": None}, "output must be str, got None"),
    ],
)
def test_wrong_types_are_refused_with_the_key(load, changes, message):
    with pytest.raises(ValueError, match="must be") as caught:
        load(minimal(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ["stems"]}, r"trainable names \['stems'\]; known parameter groups: stem,"),
        ({"trainable": []}, "nothing would learn"),
        ({"lora": {}, "trainable": ["language_model"]}, "take language_model out"),
        ({"model": {}}, "exactly one of checkpoint"),
        ({"model": {"checkpoint": "x", "language_model": "y"}}, "exactly one of checkpoint"),
        ({"objective": {"name": "distillation"}}, "A teacher goes with"),
        ({"teacher": {"name": "x", "image_size": 64}}, "A teacher goes with"),
        (
            {"keep_best": True, "checkpoint_every": 5},
            "keep_best compares checkpoints by validation loss: set validation",
        ),
        ({"keep_last": 0}, "keep_last must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"packing_window": 0}, "packing_window must be at least 1"),
        ({"checkpoint_every": -1}, "checkpoint_every must be at least 0"),
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"data": []}, "data is an empty list"),
        ({"data": [{"source": "easy_vqa"}, {"source": "easy_vqa"}]}, "several sources easy_vqa: give each a `name`"),
        ({"data": [{"source": "chat", "path": "x", "weight": -1}]}, "weight must be a number above 0, got -1"),
        ({"max_tiles_per_batch": 0}, "max_tiles_per_batch must be at least 1, got 0"),
        ({"max_skip_fraction": 1.5}, r"max_skip_fraction must lie in \[0, 1\], got 1.5"),
        ({"warmup_ratio": 1.0}, "warmup_ratio"),
        ({"adam_betas": [0.9]}, "adam_betas needs two numbers"),
        ({"data": {"source": "easy_vqa", "questions_per_sample": 0}}, "questions_per_sample must be at least 1"),
    ],
)
def test_values_that_cannot_work_are_refused(load, changes, message):
    with pytest.raises(ValueError, match=message):
        load(minimal(**changes))


@pytest.mark.parametrize("changes", [{"trainable": ["language_model"]}, {"lora": {}}])
def test_distillation_cannot_train_the_language_model(load, changes):
    distillation = {"objective": {"name": "distillation"}, "teacher": {"name": "x", "image_size": 64}}
    load(minimal(**distillation))
    with pytest.raises(ValueError, match="does not run the language model"):
        load(minimal(**distillation, **changes))


def test_missing_keys_are_named(load):
    values = minimal()
    del values["num_steps"], values["data"]
    with pytest.raises(ValueError, match="missing data, num_steps"):
        load(values)
    with pytest.raises(ValueError, match="teacher: missing name, image_size"):
        load(minimal(teacher={}))


def test_yaml_spellings_mean_what_they_look_like(load):
    config = load("\n".join(f"{key}: {value}" for key, value in minimal(learning_rate="3e-4", compile="on").items()))
    assert config.learning_rate == 3e-4  # plain YAML reads text
    assert config.compile == "on"  # plain YAML reads a boolean
    assert load(minimal(learning_rate=1)).learning_rate == 1.0


def test_yaml_that_builds_python_objects_is_refused(load):
    with pytest.raises(ValueError, match=r"(?s)no plain YAML.*python/object"):
        load("output: !!python/object/apply:os.getcwd []")


def test_a_recipe_must_be_a_mapping(load):
    with pytest.raises(ValueError, match="must hold a mapping"):
        load("- output\n- model\n")


def test_overrides_replace_fields_and_reach_nested_ones(load):
    config = load(
        minimal(),
        "num_steps=7",
        "learning_rate=5e-5",
        "model.image_size=224",
        "trainable=[stem, holistic_layers]",
        "lora.rank=4",
        "validation.source=easy_vqa",
        "output=runs/y=1",
    )
    assert (config.num_steps, config.learning_rate, config.model.image_size) == (7, 5e-5, 224)
    assert config.trainable == ("stem", "holistic_layers")
    assert config.lora is not None
    assert config.lora.rank == 4
    assert config.validation is not None
    assert config.output == "runs/y=1"
    assert load(config.to_dict(), "lora=null").lora is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_steps", "key=value, got 'num_steps'"),
        ("num_stepz=4", "unknown key 'num_stepz'; did you mean num_steps?"),
        ("model.sise=4", "model: unknown key 'sise'"),
        ("num_steps.x=4", "num_steps has no fields"),
        ("num_steps=four", "num_steps must be int"),
        ("num_steps=[4", "num_steps=[4 is no plain YAML"),
    ],
)
def test_wrong_overrides_are_refused(load, override, message):
    with pytest.raises(ValueError, match=r"key|fields|must be|YAML") as caught:
        load(minimal(), override)
    assert message in str(caught.value)


def test_data_is_one_source_or_a_list_of_them(load):
    alone = load(minimal(data={"source": "chat", "path": "a.jsonl"}), "data.weight=2")
    assert [(data.path, data.weight) for data in alone.data] == [("a.jsonl", 2.0)]
    sources = [{"source": "chat", "path": "a.jsonl"}, {"source": "llava", "path": "b.json", "weight": 3}]
    mixed = load(minimal(data=sources), "data.1.weight=0.5", "data.0.name=notes")
    assert [(data.label, data.weight) for data in mixed.data] == [("notes", 1.0), ("llava:b.json", 0.5)]
    assert mixed.to_dict()["data"][1]["path"] == "b.json"
    with pytest.raises(ValueError, match=r"data\.2\.weight: '2' is none of the list's 2 items; they count from 0"):
        load(minimal(data=sources), "data.2.weight=1")
    with pytest.raises(ValueError, match=r"data item: unknown key 'wieght'; did you mean weight\?"):
        load(minimal(data=[{"source": "chat", "path": "a.jsonl", "wieght": 1}]))


def test_a_stage_cannot_be_changed_after_loading(load):
    config = load(minimal())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_steps = 5


def test_every_stage_script_runs_a_recipe_of_its_own_name():
    scripts = sorted((ROOT / "train").glob("*.py"))
    assert [script.stem for script in scripts] == ["alignment", "distillation", "instruction_tuning"]
    for script in scripts:
        assert f'default="demo/{script.stem}"' in script.read_text()
