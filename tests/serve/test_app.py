"""The application of `hovle serve`, without a process of its own: what it does, what it refuses, in which form."""

import base64
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest
import torch
from fastapi.testclient import TestClient
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.inference import Row
from hovle.serve import app as serving
from hovle.serve.app import ServerOptions, build_app
from hovle.serve.prompts import PromptBuilder

HELLO = {"role": "user", "content": "hello"}
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool.function.name }}: {{ tool.function.description }}\n{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SILENT_ROLES = (
    "{% for message in messages if message.role in ['user', 'assistant'] %}{{ message['content'] }}{% endfor %}"
)
TOOL = {"type": "function", "function": {"name": "look", "description": "looks", "parameters": {"type": "object"}}}
CALL = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


@pytest.fixture(scope="module")
def model(tiny_config):
    """A tiny model whose next token depends little on the prompt: what is drawn is spread over many tokens."""
    torch.manual_seed(0)
    return HoVLEForConditionalGeneration(tiny_config()).eval()


@pytest.fixture(scope="module")
def make_client(model, make_tokenizer):
    """`make_client(template, **options)` gives a client of an application with that chat template."""
    clients = []

    def make(template: str | None = None, response_template: dict | None = None, **options) -> TestClient:
        tokenizer = make_tokenizer(**({"chat_template": template} if template else {}))
        if response_template:
            tokenizer.response_template = response_template
        processor = HoVLEProcessor.from_language_model(tokenizer, image_size=56, max_tiles=4)
        app = build_app(model, processor, ServerOptions(**{"model": "some/folder/tiny", **options}))
        clients.append(TestClient(app, raise_server_exceptions=False))
        return clients[-1].__enter__()

    yield make
    for client in clients:
        client.__exit__(None, None, None)


@pytest.fixture(scope="module")
def client(make_client):
    return make_client()


def ask(client, *messages, **fields) -> dict:
    """The body of the response, of an answer or of an error."""
    body = {"messages": list(messages) or [HELLO], "max_tokens": 6, **fields}
    return client.post("/v1/chat/completions", json=body).json()


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]


def ids_of(client, *messages, **fields) -> int:
    return ask(client, *messages, **fields)["usage"]["prompt_tokens"]


def events(client, *messages, **fields) -> list[str]:
    body = {"messages": list(messages) or [HELLO], "max_tokens": 6, "stream": True, **fields}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    lines = response.text.split("\n\n")
    assert lines.pop() == ""
    return [line.removeprefix("data: ") for line in lines]


def picture_url() -> str:
    data = io.BytesIO()
    Image.new("RGB", (400, 100)).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def picture(url: str | None = None, **fields) -> dict:
    return {"type": "image_url", "image_url": {"url": url or picture_url(), **fields}}


# --- sampling --------------------------------------------------------------------------------------------------------


def test_a_temperature_above_0_samples_and_0_is_greedy(client):
    greedy = {text_of(ask(client, temperature=0)) for _ in range(3)}
    drawn = {text_of(ask(client, temperature=1.5)) for _ in range(5)}
    assert greedy == {text_of(ask(client))}  # as the folder says
    assert len(drawn) == 5
    assert text_of(ask(client, temperature=1e-9)) in greedy
    assert {text_of(ask(client, temperature=2, top_k=1)), text_of(ask(client, temperature=2, top_p=0))} == greedy
    assert {text_of(ask(client, temperature=2, min_p=1))} == greedy
    assert len({text_of(ask(client, top_p=0.99)) for _ in range(4)}) == 4


def test_nothing_is_cut_off_the_vocabulary_that_nobody_asked_to_cut(client, model, monkeypatch):
    seen = []
    generate = model.generate

    def watched(**kwargs):
        seen.append(kwargs["generation_config"])
        return generate(**kwargs)

    monkeypatch.setattr(model, "generate", watched)
    ask(client, temperature=1)
    assert (seen[0].do_sample, seen[0].top_k) == (True, 0)


def test_a_seed_gives_the_same_answer_alone_and_among_12_clients(client):
    def seeded(seed: int) -> str:
        return text_of(ask(client, temperature=1.5, seed=seed))

    alone = [seeded(seed) for seed in range(4)]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(seeded, [0, 1, 2, 3] * 6))
    assert together == alone * 6
    assert len(set(alone)) == 4
    unseeded = set()
    for _ in range(3):
        seeded(0)
        unseeded.add(text_of(ask(client, temperature=1.5)))
    assert len(unseeded) == 3  # a seed is its request's own


