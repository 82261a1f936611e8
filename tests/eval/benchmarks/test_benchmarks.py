"""Benchmarks through the real lmms-eval: tiny random weights, and a model that knows the answers."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import pipeline

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.assets import easy_vqa
from hovle.assets.vqa_questions import draw_questions, load_questions
from hovle.cli import main
from hovle.eval.benchmarks import harness
from hovle.eval.benchmarks.suites import TASKS_FOLDER, load_suites
from hovle.eval.vqa import answer_questions, exact_match
from hovle.model.pictures import load_picture

PAPER = load_suites().suites["paper"].benchmarks


@pytest.fixture(scope="module")
def lm(lmms_eval, model_folder):
    """A loaded model for several benchmarks."""
    from hovle.eval.benchmarks.lmms_eval_plugin import HoVLEChat

    return HoVLEChat(str(model_folder), batch_size=2, max_new_tokens=4, max_tiles=2, keep_loaded=True)


def result_of(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def answers_of(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.answers.jsonl").read_text().splitlines()]


# --- the paper's benchmarks on miniature copies


@pytest.mark.parametrize("name", PAPER)
def test_every_adapter_gives_full_marks_to_a_model_that_knows_the_answers(
    name, lm, manager, miniatures, miniature_data, perfect_answer, tmp_path, monkeypatch
):
    from hovle.eval.benchmarks.harness import run_benchmark
    from hovle.eval.benchmarks.lmms_eval_plugin import Answer

    miniature = miniatures[name]
    monkeypatch.setattr(
        lm, "_generate", lambda chats, *_, **__: [Answer(perfect_answer(miniature, chat), 1, 1) for chat in chats]
    )
    benchmark = load_suites().benchmark(name)
    result, answers = run_benchmark(benchmark, lm, manager, tmp_path / "submissions", None, miniature_data)
    assert result["score"] == pytest.approx(miniature.full)
    low, high = result["interval"]
    assert low <= result["score"] <= high + 1e-9
    assert len(answers) == result["num_questions"] == len(miniature.rows) - (name == "seed")  # without its video


@pytest.mark.parametrize("name", PAPER)
def test_right_answers_in_another_form_score_or_are_counted(
    name, lm, manager, miniatures, miniature_data, perfect_answer, tmp_path, monkeypatch
):
    from hovle.eval.benchmarks.harness import run_benchmark
    from hovle.eval.benchmarks.lmms_eval_plugin import Answer

    def say(chats, *_, **__):
        return [Answer(f"The answer is {perfect_answer(miniatures[name], chat)}.", 1, 1) for chat in chats]

    monkeypatch.setattr(lm, "_generate", say)
    benchmark = load_suites().benchmark(name)
    result, _ = run_benchmark(benchmark, lm, manager, tmp_path / "submissions", None, miniature_data)
    is_told = " answers say what is expected in a form" in result["note"] or 'neither "yes" nor' in result["note"]
    assert is_told == (result["score"] < miniatures[name].full - 1e-6)
    assert not (is_told and result["comparable"])


def test_local_data_of_another_split_say_which_it_is(run, pope_data, capsys):
    (pope_data / "pope" / "test-00000-of-00001.parquet").rename(pope_data / "pope" / "train-00000-of-00001.parquet")
    code, _ = run("--tasks", "pope", "--data", pope_data)
    assert code == 1
    assert re.search(r"the files in .*pope are of the split train, as the beginn", capsys.readouterr().out)


@pytest.fixture
def pope_data(tmp_path):
    """Ten questions of POPE's kind, six to be answered with yes; their words end in their numbers."""
    pictures = [Image.new("RGB", (60, 60), (20 * number, 0, 0)) for number in range(10)]
    rows = [
        {
            "id": str(number),
            "question_id": str(number),
            "question": f"Is there a dog in picture {number}?",
            "answer": "yes" if number < 6 else "no",
            "image_source": "made",
            "image": picture,
            "category": "random",
        }
        for number, picture in enumerate(pictures)
    ]
    folder = tmp_path / "data" / "pope"
    folder.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "test-00000-of-00001.parquet")
    return folder.parent


