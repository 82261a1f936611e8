"""Do other engines answer as transformers does? Greedy tokens of the same prompts with pictures.

Run it where the engine is installed. EXPORTED is what `hovle export MODEL EXPORTED --to FORMAT` wrote:

  python serve/compare.py MODEL --engine vllm                          hovle need not be there, the folder has its code
  python serve/compare.py MODEL --engine mlx --exported EXPORTED       of the format llama; nor there
  python serve/compare.py MODEL --engine llama.cpp --exported EXPORTED gguf, in f16
  python serve/compare.py MODEL --engine onnx --exported EXPORTED
  python serve/compare.py MODEL --engine openvino --exported EXPORTED  pictures cut as in training
  python serve/compare.py MODEL --engine genai --exported EXPORTED     OpenVINO GenAI, which cuts them itself; as text
"""

import argparse
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

QUESTIONS = ("What color is it?", "What is in the picture?", "Is there a circle?", "How many shapes are there?")
EXPORTED = ("llama.cpp", "onnx", "openvino", "genai")
"""Engines that run what hovle exported for them."""

COLORS = ("red", "green", "blue", "orange", "black", "purple")
SIDE = 112
"""Pixels of a square; pictures are one to four of them wide, so that they make other numbers of tiles."""


def picture(seed: int) -> Image.Image:
    """A coloured shape on white, or two."""
    rng = random.Random(seed)
    image = Image.new("RGB", (SIDE * rng.randint(1, 4), SIDE), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 2)):
        left = rng.randrange(image.width - 60)
        shape = rng.choice((draw.ellipse, draw.rectangle))
        shape((left, 20, left + 50, 70), fill=rng.choice(COLORS))
    return image


def with_transformers(
    folder: str, prompts: list[str], pictures: list[Image.Image], num_tokens: int
) -> list[list[int]]:
    """Tokens of each answer, in float32."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    answers = []
    for prompt, image in zip(prompts, pictures, strict=True):
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
        answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def with_vllm(folder: str, prompts: list[str], pictures: list[Image.Image], num_tokens: int) -> list[list[int]]:
    """Tokens of each answer, in float32, as many at once as vLLM likes."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    engine = LLM(model=folder, trust_remote_code=True, dtype="float32", max_model_len=2048, enforce_eager=True)
    requests: list[Any] = [
        {"prompt": prompt, "multi_modal_data": {"image": image}}
        for prompt, image in zip(prompts, pictures, strict=True)
    ]
    outputs = engine.generate(requests, SamplingParams(temperature=0, max_tokens=num_tokens))
    return [list(output.outputs[0].token_ids) for output in outputs]


def with_mlx(folder: str, prompts: list[list[int]], pictures: list[Image.Image], num_tokens: int) -> list[list[int]]:
    """Tokens of each answer, in the numbers of an exported folder; prompts are ids, image tokens in their places."""
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    sys.path.insert(0, str(Path(folder) / "stem"))
    from stem import Stem

    loaded: Any = load(folder)
    model, tokenizer = loaded[0], loaded[1]
    stem = Stem(Path(folder) / "stem" / "stem.safetensors")
    answers = []
    for ids, image in zip(prompts, pictures, strict=True):
        embeds = np.array(model.model.embed_tokens(mx.array(ids)).astype(mx.float32))
        embeds[np.array(ids) == stem.image_token_id] = stem(image)
        answers.append([])
        for token, _ in generate_step(mx.array(ids), model, max_tokens=num_tokens, input_embeddings=mx.array(embeds)):
            answers[-1].append(int(token))
            if token in tokenizer.eos_token_ids:
                break
    return answers


def with_export(engine: str, folder: str, prompts: list[dict], num_tokens: int) -> list[list[int]]:
    """Tokens of each answer in an engine of `hovle chat`, in float32 where it can; prompts are what the processor
    made of words and picture."""
    from hovle.export.engines import load_exported

    model = load_exported(folder, engine, dtype="float32" if engine == "openvino" else "auto")
    answers = []
    for inputs in prompts:
        model.forget()
        tokens = model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False)
        answers.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    return answers


def with_genai(folder: str, questions: list[str], pictures: list[Image.Image], num_tokens: int) -> list[str]:
    """Each answer, in float32; GenAI makes prompts and tiles."""
    import openvino
    from openvino_genai import VLMPipeline

    pipeline = VLMPipeline(folder, "CPU", INFERENCE_PRECISION_HINT="f32")
    options = {"max_new_tokens": num_tokens, "do_sample": False}
    answers = []
    for question, image in zip(questions, pictures, strict=True):
        pixels = openvino.Tensor(np.asarray(image)[None])
        answers.append(pipeline.generate(question, images=[pixels], **options).texts[0])
    return answers


def main() -> int:
    """Run the command; returns 1 where answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--engine", choices=("vllm", "mlx", *EXPORTED), required=True, help="the other engine")
    parser.add_argument("--exported", metavar="DIR", help="for all but vLLM: the model as `hovle export` wrote it")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="about as many pictures (100)")
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="longest answer (16)")
    args = parser.parse_args()
    if (args.engine == "vllm") != (args.exported is None):
        parser.error("--engine vllm takes no --exported, and all others need it")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    questions = [QUESTIONS[number % len(QUESTIONS)] for number in range(args.questions)]
    pictures = [picture(seed) for seed in range(args.questions)]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for question in questions
    ]
    expected = timed(with_transformers, args.model, prompts, pictures, args.max_tokens)
    found: list
    if args.engine == "vllm":
        found = timed(with_vllm, args.model, prompts, pictures, args.max_tokens)
    elif args.engine == "genai":
        found = timed(with_genai, args.exported, questions, pictures, args.max_tokens)
        expected = [processor.decode(answer, skip_special_tokens=True) for answer in expected]
    else:
        pairs = zip(prompts, pictures, strict=True)
        inputs = [processor(text=prompt, images=image, return_tensors="pt") for prompt, image in pairs]
        if args.engine == "mlx":
            ids = [prompt["input_ids"][0].tolist() for prompt in inputs]
            found = timed(with_mlx, args.exported, ids, pictures, args.max_tokens)
        else:
            found = timed(with_export, args.engine, args.exported, inputs, args.max_tokens)
    return tell(args.engine, expected, found, processor)


def tell(engine: str, expected: list, found: list, processor: Any) -> int:
    """Say how many answers are the same, and which are not; returns 1 where there are such."""
    differing = [number for number, answer in enumerate(expected) if answer != found[number]]
    what = "text" if engine == "genai" else "tokens"
    sys.stdout.write(
        f"{len(expected) - len(differing)} of {len(expected)} answers are the same {what}; "
        f"{len(set(map(tuple, expected)))} distinct\n"
    )
    for number in differing:
        ours, theirs = (
            answers[number] if engine == "genai" else processor.decode(answers[number])
            for answers in (expected, found)
        )
        sys.stdout.write(f"{number}: {ours!r} in transformers, {theirs!r} in {engine}\n")
    return int(bool(differing))


def timed(engine, *arguments) -> list:
    """Answers of an engine; says how long it took."""
    began = time.perf_counter()
    answers = engine(*arguments)
    sys.stdout.write(f"{engine.__name__}: {time.perf_counter() - began:.1f} s, loading included\n")
    return answers


if __name__ == "__main__":
    sys.exit(main())
