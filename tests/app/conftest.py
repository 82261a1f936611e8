"""What the tests of the page share: two tiny models, pictures, and a desk."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from hovle import HoVLEForConditionalGeneration, HoVLEProcessor
from hovle.app.desk import Desk
from hovle.app.models import Models


@pytest.fixture(scope="session")
def save_model(tmp_path_factory, make_tokenizer, tiny_config) -> Callable[..., str]:
    """`save_model(name, **config fields)` writes a random model with its processor; gives the folder."""
    folder = tmp_path_factory.mktemp("models")

    def save(name: str, **fields) -> str:
        torch.manual_seed(len(name))
        config = tiny_config(**fields)
        model = HoVLEForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # attention far from even
        model.save_pretrained(folder / name)
        HoVLEProcessor.from_language_model(make_tokenizer(), config, max_tiles=4).save_pretrained(folder / name)
        return str(folder / name)

    return save


@pytest.fixture(scope="session")
def folders(save_model) -> list[str]:
    """Two models."""
    return [save_model("one"), save_model("other")]


@pytest.fixture
def desk(folders) -> Desk:
    """Does what visitors ask of the two models; answers take 6 tokens at most."""
    return Desk(Models(folders, max_new_tokens=6))


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    """A wide picture, which needs several tiles, and a small one."""
    paths = [tmp_path / "wide.png", tmp_path / "small.jpg"]
    Image.effect_noise((170, 60), 80).convert("RGB").save(paths[0])
    Image.new("RGB", (40, 40), "blue").save(paths[1])
    return paths


@pytest.fixture
def broken(pictures) -> Path:
    """A picture file that was cut."""
    path = pictures[0].with_name("broken.png")
    path.write_bytes(pictures[0].read_bytes()[:300])
    return path
