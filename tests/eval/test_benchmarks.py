"""Benchmarks through the real lmms-eval: tiny random weights, and a model that knows the answers."""

import json

import pytest

from hovle.cli import main
from hovle.eval.suites import load_suites

QUICK = ("mmbench", "mme", "mmmu", "seed", "textvqa", "gqa", "mathvista", "hallusion")
"""Adapters of the default run: several pictures, pictures kept apart, pairs, circular options, filters, rules."""

PAPER = load_suites().suites["paper"].benchmarks

ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PAPER]


@pytest.fixture(scope="module")
def run(lmms_eval, model_folder, tmp_path_factory):
    """`run(*options)` calls the command with a fresh output folder unless told otherwise."""

    def call(*options, output=None):
        output = output or tmp_path_factory.mktemp("results")
        code = main(["eval", "benchmarks", str(model_folder), "--output", str(output), *map(str, options)])
        return code, output

    return call


@pytest.fixture(scope="module")
def tools(lmms_eval, model_folder):
    """A loaded model and the harness's tasks, for several benchmarks."""
    from hovle.eval.harness import task_manager
    from hovle.eval.lmms_eval_plugin import HoVLEChat

    return HoVLEChat(str(model_folder), batch_size=2, max_new_tokens=4, max_tiles=2, keep_loaded=True), task_manager()


@pytest.mark.parametrize("name", PAPER)
def test_every_adapter_gives_full_marks_to_a_model_that_knows_the_answers(
    name, tools, miniatures, miniature_data, perfect_answer, tmp_path, monkeypatch
):
    from hovle.eval.harness import run_benchmark
    from hovle.eval.lmms_eval_plugin import Answer

    lm, manager = tools
    miniature = miniatures[name]
    monkeypatch.setattr(
        lm, "_generate", lambda chats, *_: [Answer(perfect_answer(miniature, chat), 1, 1) for chat in chats]
    )
    result, answers = run_benchmark(load_suites().benchmark(name), lm, manager, tmp_path, None, miniature_data)
    assert result["score"] == pytest.approx(miniature.full)
    low, high = result["interval"]
    assert low <= result["score"] <= high + 1e-9
    assert len(answers) == result["num_questions"]
