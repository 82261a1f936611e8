"""Keep a teacher's features on disk, so that a small set seen several times runs its teacher once.

A cache folder holds one folder for each teacher and way of cutting pictures (their fingerprint is its name), with
`teacher.json` for people and shards of features. A shard is a safetensors file named after the SHA-256 of its
content, which is checked when a run opens it. A picture is known by the SHA-256 of its file; beside its features lies
a checksum of its tiles, so that features never meet tiles they were not made from, augmented ones for instance.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from ...model.image_processing_hovle import HoVLEImageProcessor
from ...model.pictures import picture_size
from ...model.processing_hovle import HoVLEProcessor
from ..config import StageConfig, TeacherConfig
from ..data.batch import PackedBatch, TileBatch
from ..data.mixture import Mixture, open_held_out
from ..data.records import RecordStream, picture_sources
from ..data.skips import SkipSampleError
from ..data.tiles import picture_key, read_tiles
from .teachers import ImageTeacher, Targets

SHARD_BYTES = 256 * 2**20
"""Features are written whenever so many bytes have gathered; what an interruption loses."""

TILES_PER_BATCH = 32
"""Tiles the teacher describes at once while a cache is filled."""

Described = tuple[torch.Tensor, torch.Tensor]
"""Features `(N, S, D)` of a picture's tiles, and their checksums `(N,)`."""


class FeatureCache:
    """Features of one teacher for pictures cut in one way.

    Args:
        root: The cache folder.
        identity: What features depend on beside the picture; plain values.

    Raises:
        ValueError: When a shard is damaged.
    """

    def __init__(self, root: Path, identity: dict):
        text = json.dumps(identity, indent=1, sort_keys=True)
        self.folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "teacher.json").exists():
            (self.folder / "teacher.json").write_text(text + "\n", encoding="utf-8")
        self._shards: dict[str, Path] = {}
        self._handles: dict[Path, object] = {}
        self.reload()

    def __contains__(self, key: str) -> bool:
        return key in self._shards

    def __len__(self) -> int:
        return len(self._shards)

    @property
    def num_bytes(self) -> int:
        """Size of all shards."""
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))

    def reload(self) -> None:
        """Take in shards that are new, after checking them."""
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._handles:
                continue
            handle = _open_checked(path)
            self._handles[path] = handle
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                if name.endswith(".features"):
                    self._shards[name.removesuffix(".features")] = path

    def add(self, pictures: dict[str, Described]) -> None:
        """Write one shard: picture key -> features `(N, S, D)` and tile checksums `(N,)`; complete or absent."""
        tensors = {}
        for key, (features, checksums) in pictures.items():
            tensors[f"{key}.features"] = features.contiguous()
            tensors[f"{key}.tiles"] = checksums.contiguous()
        temporary = self.folder / f".writing-{os.getpid()}"
        try:
            save_file(tensors, temporary)
            os.replace(temporary, self.folder / f"{_sha256(temporary)}.safetensors")
        finally:
            temporary.unlink(missing_ok=True)
        self.reload()

    def load(self, keys: Iterable[str]) -> Described:
        """Features `(N, S, D)` and tile checksums `(N,)` of these pictures' tiles in order."""
        features, checksums = [], []
        for key in keys:
            if key not in self._shards:
                raise ValueError(
                    f"The feature cache {self.folder} has no picture {key}: was it changed while training ran? Start "
                    "the run again, which fills the cache first."
                )
            handle = self._handles[self._shards[key]]
            features.append(handle.get_tensor(f"{key}.features"))  # type: ignore[attr-defined]
            checksums.append(handle.get_tensor(f"{key}.tiles"))  # type: ignore[attr-defined]
        return torch.cat(features), torch.cat(checksums)


def _open_checked(path: Path):
    """Map a shard whose content is what its name says."""
    damaged = f"The feature cache file {path} is damaged (its checksum differs). Delete it; a run computes it again."
    if _sha256(path) != path.stem:
        raise ValueError(damaged)
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(damaged) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tile_checksums(tiles: torch.Tensor) -> torch.Tensor:
    """A whole number for each tile of `(N, 3, s, s)`, uint8, that moving or changing its pixels changes."""
    weights = torch.arange(1, tiles.shape[-1] + 1, device=tiles.device)
    columns, rows = tiles.sum(dim=(1, 2)), tiles.sum(dim=(1, 3))
    return (columns * weights).sum(dim=1) * 1_000_003 + (rows * weights).sum(dim=1)


