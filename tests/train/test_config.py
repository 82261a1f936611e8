"""Recipes: what loads, what is refused, and what the refusal says."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from annotated_types import Ge, Gt, Le, Lt
from places import ROOT
from pydantic.fields import FieldInfo

from hovle.train.config import RECIPES, StageConfig, find_recipe, load_stage
from hovle.train.config.section import Section

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
        ({"learning_rat": 1}, "unknown key 'learning_rat'; did you mean learning_rate, "),
        (
            {"objective": {"name": "next_token", "text_wieght": 1}},
            "objective: unknown key 'text_wieght'; did you mean",
        ),
        ({"zzz": 1}, "unknown key 'zzz'; did you mean "),
        ({1: 2}, "unknown key '1'; did you mean "),
        ({"x" * 10**5: 2}, "... (100002 characters); did you mean "),
        ({"retention": {"windw": 4}}, "retention: unknown key 'windw'; did you mean window, "),
        ({"blind_check": False}, "unknown key 'blind_check': it is called image_ablation now"),
        ({"stop_when_blind": True}, "unknown key 'stop_when_blind': it is called stop_when_images_ignored now"),
    ],
)
def test_unknown_keys_are_refused_with_a_hint(load, changes, message):
    with pytest.raises(ValueError, match="unknown key") as caught:
        load(minimal() | changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": "ten"}, "num_steps: must be a valid integer, got 'ten'"),
        ({"num_steps": "10"}, "num_steps: must be a valid integer, got '10'"),
        ({"num_steps": 1.5}, "num_steps: must be a valid integer, got 1.5"),
        ({"num_steps": True}, "num_steps: must be a valid integer, got True"),
        ({"learning_rate": "fast"}, "learning_rate: must be a valid number, got 'fast'"),
        ({"learning_rate": True}, "learning_rate: must be a valid number, got True"),
        ({"keep_best": "yes"}, "keep_best: must be a valid boolean, got 'yes'"),
        ({"trainable": "stem"}, "trainable: must be a list, got 'stem'"),
        ({"tracking": [3]}, "tracking.0: must be a valid string, got 3"),
        ({"model": "somewhere"}, "model: must be a mapping, got 'somewhere'"),
        ({"model": {"checkpoint": "x", "image_size": "big"}}, "model.image_size: must be a valid integer, got 'big'"),
        (
            {"objective": {"name": "next"}},
            "objective.name: must be one of 'distillation', 'next_token', got 'next'",
        ),
        ({"objective": {}}, "objective.name: missing"),
        ({"dtype": "float16"}, "dtype: must be 'auto', 'bfloat16' or 'float32', got 'float16'"),
        ({"data": {"source": "x"}}, "data.0.source: must be one of 'easy_vqa', 'chat', 'llava', 'pictures', 'hugg"),
        ({"data": {"source": 3}}, "data.0.source: must be one of 'easy_vqa', "),
        ({"model": {"checkpoint": 5}}, "model.checkpoint: must be a valid string, got 5"),
        ({"output": None}, "output: must be a valid string, got None"),
        ({"retention": {"window": "512"}}, "retention.window: must be a valid integer, got '512'"),
    ],
)
def test_wrong_types_are_refused_with_the_key(load, changes, message):
    with pytest.raises(ValueError, match=r"must be|missing") as caught:
        load(minimal(**changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainable": ["stems"]}, "trainable.0: must be 'stem', 'holistic_layers', .*, got 'stems'"),
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
        ({"keep_last": 0}, "keep_last: must be greater than or equal to 1, got 0"),
        ({"num_steps": 0}, "how long the stage is, is missing: set num_steps, or num_epochs"),
        ({"num_steps": -1}, "num_steps: must be greater than or equal to 0, got -1"),
        ({"packing_window": 0}, "packing_window: must be greater than or equal to 1"),
        ({"checkpoint_every": -1}, "checkpoint_every: must be greater than or equal to 0"),
        ({"num_workers": -1}, "num_workers: must be greater than or equal to 0, got -1"),
        ({"data": []}, "data: .* at least 1 item"),
        ({"data": [{"source": "easy_vqa"}, {"source": "easy_vqa"}]}, "several sources easy_vqa: give each a `name`"),
        (
            {"data": [{"source": "chat", "path": "x", "weight": -1}]},
            r"data\.0\.weight: must be greater than 0, got -1",
        ),
        ({"max_tiles_per_batch": 0}, "max_tiles_per_batch: must be greater than or equal to 1, got 0"),
        ({"max_skip_fraction": 1.5}, "max_skip_fraction: must be less than or equal to 1, got 1.5"),
        ({"warmup_ratio": 1.0}, "warmup_ratio: must be less than 1, got 1.0"),
        ({"adam_betas": [0.9]}, r"adam_betas\.1: missing"),
        (
            {"data": {"source": "easy_vqa", "questions_per_sample": 0}},
            "questions_per_sample: must be greater than or equal to 1",
        ),
    ],
)
def test_values_that_cannot_work_are_refused(load, changes, message):
    with pytest.raises(ValueError, match=message):
        load(minimal(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rates": {"language_model": 1e-5}}, "names language_model, which this stage does not train; it tr"),
        ({"learning_rates": {"lora": 1e-5}}, "names lora, which this stage does not train; it trains stem"),
        ({"learning_rates": {"words": 1e-3}}, "names words, which this stage does not train; it trains"),
        ({"learning_rates": {"stem": -1}}, "learning_rates.stem: must be greater than or equal to 0, got -1"),
        ({"learning_rates": {"stems": 1}}, "learning_rates.stems.*: must be 'stem', "),
        ({"schedule": "step"}, "schedule: must be 'cosine', 'linear' or 'constant', got 'step'"),
        ({"patience": 2}, "patience counts validations: set validation and validate_every"),
        ({"data": {"source": "easy_vqa", "held_out": 1}}, "held_out: must be less than 1, got 1"),
        (
            {"data": {"source": "easy_vqa", "held_out": 0.1}, "validation": {"source": "easy_vqa"}},
            "validation names held-out data, and so does held_out of easy_vqa",
        ),
        ({"validation": {"source": "easy_vqa", "held_out": 0.1}}, "validation.held_out has no meaning"),
        ({"num_epochs": -1}, "num_epochs: must be greater than or equal to 0"),
    ],
)
def test_options_that_cannot_work_together_are_refused(load, changes, message):
    with pytest.raises(ValueError, match=message):
        load(minimal(**changes))


@pytest.mark.parametrize("changes", [{"trainable": ["language_model"]}, {"lora": {}}])
def test_distillation_cannot_train_the_language_model(load, changes):
    distillation = {"objective": {"name": "distillation"}, "teacher": {"name": "x", "image_size": 64}}
    load(minimal(**distillation))
    with pytest.raises(ValueError, match="does not run the language model"):
        load(minimal(**distillation, **changes))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"objective": {"name": "next_token", "text_weight": 1.0}},
            "objective: text_weight belongs to distillation; ",
        ),
        (
            {"data": {"source": "chat", "path": "x", "picture_folder": "y"}},
            "picture_folder belongs to llava; chat does",
        ),
        (
            {"data": {"source": "llava", "path": "x", "split": "train"}},
            "split belongs to easy_vqa, huggingface; llava",
        ),
        ({"validation": {"source": "easy_vqa", "prompt": ""}}, "validation: prompt belongs to huggingface; easy_vqa"),
    ],
)
def test_a_key_of_another_kind_is_refused_even_with_its_default(load, section, message):
    with pytest.raises(ValueError, match="does not read it") as caught:
        load(minimal(**section))
    assert message in str(caught.value)


def test_missing_keys_are_named(load):
    values = minimal()
    del values["row_length"], values["data"]
    with pytest.raises(ValueError, match="data: missing; row_length: missing"):
        load(values)
    with pytest.raises(ValueError, match=r"teacher\.name: missing; teacher\.image_size: missing"):
        load(minimal(teacher={}))
    with pytest.raises(ValueError, match=r"data\.0\.path: missing"):
        load(minimal(data={"source": "chat"}))
    with pytest.raises(ValueError, match=r"recipe\.yaml: learning_rate: must .*; num_workers: must "):
        load(minimal(learning_rate="fast", num_workers=-1))


def test_yaml_spellings_mean_what_they_look_like(load):
    config = load("\n".join(f"{key}: {value}" for key, value in minimal(learning_rate="3e-4", compile="on").items()))
    assert config.learning_rate == 3e-4  # plain YAML reads text
    assert config.compile == "on"  # plain YAML reads a boolean
    assert load(minimal(learning_rate=1)).learning_rate == 1.0
    assert load(minimal(adam_betas=["5e-1", 0])).adam_betas == (0.5, 0.0)
    assert load(minimal(min_picture_gap=float("-inf"))).min_picture_gap == float("-inf")


def test_gradients_are_not_clipped_where_the_recipe_says_off(load):
    config = load("\n".join(f"{key}: {value}" for key, value in minimal(max_gradient_norm="off").items()))
    assert config.max_gradient_norm == float("inf")
    assert load(config.to_dict()) == config
    assert load(minimal(), "max_gradient_norm=off") == config
    for value in (0, -1, "on", True, None, float("nan"), float("-inf")):
        with pytest.raises(ValueError, match="max_gradient_norm: must be "):
            load(minimal(max_gradient_norm=value))


def bounds(annotation: Any, found: frozenset[type] = frozenset()) -> Iterator[frozenset[type]]:
    """Kinds of bounds of every number in an annotation."""
    if get_origin(annotation) is Annotated:
        base, *marks = get_args(annotation)
        inner = [mark for info in marks if isinstance(info, FieldInfo) for mark in info.metadata]
        yield from bounds(base, found | {type(mark) for mark in inner})
    elif annotation in (int, float):
        yield found
    else:
        for part in get_args(annotation):
            yield from bounds(part)


def sections(kind: type = StageConfig) -> Iterator[type]:
    """A section of recipes and those inside it."""
    yield kind
    inner = [part for hint in get_type_hints(kind).values() for part in (hint, *get_args(hint))]
    for part in [nested for item in inner for nested in (item, *get_args(item))]:
        if isinstance(part, type) and issubclass(part, Section):
            yield from sections(part)


def test_every_number_of_a_recipe_has_a_range():
    found = {
        (kind.__name__, name): kinds
        for kind in {*sections()}
        for name, hint in get_type_hints(kind, include_extras=True).items()
        for kinds in bounds(hint)
    }
    assert len(found) > 40
    assert [place for place, kinds in found.items() if not {Ge, Gt} & kinds] == []
    assert [place for place, kinds in found.items() if not {Le, Lt} & kinds] == []


NUMBERS = [
    *(
        "learning_rate",
        "final_learning_rate_ratio",
        "warmup_ratio",
        "weight_decay",
        "max_skip_fraction",
        "data.weight",
    ),
    *("lora.alpha", "lora.dropout", "expected.filled_ratio", "expected.tiles_per_sample", "language.share"),
    *("num_steps", "seed", "model.image_size", "model.max_tiles", "lora.rank", "num_workers"),
]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "1e30", "-1", "9" * 400])
def test_numbers_beyond_their_range_are_refused_by_name(load, key, value):
    with pytest.raises(ValueError, match=re.escape(key.replace("data.", "data.0."))):
        load(minimal(trainable=[], lora={}, language={"source": "x"}, expected={}), f"{key}={value}")


def test_a_recipe_that_says_something_twice_is_refused_with_the_key(load, tmp_path):
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/recipe.yaml is no plain YAML: (?s:.)*duplicate key 'num_steps'"
    ):
        load(yaml.safe_dump(minimal()) + "num_steps: 5\n")


def test_a_few_lines_of_aliases_do_not_become_gigabytes(load):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 10)]
    with pytest.raises(ValueError, match="more than 100,000 values once its aliases are written out") as caught:
        load("\n".join(lines))
    assert len(str(caught.value)) < 1000


def test_a_recipe_is_utf_8(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(yaml.safe_dump(minimal(output="läufe/猫"), allow_unicode=True).encode())
    assert load_stage(str(path)).output == "läufe/猫"
    path.write_bytes("output: l\xe4ufe".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{path} is no plain YAML: 'utf-8' codec"):
        load_stage(str(path))


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
        ("num_stepz=4", "unknown key 'num_stepz'; did you mean num_steps, "),
        ("model.sise=4", "model: unknown key 'sise'"),
        ("num_steps.x=4", "num_steps has no fields"),
        ("num_steps=four", "num_steps: must be a valid integer"),
        ("num_steps=[4", "num_steps=[4 is no plain YAML"),
    ],
)
def test_wrong_overrides_are_refused(load, override, message):
    with pytest.raises(ValueError, match=r"key|fields|must be|YAML") as caught:
        load(minimal(), override)
    assert message in str(caught.value)


def test_an_override_makes_a_source_one_of_another_kind(load):
    recipe = minimal(
        data={"source": "easy_vqa", "split": "test", "balance_answers": True, "weight": 2, "questions_per_sample": 4},
        validation={"source": "easy_vqa"},
        objective={"name": "distillation", "num_random_tokens": 3},
        teacher={"name": "x", "image_size": 64},
    )
    changes = ("data.source=llava", "data.path=x.json", "validation.source=chat", "validation.path=y.jsonl")
    config = load(recipe, *changes, "objective.name=next_token", "teacher=null")
    [source] = config.data
    assert (source.source, source.path, source.weight, source.questions_per_sample) == ("llava", "x.json", 2.0, 4)
    assert config.validation.path == "y.jsonl"
    assert load(minimal(data=[recipe["data"]]), "data.0.source=pictures", "data.0.path=x").data[0].source == "pictures"
    assert load(minimal(), "data.name=split").data[0].label == "split"  # a name there is no kind
    with pytest.raises(ValueError, match=r"data\.0\.source: must be one of .*, got 'lava'"):
        load(recipe, "data.source=lava")
    with pytest.raises(ValueError, match="split belongs to easy_vqa, huggingface; llava does not read it"):
        load(recipe, "data.source=llava", "data.path=x.json", "data.split=test")


def test_data_is_one_source_or_a_list_of_them(load):
    alone = load(minimal(data={"source": "chat", "path": "a.jsonl"}), "data.weight=2")
    assert [(data.path, data.weight) for data in alone.data] == [("a.jsonl", 2.0)]
    sources = [{"source": "chat", "path": "a.jsonl"}, {"source": "llava", "path": "b.json", "weight": 3}]
    mixed = load(minimal(data=sources), "data.1.weight=0.5", "data.0.name=notes")
    assert [(data.label, data.weight) for data in mixed.data] == [("notes", 1.0), ("llava:b.json", 0.5)]
    assert mixed.to_dict()["data"][1]["path"] == "b.json"
    with pytest.raises(ValueError, match=r"data\.2\.weight: '2' is none of the list's 2 items; they count from 0"):
        load(minimal(data=sources), "data.2.weight=1")
    with pytest.raises(ValueError, match=r"data\.0: unknown key 'wieght'; did you mean weight, \w+ or \w+\?"):
        load(minimal(data=[{"source": "chat", "path": "a.jsonl", "wieght": 1}]))


def test_a_stage_cannot_be_changed_after_loading(load):
    config = load(minimal())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_steps = 5
    assert dataclasses.replace(config, num_steps=5).num_steps == 5
    with pytest.raises(ValueError, match=r"(?s)num_steps.*greater than or equal to 0"):
        dataclasses.replace(config, num_steps=-1)


def test_every_stage_script_runs_a_recipe_of_its_own_name():
    scripts = sorted((ROOT / "train").glob("*.py"))
    assert [script.stem for script in scripts] == ["alignment", "distillation", "instruction_tuning"]
    for script in scripts:
        assert f'default="demo/{script.stem}"' in script.read_text()
