"""Whole stages on tiny models: what changes and what may not, resuming, hand-off, launching."""

import itertools
import json
import resource
import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.chat.conversation import Conversation
from hovle.cli import main
from hovle.train import run_stage
from hovle.train.config import load_stage
from hovle.train.data.skips import SkipBudgetError
from hovle.train.monitor import image_ablation as diagnosis
from hovle.train.objectives.next_token import NextTokenObjective
from hovle.train.run import stage_data, start
from hovle.train.run.checkpoint import SaveError, find_checkpoint, sorted_checkpoints
from hovle.train.step import assembly
from hovle.train.step.train_step import NonFiniteLossError, RuinedWeightsError

# peft 0.21.2 asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def read_log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def is_new(name: str) -> bool:
    """Whether a parameter belongs to the stem or to the first two layers."""
    return any(part in name for part in ("patch_embedding", "projector", ".layers.0.", ".layers.1."))


# --- the three stages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_distillation_leaves_every_bit_of_the_language_model(distillation_config, language_models, kind):
    config = distillation_config(f"model.language_model={language_models[kind]}", "dtype=bfloat16")
    trained = weights_in(run_stage(config))
    original = load_file(Path(language_models[kind]) / "model.safetensors")
    assert ("lm_head.weight" in trained) == ("lm_head.weight" in original) == (kind == "untied")
    for name, tensor in original.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(int(parts[2]) + 2)
        place = ".".join(parts).replace("model.", "model.language_model.", 1)
        assert torch.equal(trained.pop(place), tensor), name
    assert all(is_new(name) for name in trained)
    assert trained["model.language_model.layers.0.self_attn.o_proj.weight"].abs().max() > 0  # it started at zero
    assert trained["model.language_model.layers.1.mlp.down_proj.weight"].abs().max() > 0


def test_an_untied_table_learns_while_the_head_stays(distillation_config, language_models):
    changes = ("model.untie_text_embeddings=true", "trainable=[stem, holistic_layers, text_embeddings]")
    folder = run_stage(distillation_config(*changes))
    trained = weights_in(folder)
    table = load_file(Path(language_models["tied"]) / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(trained["lm_head.weight"], table)
    assert not torch.equal(trained["model.language_model.embed_tokens.weight"], table)
    model = HoVLEForConditionalGeneration.from_pretrained(folder)
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, table)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_alignment_changes_the_new_layers_and_nothing_else(next_token_config, checkpoints, kind):
    config = next_token_config(f"model.checkpoint={checkpoints[kind]}", "dtype=bfloat16")
    trained, start = weights_in(run_stage(config)), weights_in(Path(checkpoints[kind]))
    assert set(trained) == set(start)
    changed = {name for name in start if not torch.equal(trained[name], start[name])}
    assert changed == {name for name in start if is_new(name)}


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_instruction_tuning_changes_everything(next_token_config, checkpoints, kind):
    groups = "stem, holistic_layers, language_model" + (", text_embeddings" if kind == "untied" else "")
    config = next_token_config(f"model.checkpoint={checkpoints[kind]}", f"trainable=[{groups}]")
    trained, start = weights_in(run_stage(config)), weights_in(Path(checkpoints[kind]))
    assert set(trained) == set(start)
    assert not [name for name in start if torch.equal(trained[name], start[name])]


def test_lora_changes_the_language_model_alone_and_is_saved_alone(next_token_config, checkpoints):
    folder = run_stage(next_token_config("trainable=[]", "lora.rank=4", "learning_rate=0.01"))
    assert (folder.parent / "adapter" / "adapter_model.safetensors").is_file()
    trained, start = weights_in(folder), weights_in(Path(checkpoints["tied"]))
    changed = {name for name in start if not torch.equal(trained[name], start[name])}
    assert set(trained) == set(start)
    assert changed == {name for name in start if "_proj.weight" in name and not is_new(name)}


def test_a_stage_learns_and_its_model_loads(next_token_config, data):
    validation = ("validation.source=chat", f"validation.path={data / 'chat.jsonl'}", "num_validation_batches=2")
    groups = "trainable=[stem, holistic_layers, language_model]"
    folder = run_stage(next_token_config(*validation, groups, "num_steps=12", "learning_rate=0.01"))
    first, last = (entry for entry in read_log(folder.parent) if entry.get("event") == "validation")
    assert (first["step"], last["step"]) == (0, 12)
    assert last["cross_entropy"] < first["cross_entropy"] - 1
    model = HoVLEForConditionalGeneration.from_pretrained(folder)
    processor = HoVLEProcessor.from_pretrained(folder)
    assert model.dtype == torch.float32
    messages = [{"role": "user", "content": [{"type": "image", "path": str(data / "pictures" / "00.png")}]}]
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[1] > inputs["input_ids"].shape[1]


