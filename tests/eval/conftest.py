"""What the tests of evaluation share: tiny models' folders, lmms-eval without its marks on this process, and miniature
copies of the benchmarks' data sets in their own columns, with rows and pictures made here."""

import contextlib
import importlib
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFile
from transformers import (
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
)

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.cli import main
from hovle.model.language_model import add_image_tokens

INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for item in message['content'] %}"
    "{{ '<IMG_CONTEXT>' if item['type'] == 'image' else item['text'] }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def strengthen(model: torch.nn.Module) -> None:
    """Scale random weights up until attention is far from even."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)


@pytest.fixture
def save_hovle(tmp_path, tiny_config, make_tokenizer) -> Callable[..., str]:
    """`save_hovle(name, **config fields)` writes a random HoVLE with its processor; gives the folder."""

    def save(name: str = "hovle", max_tiles: int = 6, **fields) -> str:
        torch.manual_seed(0)
        config = tiny_config(**fields)
        model = HoVLEForConditionalGeneration(config)
        strengthen(model)
        model.save_pretrained(tmp_path / name)
        processor = HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=max_tiles)
        processor.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def save_internvl(tmp_path, make_tokenizer) -> Callable[[], str]:
    """`save_internvl()` writes a random transformers InternVL with tiles of 56 px, 4 tokens each; gives the folder."""

    def save() -> str:
        torch.manual_seed(0)
        tokenizer = make_tokenizer()
        add_image_tokens(tokenizer)
        tokenizer.add_tokens(["<video>"], special_tokens=True)
        tokenizer._set_model_specific_special_tokens(special_tokens={"video_token": "<video>"})
        vision = InternVLVisionConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=64,
            image_size=[56, 56],
            patch_size=[14, 14],
        )
        text = LlamaConfig(
            vocab_size=512,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        config = InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=tokenizer.context_image_token_id, image_seq_length=4
        )
        model = InternVLForConditionalGeneration(config)
        strengthen(model)
        model.save_pretrained(tmp_path / "internvl")
        processor = InternVLProcessor(
            GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=6),
            tokenizer,
            InternVLVideoProcessor(size={"height": 56, "width": 56}),
            image_seq_length=4,
            chat_template=INTERNVL_TEMPLATE,
        )
        processor.save_pretrained(tmp_path / "internvl")
        return str(tmp_path / "internvl")

    return save


@pytest.fixture
def picture() -> Image.Image:
    """Three times as wide as high: with tiles of 56 px a grid of 3 x 1, and a thumbnail."""
    drawing = Image.effect_noise((150, 50), 90).convert("RGB")
    ImageDraw.Draw(drawing).rectangle([110, 10, 140, 40], fill="red")
    return drawing


@pytest.fixture
def picture_file(picture, tmp_path) -> Path:
    """The same picture as a file."""
    picture.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@contextlib.contextmanager
def process_as_before():
    """Undo what importing and running lmms-eval does to a process, for the tests of other files."""
    filelock_api = importlib.import_module("filelock._api")
    truncated, reduce_ssl = ImageFile.LOAD_TRUNCATED_IMAGES, ssl.SSLContext.__reduce__
    lock_call = filelock_api.FileLockMeta.__call__
    yield
    ImageFile.LOAD_TRUNCATED_IMAGES = truncated
    ssl.SSLContext.__reduce__ = reduce_ssl
    filelock_api.FileLockMeta.__call__ = lock_call
    harness = importlib.import_module("lmms_eval.evaluator")
    harness._enable_reentrant_filelocks._patched = False


@pytest.fixture(scope="module")
def lmms_eval(tmp_path_factory):
    """The harness, with its data cache in a temporary folder and no waiting between its retries."""
    with process_as_before(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        for name in ("OPENAI_API_KEY", "NUM_IMAGE"):
            patch.delenv(name, raising=False)
        task = importlib.import_module("lmms_eval.api.task")
        task._resolve_hf_datasets_cache_dir.cache_clear()
        for method in (task.ConfigurableTask.download, task.ConfigurableTask.process_results):
            patch.setattr(method.retry, "sleep", lambda seconds: None)
        yield importlib.import_module("lmms_eval")
    task._resolve_hf_datasets_cache_dir.cache_clear()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, make_tokenizer, tiny_config) -> Path:
    """A saved tiny model with random weights, in float32."""
    torch.manual_seed(0)
    config = tiny_config({"max_position_embeddings": 4096})
    folder = tmp_path_factory.mktemp("tiny-hovle")
    HoVLEForConditionalGeneration(config).save_pretrained(folder)
    HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def manager(lmms_eval):
    """The harness's tasks and ours; reading them all takes seconds."""
    from hovle.eval.benchmarks.harness import task_manager

    return task_manager()


