"""A saved folder behind transformers' server: with `hovle serve`, and without hovle as `transformers serve`."""

import base64
import contextlib
import http.server
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import openai
import psutil
import pytest
import torch
from PIL import Image

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.cli import main

TRANSFORMERS_WITHOUT_HOVLE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "hovle":
            raise ImportError("hovle is not installed here")

sys.meta_path.insert(0, Absent())
from transformers.cli.transformers import app

app()
"""

COMMANDS = {
    "hovle": [
        "-m",
        "hovle",
        "serve",
        "--max-image-tokens",
        "14",
        "--label-images",
        "--allow-picture-host",
        "127.0.0.1",
    ],
    "transformers": ["-c", TRANSFORMERS_WITHOUT_HOVLE, "serve", "--trust-remote-code"],
}
DEFAULTS = {"hovle": {"max_image_tokens": 14, "label_images": True}, "transformers": {}}
"""What the servers are told to do with pictures, as arguments of `apply_chat_template`."""

HOVLE_ONLY = pytest.mark.parametrize("server", ["hovle"], indirect=True)
"""Transformers' own server does less."""

MAX_NEW_TOKENS = 6
BROKEN_PICTURE = "data:image/png;base64," + base64.b64encode(b"not a picture").decode()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, make_tokenizer, tiny_config):
    """A folder with a tiny model that answers in whole words; also the model and its processor."""
    folder = tmp_path_factory.mktemp("saved")
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, max_tiles=4)
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(tiny_config(image_token_id=processor.image_token_id)).eval()
    vocabulary = processor.tokenizer.get_vocab()
    words = [index for token, index in vocabulary.items() if len(token) > 2 and token[1:].isalpha()]
    with torch.no_grad():
        rows = model.lm_head.weight[words].clone()
        model.lm_head.weight.zero_()[words] = rows
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, processor


@dataclass
class Server:
    """A running server and a client of it."""

    kind: str
    url: str
    model: str
    client: openai.OpenAI
    pid: int

    def ask(self, content, **kwargs):
        """One greedy answer, as the client's library returns it."""
        return self.client.chat.completions.create(
            **{"model": self.model, **kwargs},
            messages=[{"role": "user", "content": content}],
            max_tokens=MAX_NEW_TOKENS,  # its newer name is not read by transformers 5.16
            temperature=0,
        )


@pytest.fixture(scope="module", params=COMMANDS)
def server(request, saved, tmp_path_factory):
    folder = saved[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp(request.param) / "log.txt"
    options = [str(folder), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(log.parent / "modules")}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *COMMANDS[request.param], *options], env=environment, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_ready(url, process, log)
        # One retry: after a status 500 the server hangs up without telling the next request.
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=1) as client:
            yield Server(request.param, url, str(folder), client, process.pid)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def wait_until_ready(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"{url}/health") as response:
                assert response.status == 200
                return
        except urllib.error.URLError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def picture() -> Image.Image:
    return Image.radial_gradient("L").resize((200, 60)).convert("RGB")


def picture_url() -> str:
    data = io.BytesIO()
    picture().save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def about(url: str) -> list[dict]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]


def greedy(saved, content, **kwargs) -> tuple[str, int]:
    """The answer of `generate`, and the number of tokens in the prompt; `kwargs` go to the template."""
    _, model, processor = saved
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **kwargs,
    )
    prompt_length = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, prompt_length:]
    return processor.decode(tokens, skip_special_tokens=True), prompt_length


@pytest.mark.parametrize("content", ["What is in the picture?", about(picture_url())], ids=["text", "picture"])
def test_answers_equal_greedy_generation(server, saved, content):
    expected, prompt_length = greedy(saved, content, **DEFAULTS[server.kind])
    completion = server.ask(content)
    assert completion.choices[0].message.content == expected
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (prompt_length, MAX_NEW_TOKENS)
    pieces = [chunk.choices[0].delta.content or "" for chunk in server.ask(content, stream=True)]
    assert "".join(pieces) == expected
    assert len(pieces) > 2


