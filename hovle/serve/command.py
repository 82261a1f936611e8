"""Answer requests of OpenAI's chat API with a model.

  hovle serve runs/demo/instruction_tuning/model             at http://localhost:8000/v1
  transformers chat runs/demo/instruction_tuning/model       talks to it from another terminal, text only

Requests name the model as it is named here, by its folder's last name, by --served-model-name, or not at all. Pictures
come as `image_url` items: http(s) URLs of public addresses (and of --allow-picture-host), or `data:` URLs; `detail`
"low" makes them one tile. A request's `chat_template_kwargs` replace --max-image-tokens and --label-images, within the
server's and the model's bounds: {"max_image_tokens": 500, "max_tiles": 4}. A `temperature` above 0 samples, 0 is
greedy; answers end at `stop` strings, at the model's last position, and when the client hangs up. What a request asks
for is done, or the request is refused: {"error": {"message", "type", "param", "code"}} names the field and the reason.

Answers grow together, up to --max-batch of them, each as it would alone: one pass through the weights gives every one
its next token, and a request that waits joins between two passes. --cache-gib bounds their keys and values. Where a
prompt begins as an earlier one did, as a second question about the same pictures does, or the next turn of a
conversation, only the rest is read; --prefix-gib bounds what is kept for that. Requests beyond --max-requests are told
to come again (429 with Retry-After). /metrics tells numbers in Prometheus' form, /health whether the model answers.
Ctrl+C and SIGTERM let the server finish what it has accepted, for --shutdown-seconds at most.

  hovle serve GGUF_DIR --engine llama.cpp --quantization q8_0     runs what `hovle export --to gguf` wrote
  HOVLE_API_KEY=secret hovle serve DIR --host 0.0.0.0        clients bring the key: Authorization: Bearer secret

Where hovle is not installed, `transformers serve DIR --trust-remote-code` serves the code in the folder, but answers a
picture it cannot read with a bare status 500.
"""

import argparse
import os
from typing import Any

import torch
from transformers.utils.import_utils import is_serve_available

from ..export.engines import ENGINES, check_quantization, load_exported
from ..export.gguf import QUANTIZATIONS
from ..export.needs import need
from ..loading import check_chat_template, check_statistics_agree, load_processor, reading
from ..model.processing_hovle import HoVLEProcessor
from ..options import add_picture_arguments, port, positive
from .limits import MAX_REQUESTS, BatchLimits