def test_a_run_records_its_recipe_and_what_it_ran_on(next_token_config):
    config = next_token_config()
    folder = run_stage(config).parent
    assert load_stage(str(folder / "recipe.yaml")) == config
    start, *steps, finish = read_log(folder)
    assert (start["event"], start["dtype"], start["compiled"], start["num_processes"]) == (
        "start",
        "float32",
        False,
        1,
    )
    assert [entry["step"] for entry in steps] == [1, 2, 3, 4]
    assert all(entry["time"] > 1e9 for entry in steps)
    assert finish["event"] == "finish"
    assert start["predicted"] == finish["predicted"]
    assert (
        set(finish["measured"])
        < set(start["predicted"])
        == {
            "flops_per_step",
            "tokens_per_second",
            "peak_memory_gib",
        }
    )
    assert all(value > 0 for value in [*start["predicted"].values(), *finish["measured"].values()])
    # Mostly Python and its libraries, which are there before the first step.
    assert start["predicted"]["peak_memory_gib"] < 1.3 * finish["measured"]["peak_memory_gib"]


def test_git_is_not_needed(next_token_config, monkeypatch):
    monkeypatch.setenv("PATH", "")
    folder = run_stage(next_token_config("num_steps=1")).parent
    assert read_log(folder)[0]["commit"] is None


@pytest.mark.slow
# The compiler looks at the gradient of every input it guards, hidden states among them.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_learn_what_eager_ones_do(next_token_config, tmp_path):
    eager = run_stage(next_token_config())
    compiled = run_stage(next_token_config("compile=on", f"output={tmp_path / 'compiled'}"))
    assert read_log(compiled.parent)[0]["compiled"] is True
    for name, tensor in weights_in(eager).items():
        torch.testing.assert_close(weights_in(compiled)[name], tensor, atol=1e-3, rtol=0)


# --- one run per folder ----------------------------------------------------------------------------------------------


def test_an_occupied_folder_is_refused_and_left_alone(next_token_config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"already holds a run\. Continue it with --resume, or choose another"):
        run_stage(next_token_config())
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_run_that_could_not_start_does_not_occupy_its_folder(next_token_config, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="no conversations"):
        run_stage(next_token_config(f"data.path={tmp_path / 'empty.jsonl'}"))
    assert not (tmp_path / "run").exists()
    run_stage(next_token_config("num_steps=1"))


@pytest.mark.parametrize("fixture", ["next_token_config", "distillation_config"])
def test_a_dry_run_shows_much_and_writes_nothing(request, fixture, tmp_path, capsys):
    config = request.getfixturevalue(fixture)()
    before = sorted(tmp_path.rglob("*"))
    run_stage(config, dry_run=True)
    assert sorted(tmp_path.rglob("*")) == before
    shown = capsys.readouterr().out
    assert f"objective       {config.objective.name}" in shown
    assert "trains          stem, holistic_layers: 133,312 of" in shown
    assert "<|im_start|>user\n" in shown
    assert shown.count("<|im_start|>user") == 1 or fixture == "next_token_config"  # one sample


def test_a_dry_run_shows_a_sample_that_fills_its_row(next_token_config, tmp_path, capsys):
    (tmp_path / "one.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "A tree?"}, {"role": "assistant", "content": "A bus."}]})
    )
    source = f"data.path={tmp_path / 'one.jsonl'}"
    run_stage(next_token_config(source), dry_run=True)
    tokens = 0
    shown = capsys.readouterr().out
    for length in range(5, 60):
        try:
            run_stage(next_token_config(source, f"row_length={length}"), dry_run=True)
        except SkipBudgetError:  # no row can hold it
            continue
        tokens = length
        break
    assert tokens
    assert capsys.readouterr().out.split("first sample")[1] == shown.split("first sample")[1]


# --- stopping and resuming -------------------------------------------------------------------------------------------


def interrupt_at(monkeypatch, step: int) -> None:
    """Make the run stop inside this optimizer step, as a user or the machine might."""
    original, calls = assembly.train_step, []

    def train_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(assembly, "train_step", train_step)