def test_penalties_and_biases_change_the_answer_as_openai_says(client):
    likeliest = ask(client, temperature=0, max_tokens=1)
    assert text_of(ask(client, temperature=0, logit_bias={})) == text_of(ask(client, temperature=0))
    for integer_or_not in (100, 100.0):
        forced = text_of(ask(client, temperature=0, logit_bias={"40": integer_or_not}))
        assert len(set(forced)) == 1
    assert text_of(ask(client, temperature=0, max_tokens=1, presence_penalty=2)) == text_of(likeliest)  # no answer yet
    once = text_of(ask(client, temperature=0, logit_bias={"40": 10}, frequency_penalty=2, max_tokens=20))
    always = text_of(ask(client, temperature=0, logit_bias={"40": 10}, frequency_penalty=-2, max_tokens=20))
    assert once.count(forced[0]) < always.count(forced[0]) == 20
    for bias in ({"-1": 1}, {"512": 1}, {"a": 1}, {"²": 1}, {"9" * 5000: 1}):
        assert ask(client, logit_bias=bias)["error"]["param"] == "logit_bias"


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/chat/completions", b"{", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", json.dumps({"messages": [HELLO], "n": 2}).encode(), 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("GET", "/v1/chat/completions", None, 405),
        ("GET", "/v1/models/another", None, 404),
        ("GET", "/docs", None, 404),
        ("GET", "/redoc", None, 404),
        ("GET", "/openapi.json", None, 404),
        ("POST", "/load_model", b"{}", 400),
        ("POST", "/load_model", b"[" * 50_000, 400),
    ],
)
def test_errors_have_one_form(client, method, path, content, status):
    response = client.request(method, path, content=content)
    assert response.status_code == status
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_an_error_of_the_server_does_not_tell_what_is_inside(client, monkeypatch):
    def fail(*_):
        raise RuntimeError('secret "quoted"\nat /home/somebody')

    monkeypatch.setattr(PromptBuilder, "_encode", fail)
    response = client.post("/v1/chat/completions", json={"messages": [HELLO]})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


def test_an_error_within_a_stream_has_the_same_form_and_the_stream_ends(client, model, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError('of "quotes"\nand lines')

    monkeypatch.setattr(type(model), "generate", fail)
    *_, error, done = events(client)
    assert json.loads(error)["error"].keys() == {"message", "type", "param", "code"}
    assert done == "[DONE]"
    assert client.post("/v1/chat/completions", json={"messages": [HELLO]}).status_code == 500


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError(), RuntimeError("can't start new thread"), OSError(24, "files")]
)
def test_a_shortage_of_the_server_is_503_and_says_to_come_again(client, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(PromptBuilder, "_encode", fail)
    response = client.post("/v1/chat/completions", json={"messages": [HELLO]})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["code"] == "overloaded"


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": -1},
        {"logit_bias": {"512": 1}},
        {"presence_penalty": 3},
        {"messages": [{"role": "user", "content": [picture("data:image/png;base64,AAAA")]}]},
        {"messages": [{"role": "user", "content": "hello " * 2000}]},
        {"chat_template_kwargs": {"tile_size": 560}},
        {"generation_config": '{"top_k": "many"}'},
    ],
    ids=str,
)
def test_all_is_checked_before_a_stream_says_200(client, fields):
    response = client.post("/v1/chat/completions", json={"messages": [HELLO], "stream": True, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_stream_ends_with_done_and_tells_its_use_if_asked(client):
    *chunks, usage, done = events(client, stream_options={"include_usage": True})
    assert done == "[DONE]"
    assert json.loads(usage)["choices"] == []
    assert json.loads(usage)["usage"] == ask(client)["usage"]
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"
    assert "usage" not in json.loads(events(client)[-2])


# --- messages --------------------------------------------------------------------------------------------------------


def test_developer_is_another_word_for_system(client):
    messages = [[{"role": role, "content": "be brief"}, HELLO] for role in ("system", "developer")]
    assert ids_of(client, *messages[0]) == ids_of(client, *messages[1])


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "system", "content": "be brief"}, "messages[0].content"),
        ({"role": "developer", "content": "be brief"}, "messages[0].content"),
        ({"role": "tool", "content": "5", "tool_call_id": "1"}, "messages[0].content"),
        ({"role": "assistant", "content": "let me see", "tool_calls": [CALL]}, "messages[0].tool_calls[0]"),
        ({**HELLO, "name": "Ann"}, "messages[0].name"),
        ({"role": "system", "content": [picture()]}, "messages[0].content"),
    ],
    ids=str,
)
def test_what_the_template_does_not_show_is_refused(make_client, message, param):
    error = ask(make_client(SILENT_ROLES), message, HELLO)["error"]
    assert error["param"] == param
    assert "does not show" in error["message"]


