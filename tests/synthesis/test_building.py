"""`hovle data build`: the same files whoever draws them, whole or not there, and no test taught."""

import json
import os
import signal
import subprocess
import sys
import time
from types import MappingProxyType

import pytest
from PIL import Image
from places import ROOT

from hovle import assets
from hovle.assets import load_manifest
from hovle.cli import main
from hovle.synthesis import building, registry, shards
from hovle.synthesis.building import Build, run_build
from hovle.synthesis.encoding import to_png
from hovle.synthesis.samples import Question, Region, Sample
from hovle.synthesis.shards import read_header, read_rows, read_samples
from hovle.synthesis.skill import AssetFolders, Skill
from hovle.train.config import ChatData, HuggingFaceData
from hovle.train.data.readers import load_records

SIZE = 24
"""Pictures to train on."""


class Dots(Skill):
    """Red pictures, quickly drawn."""

    name = "dots"
    description = "Red pictures."
    revision = 1
    sizes = MappingProxyType({"small": {"train": 4, "validation": 2, "test": 2}})
    held_out = ("drawing",)
    sources = ()
    leaks = False

    def draw(self, index: int, split: str, seed: int) -> Sample:
        rng = self.rng(index, split, seed)
        image = Image.new("RGB", (112, 112), (200, rng.randrange(100), rng.randrange(100)))
        drawing = f"drawing:{index}" if self.leaks else f"drawing:{split}-{index}"
        questions = (Question("What color is it?", "red", "color"), Question("Is it blue?", "no", "yes/no"))
        return Sample(to_png(image), image.size, questions, (Region((0, 0, 112, 112), "red"),), (drawing,))


@pytest.fixture
def dots(monkeypatch):
    """The skill `dots`, in this process."""
    monkeypatch.setattr(registry, "skill_class", {"dots": Dots}.__getitem__)
    monkeypatch.setattr(building, "_OPEN", {})
    monkeypatch.setattr(Dots, "leaks", False)
    return Dots


def build_command(folder, assets, *options):
    return [
        *("data", "build", "smol", "--out", str(folder), "--skills", "reading", "--size", str(SIZE)),
        *("--assets", str(assets), *options),
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory, crafted_assets):
    """A small build of the skill `reading`, drawn in this process."""
    folder = tmp_path_factory.mktemp("built")
    assert main(build_command(folder, crafted_assets, "--workers", "1", "--shard-size", "5")) == 0
    return folder


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_build_that_ended_anywhere_goes_on_in_other_processes_to_the_same_files(
    built, crafted_assets, tmp_path, monkeypatch
):
    durable = shards.rename_durably
    renamed = []

    def rename_or_die(source, target):
        if len(renamed) == 2:
            raise SystemExit("as if killed, with a shard that has no name yet")
        renamed.append(target)
        durable(source, target)

    monkeypatch.setattr(shards, "rename_durably", rename_or_die)
    command = build_command(tmp_path, crafted_assets, "--shard-size", "5")
    with pytest.raises(SystemExit, match="as if killed"):
        main([*command, "--workers", "1"])
    monkeypatch.undo()
    assert len(list(tmp_path.glob("reading/*.parquet"))) == 2
    assert len(list(tmp_path.glob("reading/.*.writing"))) == 1
    assert main([*command, "--workers", "2"]) == 0
    assert contents(tmp_path) == contents(built)


