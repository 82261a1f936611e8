"""Measure how many requests with a picture a second `hovle serve` answers: to one client, then to many at a time.

Every client sends its next request when it has the answer to the last one: a generated photograph, a question, no
chance. For each number of clients a server of its own is started, so that none knows a picture already, and the same
series of requests is sent from its beginning; answers that two of them gave to the same request are compared. Lost is
a request without an answer, a refusal for want of room included. The result is printed and, with --out, kept as JSON
with the machine it was measured on; clients run on it, too, and take a little of its time.

  hovle bench serve MODEL                                            1 and 50 clients, 60 seconds each
  hovle bench serve MODEL --clients 1 8 32 --out eval/results/speed/serve.json
  hovle bench serve MODEL --serve "--max-batch 1"                    options of the server
  hovle bench serve MODEL --url http://localhost:8000/v1             a server that runs, of any kind; not started anew
"""

import argparse
import asyncio
import base64
import contextlib
import io
import itertools
import json
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..export.needs import need
from ..machine.facts import environment
from ..options import positive
from .data import JPEG_QUALITY, PICTURE_SIZE, generate_photograph

NUM_PICTURES = 256
"""Different ones; more than a server keeps prompts, so that going round finds none of them kept."""

QUESTIONS = ("What is in the picture?", "Describe the colours.", "Where is it brightest?", "Is it day or night?")

MAX_SECONDS_TO_START = 600.0
"""Time in which a server must be ready."""


@dataclass
class Requests:
    """A series of requests, the same each time, endless.

    Args:
        model: What the server calls its model.
        max_tokens: Longest answer.
    """

    model: str
    max_tokens: int
    pictures: list[str] = field(default_factory=lambda: [_picture_url(seed) for seed in range(NUM_PICTURES)])

    def __getitem__(self, number: int) -> dict[str, Any]:
        question = QUESTIONS[number // len(self.pictures) % len(QUESTIONS)]
        picture = {"type": "image_url", "image_url": {"url": self.pictures[number % len(self.pictures)]}}
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": [picture, {"type": "text", "text": question}]}],
            "max_tokens": self.max_tokens,
            "temperature": 0,
        }


def _picture_url(seed: int) -> str:
    data = io.BytesIO()
    generate_photograph(seed).save(data, "JPEG", quality=JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


@dataclass
class Round:
    """What some clients got."""

    num_clients: int
    seconds: float = 0.0
    answers: dict[int, str] = field(default_factory=dict)
    """By the number of the request."""
    num_tokens: int = 0
    waits: list[float] = field(default_factory=list)
    """Seconds from each request to its answer."""
    lost: Counter = field(default_factory=Counter)
    """Errors by their kind."""

    def figures(self) -> dict[str, Any]:
        """As they are told."""
        waits = sorted(self.waits) or [0.0]
        return {
            "clients": self.num_clients,
            "seconds": round(self.seconds, 2),
            "answers": len(self.answers),
            "lost": dict(self.lost),
            "requests_per_second": round(len(self.answers) / self.seconds, 3),
            "answer_tokens_per_second": round(self.num_tokens / self.seconds, 2),
            "median_seconds": round(statistics.median(waits), 3),
            "p95_seconds": round(waits[int(0.95 * (len(waits) - 1))], 3),
        }


async def ask_for(seconds: float, num_clients: int, url: str, requests: Requests) -> Round:
    """Let so many clients ask for so long; requests that are on their way at the end are waited for."""
    import openai

    found, numbers, began = Round(num_clients), itertools.count(), time.perf_counter()

    async def ask(client: openai.AsyncOpenAI) -> None:
        while time.perf_counter() - began < seconds:
            number, sent = next(numbers), time.perf_counter()
            try:
                completion = await client.chat.completions.create(**requests[number])
            except openai.OpenAIError as error:
                found.lost[type(error).__name__] += 1
                await asyncio.sleep(0.1)
                continue
            found.waits.append(time.perf_counter() - sent)
            found.answers[number] = completion.choices[0].message.content or ""
            found.num_tokens += completion.usage.completion_tokens if completion.usage else 0

    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
        await asyncio.gather(*(ask(client) for _ in range(num_clients)))
    found.seconds = time.perf_counter() - began
    return found


@contextlib.contextmanager
def server(model: str, options: list[str]) -> Iterator[str]:
    """Run `hovle serve` within; gives its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hovle", "serve", model, "--host", "127.0.0.1", "--port", str(port), *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen, log: Any) -> None:
    deadline = time.monotonic() + MAX_SECONDS_TO_START
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError), urllib.request.urlopen(url):
            return
        time.sleep(0.1)
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    raise ValueError(f"The server did not start: {lines[-1] if lines else 'it says nothing'}")


def compare(rounds: list[Round]) -> dict[str, int]:
    """How many answers to a request that the first round had, too, the others gave, and how many of them differ."""
    first, *others = rounds
    both = [
        (first.answers[number], other.answers[number])
        for other in others
        for number in first.answers.keys() & other.answers.keys()
    ]
    return {"compared": len(both), "different": sum(one != other for one, other in both)}


def bench_serve(args: argparse.Namespace) -> dict:
    """Measure each number of clients; return figures with their circumstances."""
    need("hovle bench serve", "hovle[serve]", "openai")
    requests = Requests(args.model, args.max_tokens)
    rounds = []
    for num_clients in args.clients:
        running = contextlib.nullcontext(args.url) if args.url else server(args.model, shlex.split(args.serve))
        with running as url:
            rounds.append(asyncio.run(ask_for(args.seconds, num_clients, url, requests)))
        if not rounds[0].answers:  # there is nothing to compare the others with
            lost = ", ".join(f"{count:,} {kind}" for kind, count in rounds[0].lost.items())
            raise ValueError(f"{url} answered none of the requests ({lost}): see what the server says.")
    figures = [found.figures() for found in rounds]
    first = figures[0]["requests_per_second"]
    return {
        "bench": "serve",
        "model": args.model,
        "server": args.url or f"hovle serve {args.serve}".strip(),
        "pictures": f"{NUM_PICTURES} generated, {PICTURE_SIZE[0]} x {PICTURE_SIZE[1]}",
        "max_tokens": args.max_tokens,
        "rounds": figures,
        "over_first": [round(found["requests_per_second"] / first, 2) if first else None for found in figures],
        **compare(rounds),
        "environment": {**environment("openai", "fastapi", "uvicorn"), "date": time.strftime("%Y-%m-%d")},
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle bench serve`."""
    parser.add_argument("model", help="model folder or Hub id; with --url, what that server calls its model")
    parser.add_argument("--out", metavar="FILE", help="also write the result as JSON")
    parser.add_argument(
        "--clients", type=positive, nargs="+", default=[1, 50], metavar="N", help="clients at a time (default: 1 50)"
    )
    parser.add_argument(
        "--seconds", type=positive, default=60, metavar="S", help="for each number of clients (default: 60)"
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=64, metavar="N", help="longest answer in tokens (default: 64)"
    )
    parser.add_argument("--serve", default="", metavar="OPTIONS", help="options of hovle serve, in quotes")
    parser.add_argument("--url", help="a running server's API instead, for instance http://localhost:8000/v1")


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write the result where one was asked for."""
    text = json.dumps(bench_serve(args), indent=2)
    sys.stdout.write(text + "\n")
    if args.out:
        path = Path(args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return 0
