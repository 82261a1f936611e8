"""Benchmarks with lmms-eval's own judges, which ask a service of ours in the place of OpenAI's."""

import importlib
import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

JUDGED = ("mmbench", "mmvet", "hallusion", "mathvista")


class Judge(ThreadingHTTPServer):
    """OpenAI's chat API with canned replies."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply: Callable[[str], str] = lambda prompt: ""
        """The user's words -> what is said."""
        self.status = 200
        self.key = "a-key"
        self.prompts: list[str] = []
        self.paths: set[str] = set()

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = asked["messages"][-1]["content"]
        self.server.paths.add(self.path)
        self.server.prompts.append(prompt)
        status = self.server.status
        if self.path != "/v1/chat/completions":
            status = 404
        elif self.headers["Authorization"] != f"Bearer {self.server.key}":
            status = 401
        message = {"role": "assistant", "content": self.server.reply(prompt)}
        whole = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": asked["model"],
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        }
        body = json.dumps(whole if status == 200 else {"error": {"message": f"status {status}"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def judge(lmms_eval, monkeypatch):
    """A judge that the harness's tasks are pointed to, and no waiting between attempts."""
    with Judge() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("OPENAI_API_KEY", server.key)
        monkeypatch.setenv("OPENAI_API_URL", server.base)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        # This module of the harness's is imported once and keeps the key of that time.
        hallusion = importlib.import_module("lmms_eval.tasks.hallusion_bench.utils")
        monkeypatch.setattr(hallusion, "headers", {"Authorization": f"Bearer {server.key}"})
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def mumbling(lmms_eval, monkeypatch):
    """A model whose answers no rule can read, so that every question comes before the judge."""
    plugin = importlib.import_module("hovle.eval.benchmarks.lmms_eval_plugin")
    monkeypatch.setattr(
        plugin.HoVLEChat, "_generate", lambda self, chats, *_, **__: [plugin.Answer("mumble", 1, 1) for _ in chats]
    )


def replies_to(**said: str) -> Callable[[str], str]:
    """`replies_to(birds="B", ...)`: what is said where the last lines of the prompt hold the word."""

    def reply(prompt: str) -> str:
        (found,) = [text for word, text in said.items() if word in prompt[-400:]]
        return found

    return reply


CASES = [
    # MMBench: the first question is asked twice with its options turned around; B and A, as the data say, the second
    # question's right option is C. Judged "B" throughout, the first fails for its second form.
    ("mmbench", replies_to(birds="B", boat="C"), 50.0, 3),
    ("mmbench", replies_to(birds="E", boat="C"), 50.0, 2),
    ("mmvet", replies_to(birds="1.0", boat="0.5", ball="0.0"), 50.0, 3),
    ("mmvet", lambda prompt: "0.2", 20.0, 3),
    # HallusionBench: three questions about three pictures of two sets; the two of the first set are one question.
    ("hallusion", lambda prompt: "correct", 100.0, 3),
    ("hallusion", replies_to(birds="correct", boat="incorrect", ball="correct"), (200 / 3 + 50 + 200 / 3) / 3, 3),
    ("hallusion", lambda prompt: "unclear", 0.0, 3),
    # MathVista: the judge reads the answers 4, (C) and 1.5; the data's are 4, blue and 1.5.
    ("mathvista", replies_to(birds="4", boat="C", ball="1.5"), 100.0, 3),
    ("mathvista", replies_to(birds="4", boat="C", ball="7.5"), 200 / 3, 3),
    ("mathvista", replies_to(birds="5", boat="A", ball="7.5"), 0.0, 3),
]


@pytest.mark.parametrize(("name", "reply", "score", "num_asked"), CASES)
def test_the_score_is_the_one_the_judges_replies_imply(
    name, reply, score, num_asked, run, judge, miniature_data, capsys
):
    judge.reply = reply
    code, output = run("--tasks", name, "--judge", "--data", miniature_data)
    assert code == 0, capsys.readouterr().out
    result = json.loads((output / f"{name}.json").read_text())
    assert result["score"] == pytest.approx(score, abs=0.006)  # MathVista's has two decimals
    assert "with the harness's judge" in result["note"]
    assert len(judge.prompts) == num_asked
    assert judge.paths == {"/v1/chat/completions"}


@pytest.mark.parametrize("name", JUDGED)
def test_the_address_may_be_given_whole(name, run, judge, miniature_data, monkeypatch):
    monkeypatch.setenv("OPENAI_API_URL", f"{judge.base}/chat/completions")
    judge.reply = {"mmbench": replies_to(birds="E", boat="E"), "mmvet": lambda _: "0.0"}.get(name, lambda _: "A")
    assert run("--tasks", name, "--judge", "--data", miniature_data)[0] == 0
    assert judge.paths == {"/v1/chat/completions"}


def refuse(judge: Judge) -> None:
    judge.status = 401


def say_nothing(judge: Judge) -> None:
    judge.reply = lambda prompt: ""


def break_down(judge: Judge) -> None:
    judge.status = 500


@pytest.mark.parametrize("silence", [refuse, break_down, say_nothing])
@pytest.mark.parametrize("name", JUDGED)
def test_a_judge_that_gives_no_reply_is_a_failure_and_no_score(name, silence, run, judge, miniature_data, capsys):
    silence(judge)
    code, output = run("--tasks", name, "--judge", "--data", miniature_data)
    assert code == 1
    assert f"{name}: the judge gave no reply" in capsys.readouterr().out
    assert not (output / f"{name}.json").exists()
    assert "not run: the judge gave no reply" in (output / "README.md").read_text()


def test_a_judge_that_falls_silent_ends_its_own_benchmark_only(run, judge, miniature_data, capsys):
    judge.reply = lambda prompt: "0.5" if "Correctness" in prompt else ""
    code, output = run("--tasks", "mmbench", "mmvet", "--judge", "--data", miniature_data)
    assert code == 1
    assert json.loads((output / "mmvet.json").read_text())["score"] == pytest.approx(50)
    assert "1 of 2 benchmarks have a result" in capsys.readouterr().out


def test_grades_that_are_none_do_not_go_on_for_ever(run, judge, miniature_data, capsys):
    judge.reply = lambda prompt: "7"
    assert run("--tasks", "mmvet", "--judge", "--data", miniature_data)[0] == 1
    assert "mmvet: the judge gave no grade from 0 to 1 in 20 replies, the last one '7'" in capsys.readouterr().out


def test_grades_of_another_judge_are_no_result_to_keep(run, judge, miniature_data, monkeypatch, capsys):
    options = ("--tasks", "mmvet", "--judge", "--data", miniature_data, "--resume")
    judge.reply = lambda prompt: "0.5"
    run(*options)
    run(*options)
    assert len(judge.prompts) == 3
    monkeypatch.setenv("MODEL_VERSION", "another-judge")
    _, output = run(*options)
    assert len(judge.prompts) == 6
    result = json.loads((output / "mmvet.json").read_text())
    assert result["settings"]["judge"]["model"] == "another-judge"
    assert judge.base not in json.dumps(result)


def test_the_tasks_are_left_as_they_were(run, judge, miniature_data):
    hallusion = importlib.import_module("lmms_eval.tasks.hallusion_bench.utils")
    before = (hallusion.requests, hallusion.API_URL)
    judge.status = 401
    run("--tasks", "hallusion", "--judge", "--data", miniature_data)
    assert (hallusion.requests, hallusion.API_URL) == before
