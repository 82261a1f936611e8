"""Do vLLM or MLX answer as transformers does? Greedy tokens of the same prompts with pictures.

Run it where the engine is installed; hovle need not be, the model's folder brings its code:

  python serve/compare.py MODEL --engine vllm
  python serve/compare.py MODEL --engine mlx --exported EXPORTED     from `hovle export MODEL EXPORTED --to llama`
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


def main() -> int:
    """Run the command; returns 1 where answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--engine", choices=("vllm", "mlx"), required=True, help="the other engine")
    parser.add_argument("--exported", metavar="DIR", help="for MLX: the model as `hovle export --to llama` wrote it")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="about as many pictures (100)")
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="longest answer (16)")
    args = parser.parse_args()
    if (args.engine == "mlx") != (args.exported is not None):
        parser.error("--engine mlx needs --exported, and no other engine takes it")
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    pictures = [picture(seed) for seed in range(args.questions)]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[number % 4]}]}],
            add_generation_prompt=True,
            tokenize=False,
        )
        for number in range(args.questions)
    ]
    expected = timed(with_transformers, args.model, prompts, pictures, args.max_tokens)
    if args.engine == "vllm":
        found = timed(with_vllm, args.model, prompts, pictures, args.max_tokens)
    else:
        pairs = zip(prompts, pictures, strict=True)
        ids = [processor(text=prompt, images=image)["input_ids"][0] for prompt, image in pairs]
        found = timed(with_mlx, args.exported, ids, pictures, args.max_tokens)
    differing = [number for number, answer in enumerate(expected) if answer != found[number]]
    sys.stdout.write(
        f"{len(expected) - len(differing)} of {len(expected)} answers are the same tokens; "
        f"{len(set(map(tuple, expected)))} distinct\n"
    )
    for number in differing:
        ours, theirs = (processor.decode(answers[number]) for answers in (expected, found))
        sys.stdout.write(f"{number}: {ours!r} in transformers, {theirs!r} in {args.engine}\n")
    return int(bool(differing))


def timed(engine, *arguments) -> list[list[int]]:
    """Answers of an engine; says how long it took."""
    began = time.perf_counter()
    answers = engine(*arguments)
    sys.stdout.write(f"{engine.__name__}: {time.perf_counter() - began:.1f} s, loading included\n")
    return answers


if __name__ == "__main__":
    sys.exit(main())