def test_text_beside_calls_and_their_pictures_reach_the_model(make_client):
    client = make_client(WITH_TOOLS)
    called = {"role": "assistant", "tool_calls": [CALL]}
    lengths = [
        ids_of(client, HELLO, {**called, "content": content}, HELLO)
        for content in (None, "let me see", [{"type": "text", "text": "let me see"}, picture()])
    ]
    assert lengths == sorted(set(lengths))


def test_a_low_detail_makes_a_picture_one_tile(client):
    def num_tokens(budget: int = 1000, **fields) -> int:
        content = [picture(**fields), picture()]
        return ids_of(client, {"role": "user", "content": content}, chat_template_kwargs={"max_image_tokens": budget})

    assert num_tokens(detail="auto") == num_tokens(detail="high") == num_tokens()
    whole, low = num_tokens(), num_tokens(detail="low")
    assert whole - low == 4 * 4  # four tiles and a thumbnail of four tokens each become one tile
    assert ids_of(client, {"role": "user", "content": [picture(detail="low"), picture()]}) == low
    assert num_tokens(22, detail="low") == low - 2 * 4  # the other picture gives way: 2 tiles and a thumbnail
    assert num_tokens(12, detail="low") == low - 4 * 4


# --- tools -----------------------------------------------------------------------------------------------------------


def test_tools_that_cannot_be_done_are_refused(client, make_client):
    assert "response_template" in ask(client, tools=[TOOL])["error"]["message"]
    blind = make_client(response_template=RESPONSE_TEMPLATE)
    assert ask(blind, tools=[TOOL])["error"]["param"] == "tools[0]"
    assert text_of(ask(client, tools=[TOOL], tool_choice="none")) == text_of(ask(client))


@pytest.mark.parametrize("stream", [False, True])
def test_calls_in_an_answer_are_parsed(make_client, monkeypatch, make_tokenizer, stream):
    client = make_client(WITH_TOOLS, RESPONSE_TEMPLATE)
    ids = make_tokenizer()('I look.<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>')["input_ids"]

    tokens = iter(ids)

    def take(row, logits):
        row.input_ids = torch.cat([row.input_ids, torch.tensor([[next(tokens)]])], dim=-1)
        row._criteria(row.input_ids, None)
        row.is_done = row.input_ids[0, -len(ids) :].tolist() == ids

    monkeypatch.setattr(Row, "take", take)
    if stream:
        choices = [json.loads(event)["choices"][0] for event in events(client, tools=[TOOL])[:-1]]
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
        reason = choices[-1]["finish_reason"]
    else:
        choice = ask(client, tools=[TOOL])["choices"][0]
        calls, text, reason = choice["message"]["tool_calls"], choice["message"]["content"], choice["finish_reason"]
    assert text == "I look."
    assert reason == "tool_calls"
    assert calls[0]["function"]["name"] == "look"
    assert json.loads(calls[0]["function"]["arguments"]) == {"at": "é"}


# --- names and origins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["some/folder/tiny", "tiny", "./some/folder/tiny/", "some//folder/../folder/tiny"])
def test_the_model_goes_by_its_path_in_any_spelling_and_by_its_last_name(client, name):
    assert "choices" in ask(client, model=name)
    assert client.get(f"/v1/models/{name}").status_code == 200 or name.startswith(".")


