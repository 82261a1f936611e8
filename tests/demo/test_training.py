"""`hovle demo train`, without its half hour: report, picture and what a second call keeps."""

import argparse
import json
from collections import Counter

import pytest
import yaml
from PIL import Image

from hovle import cli
from hovle.assets import easy_vqa
from hovle.assets.vqa_questions import Question, draw_questions
from hovle.charts import load_pyplot
from hovle.demo import training as demo
from hovle.demo.answers import Answer
from hovle.train.config import load_stage

SCORES = {
    "accuracy": 0.9,
    "blank_pictures": 0.5,
    "shuffled_pictures": 0.4,
    "accuracy_unbalanced": 0.95,
    "blank_pictures_unbalanced": 0.7,
}
REPORT = {
    "stages": {
        "distillation": {"training_seconds": 60.0, "teacher_cosine": {"before": 0.01, "after": 0.5}},
        "alignment": {"training_seconds": 120.0, **SCORES},
        "instruction_tuning": {"training_seconds": 120.0, **SCORES},
    }
}


def test_the_summary_tells_times_cosines_and_all_eight_scores():
    text = demo.summary(REPORT)
    assert "5.0 minutes" in text
    assert "distillation 20%" in text
    assert "0.010 before distillation, 0.500 after" in text
    assert text.count("exact match") == 2
    assert text.count("blank pictures 50.0%") == 2
    assert text.count("95.0% on questions as they come") == 2


def test_the_picture_shows_every_question(tmp_path):
    shown = [
        Answer(Image.new("RGB", (64, 64), "red"), f"what is {index}?", "red", "red", is_right=True)
        for index in range(7)
    ]
    demo.draw_report(load_pyplot(), tmp_path / "demo.png", shown, REPORT)
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 1000


@pytest.mark.parametrize("balanced", [True, False])
def test_questions_are_the_same_every_time_and_about_test_pictures(balanced):
    questions = draw_questions(easy_vqa() / "test", 50, balanced=balanced)
    assert questions == draw_questions(easy_vqa() / "test", 50, balanced=balanced)
    assert len({(question.text, question.picture) for question in questions}) == 50
    assert all("test" in question.picture.parts for question in questions)
    with pytest.raises(ValueError, match="not 0"):
        draw_questions(easy_vqa() / "test", 0, balanced=balanced)


def best_guess(questions: list[Question]) -> float:
    """Share of right answers of someone who knows only how often each answer to a wording is right."""
    answers = Counter((question.text, question.answer) for question in questions)
    best = Counter()
    for (text, _), count in answers.items():
        best[text] = max(best[text], count)
    return sum(best.values()) / len(questions)


def test_the_wording_of_balanced_questions_tells_little():
    split = easy_vqa() / "test"
    assert best_guess(draw_questions(split, 5000, balanced=False)) > 0.66
    balanced = draw_questions(split, 1000, balanced=True)
    yes = sum(question.answer == "yes" for question in balanced)
    no = sum(question.answer == "no" for question in balanced)
    assert 0.8 < yes / no < 1.25
    # Of ten questions a wording the luckiest answer is above its share by chance alone.
    assert best_guess(balanced) < 0.6


def finish_stage(output, stage, overrides=()):
    """Leave what a finished stage leaves; return the three configs."""
    args = argparse.Namespace(output=output, overrides=[])
    configs = {name: load_stage(f"demo/{name}", demo.stage_settings(name, args)) for name in demo.STAGES}
    folder = output / stage
    (folder / "model").mkdir(parents=True)
    recipe = load_stage(f"demo/{stage}", [*demo.stage_settings(stage, args), *overrides]).to_dict()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    entries = [
        {"event": "start", "time": 100.0, "device": "cpu", "num_threads": 2, "dtype": "bfloat16", "compiled": True}
        | {"processor": "one", "torch": "2.14.1", "commit": None},
        {"event": "validation", "time": 101.0, "image_cosine": 0.0},
        {"step": 10, "loss": 1.0, "elapsed_seconds": 5.0, "tokens_per_second": 100.0, "time": 106.0},
        {"step": 20, "loss": 1.0, "elapsed_seconds": 4.0, "tokens_per_second": 50.0, "time": 110.0},
        {"event": "validation", "time": 111.0, "image_cosine": 0.6},
        {"event": "finish", "time": 112.0},
    ]
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return configs


def test_a_finished_stage_is_kept_and_its_log_is_summed_up(tmp_path, capsys):
    configs = finish_stage(tmp_path, "distillation")
    demo.check_kept_stages(tmp_path, configs)
    demo.train_stage("distillation", tmp_path / "distillation", configs["distillation"])
    assert "already trained" in capsys.readouterr().out
    facts = demo.stage_facts(tmp_path / "distillation")
    assert (facts["seconds"], facts["training_seconds"], facts["tokens"]) == (12.0, 9.0, 700)
    assert facts["teacher_cosine"] == {"before": 0.0, "after": 0.6}


def test_a_stage_that_differs_in_what_moves_no_number_is_kept(tmp_path):
    configs = finish_stage(tmp_path, "distillation", ["log_every=3", "num_workers=0"])
    demo.check_kept_stages(tmp_path, configs)


def test_a_stage_of_another_recipe_is_not_kept(tmp_path):
    configs = finish_stage(tmp_path, "distillation", ["rows_per_batch=4"])
    with pytest.raises(ValueError, match=r"rows_per_batch.*--fresh"):
        demo.check_kept_stages(tmp_path, configs)


