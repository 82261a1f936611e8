"""The configurations in `serve/` name what exists: options, fields, paths."""

import argparse
import importlib.util
import inspect
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from places import ROOT

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.serve import command
from hovle.serve.app import ServerOptions, build_app

FOLDER = ROOT / "serve"

VLLM_OPTIONS = {
    *("model", "trust-remote-code", "served-model-name", "host", "port", "max-model-len", "max-num-seqs"),
    *("gpu-memory-utilization", "limit-mm-per-prompt", "allowed-media-domains", "chat-template"),
}
"""Of `vllm serve`, read in vLLM 0.33: `vllm/engine/arg_utils.py` and `vllm/entrypoints/common/cli_args.py`."""

RAY_FIELDS = {
    "": {"applications", "http_options", "proxy_location"},
    "applications": {"name", "route_prefix", "import_path", "args", "runtime_env"},
    "args": {"llm_configs", "ingress_cls_config", "ingress_deployment_config"},
    "llm_configs": {
        *("model_loading_config", "accelerator_type", "deployment_config", "engine_kwargs", "runtime_env"),
        *("accelerator_config", "placement_group_config", "llm_engine"),
    },
    "model_loading_config": {"model_id", "model_source", "tokenizer_source"},
    "deployment_config": {"autoscaling_config", "num_replicas", "max_ongoing_requests", "max_queued_requests"},
    "autoscaling_config": {"min_replicas", "initial_replicas", "max_replicas", "target_ongoing_requests"},
    "engine_kwargs": {name.replace("-", "_") for name in VLLM_OPTIONS},
    "limit_mm_per_prompt": {"image"},
}
"""Fields by the one that holds them, read in Ray 2.58: `ray/serve/schema.py`, `ray/serve/config.py` and `ray/llm/`, in
which `engine_kwargs` are those of vLLM's engine and of its front (`vllm_models.py`)."""


def read(name: str) -> list[Any]:
    return list(yaml.safe_load_all((FOLDER / name).read_text(encoding="utf-8")))


def unknown_fields(value: Any, holder: str = "") -> list[str]:
    if isinstance(value, list):
        return [name for item in value for name in unknown_fields(item, holder)]
    if not isinstance(value, dict):
        return []
    found = [f"{holder}.{name}" for name in value if name not in RAY_FIELDS[holder]]
    return found + [name for key, item in value.items() if key in RAY_FIELDS for name in unknown_fields(item, key)]


@pytest.fixture(scope="module")
def deployment() -> dict:
    return read("kubernetes.yaml")[0]


@pytest.fixture(scope="module")
def container(deployment) -> dict:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return found


def test_kubernetes_starts_hovle_serve_with_options_it_has(deployment, container):
    program, subcommand, *arguments = [*container["command"], *container["args"]]
    assert (program, subcommand) == ("hovle", "serve")
    parser = argparse.ArgumentParser(exit_on_error=False)
    command.add_arguments(parser)
    args = parser.parse_args(arguments)
    assert container["ports"][0]["containerPort"] == args.port
    assert deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > args.shutdown_seconds
    assert {variable["name"] for variable in container["env"]} == {"HOVLE_API_KEY"}
    assert '"HOVLE_API_KEY"' in inspect.getsource(command)


def test_kubernetes_asks_for_paths_that_need_no_key(container, tiny_config, make_tokenizer):
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56)
    model = HoVLEForConditionalGeneration(tiny_config()).eval()
    with TestClient(build_app(model, processor, ServerOptions("tiny", api_key="secret"))) as client:
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert client.get(container[probe]["httpGet"]["path"]).status_code == 200
            assert container[probe]["httpGet"]["port"] == container["ports"][0]["name"]


def test_kubernetes_sends_clients_to_what_it_starts(deployment, container):
    service = read("kubernetes.yaml")[1]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


def test_vllm_knows_its_options():
    (options,) = read("vllm.yaml")
    assert options.keys() <= VLLM_OPTIONS


@pytest.mark.parametrize("after", ["", "\n"])
def test_vllms_template_says_what_the_processor_says(make_tokenizer, after):
    spec = importlib.util.spec_from_file_location("vllm_template", FOLDER / "vllm_template.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    processor = HoVLEProcessor.from_language_model(make_tokenizer(), image_size=56, text_after_image=after)
    items = [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}, {"type": "image"}]
    more = [{"type": "image"}, {"type": "text", "text": "\nAnd?"}]
    chat = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": items},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": more},
    ]
    template = module.flattening(processor.chat_template, processor.image_token, after)
    found = processor.tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False)
    assert found == processor.apply_chat_template(chat, tokenize=False)
    assert found.count(processor.image_token) == 4


def test_ray_knows_its_fields():
    (found,) = read("ray_serve.yaml")
    assert unknown_fields(found) == []
    [[engine]] = [[item["engine_kwargs"] for item in app["args"]["llm_configs"]] for app in found["applications"]]
    assert engine["chat_template"].endswith("template.jinja")  # without it vLLM's chats see no pictures
    assert unknown_fields({"applications": [{"args": {"llm_configs": [{"engine_kwargs": {"modle": 1}}]}}]}) == [
        "engine_kwargs.modle"
    ]
