"""The feature cache: the teacher's own features, computed once; nothing wrong, damaged or stale is ever read."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file

from hovle import HoVLEImageProcessor
from hovle.train import run_stage
from hovle.train.config import LayerMatch, TeacherConfig
from hovle.train.data.batch import TileBatch
from hovle.train.data.mixture import Mixture
from hovle.train.data.tiles import picture_key, read_tiles
from hovle.train.objectives import feature_cache
from hovle.train.objectives.feature_cache import (
    CachedTargets,
    FeatureCache,
    cache_identity,
    fill_cache,
    tile_checksums,
)
from hovle.train.objectives.teachers import TimmTeacher, make_teacher

GRID = 2


@pytest.fixture
def config(teacher_weights, tmp_path) -> TeacherConfig:
    return TeacherConfig(
        name="test_efficientnet", checkpoint=teacher_weights, image_size=64, cache=str(tmp_path / "cache")
    )


@pytest.fixture
def teacher(config) -> TimmTeacher:
    return make_teacher(config)


@pytest.fixture
def image_processor() -> HoVLEImageProcessor:
    return HoVLEImageProcessor(tile_size=56, max_tiles=2)


@pytest.fixture
def pictures(data) -> list[str]:
    return [str(path) for path in sorted((data / "pictures").iterdir())]


@pytest.fixture
def fill(config, teacher, image_processor, pictures):
    """`fill(...)`: open the cache of the teacher and fill it with the pictures."""

    def build(paths: list[str] = pictures, max_gib: float = 1.0, **fields) -> FeatureCache:
        identity = cache_identity(config, teacher, image_processor, GRID, torch.float32)
        cache = FeatureCache(Path(str(config.cache)), identity)
        fill_cache(cache, teacher, lambda: paths, image_processor, GRID, max_gib, **fields)
        return cache

    return build


def batch_of(paths: list[str], image_processor: HoVLEImageProcessor) -> TileBatch:
    return TileBatch(
        pixel_values=torch.cat([read_tiles(path, image_processor) for path in paths]),
        picture_keys=[picture_key(path) for path in paths],
        names=paths,
    )


def count_calls(monkeypatch) -> list[int]:
    """Number of tiles of each call of a teacher from now on."""
    calls: list[int] = []
    original = TimmTeacher.feature_maps

    def feature_maps(self, backbone, pixels):
        if (pixels != pixels[..., :1, :1]).any():  # a blank tile only tells the widths
            calls.append(len(pixels))
        return original(self, backbone, pixels)

    monkeypatch.setattr(TimmTeacher, "feature_maps", feature_maps)
    return calls


# --- contents --------------------------------------------------------------------------------------------------------


def test_a_batch_gets_the_features_the_teacher_gives_it(fill, teacher, image_processor, pictures):
    targets = CachedTargets(fill(), teacher.widths)
    batch = batch_of([pictures[5], pictures[0], pictures[3], pictures[5]], image_processor)
    assert len(batch.pixel_values) == 1 + 3 + 3 + 1
    expected = teacher.raw_features(batch.pixel_values, GRID)
    rounding = {"rtol": 1e-4, "atol": 1e-4}  # the cache was filled by other batches
    torch.testing.assert_close(targets.raw_targets(batch, GRID), expected, **rounding)
    torch.testing.assert_close(targets.targets(batch, GRID), expected, **rounding)
    targets.standardize([expected])
    assert targets.targets(batch, GRID).flatten(0, 1).mean(dim=0).abs().max() < 1e-4


def test_every_picture_is_described_once(fill, pictures, monkeypatch, capsys, tmp_path):
    calls = count_calls(monkeypatch)
    cache = fill()
    assert len(cache) == len(pictures) == 12
    assert sum(calls) == 4 * 3 + 8  # four wide pictures have two tiles and a thumbnail
    shown = capsys.readouterr().out
    assert "0 pictures and 12 new ones of 20 tiles, 0.000 GiB in all" in shown
    calls.clear()
    copy = shutil.copy(pictures[0], tmp_path / "copy.png")
    fill([*pictures, str(copy)])  # the same picture under another name
    assert calls == []
    assert "12 pictures and 0 new ones of 0 tiles" in capsys.readouterr().out


def test_pictures_may_be_bytes(fill, pictures):
    cache = fill([Path(pictures[0]).read_bytes()])
    assert picture_key(pictures[0]) in cache
    assert len(cache) == 1


def test_damaged_and_missing_pictures_are_left_to_training_to_skip(fill, pictures, tmp_path):
    (tmp_path / "damaged.png").write_bytes(Path(pictures[0]).read_bytes()[:60])
    cache = fill([pictures[0], str(tmp_path / "damaged.png"), str(tmp_path / "gone.png")])
    assert len(cache) == 1


def test_an_interrupted_pass_continues(fill, pictures, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)
    monkeypatch.setattr(feature_cache, "TILES_PER_BATCH", 4)
    calls = count_calls(monkeypatch)
    original = FeatureCache.add

    def interrupted(self, described):
        if len(self) >= 4:
            raise KeyboardInterrupt
        original(self, described)

    with monkeypatch.context() as patch:
        patch.setattr(FeatureCache, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fill()
    finished = sum(calls)
    calls.clear()
    cache = fill()
    assert len(cache) == 12
    assert 0 < sum(calls) < 20
    assert finished + sum(calls) < 20 + 8  # only what was not yet written is done again
    assert not list(cache.folder.glob(".writing-*"))


# --- what it refuses -------------------------------------------------------------------------------------------------


def test_a_cache_that_would_be_too_large_is_refused_before_it_is_filled(fill, monkeypatch):
    calls = count_calls(monkeypatch)
    with pytest.raises(ValueError, match=r"would be too large: .* 12 new ones of 20 tiles.*max_cache_gib is 1e-05"):
        fill(max_gib=1e-5)
    assert calls == []


@pytest.mark.parametrize("damage", ["flip", "cut", "rename"])
def test_a_damaged_shard_is_refused(fill, damage):
    cache = fill()
    [shard] = cache.folder.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    if damage == "rename":
        shard.rename(shard.with_stem("0" * 64))
    elif damage == "cut":
        shard.write_bytes(data[:-4])
    else:
        data[-7] ^= 1
        shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"file .*safetensors is damaged \(its checksum differs\)\. Delete it"):
        fill()


def test_tiles_that_are_not_the_pictures_are_refused(fill, teacher, image_processor, pictures):
    targets = CachedTargets(fill(), teacher.widths)
    batch = batch_of(pictures[:2], image_processor)
    for change in (lambda tiles: tiles.flip(-1), lambda tiles: tiles.flip(-2), lambda tiles: tiles // 2):
        augmented = dataclasses.replace(batch, pixel_values=change(batch.pixel_values))
        with pytest.raises(ValueError, match=r"are not those the cached features .* if they are augmented"):
            targets.targets(augmented, GRID)


def test_a_picture_that_is_not_in_the_cache_is_refused(fill, teacher, image_processor, pictures):
    targets = CachedTargets(fill(pictures[:3]), teacher.widths)
    with pytest.raises(ValueError, match=r"has no picture [0-9a-f]{32}: was it changed while training ran"):
        targets.targets(batch_of(pictures[3:4], image_processor), GRID)


def test_checksums_notice_moved_pixels():
    tiles = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    checksums = tile_checksums(tiles)
    assert checksums.dtype == torch.int64
    for changed in (tiles.flip(-1), tiles.flip(-2), tiles.transpose(-1, -2), tiles.roll(1, dims=-1)):
        assert (tile_checksums(changed) != checksums).all()
    assert torch.equal(tile_checksums(tiles.contiguous(memory_format=torch.channels_last)), checksums)


def test_other_teachers_and_other_tiles_have_other_caches(config, teacher, image_processor):
    def folder(config=config, teacher=teacher, image_processor=image_processor, grid=GRID, dtype=torch.float32) -> str:
        identity = cache_identity(config, teacher, image_processor, grid, dtype)
        assert json.loads(json.dumps(identity)) == identity
        return FeatureCache(Path(str(config.cache)), identity).folder.name

    changed = make_teacher(config)
    with torch.no_grad():
        next(changed.backbone.parameters()).add_(1e-3)
    fields = {"name": config.name, "checkpoint": config.checkpoint, "cache": config.cache}
    folders = [
        folder(),
        folder(teacher=changed),
        folder(config=TeacherConfig(**fields, image_size=96)),
        folder(config=TeacherConfig(**fields, image_size=64, layers=(LayerMatch(teacher=-2),))),
        folder(image_processor=HoVLEImageProcessor(tile_size=56, max_tiles=3)),
        folder(image_processor=HoVLEImageProcessor(tile_size=28, max_tiles=2)),
        folder(grid=4),
        folder(dtype=torch.bfloat16),
    ]
    assert len(set(folders)) == len(folders)
    same = TeacherConfig(**fields, image_size=64, layers=(LayerMatch(student=0),), standardize=True)
    assert folder(config=same) == folders[0]  # neither changes what the teacher says


# --- whole runs ------------------------------------------------------------------------------------------------------


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("overrides", [(), ("teacher.standardize=true", "num_workers=1")])
def test_a_run_with_a_cache_ends_as_one_without(distillation_config, monkeypatch, tmp_path, overrides):
    validation = [f"validation.{name}={value}" for name, value in source(distillation_config).items()]
    overrides = (*overrides, *validation, "num_validation_batches=1")
    plain = weights_in(run_stage(distillation_config(*overrides, f"output={tmp_path / 'plain'}")))
    cached = (*overrides, f"teacher.cache={tmp_path / 'cache'}")
    filled = weights_in(run_stage(distillation_config(*cached)))
    assert_near(filled, plain)
    calls = count_calls(monkeypatch)
    assert_same(weights_in(run_stage(distillation_config(*cached, f"output={tmp_path / 'again'}"))), filled)
    assert calls == []  # the second run does without its teacher


def source(distillation_config) -> dict[str, str]:
    [data] = distillation_config().data
    return {"source": data.source, "path": str(data.path)}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same but for rounding, which Adam enlarges: a teacher describes other tiles at once when it fills a cache."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 5e-3 * tensor.norm(), name


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_held_out_pictures_are_cached_too(distillation_config, data, tmp_path):
    for name in ("training", "held_out"):
        (tmp_path / name).mkdir()
    for number, path in enumerate(sorted((data / "pictures").iterdir())):
        shutil.copy(path, tmp_path / ("training" if number < 8 else "held_out"))
    run_stage(
        distillation_config(
            f"data.path={tmp_path / 'training'}",
            "validation.source=pictures",
            f"validation.path={tmp_path / 'held_out'}",
            "num_validation_batches=1",
            f"teacher.cache={tmp_path / 'cache'}",
        )
    )
    [shard] = (tmp_path / "cache").rglob("*.safetensors")
    assert len(load_file(shard)) == 2 * 12


FILL = """
import sys, time
from pathlib import Path
import torch
from hovle import HoVLEImageProcessor
from hovle.train.config import TeacherConfig
from hovle.train.objectives.feature_cache import FeatureCache, cache_identity, fill_cache
from hovle.train.objectives.teachers import TimmTeacher, make_teacher

