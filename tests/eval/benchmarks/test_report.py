"""Pages and Hub files made from results."""

import pytest
import yaml
from huggingface_hub._eval_results import parse_eval_result_entries

from hovle.eval.benchmarks.report import eval_result_files, model_card, results_page, results_table
from hovle.eval.benchmarks.suites import load_suites


@pytest.fixture
def suites():
    return load_suites()


def result(name: str, score: float, **changes) -> dict:
    return {
        "benchmark": name,
        "title": name,
        "task": f"{name}_task",
        "score": score,
        "interval": (score - 2, score + 2),
        "num_questions": 1200,
        "comparable": True,
        "note": "",
        "limit": None,
        "harness": {"lmms-eval": "0.7.3"},
        "prompt_hash": "ab12",
        "data": {"name": f"org/{name}", "revision": "f" * 40, "is_local_copy": False, "text_hash": "cd34"},
        "model": {"name": "mine", "hash": "ef56"},
        "settings": {"dtype": "bfloat16", "max_tiles": 12, "batch_size": 8},
        "environment": {"hovle": "0.1.0", "torch": "2", "transformers": "5", "device": "cpu"},
        "date": "2026-11-25",
        **changes,
    }


def test_ours_stands_beside_the_published_scores(suites):
    results = {"ocrbench": result("ocrbench", 512.34), "pope": result("pope", 80.0)}
    assert results_table(results, suites).splitlines() == [
        "| benchmark | questions | this model (95 % interval) | HoVLE | HoVLE-HD | InternVL2-2B | Mono-InternVL | "
        "Qwen2-VL-2B |",
        "|---|---|---|---|---|---|---|---|",
        "| POPE | 1,200 | 80.0 (78.0 to 82.0) | 87.6 | 87.4 | not published | not published | not published |",
        "| OCRBench | 1,200 | 512.3 (510.3 to 514.3) | not published | 740 | 784 | 767 | 809 |",
    ]


def test_what_must_not_be_compared_is_marked_and_explained(suites):
    results = {
        "mmvet": result("mmvet", 20.0, comparable=False, note="by rules"),
        "mme": result("mme", 1500.0, comparable=False, limit=10, interval=None, num_questions=10),
    }
    page = results_page(results, suites, {"gqa": "no data"})
    assert "| MM-Vet | 1,200 | 20.0 (18.0 to 22.0) * | 44.3 |" in page
    assert "| MME | 10 | 1500 * | not published |" in page
    assert "| GQA |  | not run: no data | 60.9 |" in page
    assert "- mmvet: by rules." in page
    assert "- mme: only the first 10 questions." in page
    assert "- gqa: no data" in page
    assert "| harness | lmms-eval 0.7.3 |" in page


def test_a_page_without_any_result_says_why(suites):
    assert "- pope: no network" in results_page({}, suites, {"pope": "no network"})


def test_files_for_the_hub_hold_comparable_scores_with_what_repeats_them(suites):
    results = {
        "docvqa": result("docvqa", 61.237, data={**result("docvqa", 0)["data"], "name": "org/Docs"}),
        "infovqa": result("infovqa", 30.0, data={**result("infovqa", 0)["data"], "name": "org/Docs"}),
        "mmvet": result("mmvet", 20.0, comparable=False),
        "easy_vqa": result("easy_vqa", 80.0, data={**result("easy_vqa", 0)["data"], "name": "easy-vqa"}),
    }
    files = eval_result_files(results)
    assert list(files) == ["org--Docs.yaml"]
    entries = parse_eval_result_entries(yaml.safe_load(files["org--Docs.yaml"]))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in entries] == [
        ("org/Docs", "docvqa_task", 61.24),
        ("org/Docs", "infovqa_task", 30.0),
    ]
    assert entries[0].dataset_revision == "f" * 40
    for part in (
        "lmms-eval 0.7.3",
        "prompts ab12",
        "data texts cd34",
        "model ef56",
        "bfloat16",
        "max tiles 12",
        "59.24",
    ):
        assert part in entries[0].notes


def test_a_model_card_starts_with_a_header_the_hub_reads(suites):
    card = model_card({"pope": result("pope", 80.0)}, suites)
    header = yaml.safe_load(card.split("---")[1])
    assert (header["library_name"], header["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert "# mine" in card
    assert "| POPE | 1,200 |" in card