def weights_fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, types and values of a module's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cache_identity(
    config: TeacherConfig,
    teacher: ImageTeacher,
    image_processor: HoVLEImageProcessor,
    grid_size: int,
    dtype: torch.dtype,
) -> dict:
    """What a teacher's features of a picture depend on."""
    cutting = image_processor.grid_settings()
    return {
        "version": 1,
        "kind": config.kind,
        "name": config.name,
        "weights": weights_fingerprint(teacher.backbone),
        "layers": [match.teacher for match in config.layers],
        "projected": config.projected,
        "teacher_image_size": config.image_size,
        "mean": teacher.normalize.mean.flatten().tolist(),
        "std": teacher.normalize.std.flatten().tolist(),
        "grid_size": grid_size,
        "dtype": str(dtype).removeprefix("torch."),
        "tile_size": cutting["size"].height,
        "min_tiles": cutting["min_patches"],
        "max_tiles": cutting["max_patches"] if cutting["crop_to_patches"] else 1,
    }


def fill_cache(
    cache: FeatureCache,
    teacher: ImageTeacher,
    pictures: Callable[[], Iterable[str | bytes]],
    image_processor: HoVLEImageProcessor,
    grid_size: int,
    max_gib: float,
    *,
    is_main_process: bool = True,
) -> None:
    """Compute what the cache lacks of these pictures; of several processes one works while the others wait.

    Args:
        cache: Extended in place; an interrupted pass continues where it was.
        teacher: On the device it is to run on.
        pictures: Gives all pictures, paths or bytes of files, each time it is called. Damaged ones are left out, as
            training skips them.
        image_processor: Cuts them into tiles.
        grid_size: Tokens along one side of the student's grid.
        max_gib: Limit of the cache's size.
        is_main_process: Whether to tell people what happens.

    Raises:
        ValueError: When the cache would become larger than `max_gib`; nothing is computed then.
    """
    with FileLock(cache.folder / ".lock"):
        cache.reload()
        missing, num_tiles = _count_missing(cache, pictures(), image_processor)
        new_bytes = num_tiles * grid_size**2 * sum(teacher.widths) * 4
        gib = (cache.num_bytes + new_bytes) / 2**30
        size = f"{len(cache):,} pictures and {len(missing):,} new ones of {num_tiles:,} tiles, {gib:.3f} GiB in all"
        if gib > max_gib:
            raise ValueError(
                f"The feature cache would be too large: {size}, but teacher.max_cache_gib is {max_gib:g}. Raise the "
                "limit or train without teacher.cache."
            )
        if is_main_process:
            print(f"Teacher features in {cache.folder}: {size}.")  # noqa: T201 - said before the disk is filled
        progress = tqdm(total=len(missing), desc="teacher features", unit="picture", disable=not is_main_process)
        gathered: dict[str, Described] = {}
        for described in _describe(missing, pictures(), teacher, image_processor, grid_size):
            gathered |= described
            progress.update(len(described))
            if sum(features.nbytes for features, _ in gathered.values()) >= SHARD_BYTES:
                cache.add(gathered)
                gathered = {}
        if gathered:
            cache.add(gathered)
        progress.close()


def _count_missing(
    cache: FeatureCache, pictures: Iterable[str | bytes], image_processor: HoVLEImageProcessor
) -> tuple[set[str], int]:
    """Keys of the pictures a cache lacks, and their tiles by the headers of the files."""
    missing: set[str] = set()
    num_tiles = 0
    for picture in pictures:
        with contextlib.suppress(ValueError, OSError):  # damaged or missing: counted as skipped in training
            key = picture_key(picture)
            if key not in cache and key not in missing:
                num_tiles += image_processor.get_number_of_image_patches(*picture_size(picture))
                missing.add(key)
    return missing, num_tiles