@pytest.fixture
def run(manager, model_folder, tmp_path, monkeypatch):
    """`run(*options)` calls the command on the tiny model and gives exit code and output folder."""
    monkeypatch.setattr("hovle.eval.benchmarks.harness.task_manager", lambda: manager)

    def call(*options, model=model_folder, output=tmp_path / "results"):
        return main(["eval", "benchmarks", str(model), "--output", str(output), *map(str, options)]), output

    return call


@pytest.fixture
def short_answers(lmms_eval, monkeypatch):
    """No answer is longer than four tokens; random weights never come to an end by themselves."""
    plugin = importlib.import_module("hovle.eval.benchmarks.lmms_eval_plugin")
    read = plugin.generation_arguments

    def shortened(*arguments):
        given, stops = read(*arguments)
        return {**given, "max_new_tokens": 4}, stops

    monkeypatch.setattr(plugin, "generation_arguments", shortened)


@dataclass(frozen=True)
class Miniature:
    """A data set of a few rows in a benchmark's own columns."""

    split: str
    rows: list[dict[str, Any]]
    answers: list[str]
    """What a perfect model says, row by row."""
    question: str = "question"
    """Column with words that tell the rows apart in the prompt."""
    full: float = 100.0
    """The score of those answers."""


def draw_picture(number: int) -> Image.Image:
    """A drawing of its own for every number, in sizes that need one or several tiles."""
    drawing = Image.new("RGB", (60 + 50 * (number % 3), 60 + 20 * (number % 2)), (200, 30 * (number % 8), 120))
    ImageDraw.Draw(drawing).ellipse((5 * (number % 4), 8, 50, 50), fill=(20, 90, 25 * (number % 9)))
    return drawing


def _rows(count: int, **columns) -> list[dict[str, Any]]:
    """Rows whose columns are a list of values, or one value for all; `image` is drawn."""
    return [
        {name: values[place] if isinstance(values, list) else values for name, values in columns.items()}
        for place in range(count)
    ]


QUESTIONS = ["How many birds fly?", "Which colour has the boat?", "Who holds the ball?"]
IMAGES = [draw_picture(0), draw_picture(1), draw_picture(2)]
LETTERS = ["A", "C", "B"]
OPTIONS = [["one", "two", "six"], ["red", "green", "blue"], ["a boy", "a girl", "no one"]]


def _lettered(*names: str) -> dict[str, list[str]]:
    """A column for each option: the first holds the first options of all questions."""
    return {name: [options[place] for options in OPTIONS] for place, name in enumerate(names)}


def _mmmu() -> Miniature:
    pictures = {f"image_{number}": [draw_picture(number), draw_picture(number + 1), None] for number in (1, 2)}
    pictures["image_1"][2] = draw_picture(7)
    rows = _rows(
        3,
        id=["validation_Math_1", "validation_Art_2", "validation_Math_3"],
        question=["<image 1> How many birds fly?", "Is <image 1> or <image 2> a boat?", "<image 1> What is the sum?"],
        options=["['one', 'two', 'six']", "['first', 'second']", "[]"],
        explanation="",
        **pictures,
        **{f"image_{number}": None for number in range(3, 8)},
        answer=["C", "A", "12"],
        question_type=["multiple-choice", "multiple-choice", "open"],
        subfield="any",
        topic_difficulty="Easy",
        img_type="['Diagrams']",
    )
    # The harness takes the picture marks out of the prompt, so that the rows are told apart by what stands around.
    return Miniature("validation", rows, ["C", "A", "12"], question="marker")


def _mme() -> Miniature:
    rows = _rows(
        4,
        question_id=["code/1.png", "code/1.png", "count/2.png", "count/2.png"],
        image=[draw_picture(1), draw_picture(1), draw_picture(2), draw_picture(2)],
        question=[f"{text} Please answer yes or no." for text in ("Is it C?", "Is it Python?", "Two?", "Three?")],
        answer=["Yes", "No", "No", "Yes"],
        category=["code_reasoning", "code_reasoning", "count", "count"],
    )
    return Miniature("test", rows, ["Yes", "No.", "no", "yes"], full=400.0)


