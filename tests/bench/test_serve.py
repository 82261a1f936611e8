"""`hovle bench serve` counts what clients got, what they lost and what they were told differently."""

import json
import threading
import time

import pytest
import torch
import uvicorn

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli
from hovle.bench import serve as bench
from hovle.serve.app import ServerOptions, build_app


@pytest.fixture(scope="module")
def parts(tiny_config, make_tokenizer):
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(tiny_config()).eval()
    model.generation_config.eos_token_id = None
    return model, HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, max_tiles=1)


@pytest.fixture
def start(parts, monkeypatch):
    """`start(**options)` runs a server in this process and gives its URL."""
    monkeypatch.setattr(bench, "NUM_PICTURES", 3)
    running = []

    def run(**options) -> str:
        app = build_app(*parts, ServerOptions("tiny", **options))
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"

    yield run
    for server, thread in running:
        server.should_exit = True
        thread.join()


def test_it_writes_what_clients_got(start, tmp_path, capsys):
    out = tmp_path / "speed" / "serve.json"
    options = ["--url", start(), "--clients", "1", "3", "--seconds", "1", "--max-tokens", "4", "--out", str(out)]
    assert cli.main(["bench", "serve", "tiny", *options]) == 0
    result = json.loads(out.read_text())
    assert result == json.loads(capsys.readouterr().out)
    assert [found["clients"] for found in result["rounds"]] == [1, 3]
    for found in result["rounds"]:
        assert found["answers"] > 0
        assert not found["lost"]
        assert found["answer_tokens_per_second"] == pytest.approx(4 * found["requests_per_second"], rel=0.01)
    assert result["over_first"][0] == 1
    assert result["compared"] > 0
    assert result["different"] == 0


def test_requests_without_an_answer_are_lost(start, tmp_path):
    out = tmp_path / "serve.json"
    options = ["--url", start(max_requests=1), "--clients", "4", "--seconds", "1", "--out", str(out)]
    assert cli.main(["bench", "serve", "tiny", *options]) == 0
    (found,) = json.loads(out.read_text())["rounds"]
    assert found["lost"]["RateLimitError"] > 0


def test_a_server_that_answers_nothing_is_no_result(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "NUM_PICTURES", 1)
    options = ["--url", "http://127.0.0.1:9/v1", "--clients", "1", "--seconds", "1", "--out", str(tmp_path / "a.json")]
    assert cli.main(["bench", "serve", "tiny", *options]) == 1
    assert "http://127.0.0.1:9/v1 answered none of the requests (" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_other_answers_to_the_same_request_are_counted():
    rounds = [bench.Round(1, answers={0: "a", 1: "b"}), bench.Round(9, answers={0: "a", 1: "c", 2: "d"})]
    assert bench.compare(rounds) == {"compared": 2, "different": 1}


def test_requests_are_the_same_each_time_and_no_two_are_alike(monkeypatch):
    monkeypatch.setattr(bench, "NUM_PICTURES", 3)
    one, other = bench.Requests("m", 4), bench.Requests("m", 4)
    first = [json.dumps(one[number]) for number in range(12)]
    assert first == [json.dumps(other[number]) for number in range(12)]
    assert len(set(first)) == 12


def test_a_server_that_does_not_start_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "NUM_PICTURES", 1)
    assert cli.main(["bench", "serve", str(tmp_path), "--seconds", "1"]) == 1
    assert "The server did not start: " in capsys.readouterr().err
