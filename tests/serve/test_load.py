"""Fifty clients at once: nothing is lost, and nobody's answer is another than alone."""

import base64
import io
import itertools
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import psutil
import pytest
import torch
import uvicorn
from PIL import Image
from tiny_models import shake

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.serve.app import ServerOptions, build_app
from hovle.serve.connections import BoundedConnection

SECONDS = 60
CLIENTS = 50


def picture(seed: int, size: tuple[int, int]) -> str:
    noise = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).resize(size).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def requests() -> list[dict]:
    """Of one and of several pictures and of none, greedy and drawn, with and without ends and penalties."""
    pictures = [picture(seed, size) for seed, size in enumerate([(60, 60), (150, 60), (60, 170), (300, 290)])]
    found = []
    for number, (question, count) in enumerate(
        itertools.product(("hi", "What is it?", "Where is it? " * 9), range(4))
    ):
        items = [{"type": "image_url", "image_url": {"url": url}} for url in (pictures * 2)[number % 4 :][:count]]
        settings = [{"temperature": 0}, {"temperature": 1.2, "seed": number}, {"top_p": 0.9, "seed": number}]
        extras = [{}, {"stop": ["e"]}, {"frequency_penalty": 0.5}]
        found.append(
            {
                "messages": [{"role": "user", "content": [*items, {"type": "text", "text": question}]}],
                "max_tokens": 5 + 7 * (number % 5),
                **settings[number % 3],
                **extras[number // 3 % 3],
            }
        )
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["flat", "hd"])
def test_fifty_clients_get_what_each_gets_alone(tiny_config, make_tokenizer, kind):
    torch.manual_seed(0)
    config = tiny_config(**({"pixel_shuffle_loc": "post"} if kind == "hd" else {}))
    model = shake(HoVLEForConditionalGeneration(config)).eval()
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4)
    app = build_app(model, processor, ServerOptions("tiny"))
    server = uvicorn.Server(uvicorn.Config(app, port=0, http=BoundedConnection, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"

    def ask(client: openai.OpenAI, request: dict, stream: bool) -> str:
        answer = client.chat.completions.create(model="tiny", stream=stream, **request)
        if stream:
            return "".join(piece.choices[0].delta.content or "" for piece in answer)
        return answer.choices[0].message.content

    asked = requests()
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
        alone = [ask(client, request, stream=False) for request in asked]
    process, before = psutil.Process(), psutil.Process().memory_info().rss
    deadline = time.monotonic() + SECONDS

    def keep_asking(seed: int) -> list[bool]:
        draw, same = random.Random(seed), []
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
            while time.monotonic() < deadline:
                number = draw.randrange(len(asked))
                same.append(ask(client, asked[number], draw.random() < 0.5) == alone[number])
        return same

    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            found = list(pool.map(keep_asking, range(CLIENTS)))  # raises what any client was refused
    finally:
        server.should_exit = True
        thread.join()
    assert all(len(same) > 0 for same in found)
    assert all(all(same) for same in found)
    assert process.memory_info().rss < before + 2**30