weights, cache, pictures = sys.argv[1:]
torch.set_num_threads(1)
calls = []
original = TimmTeacher.feature_maps
def slow(self, backbone, pixels):
    if (pixels != pixels[..., :1, :1]).any():
        calls.append(len(pixels))
        time.sleep(0.1)
    return original(self, backbone, pixels)
TimmTeacher.feature_maps = slow
config = TeacherConfig(name="test_efficientnet", checkpoint=weights, image_size=64, cache=cache)
teacher, processor = make_teacher(config), HoVLEImageProcessor(tile_size=56, max_tiles=2)
identity = cache_identity(config, teacher, processor, 2, torch.float32)
features = FeatureCache(Path(cache), identity)
paths = [str(path) for path in sorted(Path(pictures).iterdir())]
fill_cache(features, teacher, lambda: paths, processor, 2, 1.0)
print("tiles", sum(calls), "pictures", len(features))
"""


def test_of_two_processes_one_fills_the_cache(tmp_path, teacher_weights, data):
    (tmp_path / "fill.py").write_text(FILL)
    arguments = [teacher_weights, str(tmp_path / "cache"), str(data / "pictures")]
    command = [sys.executable, str(tmp_path / "fill.py"), *arguments]
    root = ROOT
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root, env=None)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = sorted(output.splitlines()[-1] for output, _ in outputs)
    assert lines == ["tiles 0 pictures 12", "tiles 20 pictures 12"]


def test_a_streamed_source_is_refused(teacher, config, distillation_config, parts, tmp_path):
    class Stream:
        fingerprint = "stream"

        def open_shard(self):
            raise AssertionError

    stage = distillation_config(f"teacher.cache={tmp_path / 'cache'}")
    with pytest.raises(ValueError, match=r"teacher\.cache needs sources of known size"):
        feature_cache.cached_targets(
            teacher, stage.teacher[0], stage, Mixture([Stream()], 0), [], parts[1], torch.float32
        )
