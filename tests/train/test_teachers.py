"""Image teachers: the right weights, the right normalisation, features on the student's grid."""

from pathlib import Path

import matplotlib
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from hovle import HoVLEImageProcessor, assets
from hovle.train.config import TeacherConfig
from hovle.train.pixels import read_tiles
from hovle.train.teachers import ImageTeacher


@pytest.fixture(scope="module")
def lite0() -> ImageTeacher:
    return ImageTeacher(TeacherConfig(name="tf_efficientnet_lite0", image_size=128), assets.teacher())


def random_tiles(count: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def tiny(weights: str, **fields) -> ImageTeacher:
    return ImageTeacher(TeacherConfig(**{"name": "test_efficientnet", "image_size": 64, **fields}), Path(weights))


def test_the_real_teacher_describes_tiles_on_the_students_grid(lite0):
    tiles = random_tiles(2, 112)
    assert lite0.width == 320
    assert lite0.backbone(torch.zeros(1, 3, 128, 128))[-1].shape == (1, 320, 4, 4)
    for grid_size in (1, 2, 4, 8):
        features = lite0.features(tiles, grid_size)
        assert features.shape == (2, grid_size**2, 320)
        assert features.dtype == torch.float32
        assert features.isfinite().all()


def test_the_real_teachers_weights_know_a_picture(lite0):
    """The head is not part of the teacher; weights put in the wrong order would not find the class."""
    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    from hovle.train.teachers import _load_in_order

    full = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    _load_in_order(full, assets.teacher())
    tiles = read_tiles(photograph, HoVLEImageProcessor(tile_size=224, max_tiles=1))
    with torch.no_grad():
        probabilities = full(lite0.normalize(tiles)).softmax(dim=-1)[0]
    assert int(probabilities.argmax()) == 652  # "military uniform"
    assert probabilities[652] > 0.3  # 0.47
    for name, tensor in lite0.backbone.state_dict().items():
        assert torch.equal(tensor, full.state_dict()[name])


def test_a_raw_picture_arrives_as_timm_itself_would_show_it(lite0):
    tiles = random_tiles(1, 128)
    config = timm.data.resolve_model_data_config(timm.create_model("tf_efficientnet_lite0", pretrained=False))
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        features = lite0.backbone((tiles / 255 - mean) / std)[-1].flatten(2).transpose(1, 2)
    torch.testing.assert_close(lite0.features(tiles, 4), features, atol=1e-4, rtol=1e-4)


def test_grid_cells_are_row_major_means_of_the_feature_map(teacher_weights):
    teacher = tiny(teacher_weights, feature_index=-3)  # 8 x 8
    tiles = random_tiles(1, 64)
    feature_map = teacher.backbone(teacher.normalize(tiles))[-1][0]
    found = teacher.features(tiles, 2)[0]
    cells = [feature_map[:, row : row + 4, column : column + 4] for row in (0, 4) for column in (0, 4)]
    torch.testing.assert_close(found, torch.stack([cell.mean(dim=(1, 2)) for cell in cells]))


def test_the_feature_map_is_chosen_by_index(teacher_weights):
    assert [tiny(teacher_weights, feature_index=index).width for index in (-1, -2, 0)] == [64, 48, 16]


def test_standardised_features_have_mean_0_and_deviation_1(teacher_weights):
    teacher = tiny(teacher_weights)
    pictures = [random_tiles(count, 56, seed=count) for count in (3, 1, 8)]
    plain = torch.cat([teacher.features(tiles, 2) for tiles in pictures]).flatten(0, 1)
    teacher.standardize(iter(pictures), 2)
    features = torch.cat([teacher.features(tiles, 2) for tiles in pictures]).flatten(0, 1)
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(dim=0, correction=0), torch.ones(64), atol=1e-3, rtol=0)
    expected = (plain - plain.mean(dim=0)) / plain.std(dim=0, correction=0)
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=1e-3)


def test_a_teacher_stays_frozen_and_in_evaluation_mode(teacher_weights):
    teacher = tiny(teacher_weights)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    parent = nn.ModuleList([teacher])
    parent.train()
    assert not any(module.training for module in teacher.modules())
    features = teacher.features(random_tiles(2, 56), 2)
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    for name, tensor in teacher.state_dict().items():  # batch statistics, too
        assert torch.equal(tensor, before[name])


def test_weights_may_be_a_safetensors_file(teacher_weights, tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(torch.load(teacher_weights, weights_only=True), path)
    tiles = random_tiles(1, 56)
    assert torch.equal(tiny(str(path)).features(tiles, 2), tiny(teacher_weights).features(tiles, 2))


def test_weights_under_other_names_are_taken_in_order(teacher_weights, tmp_path):
    path = tmp_path / "renamed.pt"
    weights = torch.load(teacher_weights, weights_only=True)
    torch.save({f"tensor_{number}": tensor for number, tensor in enumerate(weights.values())}, path)
    tiles = random_tiles(1, 56)
    assert torch.equal(tiny(str(path)).features(tiles, 2), tiny(teacher_weights).features(tiles, 2))


def test_weights_of_another_model_are_refused(teacher_weights):
    with pytest.raises(
        ValueError, match=r"test_efficientnet\.pt holds \d+ tensors that do not match the \d+ of the t"
    ):
        ImageTeacher(TeacherConfig(name="tf_efficientnet_lite0", image_size=64), Path(teacher_weights))


def test_weights_that_would_run_code_are_refused(tmp_path):
    torch.save({"weight": Path("x")}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        tiny(str(tmp_path / "evil.pt"))