RESUMED = {
    "next_token": ("next_token_config", []),
    "next_token, worker": ("next_token_config", ["num_workers=1"]),
    "next_token, accumulation": ("next_token_config", ["gradient_accumulation_steps=3", "warmup_ratio=0.5"]),
    "next_token, bfloat16": ("next_token_config", ["dtype=bfloat16", "trainable=[stem, language_model]"]),
    "distillation": ("distillation_config", []),
    "distillation, projection, worker": ("distillation_config", ["teacher.layers=[{teacher: -2}]", "num_workers=1"]),
    "distillation, standardised teacher": ("distillation_config", ["teacher.standardize=true"]),
    "distillation, accumulation": ("distillation_config", ["gradient_accumulation_steps=2", "packing_window=7"]),
    "distillation, untied": (
        "distillation_config",
        ["model.untie_text_embeddings=true", "trainable=[stem, text_embeddings]"],
    ),
    "lora": ("next_token_config", ["lora.rank=4", "trainable=[]"]),
    "lora, dropout, worker": ("next_token_config", ["lora.rank=4", "lora.dropout=0.2", "num_workers=1"]),
}


@pytest.mark.parametrize(("fixture", "overrides"), RESUMED.values(), ids=RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(request, monkeypatch, tmp_path, fixture, overrides):
    make_config = request.getfixturevalue(fixture)
    straight = run_stage(make_config(*overrides, f"output={tmp_path / 'straight'}"))
    config = make_config(*overrides, "checkpoint_every=2")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config)
    assert not (tmp_path / "run" / "model").exists()
    newest = find_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "checkpoint-000002"
    resumed = run_stage(config, resume=True)
    assert_same_weights(weights_in(resumed), weights_in(straight))
    keys = ("step", "loss", "gradient_norm", "learning_rate")
    expected, found = (
        [tuple(entry[key] for key in keys) for entry in read_log(folder.parent) if "loss" in entry]
        for folder in (straight, resumed)
    )
    assert found == [*expected[:3], *expected[2:]]  # step 3 was done twice


@pytest.fixture
def faulty(data, tmp_path) -> str:
    """The chats with a damaged picture and a conversation without a reply; every third record is of no use."""
    copied = Path(shutil.copytree(data, tmp_path / "faulty"))
    (copied / "damaged.png").write_bytes((data / "pictures" / "01.png").read_bytes()[:60])
    lines = (data / "chat.jsonl").read_text().splitlines()
    turns = json.loads(lines[0])["messages"]
    turns[0]["content"][0]["path"] = "damaged.png"
    bad = [json.dumps({"messages": turns}), json.dumps({"messages": turns[:1]})]
    (copied / "chat.jsonl").write_text("\n".join(lines[:4] + bad))
    return f"data.path={copied / 'chat.jsonl'}"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_skips_are_logged_and_counted_on_after_resuming(next_token_config, monkeypatch, tmp_path, faulty, num_workers):
    overrides = (faulty, "max_skip_fraction=1", f"num_workers={num_workers}")
    straight = read_log(run_stage(next_token_config(*overrides, f"output={tmp_path / 'straight'}")).parent)
    config = next_token_config(*overrides, "checkpoint_every=2", "log_every=3")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config)
    resumed = read_log(run_stage(config, resume=True).parent)
    counts = [[entry for entry in log if "loss" in entry][-1] for log in (straight, resumed)]
    for name in ("samples_drawn", "samples_skipped", "samples_split"):
        assert counts[0][name] == counts[1][name]
    events = [[entry for entry in log if entry.get("event") == "skip"] for log in (straight, resumed)]
    strip = [[(entry["name"], entry["reason"]) for entry in some] for some in events]
    assert strip[0] == strip[1]
    assert counts[0]["samples_skipped"] == Counter(reason for _, reason in strip[0])
    assert set(strip[0]) == {("chat.jsonl:5", "unreadable picture"), ("chat.jsonl:6", "no supervised token")}
    assert all("damaged.png" in entry["detail"] for entry in events[0] if entry["name"] == "chat.jsonl:5")


def test_skips_of_the_validation_data_are_logged(next_token_config, tmp_path, faulty):
    path = faulty.removeprefix("data.path=")
    validation = ("validation.source=chat", f"validation.path={path}", "num_validation_batches=2")
    run_stage(next_token_config(*validation, "max_skip_fraction=1", "num_steps=1"))
    events = [entry for entry in read_log(tmp_path / "run") if entry.get("event") == "skip"]
    assert {entry["name"] for entry in events} <= {"chat.jsonl:5", "chat.jsonl:6"}
    assert events