def _hallusion() -> Miniature:
    rows = _rows(
        3,
        category=["VD", "VD", "VS"],
        subcategory=["illusion", "illusion", "chart"],
        visual_input="1",
        set_id=["0", "0", "1"],
        figure_id=["0", "1", "1"],
        sample_note="",
        question_id="0",
        question=QUESTIONS,
        gt_answer_details=["They are equal.", "They differ.", "It rises."],
        gt_answer=["1", "0", "1"],
        filename="any.png",
        image=IMAGES,
    )
    return Miniature("image", rows, ["Yes, they are.", "No", "yes"])


def _mathvista() -> Miniature:
    metadata = {
        "split": "testmini",
        "language": "english",
        "source": "made",
        "category": "general-vqa",
        "task": "any",
        "context": "drawing",
        "grade": "elementary school",
        "skills": ["arithmetic reasoning"],
    }
    rows = _rows(
        3,
        pid=["1", "2", "3"],
        question=QUESTIONS,
        image="images/1.jpg",
        decoded_image=IMAGES,
        choices=[None, OPTIONS[1], None],
        unit=None,
        precision=[None, None, 1.0],
        answer=["4", "blue", "1.5"],
        question_type=["free_form", "multi_choice", "free_form"],
        answer_type=["integer", "text", "float"],
        metadata=[metadata] * 3,
        query=[f"Hint: answer.\nQuestion: {text}" for text in QUESTIONS],
    )
    return Miniature("testmini", rows, ["There are 4.", "(C) blue", "about 1.48"])


def _doc_vqa(**more) -> Miniature:
    return Miniature(
        "validation",
        _rows(
            3,
            questionId=["1", "2", "3"],
            question=QUESTIONS,
            answers=[["two"], ["blue", "navy"], ["no one"]],
            image=IMAGES,
            data_split="val",
            **more,
        ),
        ["two", "navy", "no one"],
    )


