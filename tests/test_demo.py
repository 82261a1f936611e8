"""`hovle demo`, without its half hour: report, picture and what a second call keeps."""

import json

from PIL import Image

from hovle import demo
from hovle.eval.vqa import Question

REPORT = {
    "training_seconds": {"distillation": 60.0, "alignment": 120.0, "instruction_tuning": 120.0},
    "teacher_cosine": {"before": 0.01, "after": 0.5},
    "evaluation_seconds": 30.0,
    "alignment": {"accuracy": 0.8, "blank_pictures": 0.5, "shuffled_pictures": 0.4},
    "instruction_tuning": {"accuracy": 0.9, "blank_pictures": 0.5, "shuffled_pictures": 0.4},
}


def test_the_summary_tells_times_cosines_and_all_six_scores():
    text = demo.summary(REPORT)
    assert "5.0 minutes" in text
    assert "distillation 20%" in text
    assert "0.010 before, 0.500 after" in text
    assert text.count("exact match") == 2
    assert text.count("blank pictures 50.0%") == 2


def test_the_picture_shows_every_question(tmp_path):
    shown = [(Question(f"what is {index}?", "red", Image.new("RGB", (64, 64), "red")), "red") for index in range(7)]
    demo.draw_report(tmp_path / "demo.png", shown, REPORT)
    with Image.open(tmp_path / "demo.png") as picture:
        assert picture.width > 1000
        assert picture.convert("RGB").getcolors(maxcolors=1 << 24) is not None


def test_questions_are_the_same_every_time_and_about_test_pictures():
    questions = demo.test_questions(50)
    assert questions == demo.test_questions(50)
    assert len({(question.text, question.picture) for question in questions}) == 50
    assert all("test" in question.picture.parts for question in questions)


def test_a_finished_stage_is_kept(tmp_path, monkeypatch, capsys):
    (tmp_path / "distillation" / "model").mkdir(parents=True)
    entries = [{"event": "start"}, {"step": 10, "elapsed_seconds": 5.0}, {"step": 20, "elapsed_seconds": 4.0}]
    (tmp_path / "distillation" / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert demo.train_stage("distillation", tmp_path, []) == 9.0
    assert "already trained" in capsys.readouterr().out
