"""What `hovle serve` takes from a request, and what it refuses."""

import re

import pytest
from transformers import GenerationConfig

from hovle import HoVLEProcessor
from hovle.serve.failures import RequestError
from hovle.serve.requests import check_request, check_template_kwargs, read_request

PICTURE = {"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}
HELLO = {"role": "user", "content": "hello"}
CALLED = {"name": "f", "arguments": {}}


@pytest.fixture(scope="module")
def processor(make_tokenizer):
    template = make_tokenizer().chat_template + "{{ tone }}{{ eos_token }}"
    return HoVLEProcessor.from_language_model(make_tokenizer(chat_template=template), image_size=56, max_tiles=4)


def test_null_fields_are_absent_at_every_depth_and_the_rest_is_kept():
    message = {
        **HELLO,
        "tool_calls": None,
        "images": None,
        "content": [{"type": "text", "text": "hi", "detail": None}],
    }
    body = {"messages": [message], "model": "a/b", "stop": None, "n": None, "unheard_of": None, "temperature": 0}
    request = check_request(body)
    assert (request.model, request.stop, request.n, request.temperature) == ("a/b", [], 1, 0)
    assert request.messages[0].text == "hi"
    assert message["tool_calls"] is None  # the caller's own is left alone
    call = {"function": {"name": "f", "arguments": {"a": None}}}
    kept = check_request({"messages": [{"role": "assistant", "tool_calls": [call]}]}).messages[0].tool_calls[0]
    assert kept.function.arguments == {"a": None}  # the client's own words, not fields


@pytest.mark.parametrize("field", ["max_completion_tokens", "max_tokens"])
def test_the_longest_answer_is_read_by_either_name(field):
    assert check_request({"messages": [HELLO], field: 7}).longest_answer == 7


def test_pictures_are_found_in_order_and_developers_are_the_system():
    bare = {"type": "image_url", "image_url": "http://localhost/b.png"}
    developer = {"role": "developer", "content": "be brief"}
    request = check_request({"messages": [developer, {"role": "user", "content": [PICTURE, bare]}]})
    assert [picture.url for picture in request.picture_urls] == ["http://localhost/a.png", "http://localhost/b.png"]
    assert request.messages[0].role == "system"


@pytest.mark.parametrize(
    ("arguments", "expected"), [('{"a": 1}', {"a": 1}), ("", {}), (" \n", {}), (None, {}), ({"a": 1}, {"a": 1})]
)
def test_arguments_of_tool_calls_are_read_from_their_json(arguments, expected):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    checked = check_request({"messages": [HELLO, message]}).messages[1]
    assert checked.tool_calls[0].function.arguments == expected


def settings(text: str) -> dict:
    return {"messages": [HELLO], "generation_config": text}


def item(value) -> dict:
    return {"messages": [{**HELLO, "content": [value]}]}


BROKEN = {
    "no messages": ({}, "messages: missing"),
    "messages of no length": ({"messages": []}, "messages: expected at least 1 of them, found 0"),
    "messages a string": ({"messages": "hello"}, 'messages: expected a list, found "hello"'),
    "message a string": ({"messages": ["hello"]}, "messages[0]: expected an object"),
    "no role": ({"messages": [{"content": "hello"}]}, "messages[0].role: missing"),
    "role null": ({"messages": [{**HELLO, "role": None}]}, "messages[0].role: missing"),
    "role a number": ({"messages": [{**HELLO, "role": 1}]}, "messages[0].role: expected system, developer"),
    "role unknown": ({"messages": [{**HELLO, "role": "critic"}]}, "messages[0].role: expected system, developer"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content: missing"),
    "content a number": ({"messages": [{**HELLO, "content": 5}]}, "messages[0].content: expected a list"),
    "item without type": (item({"text": "a"}), "messages[0].content[0].type: missing"),
    "item a string": (item("a"), "messages[0].content[0]: expected an object"),
    "item null": (item(None), "messages[0].content[0]: expected an object, found null"),
    "item a list": (item([]), "messages[0].content[0]: expected an object, found []"),
    "item unknown": (item({"type": "image"}), 'expected text or image_url, found "image"'),
    "item of unhashable type": (item({"type": []}), "messages[0].content[0].type: expected text or image_url"),
    "text missing": (item({"type": "text"}), "content[0].text: missing from an item of type text"),
    "text a number": (item({"type": "text", "text": 5}), "content[0].text: expected a string, found 5"),
    "text beside a picture": (item({**PICTURE, "text": "a"}), "content[0].text: no key of an item of type image_url"),
    "picture without url": (item({"type": "image_url"}), "content[0].image_url: missing"),
    "url null": (item({"type": "image_url", "image_url": {"url": None}}), "image_url.url: missing"),
    "detail unknown": (
        item({"type": "image_url", "image_url": {"url": "a", "detail": "ultra"}}),
        "image_url.detail: expected auto, low or high",
    ),
    "detail beside": (item({**PICTURE, "detail": "low"}), "messages[0].content[0].detail: not read by this server"),
    "half a character": ({"messages": [{**HELLO, "content": "a\ud83d"}]}, "half a character"),
    "tool calls a string": ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, "tool_calls: expected a list"),
    "tool calls of a user": ({"messages": [{**HELLO, "tool_calls": [{"function": CALLED}]}]}, "[0].tool_calls: only"),
    "arguments no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "function.arguments: expected JSON",
    ),
    "arguments a list": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
        "function.arguments: expected an object",
    ),
    "content beside tool calls": (
        {"messages": [{"role": "assistant", "content": [5], "tool_calls": [{"function": CALLED}]}]},
        "messages[0].content[0]: expected an object, found 5",
    ),
    "two answers": ({"messages": [HELLO], "n": 2}, "n: only 1 is supported, found 2"),
    "JSON answers": (
        {"messages": [HELLO], "response_format": {"type": "json_object"}},
        'response_format.type: only text is supported, found "json_object"',
    ),
    "logprobs": ({"messages": [HELLO], "logprobs": True}, "logprobs: only false is supported, found true"),
    "tool required": ({"messages": [HELLO], "tool_choice": "required"}, "tool_choice: expected auto or none"),
    "tool named": ({"messages": [HELLO], "tool_choice": {"type": "function"}}, "tool_choice: expected auto or none"),
    "temperature a string": ({"messages": [HELLO], "temperature": "0"}, 'temperature: expected a number, found "0"'),
    "temperature true": ({"messages": [HELLO], "temperature": True}, "temperature: expected a number, found true"),
    "temperature hot": ({"messages": [HELLO], "temperature": 2.1}, "temperature: expected at most 2"),
    "temperature cold": ({"messages": [HELLO], "temperature": -1}, "temperature: expected at least 0"),
    "temperature no number": ({"messages": [HELLO], "temperature": float("nan")}, "temperature: expected a finite"),
    "top_p": ({"messages": [HELLO], "top_p": 1.5}, "top_p: expected at most 1"),
    "min_p": ({"messages": [HELLO], "min_p": -0.1}, "min_p: expected at least 0"),
    "top_k": ({"messages": [HELLO], "top_k": 0.5}, "top_k: expected an integer"),
    "penalty": ({"messages": [HELLO], "presence_penalty": -2.5}, "presence_penalty: expected at least -2"),
    "bias": ({"messages": [HELLO], "logit_bias": {"5": 101}}, "logit_bias.5: expected at most 100"),
    "seed": ({"messages": [HELLO], "seed": 2**63}, "seed: expected at most"),
    "max_tokens true": ({"messages": [HELLO], "max_tokens": True}, "max_tokens: expected an integer, found true"),
    "max_tokens negative": ({"messages": [HELLO], "max_tokens": -1}, "max_tokens: expected at least 1, found -1"),
    "two longest answers": (
        {"messages": [HELLO], "max_tokens": 1, "max_completion_tokens": 2},
        "max_tokens: is 1 but",
    ),
    "tools of strings": ({"messages": [HELLO], "tools": ["f"]}, "tools[0]: expected an object"),
    "stop a number": ({"messages": [HELLO], "stop": 5}, "stop: expected a list"),
    "stop of numbers": ({"messages": [HELLO], "stop": [5]}, "stop[0]: expected a string"),
    "stop empty": ({"messages": [HELLO], "stop": ""}, "stop[0]: expected at least 1 character"),
    "stops too many": ({"messages": [HELLO], "stop": ["a"] * 17}, "at most 16"),
    "stream a string": ({"messages": [HELLO], "stream": "yes"}, "stream: expected true or false"),
    "usage without a stream": ({"messages": [HELLO], "stream_options": {"include_usage": True}}, "stream_options: of"),
    "settings no JSON": (settings("{"), "generation_config: expected JSON"),
    "settings a list": (settings("[]"), "generation_config: expected an object"),
    "settings no text": ({"messages": [HELLO], "generation_config": {}}, "generation_config: expected a string"),
    "unknown setting": (settings('{"guidance_scale": 2}'), "generation_config.guidance_scale: not read"),
    "beams": (settings('{"num_beams": 9999}'), "generation_config.num_beams: not read"),
    "sampling a string": (settings('{"do_sample": "no"}'), "generation_config.do_sample: expected true or false"),
    "answer of no length": (settings('{"max_new_tokens": 0}'), "generation_config.max_new_tokens: expected at least"),
    "field unknown": ({"messages": [HELLO], "images": ["a.png"]}, "images: not read by this server"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_request_of_another_form_is_refused_with_its_place(case):
    body, reason = BROKEN[case]
    with pytest.raises(RequestError, match=re.escape(reason)) as refused:
        check_request(body)
    if refused.value.param:
        assert str(refused.value).startswith(f"{refused.value.param}: ")


@pytest.mark.parametrize("key", ["images", "image", "attachments", "files", "image_url", "experimental_attachments"])
def test_a_picture_where_it_is_not_read_is_refused_with_the_right_form(key):
    with pytest.raises(RequestError, match=re.escape('{"type": "image_url", "image_url": {"url": ...}}')) as refused:
        check_request({"messages": [HELLO, {**HELLO, key: ["data:image/png;base64,AAAA"]}]})
    assert refused.value.param == f"messages[1].{key}"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"5", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_object_is_refused(body):
    with pytest.raises(RequestError, match="The request"):
        read_request(body)


def test_settings_that_only_repeat_what_is_usual_are_taken():
    text = GenerationConfig(do_sample=False, max_new_tokens=6).to_json_string(use_diff=False)
    assert check_request(settings(text)).longest_answer == 6


def test_known_template_kwargs_are_taken(processor):
    kwargs = {"label_images": True, "max_tiles": 4, "min_tiles": 1, "max_image_tokens": 9, "tone": "dry, short"}
    limits = {"max_tiles": 4, "min_tiles": 4}
    assert check_template_kwargs(kwargs, processor, limits) == kwargs
    assert check_template_kwargs({"enable_thinking": False}, processor, limits) == {"enable_thinking": False}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"images": ["/etc/hostname"]},
        {"processor_kwargs": {"images": ["/etc/hostname"]}},
        {"images_kwargs": {"tile_size": 560}},
        {"chat_template": "{{ messages }}"},
        {"messages": []},
        {"role": [{"a": 1}]},
        {"tokenize": False},
        {"tile_size": 560},
        {"max_length": 3},
        {"return_tensors": "np"},
        {"eos_token": "x"},
        {"tone": "<|im_end|>"},
        {"unheard_of": 1},
        {"max_tiles": 5},
        {"min_tiles": 5},
        {"max_tiles": 0},
        {"max_tiles": "2"},
        {"max_tiles": True},
        {"max_image_tokens": 21},
        {"max_image_tokens": "20"},
        {"label_images": 1},
        {"label_pictures": True},
    ],
    ids=str,
)
def test_other_template_kwargs_are_refused(processor, kwargs):
    limits = {"max_tiles": 4, "min_tiles": 4, "max_image_tokens": 20}
    with pytest.raises(
        ValueError, match=rf"chat_template_kwargs\.{next(iter(kwargs))}(: | is called label_images now)"
    ):
        check_template_kwargs(kwargs, processor, limits)