def test_a_request_can_bring_its_own_budget_and_do_without_numbers(server, saved):
    own = {"max_image_tokens": 8, "label_images": False}
    lengths = {greedy(saved, about(picture_url()), **kwargs)[1] for kwargs in (own, *DEFAULTS.values())}
    assert len(lengths) == 3
    completion = server.ask(about(picture_url()), extra_body={"chat_template_kwargs": own})
    expected, prompt_length = greedy(saved, about(picture_url()), **own)
    assert (completion.choices[0].message.content, completion.usage.prompt_tokens) == (expected, prompt_length)


@pytest.mark.parametrize("stream", [False, True])
def test_a_broken_picture_is_refused_and_the_server_goes_on(server, saved, stream):
    status = {"hovle": 400, "transformers": 500}[server.kind]
    with pytest.raises(openai.APIStatusError) as refused:
        server.ask(about(BROKEN_PICTURE), stream=stream)
    assert refused.value.status_code == status
    if server.kind == "hovle":
        assert "picture 1 of the request: cannot be decoded" in refused.value.message
    assert server.ask("hello").choices[0].message.content == greedy(saved, "hello")[0]


@pytest.mark.parametrize("url", ["/etc/hostname", "file:///etc/hostname"])
def test_a_client_cannot_make_the_server_read_its_files(server, url):
    with pytest.raises(openai.APIStatusError) as refused:
        server.ask(about(url))
    if server.kind == "hovle":
        assert "only http and https URLs are read" in refused.value.message


@HOVLE_ONLY
@pytest.mark.parametrize("by", ["images", "processor_kwargs"])
def test_nor_through_arguments_of_the_template(server, tmp_path, by):
    picture().save(tmp_path / "secret.png")
    images = [str(tmp_path / "secret.png")]
    kwargs = {"images": images} if by == "images" else {"processor_kwargs": {"images": images}}
    for content in (about(None), about(picture_url())):
        with pytest.raises(openai.BadRequestError):
            server.ask(content, extra_body={"chat_template_kwargs": kwargs})
    with pytest.raises(openai.BadRequestError) as refused:
        server.ask("hello", extra_body={"chat_template_kwargs": kwargs})
    assert f"chat_template_kwargs.{by}: not taken from a request" in refused.value.message


@HOVLE_ONLY
@pytest.mark.parametrize("kwargs", [{"max_tiles": 5}, {"max_image_tokens": 15}, {"tile_size": 560}], ids=str)
def test_a_request_cannot_go_beyond_the_servers_budget(server, kwargs):
    with pytest.raises(openai.BadRequestError) as refused:
        server.ask(about(picture_url()), extra_body={"chat_template_kwargs": kwargs})
    assert f"chat_template_kwargs.{next(iter(kwargs))}: " in refused.value.message


@HOVLE_ONLY
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_a_stop_string(server, saved, stream):
    def answer(**kwargs) -> str:
        completion = server.ask("What is it?", stream=stream, **kwargs)
        if not stream:
            return completion.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in completion)

    whole = greedy(saved, "What is it?")[0]
    middle = len(whole) // 2
    for stop in (whole[middle : middle + 1], whole[middle - 2 : middle + 2], whole[:1], whole[-1:]):
        assert answer(stop=stop) == whole[: whole.index(stop)]
    assert answer(stop=["nowhere", whole[middle : middle + 2]]) == whole[: whole.index(whole[middle : middle + 2])]
    for stop in ([], "nowhere", whole[-2:] + "?"):
        assert answer(stop=stop) == whole


