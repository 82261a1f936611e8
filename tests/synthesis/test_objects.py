import io

import numpy as np
import pytest
from drawn_furniture import BOX, PAINT, write_furniture
from PIL import Image

from hovle.synthesis.furniture import accepted_names, called, read_catalog, split_catalog
from hovle.synthesis.meshes import read_obj, turned
from hovle.synthesis.ray_tracing import Camera, Light, Stage, Surroundings, render
from hovle.synthesis.skill import AssetFolders
from hovle.synthesis.skills.objects import Objects, is_clearly_other, is_held_out_view

GRAY = Surroundings((0.4, 0.4, 0.4), (0.4, 0.4, 0.4))


def files(**contents):
    """What `read_obj` reads from: names without their dot."""
    found = {name.replace("_", "."): content for name, content in contents.items()}
    return lambda name: found[name] if isinstance(found[name], bytes) else found[name].encode()


def picture(stage, camera, light=None, size=(112, 112)):
    image, box = render(stage, camera, light or Light(-60, 40), GRAY, size, seed=1)
    return np.asarray(image).astype(int), box


@pytest.fixture(scope="module")
def cube():
    return Stage(read_obj("box.obj", files(box_obj=BOX, box_mtl=PAINT)))


def test_polygons_become_triangles_and_count_from_either_end():
    mesh = read_obj("box.obj", files(box_obj=BOX, box_mtl=PAINT))
    assert mesh.faces.shape == (12, 3)
    assert mesh.faces[-2].tolist() == [0, 1, 2]  # written -8 -7 -6
    assert mesh.materials[mesh.material_ids[0]].color == (0.8, 0.1, 0.1)


@pytest.mark.parametrize(("text", "message"), [("v 0 0 0\n", "no face"), ("v 0 0 0\nf 1 2 3\n", "1 vertices")])
def test_a_model_without_usable_faces_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        read_obj("a.obj", files(a_obj=text))


def test_a_texture_that_did_not_come_with_the_model_leaves_its_color():
    paint = PAINT + "map_Kd C:\\Documents and Settings\\someone\\wood.jpg\n"
    mesh = read_obj("box.obj", files(box_obj=BOX, box_mtl=paint))
    assert mesh.materials[1].texture is None
    assert mesh.materials[1].color == (0.8, 0.1, 0.1)


def test_a_texture_lies_as_its_coordinates_say():
    file = io.BytesIO()
    image = Image.new("RGB", (2, 2))
    image.putdata([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)])  # red, green over blue, white
    image.save(file, "PNG")
    corners = "v -1 0 0\nv 1 0 0\nv 1 2 0\nv -1 2 0\nvt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\n"
    wall = f"mtllib a.mtl\nusemtl a\n{corners}f 1/1 2/2 3/3 4/4\n"
    mesh = read_obj("a.obj", files(a_obj=wall, a_mtl="newmtl a\nmap_Kd a.png\n", a_png=file.getvalue()))
    pixels, (left, top, right, bottom) = picture(Stage(mesh), Camera(0, 0))
    upper, lower = (top + (bottom - top) * quarter // 4 for quarter in (1, 3))
    near_left, near_right = (left + (right - left) * quarter // 4 for quarter in (1, 3))
    strongest = [pixels[y, x].argmax() for y, x in ((upper, near_left), (upper, near_right), (lower, near_left))]
    assert strongest == [0, 1, 2]


def test_the_box_is_where_an_own_projection_puts_the_corners(cube):
    """Worst case measured: one pixel."""
    for azimuth, elevation, fill in ((0, 0, 0.8), (35, 20, 0.7), (200, 45, 0.9)):
        camera = Camera(azimuth, elevation, view_angle=35, fill=fill)
        _, (left, top, right, bottom) = picture(cube, camera)
        assert max(56 - left, right - 56, 56 - top, bottom - 56) == pytest.approx(56 * fill, abs=1.5)
        assert abs((left + right) / 2 - 56) < 6


def test_the_sun_casts_a_shadow_to_the_other_side(cube):
    pixels, (left, _, right, bottom) = picture(
        cube, Camera(0, 25, fill=0.4), Light(90, 35, strength=1.2, softness=0.02)
    )
    row = pixels[bottom - 6].sum(axis=-1)
    assert row[max(0, left - 12) : left - 4].mean() < 0.8 * row[right + 4 : right + 12].mean()


def test_glass_shows_what_is_behind_it(cube):
    glass = Stage(read_obj("box.obj", files(box_obj=BOX, box_mtl=PAINT + "d 0.2\n")))
    through, box = picture(glass, Camera(20, 15))
    solid, same = picture(cube, Camera(20, 15))
    assert box == same
    redness = [(part[56, 56, 0] - part[56, 56, 2]) for part in (through, solid)]
    assert 0 <= redness[0] < 0.7 * redness[1]


def test_a_turned_model_turns_its_normals_with_it():
    mesh = read_obj("a.obj", files(a_obj="v 0 0 0\nv 1 0 0\nv 0 1 0\nvn 0 0 1\nf 1//1 2//1 3//1\n"))
    upright = turned(mesh, np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]], np.float32))
    assert upright.vertices[2].tolist() == [0, 0, -1]
    assert upright.normals[0, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Armchair", "armchair"), ("Ford Focus", "car"), ("Sitting female", None), ("Parking slot 45°", None),
        ("Wall type G plug", "wall socket"), ("Quadruple French window 3 panes", "French window"), ("Trunck", "trunk"),
    ],
)  # fmt: skip
def test_things_are_called_what_people_call_them(name, expected):
    assert called(name) == expected