SERVERS_OF_THEIR_OWN = {
    "vllm": "vLLM brings its own server with the same API: vllm serve {model} --trust-remote-code.",
}
"""Engines that batch, count and stream by themselves -> how they are used."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `hovle serve`, a choice of those of `transformers serve`."""
    parser.add_argument("model", help="model folder or Hub id")
    parser.add_argument("--host", default="localhost", help="address to listen at (default: localhost)")
    parser.add_argument("--port", type=port, default=8000, help="port to listen at (default: 8000)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    parser.add_argument(
        "--dtype",
        default="auto",
        help="number format: for torch for instance bfloat16 (default: as saved), for openvino float32 or bfloat16 "
        "(default: what it finds faster)",
    )
    parser.add_argument("--attn-implementation", help="sdpa, eager, flex_attention or flash_attention_2")
    parser.add_argument("--served-model-name", metavar="NAME", help="what clients call the model")
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages from there may use the server, for instance http://localhost:3000; * for all; repeatable",
    )
    parser.add_argument(
        "--allow-picture-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch pictures from this host also where its address is not public; repeatable",
    )
    limits = BatchLimits()
    parser.add_argument(
        "--max-batch",
        type=positive,
        default=limits.num_rows,
        metavar="N",
        help=f"answers that grow at a time (default: {limits.num_rows})",
    )
    parser.add_argument(
        "--cache-gib",
        type=_bytes_of_gib,
        default=limits.cache_bytes,
        metavar="GIB",
        help=f"memory for keys and values of all answers in work (default: {limits.cache_bytes >> 30})",
    )
    parser.add_argument(
        "--prefix-gib",
        type=_bytes_of_gib,
        default=limits.prefix_bytes,
        metavar="GIB",
        help=f"memory for beginnings of prompts, 0 to keep none (default: {limits.prefix_bytes >> 30})",
    )
    parser.add_argument(
        "--max-requests",
        type=positive,
        default=MAX_REQUESTS,
        metavar="N",
        help=f"requests in work or waiting (default: {MAX_REQUESTS})",
    )
    parser.add_argument(
        "--shutdown-seconds",
        type=positive,
        default=120,
        metavar="S",
        help="time for accepted requests once the server is told to stop (default: 120)",
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients must bring; better by the environment variable HOVLE_API_KEY, which others do not see",
    )
    parser.add_argument(
        "--engine",
        choices=("torch", *ENGINES, *SERVERS_OF_THEIR_OWN),
        default="torch",
        help="llama.cpp, openvino and onnx give one answer after another; vllm has a server of its own",
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="which file llama.cpp reads (default: f16)")
    add_picture_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    if not is_serve_available():
        raise ValueError("The server's packages are missing: pip install 'hovle[serve]' brings them.")
    need("The server", "hovle[serve]", "prometheus_client")
    if args.engine in SERVERS_OF_THEIR_OWN:
        advice = SERVERS_OF_THEIR_OWN[args.engine].format(model=args.model)
        raise ValueError(f"--engine {args.engine}: {advice} See serve/README.md in hovle's repository.")
    _refuse_missing_device(args.device)
    import uvicorn

    from .app import ServerOptions, build_app
    from .connections import BoundedConnection

    model, processor = (_load_torch if args.engine == "torch" else _load_exported)(args)
    options = ServerOptions(
        args.model,
        args.served_model_name,
        _defaults(args),
        args.allow_picture_host,
        args.allow_origin,
        BatchLimits(args.max_batch, args.cache_gib, args.prefix_gib),
        args.max_requests,
        _api_key(args.api_key),
    )
    app = build_app(model, processor, options)
    uvicorn.run(
        app,
        host=args.host,
        port=args.port,
        log_level="info",
        http=BoundedConnection,
        timeout_graceful_shutdown=args.shutdown_seconds,
    )
    return 0


def _load_torch(args: argparse.Namespace) -> tuple[Any, HoVLEProcessor]:
    check_quantization(args.engine, args.quantization)
    from transformers.cli.serving.model_manager import ModelManager

    with reading(args.model):
        models = ModelManager(
            device=args.device, dtype=args.dtype, attn_implementation=args.attn_implementation, force_model=args.model
        )
        model, processor = models.load_model_and_processor(models.process_model_name(args.model))
        check_chat_template(processor)
        if processor.image_processor.gives_bytes():
            check_statistics_agree(processor.image_processor, model.config)
    return model, processor


def _load_exported(args: argparse.Namespace) -> tuple[Any, HoVLEProcessor]:
    limits = BatchLimits()
    usual = {
        "device": "auto",
        "attn_implementation": None,
        "max_batch": limits.num_rows,
        "cache_gib": limits.cache_bytes,
        "prefix_gib": limits.prefix_bytes,
    }
    for name, value in usual.items():
        if getattr(args, name) != value:
            raise ValueError(f"--{name.replace('_', '-')} is of no use with --engine {args.engine}; leave it out.")
    return load_exported(args.model, args.engine, args.quantization, args.dtype), load_processor(args.model)


def _bytes_of_gib(text: str) -> int:
    number = float(text)
    if not 0 <= number < 2**20:
        raise argparse.ArgumentTypeError(f"expected GiB, 0 or more, found {text}")
    return int(number * 2**30)


def _api_key(given: str | None) -> str | None:
    """The key of the command line or else of the environment; an empty one would let everybody in."""
    key = os.environ.get("HOVLE_API_KEY") if given is None else given
    if key is not None and not key.strip():
        raise ValueError("The API key is empty: give one with --api-key or HOVLE_API_KEY, or neither to ask for none.")
    return key


def _refuse_missing_device(name: str) -> None:
    """Raise for a device torch does not find, before the model is read."""
    if name == "auto":
        return
    try:
        torch.empty(0, device=int(name) if name.isdigit() else name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); `hovle doctor` names the devices.") from error


def _defaults(args: argparse.Namespace) -> dict:
    """Arguments of `apply_chat_template` for requests that do not bring their own."""
    budget = {} if args.max_image_tokens is None else {"max_image_tokens": args.max_image_tokens}
    return {**budget, "label_images": args.label_images}
