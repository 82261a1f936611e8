"""hovle-smol's recipes in miniature: drawn pictures, three tiny teachers, a tiny language model, every stage."""

import json
import shutil
from pathlib import Path

import pytest
from drawn_packages import write_drawings, write_words_and_fonts
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hovle.assets import resolve_asset
from hovle.cli import main
from hovle.synthesis.registry import SKILLS
from hovle.train.config import StageConfig, load_stage
from hovle.train.plan.command import read_stages
from hovle.train.run.stage import run_stage

# peft 0.21.2 asks for `is_gradient_checkpointing`, which transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STAGES = ("letters", "lines", "distillation", "alignment", "instruction_tuning")

DRAWN = ("letters", "reading", "scenes", "clocks")
"""Skills that are drawn here; those that need packages without stand-ins have the pictures of scenes."""

TINY = (
    "rows_per_batch=2", "row_length=512", "num_steps=2", "validate_every=0", "num_validation_batches=1",
    "checkpoint_every=0", "num_workers=0", "log_every=1", "dtype=float32", "compile=off", "packing_window=8",
    "retention={num_tokens: 64, window: 32}", "data.12.path=easy",
    "stop_when_images_ignored=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def ground(tmp_path_factory) -> Path:
    """A folder with `data/smol`, a build of a few pictures, and `data/replay.jsonl`."""
    folder = tmp_path_factory.mktemp("ground")
    assets = write_words_and_fonts(write_drawings(tmp_path_factory.mktemp("assets")))
    build = folder / "data" / "smol"
    options = ("--size", "4", "--workers", "1", "--assets", str(assets))
    assert main(["data", "build", "smol", "--out", str(build), "--skills", *DRAWN, *options]) == 0
    for name in SKILLS.keys() - {*DRAWN}:
        shutil.copytree(build / "scenes", build / name)
    texts = [{"text": f"The quick brown fox jumps over the lazy dog {number} times."} for number in range(40)]
    (folder / "data" / "replay.jsonl").write_text("\n".join(map(json.dumps, texts)))
    shapes = folder / "easy" / "train"  # instead of 4,000 pictures
    (shapes / "images").mkdir(parents=True)
    Image.new("RGB", (64, 64), "red").save(shapes / "images" / "0.png")
    questions = [["what color is it?", "red", 0], ["is it blue?", "no", 0]]
    (shapes / "questions.json").write_text(json.dumps(questions))
    return folder


def tiny_stage(stage: str, language_models: dict[str, str], teacher_weights: str) -> StageConfig:
    """The shipped recipe with everything small, its data, objective and parts as they are."""
    small = list(TINY)
    if stage in ("letters", "lines"):
        teacher = f"{{name: test_efficientnet, checkpoint: {teacher_weights}, image_size: 64, standardize: true}}"
        small = [item for item in small if not item.startswith("data.")]
        small += [f"model.language_model={language_models['tied']}", "model.num_embedding_layers=2"]
        small += [f"teacher=[{teacher}]", "objective.words.num_others=32"]
    if stage == "distillation":
        teacher = f"{{name: test_efficientnet, checkpoint: {teacher_weights}, image_size: 64, standardize: true"
        teachers = ", ".join(f"{teacher}, cache: runs/features{number}}}" for number in range(3))
        small += [f"model.language_model={language_models['tied']}", "model.num_embedding_layers=3"]
        small += [f"teacher=[{teachers}]", "objective.words.num_others=32"]
    return load_stage(f"smol/{stage}", small)


def test_all_stages_run_one_after_another_on_a_build(ground, language_models, teacher_weights, monkeypatch):
    monkeypatch.chdir(ground)
    logged = {}
    for stage in STAGES:
        config = tiny_stage(stage, language_models, teacher_weights)
        run_stage(config)
        logged[stage] = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text().splitlines()]
    steps = {stage: [entry for entry in entries if "event" not in entry] for stage, entries in logged.items()}
    assert [len(entries) for entries in steps.values()] == [2] * len(STAGES)
    for stage in STAGES[:3]:  # a step may hold no letter that is large enough
        assert any(entry["character_cross_entropy"] > 0 for entry in steps[stage])
    assert all(entry["word_cross_entropy"] > 0 and entry["text_error"] >= 0 for entry in steps["distillation"])
    assert all(entry["text_error"] >= 0 for entry in steps["alignment"])
    assert all("language_kl" in entry for entry in steps["instruction_tuning"])  # there the language model learns
    before, after = (
        load_file(ground / "runs" / "smol" / stage / "model" / "model.safetensors") for stage in STAGES[3:]
    )
    language = "model.language_model.layers.3.self_attn.q_proj.weight"
    assert not before[language].equal(after[language])  # adapters are merged
    first = load_file(ground / "runs" / "smol" / "distillation" / "model" / "model.safetensors")
    assert first[language].equal(before[language])  # frozen


def test_every_skill_is_learnt_in_every_stage_and_validated_on_what_is_held_out():
    for stage in STAGES[2:]:
        config = load_stage(f"smol/{stage}")
        assert {source.name for source in config.data} >= {*SKILLS} - {"letters"}
        assert all(source.split == "train" for source in config.data if source.source != "chat")
        assert ("no-picture" in {source.name for source in config.data}) == (stage != "distillation")
        assert (config.validation.path, config.validation.split) == ("data/smol", "validation")
        assert (config.language is not None, config.retention is not None) == (True, True)
        assert config.stop_when_images_ignored == (stage != "distillation")


def test_the_plan_counts_what_the_recipes_say():
    [(_, letters, _), (_, lines, _), (_, first, model), (_, second, _), (_, third, _)] = read_stages(
        [f"smol/{stage}" for stage in STAGES]
    )
    assert lines.model.lower_layers == f"{letters.output}/model"
    assert first.model.lower_layers == f"{lines.output}/model"
    assert first.expected.word_pieces_per_sample > 0
    assert model.image_seq_length == 16
    for before, stage in ((first, second), (second, third)):
        assert stage.model.checkpoint == f"{before.output}/model"


def test_chats_are_the_language_models_own_but_for_its_system_turn():
    folder = str(resolve_asset("asset:smollm2-135m-instruct"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = load_stage("smol/distillation").model.chat_template
    for stage in STAGES[:2]:
        assert load_stage(f"smol/{stage}").model.chat_template == template
    turns = [("system", "Be brief."), ("user", "Hi\n"), ("assistant", "Yes."), ("user", "And?")]
    chat = [{"role": role, "content": content} for role, content in turns]
    for messages in (chat, chat[:3]):
        for opens in (True, False):
            options = {"tokenize": False, "add_generation_prompt": opens}
            own = tokenizer.apply_chat_template(messages, **options)
            assert tokenizer.apply_chat_template(messages, chat_template=template, **options) == own
    alone = tokenizer.apply_chat_template(chat[1:2], chat_template=template, tokenize=False)
    assert alone == "<|im_start|>user\nHi\n<|im_end|>\n"