@pytest.mark.parametrize(
    ("answers", "score", "num_unread"),
    [
        # 3 found, 1 missed ("no"), "Yes." and "a dog" are nothing; of the others 1 is taken for yes:
        # precision 3/4, recall 3/4.
        (["Yes", "yes ", "YES", "no", "Yes.", "a dog", "yes", "no", "No.", "no"], 75.0, 3),
        # 4 found, 2 missed, 1 false alarm: precision 4/5, recall 4/6.
        (["yes", "yes", "yes", "yes", "no", "no", "yes", "no", "no", "no"], 800 / 11, 0),
        (["Yes."] * 10, 0.0, 10),
        # One is found and nothing is missed.
        (["yes", *["a dog"] * 9], 100.0, 9),
    ],
)
def test_pope_counts_as_it_says(answers, score, num_unread, run, pope_data, monkeypatch):
    from hovle.eval.benchmarks.lmms_eval_plugin import Answer, HoVLEChat

    def say(self, chats, *_, **__):
        numbers = [re.search(r"picture (\d+)", json.dumps(chat, default=str))[1] for chat in chats]
        return [Answer(answers[int(number)], 1, 1) for number in numbers]

    monkeypatch.setattr(HoVLEChat, "_generate", say)
    monkeypatch.setattr("hovle.eval.benchmarks.suites.Suites.departures", lambda *_: [])
    code, output = run("--tasks", "pope", "--data", pope_data)
    assert code == 0
    result = result_of(output, "pope")
    assert result["score"] == pytest.approx(score)
    assert result["comparable"] == (num_unread == 0)
    said = f'{num_unread} of 10 answers are neither "yes" nor "no" alone'
    assert (said in result["note"]) == (num_unread > 0)


def test_all_of_the_paper_runs_with_a_real_model_and_says_what_is_published(
    run, miniature_data, short_answers, capsys
):
    code, output = run("--suite", "paper", "--data", miniature_data, "--batch-size", 4, "--max-tiles", 2)
    assert code == 0
    results = {name: result_of(output, name) for name in PAPER}
    for name, result in results.items():
        assert result["settings"]["max_tiles"] == 2, name
        assert result["data"]["is_local_copy"], name
        assert len(result["prompt_hash"]) == len(result["data"]["text_hash"]) == len(result["identity"]) == 16, name
        assert any(answer["answer"] for answer in answers_of(output, name)), name
    assert not results["mmvet"]["comparable"]
    assert not results["chartqa"]["comparable"]  # neither 12 tiles nor the data of the Hub
    assert "at most 2 tiles, the published scores have 12; a local copy of the data" in results["chartqa"]["note"]
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| ChartQA "))
    assert row.endswith("| not published | 78.6 | 76.2 | 73.7 | 73.5 |")
    page = (output / "README.md").read_text()
    assert "our choice for the paper's unnamed 17th" in page
    assert not (output / ".eval_results").exists()  # local copies are no scores for the Hub
    assert "pipeline_tag: image-text-to-text" in (output / "model_card.md").read_text()


@pytest.fixture
def tiles_seen(lmms_eval, monkeypatch, pope_data):
    """How many tiles the model was given for each answer; POPE's pictures are four by three here."""
    seen = []
    generate = HoVLEForConditionalGeneration.generate

    def counted(self, *arguments, **kwargs):
        seen.append(len(kwargs["pixel_values"]))
        return generate(self, *arguments, **kwargs)

    monkeypatch.setattr(HoVLEForConditionalGeneration, "generate", counted)
    path = next((pope_data / "pope").glob("*.parquet"))
    rows = [{**row, "image": Image.new("RGB", (80, 60), "red")} for row in datasets.Dataset.from_parquet(str(path))]
    datasets.Dataset.from_list(rows[:1]).to_parquet(path)
    return seen


@pytest.mark.parametrize(
    ("options", "num_tiles", "says"),
    [
        ((), 13, ""),  # 4 x 3 and the thumbnail; the model's own limit is 3
        (("--suite", "offline"), 1, "the model's own limit of tiles, the published scores have 12"),
        (("--max-tiles", 2), 1, "at most 2 tiles, the published scores have 12"),
        (("--max-tiles", 12, "--suite", "offline"), 13, ""),
    ],
)
def test_the_suites_tiles_reach_the_model(
    options, num_tiles, says, run, pope_data, tiles_seen, short_answers, monkeypatch
):
    code, output = run("--tasks", "pope", "--data", pope_data, *options)
    assert code == 0
    assert tiles_seen == [num_tiles]
    result = result_of(output, "pope")
    assert says in result["note"]
    assert ("published scores have 12" in result["note"]) == bool(says)
    assert "| POPE | 1 | 0.0 (0.0 to 0.0) * |" in (output / "README.md").read_text()  # a local copy in any case


