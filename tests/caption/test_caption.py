"""`hovle caption`: the answers of `generate`, whatever shares a batch, and none lost to a kill."""

import json
import multiprocessing
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import shake

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor, cli
from hovle.inference import ImageSession

SIZES = [(60, 60), (300, 100), (100, 300), (60, 60), (400, 400), (90, 60), (60, 90), (200, 60), (61, 61), (70, 70)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config, make_tokenizer) -> Path:
    """A tiny model that says something else of every picture."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = tiny_config()
    shake(HoVLEForConditionalGeneration(config)).save_pretrained(folder)
    HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, size in enumerate(SIZES):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        (folder / str(number % 3)).mkdir(exist_ok=True)
        Image.fromarray(pixels).resize(size).save(folder / str(number % 3) / f"{number // 3}.png")
    return folder


def arguments(folder, out, *sources, **options) -> list[str]:
    given = {"model": folder, "out": out, "prompt": "what is it?", "dtype": "float32", "max-new-tokens": 6, **options}
    return ["caption", *map(str, sources), *(str(part) for name in given for part in (f"--{name}", given[name]))]


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def expected(folder, photos) -> list[dict]:
    """Each picture alone, by `apply_chat_template` and `generate`."""
    model = HoVLEForConditionalGeneration.from_pretrained(folder).eval()
    processor = HoVLEProcessor.from_pretrained(folder)
    lines = []
    for path in sorted(photos.rglob("*.png")):
        content = [{"type": "image", "path": str(path)}, {"type": "text", "text": "what is it?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        text = processor.decode(ids, skip_special_tokens=True).strip()
        is_cut = int(ids[-1]) != model.generation_config.eos_token_id
        lines.append({"name": str(path), "caption": text, "num_tokens": len(ids), "is_cut": is_cut})
    assert len({line["caption"] for line in lines}) > 5
    return lines


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_captions_are_the_answers_of_generate_in_the_order_of_the_input(
    folder, photos, expected, tmp_path, capsys, batch_size
):
    out = tmp_path / "out.jsonl"
    assert cli.main(arguments(folder, out, photos, **{"batch-size": batch_size})) == 0
    assert read(out) == expected
    printed = capsys.readouterr().err
    assert "10/10" in printed  # the progress bar
    assert f"10 of 10 pictures have an answer, {out} has them all." in printed


def test_a_picture_that_cannot_be_read_is_a_line_with_the_reason(folder, photos, expected, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes((photos / "0" / "0.png").read_bytes()[:60])
    sources = [tmp_path / "gone.jpg", photos, tmp_path / "broken.png", photos / "0"]  # some are named twice
    out = tmp_path / "out.jsonl"
    assert cli.main(arguments(folder, out, *sources)) == 1
    lines = read(out)
    assert lines[0]["name"] == str(tmp_path / "gone.jpg")
    assert lines[0]["error"].startswith("no such file")
    assert set(lines[11]) == {"name", "error"}
    assert lines[1:11] == expected
    assert lines[12:] == [line for line in expected if Path(line["name"]).parent.name == "0"]
    assert "gone.jpg: no such file" in capsys.readouterr().err
    Image.new("RGB", (60, 60), "red").save(tmp_path / "gone.jpg")  # errors are tried again, answers are kept
    assert cli.main([*arguments(folder, out, *sources), "--resume"]) == 1
    assert "caption" in read(out)[0]
    assert read(out)[1:] == lines[1:]


def test_options_reach_the_pictures_and_are_kept_apart(folder, photos, expected, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    assert cli.main([*arguments(folder, out, photos, **{"max-tiles": 1}), "--uint8"]) == 0
    assert read(out) != expected
    assert cli.main([*arguments(folder, out, photos, **{"max-tiles": 2}), "--uint8", "--resume"]) == 1
    assert "was made with max_tiles 1, now it is 2" in capsys.readouterr().err


def test_a_prompt_that_leaves_no_room_for_an_answer_is_an_error_of_its_picture(folder, photos, tmp_path, capsys):
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}]
    [ids] = HoVLEProcessor.from_pretrained(folder).encode_chats([chat], [1], add_generation_prompt=True)
    short = shutil.copytree(folder, tmp_path / "short")
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = len(ids) + 6
    (short / "config.json").write_text(json.dumps(config))
    out = tmp_path / "out.jsonl"
    sources = [photos / "0" / "0.png", photos / "1" / "0.png"]  # one tile, and several
    assert cli.main(arguments(short, out, *sources)) == 1
    first, second = read(out)
    assert "caption" in first
    assert f"the answer up to 6; the model has {len(ids) + 6} positions" in second["error"]
    assert cli.main(arguments(short, tmp_path / "other.jsonl", *sources, **{"max-new-tokens": 7})) == 1
    assert "hovle caption: its prompt takes" in capsys.readouterr().err
    assert not read(tmp_path / "other.jsonl")


def test_pictures_of_a_row_are_shown_together(folder, photos, expected, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [Path(line["name"]).read_bytes() for line in expected[:3]]
    rows = {"images": [[{"bytes": file, "path": None} for file in files[:number]] for number in (1, 2)]}
    features = datasets.Features({"images": [datasets.Image()]})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "data.parquet")
    assert cli.main(arguments(folder, tmp_path / "out.jsonl", tmp_path / "data.parquet")) == 0
    first, second = read(tmp_path / "out.jsonl")
    assert first == {**expected[0], "name": f"{tmp_path / 'data.parquet'}[0]"}
    session = ImageSession(
        HoVLEForConditionalGeneration.from_pretrained(folder).eval(), HoVLEProcessor.from_pretrained(folder), files[:2]
    )
    assert second["caption"] == session.ask("what is it?", max_new_tokens=6, do_sample=False)


def test_memory_that_runs_out_says_how_to_go_on(folder, photos, tmp_path, capsys, monkeypatch):
    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("12 GiB")

    monkeypatch.setattr(HoVLEForConditionalGeneration, "generate", out_of_memory)
    assert cli.main(arguments(folder, tmp_path / "out.jsonl", photos)) == 1
    assert "--batch-size 8 takes more memory than there is (12 GiB)" in capsys.readouterr().err


def work(argv: list[str]) -> None:
    torch.set_num_threads(1)
    cli.main(argv)


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_nothing_is_lost_on_kill_9(folder, photos, expected, tmp_path, num_kills):
    """Runs are killed at random moments and gone on with; what was there stays, and the end is as of one run."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "hovle.caption.command"])
    chance, out = random.Random(num_kills), tmp_path / "out.jsonl"
    argv = [*arguments(folder, out, photos, **{"batch-size": 1, "workers": 2}), "--resume"]
    num_unfinished = 0
    for number in range(num_kills):
        if number % 7 == 6:  # from the beginning again
            out.unlink(missing_ok=True)
        before = out.read_bytes() if out.exists() else b""
        wanted = before.count(b"\n") + chance.randrange(3)
        process = context.Process(target=work, args=(argv,))
        process.start()
        while process.is_alive() and (out.read_bytes() if out.exists() else b"").count(b"\n") <= wanted:
            time.sleep(0.001)
        time.sleep(chance.random() * 0.03)
        process.kill()
        process.join()
        after = out.read_bytes() if out.exists() else b""
        assert {*before.splitlines()[: before.count(b"\n")]} <= {*after.splitlines()}
        num_unfinished += after.count(b"\n") < len(expected)
    assert num_unfinished
    assert cli.main(argv) == 0
    assert read(out) == expected
