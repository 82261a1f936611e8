"""What a running server does over real sockets: deadlines, clients that leave, and its own end."""

import contextlib
import http.client
import http.server
import io
import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import uvicorn
from PIL import Image

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.serve import app as serving
from hovle.serve.app import ServerOptions, build_app
from hovle.serve.connections import BoundedConnection

HELLO = {"role": "user", "content": "hello"}
PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def parts(tiny_config, make_tokenizer):
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(tiny_config()).eval()
    model.generation_config.eos_token_id = None
    return model, HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, max_tiles=4)


class Running:
    """A server in this process."""

    def __init__(self, parts, **options):
        app = build_app(*parts, ServerOptions("tiny", picture_hosts=["127.0.0.1"], **options))
        config = uvicorn.Config(app, port=0, http=BoundedConnection, log_level="error", timeout_graceful_shutdown=30)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def send(self, **fields) -> http.client.HTTPConnection:
        connection = self.connect()
        body = {"messages": [HELLO], "max_tokens": 4, **fields}
        connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def number(self, name: str) -> float:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))

    def until(self, name: str, value: float) -> None:
        deadline = time.monotonic() + 20
        while self.number(name) != value:
            assert time.monotonic() < deadline, (name, self.number(name))
            time.sleep(0.02)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.fixture
def start(parts):
    running = []

    def run(**options) -> Running:
        running.append(Running(parts, **options))
        return running[-1]

    yield run
    for server in running:
        server.stop()


def read_error(connection: http.client.HTTPConnection) -> tuple[int, dict]:
    response = connection.getresponse()
    return response.status, json.loads(response.read())["error"]


def test_a_body_that_does_not_come_in_time_is_refused_and_leaves_its_place(start, monkeypatch):
    monkeypatch.setattr(serving, "MAX_SECONDS_FOR_BODY", 0.5)
    server = start(max_requests=1)
    with contextlib.closing(server.connect()) as connection:
        connection.putrequest("POST", PATH)
        connection.putheader("Content-Length", "1000")
        connection.endheaders()
        began = time.monotonic()
        dripping = threading.Event()

        def drip() -> None:  # a byte now and then is not enough
            with contextlib.suppress(OSError):
                while not dripping.wait(0.1):
                    connection.send(b" ")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            status, error = read_error(connection)
            assert 0.4 < time.monotonic() - began < 10
        finally:
            dripping.set()
            thread.join()
    assert (status, error["code"]) == (408, "timeout")
    assert "within 0.5 seconds" in error["message"]
    with contextlib.closing(server.send()) as connection:
        assert connection.getresponse().status == 200


def png() -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (60, 60)).save(data, "PNG")
    return data.getvalue()


@contextlib.contextmanager
def slow_pictures() -> Iterator[int]:
    """The port of a server that sends a picture after a moment, and any byte by byte, for ever, at /endless."""
    over = threading.Event()

    class Slow(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while self.path == "/endless" and not over.wait(0.05):
                    self.wfile.write(b"\0")
            over.wait(0.3)
            self.wfile.write(png())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Slow) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        over.set()
        server.shutdown()
        thread.join()


def test_pictures_that_do_not_come_in_time_are_refused(start, monkeypatch):
    monkeypatch.setattr("hovle.model.pictures.MAX_SECONDS", 0.5)
    server = start()
    with slow_pictures() as port:
        url = f"http://127.0.0.1:{port}/endless"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what is it?"}]
        began = time.monotonic()
        with contextlib.closing(server.send(messages=[{"role": "user", "content": content}])) as connection:
            status, error = read_error(connection)
        assert 0.4 < time.monotonic() - began < 10
        assert status == 400
        assert "picture 1 of the request" in error["message"]
        assert "took longer than 0.5 seconds" in error["message"]
    server.until("hovle_requests_in_work", 0)


def test_all_pictures_of_a_request_share_one_deadline(start, monkeypatch):
    monkeypatch.setattr("hovle.serve.prompts.MAX_PICTURE_SECONDS", 0.2)
    server = start()
    with slow_pictures() as port:
        url = f"http://127.0.0.1:{port}/a.png"
        content = [{"type": "image_url", "image_url": {"url": url}}] * 3
        with contextlib.closing(server.send(messages=[{"role": "user", "content": content}])) as connection:
            status, error = read_error(connection)
    assert status == 400
    assert error["message"] == "picture 2 of the request: the pictures before it took longer than 0.2 seconds."


def test_a_stream_is_counted_when_it_is_over(start):
    server, counter = start(), 'hovle_requests_total{status="200"}'
    with contextlib.closing(server.send()) as connection:
        assert connection.getresponse().status == 200
    with contextlib.closing(server.send(max_tokens=900, stream=True)) as connection:
        connection.getresponse().read(50)
        server.until("hovle_answers_in_work", 1)
        assert server.number(counter) == 1
    server.until(counter, 2)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_leaves_its_place_to_the_next(start, stream):
    server = start(max_requests=1)
    connection = server.send(max_tokens=900, stream=stream)
    server.until("hovle_answers_in_work", 1)
    with contextlib.closing(server.send()) as other:
        assert other.getresponse().status == 429
    if stream:
        connection.getresponse().read(50)
    connection.sock.shutdown(socket.SHUT_RDWR)
    connection.close()
    server.until("hovle_requests_in_work", 0)
    server.until("hovle_answers_in_work", 0)
    with contextlib.closing(server.send()) as other:
        assert other.getresponse().status == 200


def test_a_server_that_is_told_to_stop_finishes_what_it_accepted(start):
    server = start()
    whole = [server.send(max_tokens=60) for _ in range(3)]
    streamed = server.send(max_tokens=60, stream=True)
    server.until("hovle_requests_in_work", 4)
    server.server.should_exit = True
    for connection in whole:
        response = connection.getresponse()
        assert response.status == 200
        assert json.loads(response.read())["usage"]["completion_tokens"] == 60
    assert streamed.getresponse().read().endswith(b"data: [DONE]\n\n")
    for connection in (*whole, streamed):
        connection.close()
    server.stop()
    with pytest.raises(OSError), contextlib.closing(server.connect()) as connection:  # noqa: PT011
        connection.connect()