def test_the_served_name_is_the_one_that_is_listed(make_client):
    client = make_client(served_name="mine")
    assert client.get("/v1/models").json()["data"] == [client.get("/v1/models/mine").json()]
    assert ask(client, model="mine")["model"] == "mine"
    error = ask(client, model="gpt-4o")["error"]
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_web_pages_of_named_origins_may_use_the_server_and_no_others(client, make_client):
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    open_to_one = make_client(origins=["http://localhost:3000"])
    allowed = open_to_one.options("/v1/chat/completions", headers=asked)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "http://localhost:3000"
    refused = open_to_one.options("/v1/chat/completions", headers={**asked, "Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in refused.headers
    assert "access-control-allow-origin" not in client.get("/v1/models", headers=asked).headers


def test_an_answer_ends_where_longrope_would_turn_what_was_read(tiny_config, make_tokenizer):
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 96}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    torch.manual_seed(0)
    model = HoVLEForConditionalGeneration(tiny_config(text_config={"rope_parameters": rope})).eval()
    model.generation_config.eos_token_id = None
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, max_tiles=4)
    with TestClient(build_app(model, processor, ServerOptions("tiny"))) as client:
        short = ask(client, max_tokens=200)
        assert short["usage"]["total_tokens"] == 97
        assert short["choices"][0]["finish_reason"] == "length"
        beyond = ask(client, {"role": "user", "content": "hello " * 40}, max_tokens=20)
        assert beyond["usage"]["prompt_tokens"] > 96
        assert beyond["usage"]["completion_tokens"] == 20


# --- keys and metrics ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("GET", "/v1/models"), ("POST", "/load_model"), ("GET", "/metrics")],
)
@pytest.mark.parametrize(
    ("header", "found"),
    [(None, "none"), ("Bearer secre", "another"), ("secret", "another"), ("Bearer \xe9", "another")],
)
def test_without_the_key_nothing_is_answered(make_client, method, path, header, found):
    client = make_client(api_key="secret")
    headers = {"Authorization": header.encode("latin-1")} if header else {}
    response = client.request(method, path, headers=headers, content=b"{")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert found in error["message"]
    assert "secret" not in error["message"]


def test_with_the_key_all_is_answered_and_health_needs_none(make_client):
    client = make_client(api_key="secret")
    assert client.get("/health").json() == {"status": "ok"}
    client.headers["Authorization"] = "Bearer secret"
    assert "choices" in ask(client)
    assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 200
    assert "secret" not in repr(ServerOptions("m", api_key="secret"))


def test_metrics_count_requests_and_tokens(make_client):
    client = make_client()

    def numbers() -> dict[str, float]:
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        families = text_string_to_metric_families(response.text)
        samples = [sample for family in families for sample in family.samples]
        return {sample.name + sample.labels.get("status", ""): sample.value for sample in samples}

    before = numbers()
    assert before["hovle_requests_in_work"] == before["hovle_prompts_waiting"] == before["hovle_answers_in_work"] == 0
    usage = ask(client)["usage"]
    events(client)
    ask(client, n=2)
    after = numbers()
    assert (after["hovle_requests_total200"], after["hovle_requests_total400"]) == (2, 1)
    assert after["hovle_prompt_tokens_total"] == 2 * usage["prompt_tokens"]
    assert after["hovle_answer_tokens_total"] == 2 * usage["completion_tokens"]
    assert after["hovle_reused_tokens_total"] == usage["prompt_tokens"] - 1
    assert after["hovle_steps_total"] == 2 * (usage["completion_tokens"] - 1)
    assert after["hovle_request_seconds_count"] == 3
    assert after["hovle_first_token_seconds_count"] == 2
    assert after["hovle_requests_in_work"] == after["hovle_answers_in_work"] == 0
    assert after["process_open_fds"] > 0


def test_health_tells_when_the_model_has_stopped(make_client, monkeypatch):
    client = make_client()
    monkeypatch.setattr("hovle.serve.engine.Engine.is_alive", False)
    assert client.get("/health").status_code == 503


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_nothing_is_left_behind_by_a_request(client):
    process = psutil.Process()

    def counts() -> tuple[int, int, int]:
        return threading.active_count(), process.num_fds(), process.memory_info().rss

    for number in range(60):  # caches and pools fill
        ask(client, max_tokens=1, stream=bool(number % 2)) if number % 2 == 0 else events(client, max_tokens=1)
    before = counts()
    for number in range(250):
        ask(client, max_tokens=1)
        events(client, max_tokens=1)
        if number % 25 == 0:
            ask(client, {"role": "user", "content": [picture("data:image/png;base64,AAAA")]})
            ask(client, {"role": "user", "content": [picture()]}, max_tokens=1)
    after = counts()
    assert after[0] <= before[0] + 2
    assert after[1] <= before[1] + 2
    assert after[2] <= before[2] + 30 * 2**20