MINIATURES = {
    "mmbench": Miniature(
        "dev",
        _rows(
            3,
            index=[1, 2, 1_000_001],
            question=[QUESTIONS[0], QUESTIONS[1], "How many birds are flying?"],
            hint=["They are grey.", "nan", "nan"],
            answer=["B", "C", "A"],
            A=["one", "red", "two"],
            B=["two", "green", "six"],
            C=["six", "blue", "one"],
            D=["nine", "black", "nine"],
            category="counting",
            image=IMAGES,
            source="made",
            **{"L2-category": "fine", "comment": "nan", "split": "dev"},
        ),
        ["B", "C.", "A"],
    ),
    "mme": _mme(),
    "mmmu": _mmmu(),
    "mmvet": Miniature(
        "test",
        _rows(
            3,
            question_id=["v1_0", "v1_1", "v1_2"],
            image=IMAGES,
            question=QUESTIONS,
            answer=["4<OR>four", "red<AND>blue", "a boy"],
            image_source="made",
            capability="ocr,math",
        ),
        ["I see four of them.", "Blue and red.", "A boy does."],
    ),
    "seed": Miniature(
        "test",
        _rows(
            3,
            answer=LETTERS,
            **_lettered("choice_a", "choice_b", "choice_c"),
            choice_d="none",
            data_id="1",
            data_type=["image", "image", "video"],
            image=[[one] for one in IMAGES],
            question=QUESTIONS,
            question_id=["1", "2", "3"],
            question_type_id=1,
            segment=None,
        ),
        LETTERS,
    ),
    "pope": Miniature(
        "test",
        _rows(
            3,
            id=["1", "2", "3"],
            question_id=["1", "2", "3"],
            question=QUESTIONS,
            answer=["yes", "no", "yes"],
            image_source="made",
            image=IMAGES,
            category="random",
        ),
        ["Yes", "No", "yes"],
    ),
    "hallusion": _hallusion(),
    "textvqa": Miniature(
        "validation",
        _rows(
            3,
            image_id="1",
            question_id=[1, 2, 3],
            question=[text.lower() for text in QUESTIONS],
            image=IMAGES,
            answers=[["stop"] * 10, ["open"] * 9 + ["closed"], ["exit"] * 10],
            ocr_tokens=[["stop"]] * 3,
        ),
        ["Stop", "open", "exit."],
    ),
    "chartqa": Miniature(
        "test",
        _rows(
            3,
            type=["human_test", "augmented_test", "human_test"],
            question=QUESTIONS,
            answer=["10", "red", "25%"],
            image=IMAGES,
        ),
        ["10.3", "Red", "25%"],
    ),
    "infovqa": _doc_vqa(answer_type="single span"),
    "docvqa": _doc_vqa(question_types=[["form"]] * 3, docId=7),
    "ocrbench": Miniature(
        "test",
        _rows(
            3,
            dataset=["IIIT5K", "docVQA", "HME100k"],
            question=QUESTIONS,
            question_type=[
                "Regular Text Recognition",
                "Doc-oriented VQA",
                "Handwritten Mathematical Expression Recognition",
            ],
            answer=[["STOP"], ["May 5"], ["x + 1"]],
            image=IMAGES,
        ),
        ["It says stop", "May 5", "x+1"],
        full=1000.0,
    ),
    "gqa": Miniature(
        "testdev",
        _rows(
            3,
            id=["1", "2", "3"],
            imageId=["n2", "n1", "n2"],
            question=QUESTIONS,
            answer=["two", "blue", "boy"],
            fullAnswer="any",
            isBalanced=True,
        ),
        ["Two", "blue.", "boy"],
    ),
    "scienceqa": Miniature(
        "test",
        _rows(
            3,
            image=IMAGES,
            question=QUESTIONS,
            choices=OPTIONS,
            answer=[0, 2, 1],
            hint=["Look up.", "", ""],
            subject="natural science",
            topic="biology",
        ),
        ["A", "C. blue", "b"],
    ),
    "ai2d": Miniature(
        "test",
        _rows(3, question=QUESTIONS, options=OPTIONS, answer=["0", "2", "1"], image=IMAGES),
        ["A", "C. blue", "b"],
    ),
    "mathvista": _mathvista(),
    "mmstar": Miniature(
        "val",
        _rows(
            3,
            index=[0, 1, 2],
            question=[f"{text}\nOptions: A: x, B: y, C: z, D: v" for text in QUESTIONS],
            image=IMAGES,
            answer=LETTERS,
            category=["math", "math", "coarse perception"],
            l2_category=["geometry", "statistical reasoning", "image emotion"],
            meta_info="{}",
        ),
        LETTERS,
    ),
}
"""Benchmark -> its data in small. MME scores pictures by two questions each, so it has four rows."""


@pytest.fixture(scope="session")
def miniatures() -> dict[str, Miniature]:
    """All of `MINIATURES`."""
    return MINIATURES


@pytest.fixture(scope="session")
def miniature_data(tmp_path_factory) -> Path:
    """A folder as `--data` takes it, with every miniature as parquet files."""
    import datasets

    folder = tmp_path_factory.mktemp("miniatures")
    for name, miniature in MINIATURES.items():
        _write(datasets, miniature.rows, folder / name / f"{miniature.split}-00000-of-00001.parquet")
    pictures = [{"id": "n1", "image": draw_picture(4)}, {"id": "n2", "image": draw_picture(5)}]
    _write(datasets, pictures, folder / "gqa_images" / "testdev-00000-of-00001.parquet")
    return folder


def _write(datasets: Any, rows: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(path)


def prompt_words(chat: list[dict]) -> str:
    """All text of a chat."""
    return "\n".join(item.get("text", "") for message in chat for item in message["content"])


def answer_for(miniature: Miniature, chat: list[dict]) -> str:
    """What a perfect model says to a prompt of a miniature."""
    words = prompt_words(chat).lower()
    keys = [
        row["question"].removesuffix(" Please answer yes or no.").partition("\nOptions")[0] for row in miniature.rows
    ]
    if miniature.question == "marker":
        keys = [text.split(">")[-1].strip() for text in keys]
    (found,) = [answer for key, answer in zip(keys, miniature.answers, strict=True) if key.lower() in words]
    return found


@pytest.fixture(scope="session")
def perfect_answer():
    """`perfect_answer(miniature, chat)`."""
    return answer_for