def _describe(
    missing: set[str],
    pictures: Iterable[str | bytes],
    teacher: ImageTeacher,
    image_processor: HoVLEImageProcessor,
    grid_size: int,
) -> Iterator[dict[str, Described]]:
    """Run the teacher over the missing pictures, a few at a time."""
    device = teacher.feature_mean.device
    remaining = set(missing)
    waiting: dict[str, torch.Tensor] = {}

    def describe() -> dict[str, Described]:
        counts = [len(tiles) for tiles in waiting.values()]
        features = teacher.raw_features(torch.cat(list(waiting.values())).to(device), grid_size).cpu().split(counts)
        return {
            key: (part.clone(), tile_checksums(tiles))
            for (key, tiles), part in zip(waiting.items(), features, strict=True)
        }

    for picture in pictures:
        with contextlib.suppress(ValueError, OSError):  # damaged or missing: counted as skipped in training
            key = picture_key(picture)
            if key in remaining:
                waiting[key] = read_tiles(picture, image_processor)
                remaining.remove(key)
        if sum(len(tiles) for tiles in waiting.values()) >= TILES_PER_BATCH:
            yield describe()
            waiting.clear()
    if waiting:
        yield describe()


def cached_targets(
    teacher: ImageTeacher,
    teacher_config: TeacherConfig,
    config: StageConfig,
    mixture: Mixture,
    held_out: list[PackedBatch],
    processor: HoVLEProcessor,
    dtype: torch.dtype,
    *,
    is_main_process: bool = True,
) -> "CachedTargets":
    """Features of all pictures of a mixture and of the held-out batches, from a cache that is filled first.

    Args:
        teacher: Fills the cache, on the device it is on.
        teacher_config: Of that teacher; it names a cache.
        config: The stage.
        mixture: What training reads.
        held_out: Batches of the validation source.
        processor: Of the student.
        dtype: Number format of the run, in which the teacher computes.
        is_main_process: Whether to tell people what happens.
    """
    assert teacher_config.cache is not None
    if mixture.num_records is None:
        raise ValueError("teacher.cache needs sources of known size; a streamed one never ends: train without it.")
    names = {name for batch in held_out for name in batch.names}

    def pictures() -> Iterator[str | bytes]:
        yield from _first_pictures(mixture)
        if config.holds_out:
            yield from _first_pictures(open_held_out(config), names)

    grid_size = round(processor.image_seq_length**0.5)
    identity = cache_identity(teacher_config, teacher, processor.image_processor, grid_size, dtype)
    cache = FeatureCache(Path(teacher_config.cache), identity)
    fill_cache(
        cache,
        teacher,
        pictures,
        processor.image_processor,
        grid_size,
        teacher_config.max_cache_gib,
        is_main_process=is_main_process,
    )
    return CachedTargets(cache, teacher.widths).to(teacher.feature_mean.device)


def _first_pictures(mixture: Mixture, names: set[str] | None = None) -> Iterator[str | bytes]:
    """First picture of each record, the one distillation takes; of the records with these names, or of all."""
    for records in mixture.sources:
        assert not isinstance(records, RecordStream)  # `cached_targets` refuses them
        for place in range(len(records)):
            with contextlib.suppress(SkipSampleError):
                record = records[place]
                if names is None or record.name in names:
                    yield from picture_sources(record.messages)[:1]


class CachedTargets(Targets):
    """A teacher's features from a cache; the teacher itself is no longer needed.

    Args:
        cache: Holds the features of every picture.
        widths: Channels of each matched layer.
    """

    def __init__(self, cache: FeatureCache, widths: tuple[int, ...]):
        super().__init__(widths)
        self.cache = cache

    def raw_targets(self, batch: TileBatch, grid_size: int) -> torch.Tensor:
        tiles = batch.pixel_values
        features, checksums = self.cache.load(batch.picture_keys)
        if not torch.equal(checksums, tile_checksums(tiles).cpu()):
            raise ValueError(
                f"The tiles of {', '.join(batch.names[:3])}, ... are not those the cached features "
                f"({self.cache.folder}) were made from. Tiles must depend on the picture alone: train without "
                "teacher.cache if they are augmented."
            )
        assert features.shape[1] == grid_size**2  # part of the cache's identity
        return features.to(tiles.device)