@HOVLE_ONLY
def test_a_slow_picture_does_not_hold_up_others(server, saved):
    released = threading.Event()

    class SlowPicture(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.set()
            released.wait(30)
            self.send_error(404)

        def log_message(self, *_):
            pass

    asked = threading.Event()
    with http.server.HTTPServer(("127.0.0.1", 0), SlowPicture) as pictures, ThreadPoolExecutor(2) as pool:
        pool.submit(pictures.handle_request)
        slow = pool.submit(server.ask, about(f"http://127.0.0.1:{pictures.server_port}/a.png"))
        try:
            assert asked.wait(20)
            answer = server.client.with_options(timeout=8, max_retries=0).chat.completions.create(
                model=server.model, messages=[{"role": "user", "content": "hello"}], max_tokens=1
            )
            assert answer.usage.completion_tokens == 1
            assert not slow.done()
        finally:
            released.set()
        assert isinstance(slow.exception(), openai.BadRequestError)


@HOVLE_ONLY
def test_a_picture_from_an_address_that_is_not_public_needs_leave(server):
    requests = []

    class Inside(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            self.send_response(302)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/secret")
            self.end_headers()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Inside) as inside:
        threading.Thread(target=inside.serve_forever, daemon=True).start()
        for host, seen in (("localhost", []), ("[::ffff:127.0.0.1]", []), ("127.0.0.1", ["/a.png"])):
            with pytest.raises(openai.BadRequestError, match="its address is not a public one"):
                server.ask(about(f"http://{host}:{inside.server_port}/a.png"))
            assert requests == seen
        inside.shutdown()


@HOVLE_ONLY
def test_silent_connections_and_many_slow_pictures_shut_nobody_out(server):
    released = threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            released.wait(30)
            self.send_error(404)

        def log_message(self, *_):
            pass

    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as pictures,
        contextlib.ExitStack() as silent,
        ThreadPoolExecutor(45) as pool,
    ):
        threading.Thread(target=pictures.serve_forever, daemon=True).start()
        for _ in range(300):
            silent.enter_context(socket.create_connection(address, timeout=10))
        slow = [pool.submit(server.ask, about(f"http://127.0.0.1:{pictures.server_port}/a.png")) for _ in range(45)]
        try:
            time.sleep(1)
            began = time.monotonic()
            assert server.ask("hello").usage.completion_tokens == MAX_NEW_TOKENS
            assert time.monotonic() - began < 4
            assert not any(request.done() for request in slow)
        finally:
            released.set()
            pictures.shutdown()


@HOVLE_ONLY
def test_the_server_keeps_its_threads_and_files_over_many_requests(server):
    process = psutil.Process(server.pid)
    for _ in range(5):
        server.ask("hello")
    before = process.num_threads(), process.num_fds()
    for number in range(100):
        answer = server.ask("hello", stream=bool(number % 2))
        if number % 2:
            list(answer)
    after = process.num_threads(), process.num_fds()
    assert after[0] <= before[0] + 1
    assert after[1] <= before[1] + 1


@HOVLE_ONLY
def test_prompt_and_answer_stay_within_the_models_positions(server, saved):
    positions = saved[1].config.get_text_config().max_position_embeddings
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            server.ask("hello " * positions, stream=stream)
        assert f"this model has {positions} positions" in refused.value.message
    words = "9" * (positions - 60)  # a long prompt leaves a short answer
    completion = server.client.chat.completions.create(
        model=server.model, messages=[{"role": "user", "content": words}], max_tokens=10**9, temperature=0
    )
    assert completion.usage.total_tokens == positions
    assert completion.choices[0].finish_reason == "length"


def post(server, path: str, body: bytes) -> tuple[int, str]:
    """Status and text of an answer to a request that no client library would send."""
    request = urllib.request.Request(server.url + path, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@HOVLE_ONLY
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({}, "messages: missing"),
        ({"messages": [{"content": "hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": ["hello"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "path": "a.png"}]}]}, 'found "image"'),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, "half a character"),
        ({"messages": [{"role": "user", "content": "hello"}], "n": 2}, "n: only 1 is supported"),
        ({"messages": [{"role": "user", "content": "hello"}], "stop": 5}, "stop: expected"),
        ({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 0}, "max_tokens: expected at least 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_clients_mistake_is_answered_with_its_reason(server, body, reason):
    status, text = post(server, "/v1/chat/completions", json.dumps(body).encode())
    assert status == 400
    assert reason in json.loads(text)["error"]["message"]


@HOVLE_ONLY
def test_the_served_model_is_listed_and_no_other_can_be_loaded(server, saved):
    assert [model.id for model in server.client.models.list()] == [server.model]
    assert post(server, "/load_model", json.dumps({"model": server.model}).encode())[0] == 200
    status, text = post(server, "/load_model", json.dumps({"model": str(saved[0].parent)}).encode())
    assert status == 400
    assert "pinned to" in text
    assert post(server, "/reset", b"{}")[0] == 404
    assert server.ask("hello").choices[0].message.content == greedy(saved, "hello")[0]


def test_another_model_is_refused(server):
    with pytest.raises(openai.BadRequestError) as refused:
        server.ask("hello", model="someone/else")
    assert "pinned to" in refused.value.response.text


def test_transformers_chat_talks_to_the_server(server, saved, tmp_path):
    command = ["chat", str(saved[0]), server.url, f"max_new_tokens={MAX_NEW_TOKENS}", "do_sample=False"]
    finished = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS_WITHOUT_HOVLE, *command],
        input="What is in the picture?\nn\n!exit\n",
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "0",
            "COLUMNS": "200",
        },  # offline, it refuses servers on this machine, too
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    expected = greedy(saved, "What is in the picture?")[0]
    assert expected.strip() in finished.stdout