def test_other_tiles_than_the_suites_are_said_in_the_table(run):
    _, output = run("--tasks", "easy_vqa", "--suite", "offline", "--limit", 2, "--max-tiles", 2)
    page = (output / "README.md").read_text()
    assert "at most 2 tiles, the suite offline has the model's own" in page
    assert "| most tiles of a picture | 2 |" in page


# --- questions that need no network


@pytest.mark.parametrize("name", ["easy_vqa", "easy_vqa_balanced"])
def test_the_offline_questions_are_those_of_the_demo(name):
    file = {"easy_vqa": "as_they_come", "easy_vqa_balanced": "balanced"}[name]
    lines = (TASKS_FOLDER / "easy_vqa" / f"{file}.jsonl").read_text().splitlines()
    questions = load_questions(easy_vqa() / "test")
    chosen = [questions[json.loads(line)["place"]] for line in lines]
    assert chosen == draw_questions(easy_vqa() / "test", 1000, balanced=name == "easy_vqa_balanced")


def _ask_pipeline(ask, question) -> str:
    content = [{"type": "image", "image": load_picture(question.picture)}, {"type": "text", "text": question.text}]
    said = ask(text=[{"role": "user", "content": content}], max_new_tokens=8, return_full_text=False)
    return said[0]["generated_text"].strip()


def _routes(run, model_folder: Path, num_questions: int) -> tuple[list[list[str]], dict, list]:
    """Answers to the same questions: the harness at three batch sizes, our own API, transformers' pipeline."""
    options = ("--tasks", "easy_vqa", "--suite", "offline", "--limit", num_questions, "--dtype", "float32")
    routes = []
    for batch_size in (1, 4, 16):
        code, output = run(*options, "--batch-size", batch_size)
        assert code == 0
        routes.append([answer["answer"] for answer in answers_of(output, "easy_vqa")])
    model = HoVLEForConditionalGeneration.from_pretrained(model_folder, dtype=torch.float32).eval()
    processor = HoVLEProcessor.from_pretrained(model_folder)
    questions = draw_questions(easy_vqa() / "test", 1000, balanced=False)[:num_questions]
    routes.append(answer_questions(model, processor, questions, batch_size=8))
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    routes.append([_ask_pipeline(ask, question) for question in questions])
    return routes, result_of(output, "easy_vqa"), questions


def test_answers_depend_neither_on_the_batch_size_nor_on_the_route(run, model_folder):
    num_questions = 100
    routes, result, questions = _routes(run, model_folder, num_questions)
    assert [len(route) for route in routes] == [num_questions] * 5
    assert len(set(routes[0])) > num_questions // 4  # random weights still tell the prompts apart
    assert all(route == routes[0] for route in routes)
    assert result["score"] == pytest.approx(100 * exact_match(routes[0], questions))


def test_blank_pictures_are_asked_the_same_questions(run):
    code, output = run("--suite", "offline", "--limit", 6)
    assert code == 0
    balanced, blank = (answers_of(output, name) for name in ("easy_vqa_balanced", "easy_vqa_blank"))
    assert [answer["question"] for answer in balanced] == [answer["question"] for answer in blank]
    assert [answer["answer"] for answer in balanced] != [answer["answer"] for answer in blank]