def test_a_folding_chair_may_be_called_a_chair():
    assert accepted_names("folding chair", ["chair", "folding chair"]) == ("chair",)
    assert accepted_names("chair", ["chair"]) == ()


@pytest.fixture(scope="module")
def skill(tmp_path_factory):
    return Objects(AssetFolders(write_furniture(tmp_path_factory.mktemp("furniture"))))


def test_parts_share_no_new_model_no_new_name_and_no_view(skill):
    parts = skill.parts
    names = {piece.name for piece in parts.known}
    assert {piece.name for piece in parts.new_models} <= names
    assert not {piece.key for piece in parts.new_models} & {piece.key for piece in parts.known}
    assert not {piece.name for piece in parts.new_names} & names
    assert all(any(is_held_out_view(piece, sector) for sector in range(6)) for piece in parts.known)
    drawn = {
        split: {source for index in range(0, 72, 8) for source in skill.draw(index, split, 0).source_ids}
        for split in ("train", "test")
    }
    tested = {source for source in drawn["test"] if source.startswith(("view:", "new-"))}
    assert tested
    assert not tested & drawn["train"]


def test_pictures_show_a_model_where_its_region_is_and_are_drawn_the_same_again(skill):
    for index in range(0, 32, 8):
        sample = skill.draw(index, "train", 0)
        sample.check()
        (region,) = sample.regions
        name, *checks, _ = sample.questions
        assert name.answer == region.text
        assert {question.answer for question in checks} == {"yes", "no"}
        for question in checks:
            assert (question.answer == "yes") == (f" {region.text}" in question.text)
        assert skill.draw(index, "train", 0) == sample


def test_what_is_said_not_to_be_there_could_not_be_meant(skill):
    folder = skill.folders["sweethome3d-furniture"] / "usr/share/sweethome3d/furniture"
    pieces = {piece.name: piece for piece in read_catalog(folder)}
    assert is_clearly_other(pieces["hammer"], pieces["chair"]) == (
        pieces["hammer"].category != pieces["chair"].category
    )
    assert not is_clearly_other(pieces["thing alpha"], pieces["thing beta"])
    assert len(split_catalog(pieces.values()).new_models) == 0


def test_a_folder_without_furniture_is_named(tmp_path):
    with pytest.raises(ValueError, match="sh3f"):
        read_catalog(tmp_path)