def test_a_folder_without_a_model_ends_in_a_message(tmp_path, capsys):
    assert main(["serve", str(tmp_path)]) == 1
    assert "expected a folder with config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "reason"),
    [
        (["--port", "99999"], "expected 0 to 65535, found 99999"),
        (["--port", "-1"], "expected 0 to 65535, found -1"),
        (["--max-image-tokens", "0"], "expected 1 or more, found 0"),
        (["--max-image-tokens", "-3"], "expected 1 or more, found -3"),
    ],
    ids=str,
)
def test_a_number_out_of_range_is_refused_before_the_model_is_read(option, reason, capsys):
    with pytest.raises(SystemExit):
        main(["serve", "owner/name", *option])
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "99", "toaster"])
def test_a_missing_device_is_named(saved, device, capsys):
    assert main(["serve", str(saved[0]), "--device", device]) == 1
    assert f"--device {device} cannot be used (" in capsys.readouterr().err


def test_without_prometheus_the_message_names_the_extra(saved, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main(["serve", str(saved[0])]) == 1
    assert "pip install 'hovle[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--engine", "vllm"], "--engine vllm: vLLM brings its own server with the same API: vllm serve"),
        (["--engine", "openvino"], "openvino"),
        (["--quantization", "q8_0"], "--quantization is for --engine llama.cpp, not for torch"),
        (["--engine", "onnx", "--quantization", "q8_0"], "--quantization is for --engine llama.cpp, not for onnx"),
        (["--engine", "llama.cpp", "--max-batch", "4"], "--max-batch is of no use with --engine llama.cpp"),
        (["--engine", "llama.cpp", "--dtype", "bfloat16"], "--dtype is of no use with --engine llama.cpp"),
        (["--engine", "openvino", "--dtype", "float16"], "computes in auto, float32, bfloat16 here, not in 'float16'"),
        (["--engine", "llama.cpp"], "llama.cpp"),  # no files of it there, or the package is missing
        (["--engine", "onnx", "--device", "cpu"], "--device is of no use with --engine onnx"),
        (["--engine", "onnx"], "onnx"),
    ],
    ids=str,
)
def test_another_engine_says_what_it_needs(saved, options, reason, capsys):
    assert main(["serve", str(saved[0]), *options]) == 1
    assert reason in capsys.readouterr().err


def test_bytes_that_the_model_would_normalise_otherwise_are_refused(saved, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    folder = tmp_path / "model"
    shutil.copytree(saved[0], folder)
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"] |= {"do_rescale": False, "do_normalize": False, "image_mean": [0.5, 0.5, 0.5]}
    path.write_text(json.dumps(settings))
    assert main(["serve", str(folder), "--device", "cpu"]) == 1
    assert "its image processor gives bytes" in capsys.readouterr().err


def test_an_empty_key_is_refused(saved, monkeypatch, capsys):
    monkeypatch.setenv("HOVLE_API_KEY", " ")
    assert main(["serve", str(saved[0])]) == 1
    assert "The API key is empty" in capsys.readouterr().err


def test_without_the_servers_packages_the_message_names_the_extra(saved, monkeypatch, capsys):
    monkeypatch.setattr("hovle.serve.command.is_serve_available", lambda: False)
    assert main(["serve", str(saved[0])]) == 1
    assert "pip install 'hovle[serve]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["ab", "cd", "ef"], ["ab"]),
        (["ac", "ce", "x"], ["a", "cce", "x"]),
        (["a", "c", "d", "z"], ["a"]),
        (["ac"], ["a", "c"]),
        (["xq", "y"], ["x"]),
    ],
)
def test_a_piece_that_may_begin_a_stop_string_waits(pieces, expected):
    from hovle.serve.generation import UntilStop

    until_stop = UntilStop(["cd", "q"])
    told = [*map(until_stop.feed, pieces), until_stop.rest()]
    assert [piece for piece in told if piece] == expected