def test_lmms_evals_own_command_finds_model_and_tasks_in_the_installed_package(model_folder, tmp_path):
    options = {
        "model": "hovle",
        "model_args": f"pretrained={model_folder},max_tiles=2",
        "tasks": "easy_vqa",
        "include_path": TASKS_FOLDER,
        "limit": 3,
        "batch_size": 2,
        "output_path": tmp_path,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "lmms_eval", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    (found,) = [path for path in tmp_path.rglob("*.json") if path.name.endswith("results.json")] or [None]
    assert found is not None, result.stdout + result.stderr  # the command ends with 0 whatever happens
    content = json.loads(found.read_text())
    assert 0 <= content["results"]["easy_vqa"]["exact_match,none"] <= 1
    assert content["throughput"]["total_gen_tokens"] > 0


def test_answers_that_differ_from_another_run_are_counted(run, tmp_path, capsys):
    options = ("--suite", "offline", "--tasks", "easy_vqa", "--limit", 4)
    run(*options, output=tmp_path / "first")
    path = tmp_path / "first" / "easy_vqa.answers.jsonl"
    changed = [json.loads(line) for line in path.read_text().splitlines()]
    changed[2]["answer"] += "!"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in changed[:3]))
    _, output = run(*options, "--compare", tmp_path / "first")
    assert f"easy_vqa: 1 of 3 answers differ ({tmp_path / 'first'})" in capsys.readouterr().out
    compared = result_of(output, "easy_vqa")["compared"]
    assert (compared["num_different"], compared["num_answers"]) == (1, 3)
    page = (output / "README.md").read_text()
    assert "; 1 of 3 answers in float32, 8 at once differ from those in float32, 8 at once (score " in page


