"""`hovle data doctor`: what the report says of small sources, sound and broken."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import yaml

from hovle.cli import main
from hovle.train.config import load_stage


@pytest.fixture
def recipe(next_token_config, data, tmp_path) -> Path:
    """A recipe over sound chats and a LLaVA file with every kind of fault."""
    pictures = tmp_path / "pictures"
    shutil.copytree(data / "pictures", pictures)
    (pictures / "half.png").write_bytes((data / "pictures" / "00.png").read_bytes()[:100])

    def entry(mark: str, reply: str, *names: str) -> dict:
        turns = [{"from": "human", "value": f"{mark}What is it?"}, {"from": "gpt", "value": reply}]
        return {"image": list(names), "conversations": turns}

    entries = [
        entry("<image>\n", "A bus", "01.png"),
        entry("", "A bus", "01.png"),
        entry("<image>", "A bus", "half.png"),
        entry("<image>", "A bus", "gone.png"),
        entry("<image>", "", "01.png"),
        entry("<image>", "the quick brown fox " * 60, "01.png"),
        entry("<image>", "\x1b[31mred\x1b[0m", "02.png"),
    ]
    (tmp_path / "llava.json").write_text(json.dumps(entries))
    next_token_config()
    values = yaml.safe_load((tmp_path / "next_token.yaml").read_text())
    values["data"] = [
        {**values["data"], "weight": 3, "name": "chats"},
        {"source": "llava", "path": str(tmp_path / "llava.json"), "picture_folder": str(pictures), "name": "mixed"},
    ]
    path = tmp_path / "mix.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def report_of(capsys, tmp_path, *arguments) -> tuple[int, str]:
    code = main(["data", "doctor", *map(str, arguments), "--out", str(tmp_path / "lengths.png")])
    return code, capsys.readouterr().out


def test_sound_data_is_described_with_its_samples(next_token_config, tmp_path, capsys):
    next_token_config()
    code, shown = report_of(capsys, tmp_path, tmp_path / "next_token.yaml")
    assert code == 0
    assert "chat:chat.jsonl: 18 records, 100.0% of the samples" in shown
    assert "skipped" not in shown
    assert "scanned" not in shown
    assert ">>In the corner of the street is a tree and a bus and a dog and a cat.<|im_end|><<" in shown
    assert "image tokens]</img>" in shown
    assert shown.count("\n---") == 5
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")
    tokens = int(shown.split(" tokens, ")[0].split()[-1].replace(",", ""))
    config = load_stage(str(tmp_path / "next_token.yaml"))
    filled = 1 - float(shown.split("whole mix: ")[1].split("%")[0]) / 100
    epochs = config.num_steps * config.rows_per_batch * config.row_length * filled / tokens
    assert float(shown.split("run ")[1].split()[0]) == pytest.approx(epochs, abs=0.01)


def test_every_fault_is_counted_by_reason_and_named(recipe, tmp_path, capsys):
    code, shown = report_of(capsys, tmp_path, recipe)
    assert code == 1
    assert "mixed: 7 records, 25.0% of the samples" in shown
    for reason in ("picture count", "unreadable picture", "missing file", "no supervised token", "over-long"):
        assert f"skipped        1 (14.29%): {reason}" in shown
    for name, detail in ((2, "0 <image> marks in the user's turns, but 1 pictures"), (3, "half.png"), (4, "gone.png")):
        [line] = [line for line in shown.splitlines() if line.strip().startswith(f"llava.json:{name}: ")]
        assert detail in line
    assert "samples        2," in shown
    assert "A run would stop: mixed skips more than 0.10%." in shown
    assert main(["data", "doctor", str(recipe), "max_skip_fraction=0.9", "--out", str(tmp_path / "x.png")]) == 0


def test_faults_of_data_set_rows_and_unanswered_turns_are_counted_and_named(
    recipe, data, tmp_path, capsys, monkeypatch
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    picture = (data / "pictures" / "01.png").read_bytes()
    turns = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A bus"}]
    members = {f"{number}.json": json.dumps({"conversations": turns, "image": f"{number}.png"}) for number in range(5)}
    members |= {f"{number}.png": picture for number in range(5)}
    members["1.json"] = '{"conversations": ['
    members["3.json"] = json.dumps({"conversations": [*turns, {"from": "human", "value": "And?"}]})
    members["5.json"] = json.dumps({"conversations": turns, "image": "gone.png"})  # and no 5.png
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "shard.tar", "w") as tar:
        for name, content in sorted(members.items()):
            entry = tarfile.TarInfo(name)
            content = content.encode() if isinstance(content, str) else content
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    source = f"{{source: huggingface, path: {tmp_path / 'tars'}, name: tars}}"
    code, shown = report_of(capsys, tmp_path, recipe, f"data.1={source}")
    assert code == 1
    for reason in ("malformed", "missing file", "unanswered turn"):
        assert f"skipped        1 (14.29%): {reason}" in shown  # of six rows, one of which lost a turn
    for detail in (
        "1.json of shard.tar cannot",
        "its image is the text 'gone.png'",
        "1 messages after its last reply",
    ):
        assert detail in shown
    assert "samples        4," in shown


def test_conversations_that_could_share_pictures_and_those_that_do_are_counted(next_token_config, tmp_path, capsys):
    next_token_config()
    for size, records, shared in ((1, "18 records", 0), (2, "13 records of 18 conversations", 10)):
        _, shown = report_of(
            capsys, tmp_path, tmp_path / "next_token.yaml", f"data.questions_per_sample={size}", "row_length=400"
        )
        assert f"chat:chat.jsonl: {records}, 100.0% of the samples" in shown
        assert (
            f"pictures       10 of 18 conversations could share theirs, up to 2 at a time; {shared} do "
            "(questions_per_sample)"
        ) in shown


def test_data_cannot_send_codes_to_the_terminal(recipe, tmp_path, capsys):
    _, shown = report_of(capsys, tmp_path, recipe)
    assert "\x1b" not in shown
    assert r"\x1b[31mred" in shown


def test_a_bounded_scan_says_so(recipe, tmp_path, capsys):
    _, shown = report_of(capsys, tmp_path, recipe, "--samples", "4")
    assert shown.count("scanned        4 records only; --samples 0 reads all") == 2
    _, shown = report_of(capsys, tmp_path, recipe, "--samples", "0")
    assert "scanned" not in shown


def test_what_the_terminal_shows_in_colour_is_what_is_learnt(recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, shown = report_of(capsys, tmp_path, recipe)
    assert "\x1b[32mA bus<|im_end|>\x1b[0m" in shown


def test_distillation_data_counts_every_token_as_supervised(distillation_config, tmp_path, capsys):
    distillation_config()
    code, shown = report_of(capsys, tmp_path, tmp_path / "distillation.yaml", "--processes", "2")
    assert code == 0
    assert "pictures:pictures: 12 records" in shown
    assert "supervised     100.0% of the tokens" in shown


def test_files_a_picture_folder_leaves_aside_are_named(distillation_config, data, tmp_path, capsys):
    folder = tmp_path / "photos"
    shutil.copytree(data / "pictures", folder)
    (folder / "odd\x1b.heic").touch()
    distillation_config()
    code, shown = report_of(capsys, tmp_path, tmp_path / "distillation.yaml", f"data.path={folder}")
    assert code == 0
    assert r"  left aside 1 files that are no pictures by their names (1 .heic): odd\x1b.heic" in shown


def test_a_mix_that_cannot_be_packed_at_all_is_reported(next_token_config, tmp_path, capsys):
    next_token_config()
    code, shown = report_of(capsys, tmp_path, tmp_path / "next_token.yaml", "row_length=4")
    assert code == 1
    assert "no batch could be packed" in shown
    assert "skipped        27 (100.00%): over-long" in shown  # every turn of the 18 chats


def test_what_the_user_got_wrong_is_said_in_a_line(next_token_config, tmp_path, capsys):
    next_token_config()
    recipe = str(tmp_path / "next_token.yaml")
    assert main(["data", "doctor", recipe, "--samples", "-1"]) == 1
    assert "--samples must be 0 or more" in capsys.readouterr().err
    assert main(["data", "doctor", recipe, "model.checkpoint=nowhere/at/all"]) == 1
    assert "model.checkpoint: No model in nowhere/at/all" in capsys.readouterr().err


def test_keys_nobody_reads_are_named_with_the_rows_that_have_them(next_token_config, data, tmp_path, capsys):
    next_token_config()
    rows = [json.loads(line) for line in (data / "chat.jsonl").read_text().splitlines()]
    for row in rows[:5]:
        row["mood"] = "good"
    shutil.copytree(data, tmp_path / "copy")
    path = tmp_path / "copy" / "chat.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    code, shown = report_of(capsys, tmp_path, tmp_path / "next_token.yaml", f"data.path={path}")
    assert code == 0
    assert "  not read       5 rows: its 'mood' is not read." in shown
    assert "skipped" not in shown