def test_the_held_out_samples_do_not_depend_on_how_a_step_is_cut(next_token_config, data, tmp_path):
    validation = ("validation.source=chat", f"validation.path={data / 'chat.jsonl'}", "num_validation_batches=3")
    found = []
    for number in (1, 2, 4):
        shape = (f"gradient_accumulation_steps={number}", "num_steps=1", "learning_rate=1e-20", "rows_per_batch=1")
        run_stage(next_token_config(*validation, *shape, f"output={tmp_path / str(number)}"))
        entries = [entry for entry in read_log(tmp_path / str(number)) if "event" in entry]
        numbers = [entry for entry in entries if entry["event"] in ("validation", "image_ablation")]
        assert [entry["event"] for entry in numbers] == ["validation", "validation", "image_ablation"]
        found.append([{key: value for key, value in entry.items() if key != "time"} for entry in numbers])
    assert all(numbers == found[0] for numbers in found)


def test_a_validation_source_without_a_usable_sample_is_refused(next_token_config, tmp_path):
    lines = [json.dumps({"messages": [{"role": "user", "content": "A tree?"}]})] * 3
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    validation = ("validation.source=chat", f"validation.path={tmp_path / 'questions.jsonl'}")
    with pytest.raises(ValueError, match=r"(?s)chat:questions\.jsonl has no sample that can be used.* no reply to"):
        run_stage(next_token_config(*validation, "max_skip_fraction=1"))


def test_distillation_takes_the_pictures_of_a_mixed_list_and_counts_what_has_none(distillation_config, data, tmp_path):
    sources = (
        f"[{{source: chat, path: {data / 'chat.jsonl'}, weight: 2}}, {{source: pictures, path: {data / 'pictures'}}}]"
    )
    run_stage(distillation_config(f"data={sources}", "num_steps=2"))
    log = read_log(tmp_path / "run")
    assert not any(entry.get("event") == "skip" for entry in log)
    last = [entry for entry in log if "loss" in entry][-1]
    assert last["samples_skipped"].keys() == {"no picture"}  # text-only chats: counted, but no fault
    assert last["samples_drawn"] > last["samples_skipped"]["no picture"] > 0


def test_too_many_bad_records_stop_the_run_name_the_worst_and_cost_no_step(next_token_config, faulty, tmp_path):
    with pytest.raises(SkipBudgetError) as caught:
        run_stage(next_token_config(faulty))
    message = str(caught.value)
    assert "2 records of chat:chat.jsonl cannot be used, more than max_skip_fraction (0.001) of 1,000" in message
    assert "chat:chat.jsonl: no supervised token" in message
    assert "chat.jsonl:6: no reply to learn from." in message
    assert "hovle data doctor" in message
    log = read_log(tmp_path / "run")
    assert [entry["event"] for entry in log if "event" in entry][:3] == [
        "start",
        "skip",
        "skip",
    ]  # logged all the same
    stopped = [entry["step"] for entry in log if "loss" in entry][-1]
    assert find_checkpoint(tmp_path / "run").name == f"checkpoint-{stopped:06d}"
    with pytest.raises(SkipBudgetError, match="2 records"):  # at once, as nothing has changed
        run_stage(next_token_config(faulty), resume=True)
    resumed = weights_in(run_stage(next_token_config(faulty, "max_skip_fraction=1"), resume=True))
    straight = run_stage(next_token_config(faulty, "max_skip_fraction=1", f"output={tmp_path / 'straight'}"))
    assert_same_weights(resumed, weights_in(straight))


def test_a_damaged_picture_that_the_doctor_lets_pass_stops_no_epoch(next_token_config, data, tmp_path, capsys):
    copied = Path(shutil.copytree(data, tmp_path / "copied"))
    (copied / "pictures" / "01.png").write_bytes((data / "pictures" / "01.png").read_bytes()[:60])
    (copied / "chat.jsonl").write_text("\n".join((data / "chat.jsonl").read_text().splitlines()[:6]))
    source = f"data.path={copied / 'chat.jsonl'}"
    next_token_config()
    recipe = str(tmp_path / "next_token.yaml")
    assert main(["data", "doctor", recipe, source, "--out", str(tmp_path / "lengths.png")]) == 0
    assert "skipped        1 " in capsys.readouterr().out
    run_stage(next_token_config(source, "num_steps=12"))
    last = [entry for entry in read_log(tmp_path / "run") if "loss" in entry][-1]
    assert last["samples_skipped"]["unreadable picture"] > 2  # more reads than bad records are allowed


def test_data_that_cannot_be_drawn_any_more_costs_no_step(next_token_config, monkeypatch, tmp_path):
    load_batches = stage_data.load_batches

    def failing(*arguments):
        yield from itertools.islice(load_batches(*arguments), 3)
        raise SkipBudgetError("200 samples in a row had to be skipped.")

    straight = weights_in(run_stage(next_token_config(f"output={tmp_path / 'straight'}")))
    with monkeypatch.context() as patch:
        patch.setattr(stage_data, "load_batches", failing)
        with pytest.raises(SkipBudgetError, match="200 samples in a row"):
            run_stage(next_token_config())
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-000003"
    assert_same_weights(weights_in(run_stage(next_token_config(), resume=True)), straight)