def test_several_processes_are_sent_to_the_harness(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run("--suite", "offline")[0] == 1
    assert "this command runs in one process" in capsys.readouterr().err


# --- going on where a run stopped


def test_resuming_keeps_what_has_the_same_model_and_settings(run, model_folder, tmp_path, monkeypatch, capsys):
    options = ("--tasks", "easy_vqa", "--suite", "offline")
    assert run(*options, "--limit", 2)[0] == 0
    before = result_of(tmp_path / "results", "easy_vqa")
    with monkeypatch.context() as patch:
        patch.setattr(
            "hovle.eval.benchmarks.lmms_eval_plugin.HoVLEChat.__init__", lambda *_, **__: pytest.fail("model loaded")
        )
        assert run(*options, "--limit", 2, "--resume", "--batch-size", 3)[0] == 0
    assert "easy_vqa: kept" in capsys.readouterr().out
    assert result_of(tmp_path / "results", "easy_vqa") == before

    assert run(*options, "--limit", 3, "--resume")[0] == 0
    assert result_of(tmp_path / "results", "easy_vqa")["num_questions"] == 3

    other = shutil.copytree(model_folder, tmp_path / "other")
    model = HoVLEForConditionalGeneration.from_pretrained(other)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(other)
    assert run(*options, "--limit", 3, "--resume", model=other)[0] == 0
    assert result_of(tmp_path / "results", "easy_vqa")["model"]["hash"] != before["model"]["hash"]


def test_results_of_another_version_are_made_again(run, monkeypatch, capsys):
    options = ("--tasks", "easy_vqa", "--suite", "offline", "--limit", 2, "--resume")
    run(*options)
    with monkeypatch.context() as patch:
        patch.setattr("hovle.eval.benchmarks.command.__version__", "99.0")
        _, output = run(*options)
    assert "kept" not in capsys.readouterr().out
    assert result_of(output, "easy_vqa")["settings"]["hovle"] == "99.0"


def test_a_run_that_was_interrupted_goes_on_without_asking_again(run, tmp_path, monkeypatch, capsys):
    from hovle.eval.benchmarks import harness

    options = ("--suite", "offline", "--limit", 2)
    started = []
    whole = harness.run_benchmark

    def stopped(benchmark, *arguments):
        started.append(benchmark.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return whole(benchmark, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(harness, "run_benchmark", stopped)
        assert run(*options)[0] == 130
    first = (tmp_path / "results" / "easy_vqa.json").read_bytes()
    assert started == ["easy_vqa", "easy_vqa_balanced"]

    def counted(benchmark, *arguments):
        started.append(benchmark.name)
        return whole(benchmark, *arguments)

    monkeypatch.setattr(harness, "run_benchmark", counted)
    code, output = run(*options, "--resume")
    assert code == 0
    assert started[2:] == ["easy_vqa_balanced", "easy_vqa_blank"]
    assert (output / "easy_vqa.json").read_bytes() == first
    assert "3 of 3 benchmarks have a result" in capsys.readouterr().out


# --- what is missing


def test_one_missing_task_is_reported_and_the_others_go_on(run, capsys):
    code, output = run("--tasks", "nonesuch", "easy_vqa", "--suite", "offline", "--limit", 2)
    assert code == 1
    printed = capsys.readouterr().out
    assert "nonesuch: lmms-eval" in printed
    assert "has no task 'nonesuch'" in (output / "README.md").read_text()
    assert "1 of 2 benchmarks have a result" in printed
    assert "BenchmarkError" in (output / "nonesuch.error.txt").read_text()
    assert result_of(output, "easy_vqa")["num_questions"] == 2


def test_missing_data_are_reported_with_the_reason(run, offline, capsys, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    code, _ = run("--tasks", "pope")
    assert code == 1
    printed = capsys.readouterr().out
    assert "pope: its task or data cannot be loaded: " in printed
    assert "lmms-lab-encoder/POPE" in printed
    assert "0 of 1 benchmarks have a result" in printed


def test_a_missing_local_copy_is_no_reason_to_ask_the_hub(run, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    assert run("--tasks", "pope", "--data", tmp_path / "data")[0] == 1
    assert "data/pope holds no SPLIT-*.parquet files" in capsys.readouterr().out


def test_a_judge_without_a_key_is_reported(run, miniature_data, capsys):
    assert run("--tasks", "mmvet", "--judge", "--data", miniature_data)[0] == 1
    assert "mmvet: the judge needs OPENAI_API_KEY" in capsys.readouterr().out


def test_a_task_that_raises_is_reported(run, miniature_data, short_answers, capsys):
    assert run("--tasks", "mme", "--data", miniature_data, "--limit", 3)[0] == 1  # half a pair
    assert "MME only supports pairwise evaluation" in capsys.readouterr().out


def test_a_failed_benchmark_is_no_more_shown_with_its_older_result(run, miniature_data, short_answers):
    _, output = run("--tasks", "mme", "--data", miniature_data)
    assert run("--tasks", "mme", "--data", miniature_data, "--limit", 3)[0] == 1
    assert "| MME |  | not run: " in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--suite", "fast"), "no suite named 'fast'; there are paper, ocr, quick, offline"),
        (("--limit", "0"), "--limit (0) must be at least 1"),
        (("--max-tiles", "0"), "--max-tiles (0) must be at least 1; without it the suite decides"),
        (("--data", "nowhere"), "--data nowhere is no folder"),
        (("--compare", "nowhere"), "--compare nowhere is no folder"),
        (("--suite", "offline", "--batch-size", "0"), "batch_size (0) must be a whole number from 1"),
    ],
)
def test_options_without_sense_are_refused(options, message, run, capsys):
    assert run(*options)[0] == 1
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_is_refused(run, tmp_path, capsys):
    assert run("--suite", "offline", model=tmp_path)[0] == 1
    assert f"No model in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b'{"model_type": "llama"}', "holds a model of type 'llama', not 'hovle'"),
        ("model.safetensors", b"half a fi", "is missing or no safetensors file"),
    ],
)
def test_a_folder_with_a_broken_model_is_refused(file, content, message, run, model_folder, tmp_path, capsys):
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    (broken / file).write_bytes(content)
    assert run("--suite", "offline", "--limit", 2, model=broken)[0] == 1
    assert message in capsys.readouterr().err


def test_a_model_with_missing_weights_is_refused(run, model_folder, tmp_path, capsys):
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    gone = next(name for name in weights if name.endswith("down_proj.weight"))
    save_file({name: value for name, value in weights.items() if name != gone}, broken / "model.safetensors")
    assert run("--suite", "offline", "--limit", 2, model=broken)[0] == 1
    assert f"lacks 1 weights, among them {gone}" in capsys.readouterr().err


BROKEN = {
    "empty": "",
    "truncated": '{"benchmark": "easy_vqa", "score": 9',
    "no table": "[]",
    "foreign": '{"accuracy": 0.9}',
    "without model": '{"benchmark": "easy_vqa", "title": "t", "task": "t", "score": 1.0}',
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_result_is_named_and_made_again(content, run, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "easy_vqa.json").write_text(content)
    code, output = run("--tasks", "easy_vqa", "--suite", "offline", "--limit", 2, "--resume")
    assert code == 0
    printed = capsys.readouterr().out
    assert f"easy_vqa: run again. {output / 'easy_vqa.json'} is no result of `hovle eval benchmarks`" in printed
    assert result_of(output, "easy_vqa")["num_questions"] == 2


def test_a_broken_result_of_another_benchmark_is_named_and_no_other_is_lost(run, tmp_path, capsys):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "pope.json").write_text('{"benchmark": "po')
    (tmp_path / "results" / ".gqa.json.writing").write_text("{")  # left by a run that was stopped
    code, output = run("--tasks", "easy_vqa", "--suite", "offline", "--limit", 2)
    assert code == 1
    page = (output / "README.md").read_text()
    assert f"| POPE |  | not run: {output / 'pope.json'} is no result" in page
    assert "| easy-VQA, as they come | 2 |" in page
    assert "gqa" not in page
    assert "pope.json is no result" in capsys.readouterr().out


def test_a_result_under_another_name_is_no_result(run, tmp_path, capsys):
    options = ("--tasks", "easy_vqa", "--suite", "offline", "--limit", 2)
    _, output = run(*options)
    shutil.copy(output / "easy_vqa.json", output / "easy_vqa copy.json")
    assert run(*options, "--resume")[0] == 1
    assert "easy_vqa copy.json is no result of `hovle eval benchmarks` (it holds the result of" in (
        capsys.readouterr().out
    )


def test_results_of_another_model_are_left_out_of_the_pages_by_name(run, model_folder, tmp_path, capsys):
    _, output = run("--tasks", "easy_vqa", "--suite", "offline", "--limit", 2)
    other = shutil.copytree(model_folder, tmp_path / "other")
    (other / "more.json").write_text("{}")
    assert run("--tasks", "easy_vqa_blank", "--suite", "offline", "--limit", 2, model=other)[0] == 0
    assert "left out, as they are another model's: the results of easy_vqa in " in capsys.readouterr().out
    assert "as they come" not in (output / "README.md").read_text()
    assert result_of(output, "easy_vqa")["num_questions"] == 2


def test_what_cannot_be_compared_fails_and_stays_out_of_the_page(run, tmp_path, capsys):
    (tmp_path / "first").mkdir()
    code, output = run("--suite", "offline", "--tasks", "easy_vqa", "--limit", 2, "--compare", tmp_path / "first")
    assert code == 1
    assert "both runs must have answered easy_vqa" in capsys.readouterr().out
    assert "not run" not in (output / "README.md").read_text()


def test_in_bfloat16_another_batch_size_is_another_result(run, tmp_path, capsys):
    options = ("--suite", "offline", "--tasks", "easy_vqa", "--limit", 2, "--resume")
    for dtype, kept in (("float32", 1), ("bfloat16", 0)):
        folder = tmp_path / dtype
        for batch_size in (1, 2):
            assert run(*options, "--dtype", dtype, "--batch-size", batch_size, output=folder)[0] == 0
        assert capsys.readouterr().out.count("easy_vqa: kept") == kept


def test_results_in_the_models_own_folder_are_refused(run, model_folder, capsys):
    assert run("--suite", "offline", output=model_folder)[0] == 1
    assert "is the model's own folder" in capsys.readouterr().err


@pytest.mark.parametrize("commit", ["ab12" * 10, None])
def test_the_commit_of_hub_data_is_read_from_where_datasets_keeps_them(tmp_path, commit):
    folder = tmp_path / "org___name" / "default" / "0.0.0" / (commit or "no_commit")
    datasets.Dataset.from_dict({"question": ["a"]}).save_to_disk(folder)
    [file] = folder.glob("*.arrow")
    task = SimpleNamespace(
        config=SimpleNamespace(test_split="test", validation_split=None),
        dataset={"test": datasets.Dataset.from_file(str(file))},
        eval_docs_no_media=[{"question": "a"}],
    )
    facts = harness._data_facts(load_suites().benchmark("gqa"), task, None)
    assert facts["revision"] == commit


def test_broken_answers_cannot_be_compared(run, tmp_path, capsys):
    options = ("--suite", "offline", "--tasks", "easy_vqa", "--limit", 2)
    run(*options, output=tmp_path / "first")
    (tmp_path / "first" / "easy_vqa.answers.jsonl").write_text('{"doc_id": 0, "answ')
    assert run(*options, "--compare", tmp_path / "first")[0] == 1
    assert "easy_vqa.answers.jsonl holds no whole answers" in capsys.readouterr().out


def test_list_names_every_benchmark(capsys):
    assert main(["eval", "benchmarks", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"    {name} " in printed for name in load_suites().benchmarks)
