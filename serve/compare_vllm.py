"""Do vLLM and transformers answer alike? Greedy tokens of the same prompts with pictures, one engine after the other.

Run it where vLLM is installed; hovle need not be, the model's folder brings its code:

  python serve/compare_vllm.py MODEL --questions 100
"""

import argparse
import os
import random
import sys
import time
from typing import Any

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


def main() -> int:
    """Run the command; returns 1 where answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder")
    parser.add_argument("--questions", type=int, default=100, metavar="N", help="about as many pictures (100)")
    parser.add_argument("--max-tokens", type=int, default=16, metavar="N", help="longest answer (16)")
    args = parser.parse_args()
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
    answers = []
    for engine in (with_transformers, with_vllm):
        began = time.perf_counter()
        answers.append(engine(args.model, prompts, pictures, args.max_tokens))
        sys.stdout.write(f"{engine.__name__}: {time.perf_counter() - began:.1f} s, loading included\n")
    pairs = list(zip(*answers, strict=True))
    same = sum(ours == theirs for ours, theirs in pairs)
    sys.stdout.write(
        f"{same} of {len(pairs)} answers are the same tokens; {len(set(map(tuple, answers[0])))} distinct\n"
    )
    for number, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            sys.stdout.write(
                f"{number}: {processor.decode(ours)!r} in transformers, {processor.decode(theirs)!r} in vLLM\n"
            )
    return int(same != len(pairs))


if __name__ == "__main__":
    sys.exit(main())
