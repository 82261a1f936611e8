"""Connections that say nothing are closed, and make room for those that do."""

import socket
import threading
import time

import pytest
import uvicorn

from hovle.serve import connections
from hovle.serve.connections import BoundedConnection

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def answer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.fixture
def address():
    """Of a server in this process."""
    config = uvicorn.Config(answer, port=0, http=BoundedConnection, lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()
    server.should_exit = True
    thread.join()


def is_closed(connection: socket.socket) -> bool:
    connection.settimeout(5)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False


@pytest.mark.parametrize("beginning", [b"", b"GET / HTTP/1.1\r\nHost: a", REQUEST + b"GET / HT"])
def test_headers_that_do_not_come_close_the_connection(address, monkeypatch, beginning):
    monkeypatch.setattr(connections, "MAX_SECONDS_FOR_HEADERS", 0.3)
    with socket.create_connection(address, timeout=5) as connection:
        connection.sendall(beginning)
        if beginning.startswith(REQUEST):
            received = b""
            while not received.endswith(b"ok"):
                received += connection.recv(1000)
        assert is_closed(connection)


def test_the_longest_silent_connection_makes_room(address, monkeypatch):
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 3)
    held = []
    try:
        for _ in range(4):
            held.append(socket.create_connection(address, timeout=5))
            time.sleep(0.05)
        assert is_closed(held[0])
        held[3].sendall(REQUEST)
        assert held[3].recv(8) == b"HTTP/1.1"
    finally:
        for connection in held:
            connection.close()