# --- where generation ends -------------------------------------------------------------------------------------------

ENDED_OTHERWISE = """{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}{% if loop.last and message.role == 'assistant' %}LAST{% else %}<|im_end|>{% endif %}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def with_template(checkpoint: str, folder: Path, template: str) -> str:
    """A copy of a checkpoint with another chat template and settings of generation."""
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").write_text(template)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps({**settings, "eos_token_id": 5, "top_k": 7, "repetition_penalty": 1.5})
    )
    return f"model.checkpoint={folder}"


@pytest.mark.parametrize(("last", "ends"), [("<|endoftext|>", [5, 0]), ("<|im_end|>", [5, 2])])
def test_what_ends_the_replies_that_are_taught_ends_generation(next_token_config, checkpoints, tmp_path, last, ends):
    start = with_template(checkpoints["tied"], tmp_path / "start", ENDED_OTHERWISE.replace("LAST", last))
    config = next_token_config(start, f"data.path={write_texts(tmp_path)}", "num_steps=2", "checkpoint_every=1")
    folder = run_stage(config)
    for place in (folder, folder.parent / "checkpoint-000001"):
        written = json.loads((place / "generation_config.json").read_text())
        assert written["eos_token_id"] == ends, place
        assert written["repetition_penalty"] == 1.5
        assert written.get("top_k") is None  # without do_sample it means nothing, and could not be saved
    conversation = Conversation(folder)
    assert conversation.model.generation_config.eos_token_id == ends
    always_the_end = [
        lambda input_ids, scores: torch.nn.functional.one_hot(torch.tensor([ends[-1]]), scores.shape[-1]).float()
    ]
    inputs = conversation.processor(text="<|im_start|>user", return_tensors="pt")
    said = conversation.model.generate(**inputs, max_new_tokens=9, do_sample=False, logits_processor=always_the_end)
    assert said.shape[1] == inputs["input_ids"].shape[1] + 1


def test_a_template_that_ends_replies_in_words_is_told_of(next_token_config, checkpoints, tmp_path, capsys):
    template = ENDED_OTHERWISE.replace("LAST", "(over)").replace("<|im_end|>", "(next)")
    start = with_template(checkpoints["tied"], tmp_path / "start", template)
    run_stage(next_token_config(start, f"data.path={write_texts(tmp_path)}", "num_steps=1"))
    assert "ends replies with no special token" in capsys.readouterr().out


def write_texts(folder: Path) -> Path:
    """Chats of text alone."""
    messages = [{"role": "user", "content": "A tree?"}, {"role": "assistant", "content": "A bus and a dog."}]
    (folder / "texts.jsonl").write_text("\n".join([json.dumps({"messages": messages})] * 4))
    return folder / "texts.jsonl"


def test_the_number_format_is_measured_once(next_token_config, monkeypatch, tmp_path):
    config = next_token_config("dtype=auto", "checkpoint_every=2")
    with monkeypatch.context() as patch:
        patch.setattr(start, "choose_dtype", lambda name, device: torch.bfloat16)
        interrupt_at(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config)
    monkeypatch.setattr(start, "choose_dtype", lambda name, device: torch.float32)
    run_stage(config, resume=True)
    starts = [entry for entry in read_log(tmp_path / "run") if entry.get("event") == "start"]
    assert [entry["dtype"] for entry in starts] == ["bfloat16", "bfloat16"]


@pytest.fixture
def interrupted(next_token_config, monkeypatch, tmp_path) -> Path:
    """A run folder with a checkpoint after two of four steps."""
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run_stage(next_token_config("checkpoint_every=2"))
    return tmp_path / "run"


def test_resuming_another_recipe_or_other_data_is_refused(interrupted, next_token_config, data, tmp_path):
    with pytest.raises(ValueError, match=r"recipe changed \(learning_rate: 0.001 -> 0.5\)"):
        run_stage(next_token_config("learning_rate=0.5"), resume=True)
    shutil.copytree(data, tmp_path / "data")
    lines = (data / "chat.jsonl").read_text().splitlines()
    (tmp_path / "data" / "chat.jsonl").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match=r"recipe changed .*data: "):
        run_stage(next_token_config(f"data.path={tmp_path / 'data' / 'chat.jsonl'}"), resume=True)


def test_resuming_on_changed_data_is_refused(next_token_config, monkeypatch, data, tmp_path):
    copied = Path(shutil.copytree(data, tmp_path / "data")) / "chat.jsonl"
    config = next_token_config("checkpoint_every=2", f"data.path={copied}")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config)
    copied.write_text(copied.read_text().replace("apples", "pears"))
    with pytest.raises(ValueError, match="Cannot resume: the data changed"):
        run_stage(config, resume=True)


def test_a_checkpoint_is_a_model_folder(interrupted, checkpoints):
    newest = find_checkpoint(interrupted)
    assert newest is not None
    model = HoVLEForConditionalGeneration.from_pretrained(newest)
    HoVLEProcessor.from_pretrained(newest)
    assert model.dtype == torch.float32
    start = weights_in(Path(checkpoints["tied"]))
    assert not torch.equal(
        model.state_dict()["model.projector.linear_2.weight"], start["model.projector.linear_2.weight"]
    )


def test_a_checkpoint_of_a_run_in_bfloat16_loses_no_digit(next_token_config, monkeypatch, tmp_path):
    """Frozen weights are stored in bfloat16 then; the folder must still say that its weights are float32."""
    config = next_token_config("checkpoint_every=2", "dtype=bfloat16", "trainable=[stem]")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config)
    newest = find_checkpoint(tmp_path / "run")
    assert newest is not None
    assert json.loads((newest / "config.json").read_text())["dtype"] == "float32"
    saved = weights_in(newest)
    assert "lm_head.weight" not in saved  # tied, so once is enough
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    loaded = HoVLEForConditionalGeneration.from_pretrained(newest).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


def test_a_full_disk_leaves_the_older_checkpoint_to_resume_from(next_token_config, monkeypatch, tmp_path):
    config = next_token_config("checkpoint_every=1", "num_steps=5")
    straight = run_stage(next_token_config("num_steps=5", f"output={tmp_path / 'straight'}"))
    original, calls = torch.save, []

    def save(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise OSError("No space left on device")
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(SaveError, match=r"step 3 .*No space left.*checkpoint-000002 is complete"):
            run_stage(config)
    newest = find_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == "checkpoint-000002"
    assert_same_weights(weights_in(run_stage(config, resume=True)), weights_in(straight))


def test_files_that_cannot_grow_leave_the_older_checkpoint_to_resume_from(next_token_config, monkeypatch, tmp_path):
    """The system itself refuses the writes here, somewhere inside the weights."""
    config = next_token_config("checkpoint_every=1", "num_steps=5")
    straight = run_stage(next_token_config("num_steps=5", f"output={tmp_path / 'straight'}"))
    original, before = assembly.train_step, resource.getrlimit(resource.RLIMIT_FSIZE)
    calls: list[int] = []

    def train_step(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        return original(*args, **kwargs)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(assembly, "train_step", train_step)
            with pytest.raises(
                SaveError, match=r"step 3 .*File too large.*checkpoint-000002 is complete: continue it"
            ):
                run_stage(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same_weights(weights_in(run_stage(config, resume=True)), weights_in(straight))


def test_a_run_without_a_checkpoint_yet_starts_anew_when_resumed(next_token_config, monkeypatch, tmp_path, capsys):
    straight = run_stage(next_token_config("checkpoint_every=2", f"output={tmp_path / 'straight'}"))
    config = next_token_config("checkpoint_every=2")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config)
    with pytest.raises(ValueError, match=r"recipe changed \(learning_rate: 0.001 -> 0.5\)"):
        run_stage(next_token_config("learning_rate=0.5"), resume=True)
    assert_same_weights(weights_in(run_stage(config, resume=True)), weights_in(straight))
    assert "run holds no checkpoint yet: starting at step 0." in capsys.readouterr().out


@pytest.mark.parametrize("left", [[], [".recipe.yaml.writing"]], ids=["absent", "half claimed"])
def test_a_new_folder_may_be_resumed(next_token_config, tmp_path, left):
    for name in left:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / name).write_text("half")
    config = next_token_config("num_steps=1")
    run_stage(config, resume=True)
    assert load_stage(str(tmp_path / "run" / "recipe.yaml")) == config
    assert not (tmp_path / "run" / ".recipe.yaml.writing").exists()


def test_resuming_a_finished_run_does_nothing(next_token_config, capsys):
    folder = run_stage(next_token_config("num_steps=1"))
    before = {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}
    assert run_stage(next_token_config("num_steps=1"), resume=True) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")} == before
    assert "run is finished: nothing to resume." in capsys.readouterr().out


def test_the_checkpoint_with_the_smallest_validation_loss_stays(next_token_config, monkeypatch, data, tmp_path):
    validation = ("validation.source=chat", f"validation.path={data / 'chat.jsonl'}", "num_validation_batches=1")
    validation = (*validation, "image_ablation=false")
    losses = iter([9.0, 3.0, 1.0, 2.0, 4.0, 3.0, 2.5])  # before the first step, after steps 1 to 5, after the last

    def validate(*args):
        return {"cross_entropy": next(losses), "reply_accuracy": 0.5, "image_norm_ratio": 1.0}

    monkeypatch.setattr(diagnosis, "validate", validate)
    config = next_token_config(*validation, "keep_best=true", "checkpoint_every=1", "num_steps=6", "keep_last=2")
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            run_stage(config)
    run_stage(config, resume=True)  # remembers the best one
    assert [path.name for path in sorted_checkpoints(tmp_path / "run")] == [
        "checkpoint-000002",
        "checkpoint-000004",
        "checkpoint-000005",
    ]
    assert (tmp_path / "run" / "best").resolve().name == "checkpoint-000002"
    HoVLEForConditionalGeneration.from_pretrained(tmp_path / "run" / "best")


def test_a_loss_that_is_not_a_number_ends_the_run_with_its_checkpoint_kept(next_token_config, monkeypatch, tmp_path):
    forward = NextTokenObjective.forward
    calls = iter(range(100))

    def fail_in_the_third_step(self, batch):
        output = forward(self, batch)
        if self.training and next(calls) > 2:  # the first one counts operations
            output.terms = {name: term * float("nan") for name, term in output.terms.items()}
        return output

    monkeypatch.setattr(NextTokenObjective, "forward", fail_in_the_third_step)
    with pytest.raises(NonFiniteLossError, match=r"on the batch of chat\.jsonl:.*Weights are as before this step"):
        run_stage(next_token_config("checkpoint_every=1"))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-000002"]
    assert not (tmp_path / "run" / "model").exists()


def ruin_after(monkeypatch, num_steps: int) -> None:
    """Let the update of one step leave a NaN in the weights."""
    update = torch.optim.AdamW.step
    calls = iter(range(1, 100))

    def step(self, *arguments, **options):
        update(self, *arguments, **options)
        if next(calls) == num_steps:
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] = float("nan")

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


RUINED = r"After step {} 1 of \d+ tensors that learn hold NaN or infinity: \S+\. They are not saved\."


@pytest.mark.parametrize(("ruined", "told"), [(4, 4), (2, 2), (3, 3)], ids=["last", "before a checkpoint", "between"])
def test_weights_that_an_update_ruined_are_never_saved(ruined, told, next_token_config, monkeypatch, tmp_path):
    ruin_after(monkeypatch, ruined)
    with pytest.raises(RuinedWeightsError, match=RUINED.format(told)):
        run_stage(next_token_config("checkpoint_every=2"))
    saved = [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert saved == (["checkpoint-000002"] if ruined > 2 else [])


def test_a_validation_that_is_no_number_ends_the_run_without_a_model(next_token_config, data, monkeypatch, tmp_path):
    validation = ("validation.source=chat", f"validation.path={data / 'chat.jsonl'}")
    measure, calls = diagnosis.validate, iter(range(100))

    def fail_after_the_first(*given) -> dict[str, float]:
        terms = measure(*given)
        return dict.fromkeys(terms, float("nan")) if next(calls) else terms

    monkeypatch.setattr(diagnosis, "validate", fail_after_the_first)
    with pytest.raises(NonFiniteLossError, match="Validation after step 4: cross_entropy is nan"):
        run_stage(next_token_config(*validation))
    assert not (tmp_path / "run" / "model").exists()


# --- hand-off --------------------------------------------------------------------------------------------------------


def test_the_next_stage_starts_where_the_last_one_ended(next_token_config, distillation_config, data, tmp_path):
    folder = run_stage(distillation_config(f"output={tmp_path / 'first'}"))
    validation = ("validation.source=chat", f"validation.path={data / 'chat.jsonl'}")
    second = run_stage(next_token_config(f"model.checkpoint={folder}", *validation, f"output={tmp_path / 'second'}"))
    third = run_stage(next_token_config(f"model.checkpoint={second}", *validation, f"output={tmp_path / 'third'}"))
    start, before, *_ = read_log(third.parent)
    assert start["handoff"] < 1e-5
    after = [entry for entry in read_log(second.parent) if entry.get("event") == "validation"][-1]
    assert before["step"] == 0
    assert before["cross_entropy"] == pytest.approx(after["cross_entropy"], abs=1e-5)


def test_a_model_folder_changed_between_stages_is_refused(next_token_config, tmp_path):
    folder = run_stage(next_token_config(f"output={tmp_path / 'first'}"))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-(len(content) // 2) :] = bytes(len(content) // 2)  # half a download
    path.write_bytes(content)
    with pytest.raises(ValueError, match="Hand-off check failed"):
        run_stage(next_token_config(f"model.checkpoint={folder}"))
    assert not (tmp_path / "run").exists()


# --- launching -------------------------------------------------------------------------------------------------------


def test_the_command_the_module_and_the_stage_scripts_are_the_same(next_token_config, monkeypatch, tmp_path, capsys):
    next_token_config()
    recipe = str(tmp_path / "next_token.yaml")

    def script(name: str) -> str:
        return str(ROOT / "train" / f"{name}.py")

    launches = {
        "command": lambda arguments: main(["train", *arguments]),
        "script": lambda arguments: run_as_main(runpy.run_path, script("alignment"), arguments),
        "other script": lambda arguments: run_as_main(runpy.run_path, script("distillation"), arguments),
        "module": lambda arguments: run_as_main(runpy.run_module, "hovle.train", arguments),
    }

    def run_as_main(run, name: str, arguments: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.delitem(sys.modules, "hovle.train.__main__", raising=False)  # as in a fresh process
        with pytest.raises(SystemExit) as left:
            run(name, run_name="__main__")
        return left.value.code

    results = {}
    for name, launch in launches.items():
        folder = tmp_path / name
        assert launch([recipe, f"output={folder}", "num_steps=2"]) == 0
        assert f"Model saved in {folder / 'model'}" in capsys.readouterr().out
        results[name] = weights_in(folder / "model")
    for weights in results.values():
        assert_same_weights(weights, results["command"])


def test_a_stage_script_runs_its_own_recipe_unless_told_otherwise(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["alignment.py", f"model.checkpoint={tmp_path / 'none'}", "num_stepz=3"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "train" / "alignment.py"), run_name="__main__")
    assert left.value.code == 1
    assert "demo/alignment.yaml: unknown key 'num_stepz'" in capsys.readouterr().err


def test_options_may_stand_before_and_after_overrides(next_token_config, tmp_path, capsys):
    next_token_config()
    recipe = str(tmp_path / "next_token.yaml")
    for arguments in (["--dry-run", recipe, "row_length=150"], [recipe, "row_length=150", "--dry-run"]):
        assert main(["train", *arguments]) == 0
        assert "2 rows of 150 tokens" in capsys.readouterr().out


def test_mistakes_are_told_in_one_line(next_token_config, tmp_path, capsys):
    next_token_config()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").touch()
    assert main(["train", str(tmp_path / "next_token.yaml"), "--resume"]) == 1
    shown = capsys.readouterr().err.splitlines()[-1]
    assert shown.startswith("hovle train: Cannot resume: ")
    assert shown.endswith("/run holds files but no recipe.yaml, so no run. Choose another output.")


@pytest.fixture(scope="module")
def demo_checkpoint(tmp_path_factory) -> str:
    """A tiny HoVLE with the demo's tokenizer and tile size, as its first stage would leave it."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from hovle import assets

    folder = tmp_path_factory.mktemp("demo")
    tokenizer = AutoTokenizer.from_pretrained(assets.language_model())
    tokenizer.save_pretrained(folder / "language_model")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)).save_pretrained(
        folder / "language_model"
    )
    model = HoVLEForConditionalGeneration.from_language_model(folder / "language_model", 1, image_size=112)
    model.save_pretrained(folder / "model")
    HoVLEProcessor.from_language_model(str(folder / "language_model"), model.config, max_tiles=1).save_pretrained(
        folder / "model"
    )
    return str(folder / "model")


@pytest.mark.parametrize("name", ["demo/alignment", "demo/instruction_tuning"])
def test_the_demos_later_recipes_run_dry(name, demo_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", name, f"model.checkpoint={demo_checkpoint}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "source          easy_vqa: " in shown
    filled = float(shown.split(" tiles, ")[1].split("% filled")[0])
    assert filled > 80  # with this small tokenizer; 97 with the real one
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "language_model", ["tiny", pytest.param("asset:smollm2-135m-instruct", marks=pytest.mark.slow)]
)
def test_the_demos_first_recipe_runs_dry(language_model, demo_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if language_model == "tiny":
        language_model = str(Path(demo_checkpoint).parent / "language_model")
    assert main(["train", "demo/distillation", f"model.language_model={language_model}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "objective       distillation" in shown
    assert float(shown.split(" tiles, ")[1].split("% filled")[0]) > 80
    assert list(tmp_path.iterdir()) == []