@pytest.mark.slow
def test_a_killed_build_goes_on_to_the_same_files(built, crafted_assets, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "hovle", *build_command(folder, crafted_assets, "--shard-size", "5")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([*command, "--workers", "1"], env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(folder.glob("reading/train-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(folder.glob("reading/*.parquet")))
    assert 0 < done < len(list(built.glob("reading/*.parquet"))), "killed too late to show anything"
    result = subprocess.run([*command, "--workers", "2"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert contents(folder) == contents(built)


def test_some_questions_are_asked_without_their_picture(built):
    chats = [json.loads(line)["messages"] for line in (built / "no-picture.jsonl").read_text().splitlines()]
    asked = {message["content"] for row in read_rows(built, "reading", "train") for message in row["messages"][::2]}
    assert len(chats) == 2  # of 24 pictures
    assert all(user["content"] in asked and "picture" in reply["content"] for user, reply in chats)
    records = load_records(ChatData(path=str(built / "no-picture.jsonl")))
    assert [len(records[number].messages) for number in range(2)] == [2, 2]


def test_an_asset_is_looked_through_once_not_for_each_picture(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(assets, "fetch", lambda name: asked.append(name) or tmp_path / name)
    folders = AssetFolders(None)
    assert [folders["font-a"], folders["font-a"], folders["font-b"]] == [tmp_path / f"font-{x}" for x in "aab"]
    assert asked == ["font-a", "font-b"]


def test_what_is_built_is_not_drawn_again(built, crafted_assets, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in built.rglob("*.parquet")}
    monkeypatch.setattr(building, "draw_shard", None)
    assert main(build_command(built, crafted_assets, "--shard-size", "5")) == 0
    assert {path: path.stat().st_mtime_ns for path in built.rglob("*.parquet")} == before
    assert "pictures/s" not in capsys.readouterr().out


def test_another_build_is_no_part_of_this_one(dots, tmp_path, monkeypatch):
    run_build(Build(tmp_path, ("dots",), 4), 1)
    with pytest.raises(ValueError, match="its seed is 0, not 1"):
        run_build(Build(tmp_path, ("dots",), 4, seed=1), 1)
    with pytest.raises(ValueError, match="its total is 4, not 5"):
        run_build(Build(tmp_path, ("dots",), 5), 1)
    monkeypatch.setattr(Dots, "revision", 2)
    with pytest.raises(ValueError, match="its revision is 1, not 2"):
        run_build(Build(tmp_path, ("dots",), 4), 1)


def test_files_of_others_are_named(dots, tmp_path):
    (tmp_path / "dots").mkdir()
    (tmp_path / "dots" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"train-00000-of-00001.parquet cannot be read as parquet"):
        run_build(Build(tmp_path, ("dots",), 4), 1)


def test_a_test_that_shares_its_sources_with_training_is_refused(dots, tmp_path, monkeypatch):
    monkeypatch.setattr(Dots, "leaks", True)
    with pytest.raises(ValueError, match=r"1 of 1 drawings of the test part are in the training part, such as"):
        run_build(Build(tmp_path, ("dots",), 4), 1)


def test_a_sample_that_cannot_be_drawn_is_named(dots, tmp_path, monkeypatch):
    def draw(self, index, split, seed):
        raise ZeroDivisionError("no ink")

    monkeypatch.setattr(Dots, "draw", draw)
    with pytest.raises(ZeroDivisionError, match="no ink") as raised:
        run_build(Build(tmp_path, ("dots",), 4, seed=7), 1)
    assert raised.value.__notes__ == ["while drawing dots/train/0000000 with the seed 7"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (100, 112)}, "100 x 112 pixels; expected multiples of 112"),
        ({"questions": ()}, "without questions"),
        ({"questions": (Question("What?", " ", "name"),)}, "empty question or answer"),
        ({"questions": (Question("What?", "a", "name"), Question("What?", "b", "name"))}, "a question twice"),
        ({"regions": (Region((0, 0, 113, 5), "a"),)}, "does not lie in a picture of 112 x 112"),
        ({"regions": (Region((5, 5, 5, 9), "a"),)}, "does not lie in"),
        ({"regions": (Region((0, 0, 9, 9), "ab", "line", (0.0, 9.0)),)}, "2 edges of 'ab'; expected 3"),
    ],
)
def test_what_no_sample_may_be_is_refused(changes, message):
    fields = {"image": b"", "size": (112, 112), "questions": (Question("What?", "red", "name"),)}
    Sample(**fields).check()
    with pytest.raises(ValueError, match=message):
        Sample(**{**fields, **changes}).check()


def test_every_thing_is_shown_once_before_one_is_shown_again():
    skill = Dots(AssetFolders(None))
    places = [skill.place(index, 7, "train", 0) for index in range(21)]
    assert all(sorted(places[start : start + 7]) == list(range(7)) for start in (0, 7, 14))
    assert len({tuple(places[start : start + 7]) for start in (0, 7, 14)}) > 1


def test_counts_of_the_card_are_those_of_the_shards(built):
    card = json.loads((built / "card.json").read_text())
    part = card["skills"]["reading"]["parts"]["train"]
    samples = list(read_samples(built, "reading", "train"))
    assert part["pictures"] == len(samples) == SIZE
    assert part["questions"] == sum(len(sample.questions) for sample in samples)
    assert part["regions"] == sum(len(sample.regions) for sample in samples)
    assert f"{part['questions']:,}" in (built / "README.md").read_text()
    assert part["majority_answers"].keys() == part["kinds_of_question"].keys()
    for kind, found in part["majority_answers"].items():
        answers = [question.answer for sample in samples for question in sample.questions if question.kind == kind]
        assert answers.count(found["answer"]) == max(map(answers.count, answers))
        assert found["share"] == pytest.approx(answers.count(found["answer"]) / len(answers), abs=0.001)
    assert {path.name for path in (built / "sheets").iterdir()} == {"reading.png", "reading-held-out.png"}
    header = read_header(next(built.glob("reading/train-00001*")))
    assert (header["first"], header["count"], header["seed"]) == (5, 5, 0)


def test_samples_come_back_as_they_were_drawn(dots, tmp_path):
    run_build(Build(tmp_path, ("dots",), 4), 1)
    skill = Dots(AssetFolders(None))
    assert list(read_samples(tmp_path, "dots", "train")) == [skill.draw(index, "train", 0) for index in range(4)]
    with pytest.raises(ValueError, match="no part 'dev'"):
        list(read_samples(tmp_path, "dots", "dev"))
    with pytest.raises(ValueError, match="holds no train shards"):
        list(read_samples(tmp_path, "lines", "train"))


def test_training_reads_a_build_as_independent_questions_about_shared_pictures(built, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    config = HuggingFaceData(path=str(built / "reading"), independent_turns=True, questions_per_sample=8)
    records = load_records(config)
    rows = list(read_rows(built, "reading", "train"))
    assert len(records) == len(rows)
    for record, row in zip((records[place] for place in range(len(rows))), rows, strict=True):
        asked = [messages[0]["content"][-1]["text"].strip() for messages in (record.messages, *record.others)]
        assert asked == [message["content"] for message in row["messages"][::2]]
        assert record.messages[0]["content"][0]["image"] == row["image"]["bytes"]


def test_the_whole_build_can_be_one_source(built, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    for split in ("train", "test"):
        records = load_records(HuggingFaceData(path=str(built), split=split, format="parquet"))
        assert len(records) == len(list(read_rows(built, "reading", split)))


def test_the_skills_are_listed(capsys):
    assert main(["data", "build", "smol", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in registry.SKILLS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--out", "x", "--size", "huge"), "--size is 'huge'"),
        (("--out", "x", "--skills", "dancing"), "no skill named 'dancing'; there are letters, reading"),
        (("--out", "x", "--workers", "0"), "--workers is 0"),
        (("--size", "small"), "--out DIR"),
        (("--out", "x", "--assets", "nowhere", "--size", "3", "--workers", "1"), "nowhere has no folder"),
    ],
)
def test_what_cannot_be_built_is_said(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(building, "_OPEN", {})
    assert main(["data", "build", "smol", *options]) == 1
    assert message in capsys.readouterr().err


def test_a_skill_names_the_packages_it_lacks(monkeypatch):
    from hovle.synthesis.skills.reading import Reading

    monkeypatch.setattr(Reading, "extras", {"no_such_module": "hovle[smol]", "PIL": "hovle[other]"})
    with pytest.raises(ValueError, match=r"reading needs no_such_module: pip install 'hovle\[smol\]'$"):
        registry.skill_class("reading")


@pytest.mark.parametrize("name", registry.SKILLS)
def test_what_is_drawn_from_is_fetched_as_it_is_told_and_free_where_it_is_learned_from(name):
    manifest = load_manifest()
    for source in registry.skill_class(name).sources:
        entry = manifest[source.asset]
        assert source.sha256 == entry.archive.sha256
        assert "train" not in source.splits or "smol" in entry.groups