def test_a_body_beyond_the_limit_is_413(client, monkeypatch):
    monkeypatch.setattr(serving, "MAX_BODY_BYTES", 1000)
    whole = client.post("/v1/chat/completions", content=b" " * 1001)
    in_pieces = client.post("/v1/chat/completions", content=(b" " * 100 for _ in range(20)))
    assert whole.status_code == in_pieces.status_code == 413
    assert whole.json()["error"]["code"] == "request_too_large"


def test_requests_beyond_the_most_are_told_to_come_again(make_client):
    response = make_client(max_requests=0).post("/v1/chat/completions", json={"messages": [HELLO]})
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("overloaded", "rate_limit_error")
    client = make_client(max_requests=1)
    for _ in range(3):  # each leaves its place, however it ends
        assert "choices" in ask(client)
        assert "error" in ask(client, n=2)
        assert events(client)[-1] == "[DONE]"


def test_all_requests_together_hold_no_more_than_the_bound(client, monkeypatch):
    monkeypatch.setattr("hovle.serve.load.MAX_BYTES", 1000)
    for _ in range(20):  # what was held is given back
        assert "choices" in ask(client)
    error = ask(client, {"role": "user", "content": "a" * 1000})["error"]
    assert (error["code"], error["type"]) == ("overloaded", "server_error")
    with_picture = {"role": "user", "content": [picture()]}
    monkeypatch.setattr("hovle.serve.load.MAX_BYTES", len(json.dumps([with_picture])) + 100)
    assert ask(client, with_picture)["error"]["code"] == "overloaded"  # the file comes on top


def test_pictures_are_bounded_together_before_one_is_decoded(client, monkeypatch):
    decoded = []
    monkeypatch.setattr("hovle.serve.prompts.load_picture", lambda *args: decoded.append(args))
    monkeypatch.setattr("hovle.serve.prompts.MAX_PICTURE_PIXELS", 100_000)
    content = [picture(), picture(), picture()]  # 40,000 pixels each
    error = ask(client, {"role": "user", "content": content})["error"]
    assert error["message"].startswith("picture 3 of the request: with those before it")
    assert not decoded
    monkeypatch.setattr("hovle.serve.prompts.MAX_PICTURE_BYTES", 300)
    assert "MiB of files" in ask(client, {"role": "user", "content": content})["error"]["message"]
    monkeypatch.setattr("hovle.serve.prompts.MAX_PICTURES", 2)
    assert "at most 2 are read" in ask(client, {"role": "user", "content": content})["error"]["message"]


def test_long_text_is_refused_before_it_is_cut_into_tokens(client, monkeypatch):
    monkeypatch.setattr(PromptBuilder, "_encode", lambda *_: pytest.fail("was encoded"))
    error = ask(client, {"role": "user", "content": "a" * 200_000})["error"]
    assert error["code"] == "context_length_exceeded"


# --- the official client ---------------------------------------------------------------------------------------------


def test_the_official_client_reads_answers_streams_and_errors(client):
    transport = httpx.MockTransport(
        lambda request: httpx.Response(
            (found := client.request(request.method, request.url.path, content=request.content)).status_code,
            content=found.content,
            headers={"content-type": found.headers["content-type"]},
        )
    )
    with openai.OpenAI(
        base_url="http://server/v1", api_key="none", max_retries=0, http_client=httpx.Client(transport=transport)
    ) as official:
        create = official.chat.completions.create
        whole = create(model="tiny", messages=[HELLO], max_completion_tokens=6, temperature=0)
        pieces = create(model="tiny", messages=[HELLO], max_tokens=6, temperature=0, stream=True)
        streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces)
        assert streamed == whole.choices[0].message.content
        echoed = [HELLO, whole.choices[0].message, HELLO]  # as chat loops send answers back
        assert create(model="tiny", messages=echoed, max_tokens=1).usage.completion_tokens == 1
        with pytest.raises(openai.BadRequestError) as refused:
            create(model="tiny", messages=[HELLO], max_tokens=0)
        assert refused.value.param == "max_tokens"
        with pytest.raises(openai.NotFoundError):
            official.models.retrieve("another")
        assert official.models.retrieve("tiny").id == "some/folder/tiny"
