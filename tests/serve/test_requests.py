"""What `hovle serve` takes from a request, and what it refuses."""

import json
import re

import pytest

from hovle import HoVLEProcessor
from hovle.serve.requests import check_request, check_template_kwargs, picture_urls

PICTURE = {"type": "image_url", "image_url": {"url": "http://localhost/a.png"}}
HELLO = {"role": "user", "content": "hello"}
CALLED = {"name": "f", "arguments": {}}


@pytest.fixture(scope="module")
def processor(make_tokenizer):
    template = make_tokenizer().chat_template + "{{ tone }}{{ eos_token }}"
    return HoVLEProcessor.from_language_model(make_tokenizer(chat_template=template), image_size=56, max_tiles=4)


def test_a_request_loses_its_empty_fields_and_keeps_the_rest():
    message = {**HELLO, "tool_calls": None, "name": None}
    request = check_request({"messages": [message], "model": "a/b", "stop": None, "n": 1, "temperature": 0})
    assert request == {"messages": [HELLO], "model": "a/b", "n": 1, "temperature": 0}
    assert message["tool_calls"] is None  # the caller's own is left alone


def test_the_newer_name_of_the_longest_answer_is_read_everywhere():
    assert check_request({"messages": [HELLO], "max_completion_tokens": 7, "max_tokens": 9})["max_tokens"] == 7


def test_pictures_are_found_in_order():
    bare = {"type": "image_url", "image_url": "http://localhost/b.png"}
    request = check_request({"messages": [HELLO, {"role": "user", "content": [PICTURE, bare]}]})
    urls = [item["image_url"]["url"] for item in picture_urls(request["messages"])]
    assert urls == ["http://localhost/a.png", "http://localhost/b.png"]


def test_arguments_of_tool_calls_are_read_from_their_json():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    checked = check_request({"messages": [HELLO, message]})["messages"][1]
    assert checked["tool_calls"][0]["function"]["arguments"] == {"a": 1}


BROKEN = {
    "no messages": ({}, "messages is missing or empty"),
    "messages of no length": ({"messages": []}, "messages is missing or empty"),
    "messages a string": ({"messages": "hello"}, 'messages: expected a list, found "hello"'),
    "message a string": ({"messages": ["hello"]}, "messages[0]: expected an object"),
    "no role": ({"messages": [{"content": "hello"}]}, "messages[0].role"),
    "role a number": ({"messages": [{**HELLO, "role": 1}]}, "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0].content"),
    "content a number": ({"messages": [{**HELLO, "content": 5}]}, "messages[0].content"),
    "item without type": ({"messages": [{**HELLO, "content": [{"text": "a"}]}]}, "messages[0].content[0].type"),
    "item a string": ({"messages": [{**HELLO, "content": ["a"]}]}, "messages[0].content[0]: expected an object"),
    "item unknown": (
        {"messages": [{**HELLO, "content": [{"type": "image", "path": "/a.png"}]}]},
        'expected text or image_url, found "image"',
    ),
    "text missing": ({"messages": [{**HELLO, "content": [{"type": "text"}]}]}, "content[0].text"),
    "picture without url": (
        {"messages": [{**HELLO, "content": [{"type": "image_url"}]}]},
        "image_url.url: expected a string, found null",
    ),
    "url null": (
        {"messages": [{**HELLO, "content": [{"type": "image_url", "image_url": {"url": None}}]}]},
        "image_url.url: expected a string, found null",
    ),
    "half a character": ({"messages": [{**HELLO, "content": "a\ud83d"}]}, "half a character"),
    "tool calls a string": ({"messages": [{"role": "assistant", "tool_calls": "f"}]}, "tool_calls: expected a list"),
    "arguments no JSON": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "function.arguments: expected JSON",
    ),
    "content beside tool calls": (
        {"messages": [{"role": "assistant", "content": [5], "tool_calls": [{"function": CALLED}]}]},
        "messages[0].content[0]: expected an object, found 5",
    ),
    "two answers": ({"messages": [HELLO], "n": 2}, "n: only 1 is supported, found 2"),
    "JSON answers": (
        {"messages": [HELLO], "response_format": {"type": "json_object"}},
        "response_format: only",
    ),
    "temperature a string": (
        {"messages": [HELLO], "temperature": "0"},
        "temperature: expected an integer or a number",
    ),
    "max_tokens true": ({"messages": [HELLO], "max_tokens": True}, "max_tokens: expected an integer, found true"),
    "tools of strings": ({"messages": [HELLO], "tools": ["f"]}, "tools[0]: expected an object"),
    "stop a number": ({"messages": [HELLO], "stop": 5}, "stop: expected a string or a list"),
    "stop of numbers": ({"messages": [HELLO], "stop": [5]}, "stop: expected strings"),
    "stop empty": ({"messages": [HELLO], "stop": ""}, "stop: expected strings of 1 to"),
    "stops too many": ({"messages": [HELLO], "stop": ["a"] * 17}, "at most 16"),
    "settings no JSON": ({"messages": [HELLO], "generation_config": "{"}, "generation_config: expected JSON"),
    "settings a list": ({"messages": [HELLO], "generation_config": "[]"}, "generation_config: expected an object"),
    "beams": (
        {"messages": [HELLO], "generation_config": json.dumps({"num_beams": 9999})},
        "generation_config.num_beams: only 1",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_request_of_another_form_is_refused_with_its_place(case):
    body, reason = BROKEN[case]
    with pytest.raises(ValueError, match=re.escape(reason)):
        check_request(body)


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