def test_a_stage_whose_steps_were_cut_is_kept_unless_a_number_is_asked_for(tmp_path):
    configs = finish_stage(tmp_path, "distillation", ["num_steps=4"])
    assert demo.check_kept_stages(tmp_path, configs)["distillation"].num_steps == 4
    with pytest.raises(ValueError, match=r"num_steps.*--fresh"):
        demo.check_kept_stages(tmp_path, configs, [f"num_steps={configs['distillation'].num_steps}"])


def set_seconds(monkeypatch, seconds: float) -> None:
    monkeypatch.setattr("hovle.train.run.benchmark_step.estimate_seconds", lambda config, accelerator: seconds)


@pytest.mark.parametrize(("minutes", "share"), [(30.0, 1.0), (5.0, 0.5)])
def test_steps_are_cut_alike_where_they_would_take_too_long(tmp_path, monkeypatch, capsys, minutes, share):
    configs = finish_stage(tmp_path, "distillation")  # took 9 s
    wanted = sum(configs[stage].num_steps for stage in demo.STAGES[1:])
    set_seconds(monkeypatch, (demo.TRAINING_SHARE * 60 * 5.0 - 9) / (0.5 * wanted))  # half of them fit in 5 minutes
    pace = demo.Pace(tmp_path, configs)
    fitted = pace.fit_steps(configs, minutes)
    assert fitted["distillation"] == configs["distillation"]
    for stage in demo.STAGES[1:]:
        assert fitted[stage].num_steps == pytest.approx(share * configs[stage].num_steps, abs=1)
    capsys.readouterr()
    assert demo.choose_minutes(pace, minutes) == minutes  # nobody sits at a terminal
    said = capsys.readouterr().out
    assert ("50%" in said and "--minutes 10" in said) == (share < 1)
    with pytest.raises(ValueError, match="--minutes"):
        pace.fit_steps(configs, 0.5)


def test_a_person_chooses_the_minutes(tmp_path, monkeypatch):
    configs = finish_stage(tmp_path, "distillation")
    set_seconds(monkeypatch, 5.0)
    pace = demo.Pace(tmp_path, configs)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for typed, minutes in [("", 30.0), ("95", 95.0)]:
        monkeypatch.setattr("builtins.input", lambda prompt, typed=typed: typed)
        assert demo.choose_minutes(pace, 30.0) == minutes
    monkeypatch.setattr("builtins.input", lambda prompt: "long")
    with pytest.raises(ValueError, match="'long'"):
        demo.choose_minutes(pace, 30.0)


def test_what_a_stage_took_corrects_the_estimate_of_the_next(tmp_path, monkeypatch):
    set_seconds(monkeypatch, 0.9)  # the finished stage's 20 steps took 9 s: 0.45 s each
    configs = {stage: load_stage(f"demo/{stage}") for stage in demo.STAGES}
    pace = demo.Pace(tmp_path, configs)
    before = pace.remaining_seconds()
    finish_stage(tmp_path, "distillation")
    rest = sum(configs[stage].num_steps for stage in demo.STAGES[1:])
    assert before == pytest.approx(0.9 * (configs["distillation"].num_steps + rest))
    assert pace.remaining_seconds() == pytest.approx(0.45 * rest)


def test_more_steps_promise_more():
    promised = [demo.expected_accuracy(share) for share in (0.0, 0.2, 0.44, 0.7, 1.0)]
    assert promised == sorted(promised)
    assert promised[2] == pytest.approx(0.80)


def test_a_demo_that_is_finished_is_not_measured_again(tmp_path, monkeypatch):
    for stage in demo.STAGES:
        configs = finish_stage(tmp_path, stage)
    monkeypatch.setattr(
        "hovle.train.run.benchmark_step.estimate_seconds", lambda *_: pytest.fail("nothing is left to measure")
    )
    assert demo.Pace(tmp_path, configs).fit_steps(configs, minutes=0.1) == configs


def test_an_interrupted_stage_goes_on_with_its_own_steps(tmp_path, monkeypatch):
    finish_stage(tmp_path, "distillation")
    configs = finish_stage(tmp_path, "alignment", ["num_steps=7"])
    (tmp_path / "alignment" / "model").rmdir()
    kept = demo.check_kept_stages(tmp_path, configs)
    assert kept["alignment"].num_steps == 7
    resumed = []
    monkeypatch.setattr("hovle.train.run_stage", lambda config, resume: resumed.append((config, resume)))
    demo.train_stage("alignment", tmp_path / "alignment", kept["alignment"])
    assert resumed == [(kept["alignment"], True)]


def test_a_stage_trained_before_one_that_is_missing_is_not_kept(tmp_path):
    configs = finish_stage(tmp_path, "alignment")
    with pytest.raises(ValueError, match="before distillation"):
        demo.check_kept_stages(tmp_path, configs)


def test_fresh_deletes_runs_and_nothing_else(tmp_path):
    finish_stage(tmp_path, "distillation")
    (tmp_path / "thesis").mkdir()
    demo.delete_runs(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis"]
    (tmp_path / "alignment").mkdir()
    (tmp_path / "alignment" / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match=r"no recipe\.yaml"):
        demo.delete_runs(tmp_path)
    assert (tmp_path / "alignment" / "mine.txt").exists()


@pytest.mark.parametrize("arguments", [["--questions", "0"], ["num_stepz=3"], ["--questions", "100000"]])
def test_mistakes_are_found_before_training(tmp_path, capsys, arguments):
    assert cli.main(["demo", "train", "--output", str(tmp_path), *arguments]) == 1
    assert capsys.readouterr().err.startswith("hovle demo train: ")
    assert not list(tmp_path.iterdir())
