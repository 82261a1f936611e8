"""Image teachers: the right weights, the right normalisation, features on the student's grid, whatever the library."""

import json
from pathlib import Path

import matplotlib
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    ResNetConfig,
    ResNetModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SwinConfig,
    SwinModel,
)

from hovle import HoVLEImageProcessor, assets
from hovle.train import run_stage
from hovle.train.config import LayerMatch, TeacherConfig, with_new_fields
from hovle.train.data.batch import TileBatch
from hovle.train.data.tiles import read_tiles
from hovle.train.objectives.teachers import ImageTeacher, make_teacher, side_by_side

MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def lite0() -> ImageTeacher:
    return make_teacher(TeacherConfig(name="tf_efficientnet_lite0", image_size=128, checkpoint=str(assets.teacher())))


def random_tiles(count: int, size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator, dtype=torch.uint8)


def normalized(tiles: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))
    return (tiles / 255 - mean) / std


def rows(feature_map: torch.Tensor) -> torch.Tensor:
    """A map `(N, D, H, W)` as row-major features `(N, H * W, D)`."""
    return feature_map.flatten(2).transpose(1, 2)


def layers(*numbers: int) -> tuple[LayerMatch, ...]:
    return tuple(LayerMatch(teacher=number) for number in numbers)


def tiny(weights: str, **fields) -> ImageTeacher:
    fields = {"name": "test_efficientnet", "image_size": 64, "checkpoint": weights, **fields}
    return make_teacher(TeacherConfig(**fields))


# --- timm ------------------------------------------------------------------------------------------------------------


def test_the_real_teacher_describes_tiles_on_the_students_grid(lite0):
    tiles = random_tiles(2, 112)
    assert lite0.widths == (320,)
    for grid_size in (1, 2, 4, 8):
        features = lite0.features(tiles, grid_size)
        assert features.shape == (2, grid_size**2, 320)
        assert features.dtype == torch.float32
        assert features.isfinite().all()


def test_the_real_teachers_weights_know_a_picture(lite0):
    """The head is not part of the features; weights put in the wrong order would not find the class."""
    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    tiles = read_tiles(photograph, HoVLEImageProcessor(tile_size=224, max_tiles=1))
    with torch.no_grad():
        probabilities = lite0.backbone(lite0.normalize(tiles)).softmax(dim=-1)[0]
    assert int(probabilities.argmax()) == 652  # "military uniform"
    assert probabilities[652] > 0.3  # 0.47


def test_the_real_teachers_features_are_those_of_timms_feature_extractor(lite0):
    extractor = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True, out_indices=(-1,))
    weights = lite0.backbone.state_dict()
    extractor.load_state_dict({name: weights[name] for name in extractor.state_dict()})
    tiles = random_tiles(1, 128)
    config = timm.data.resolve_model_data_config(timm.create_model("tf_efficientnet_lite0", pretrained=False))
    with torch.no_grad():
        expected = rows(extractor.eval()(normalized(tiles, config["mean"], config["std"]))[-1])
    torch.testing.assert_close(lite0.features(tiles, 4), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_convnext", "test_mambaout", "test_vit", "test_vit2", "swin_tiny_patch4_window7_224"]
)
def test_any_timm_model_gives_what_its_own_forward_pass_does(tmp_path, name):
    torch.manual_seed(0)
    own = timm.create_model(name, pretrained=False).eval()
    save_file(own.state_dict(), tmp_path / "weights.safetensors")
    size = own.pretrained_cfg["input_size"][-1]
    teacher = tiny(str(tmp_path / "weights.safetensors"), name=name, image_size=size)
    tiles = random_tiles(2, size)
    with torch.no_grad():
        output = own.forward_features(normalized(tiles, own.pretrained_cfg["mean"], own.pretrained_cfg["std"]))
    if output.dim() == 3:
        expected = output[:, own.num_prefix_tokens :]
    elif name.startswith(("swin", "test_mambaout")):  # channels last
        expected = output.flatten(1, 2)
    else:
        expected = rows(output)
    torch.testing.assert_close(teacher.features(tiles, round(expected.shape[1] ** 0.5)), expected, atol=1e-4, rtol=0)


def test_a_timm_vit_sees_pictures_of_another_size(tmp_path):
    own = timm.create_model("test_vit", pretrained=False).eval()
    save_file(own.state_dict(), tmp_path / "weights.safetensors")
    teacher = tiny(str(tmp_path / "weights.safetensors"), name="test_vit", image_size=64)
    own.set_input_size(img_size=64)
    tiles = random_tiles(1, 64)
    with torch.no_grad():
        output = own.forward_features(normalized(tiles, own.pretrained_cfg["mean"], own.pretrained_cfg["std"]))
    torch.testing.assert_close(teacher.features(tiles, 4), output[:, own.num_prefix_tokens :], atol=1e-5, rtol=0)


def test_grid_cells_are_row_major_means_of_the_feature_map(teacher_weights):
    teacher = tiny(teacher_weights, layers=layers(-3))  # 8 x 8
    tiles = random_tiles(1, 64)
    feature_map = teacher.feature_maps(teacher.backbone, teacher.normalize(tiles))[0][0]
    assert feature_map.shape == (32, 8, 8)
    found = teacher.features(tiles, 2)[0]
    cells = [feature_map[:, row : row + 4, column : column + 4] for row in (0, 4) for column in (0, 4)]
    torch.testing.assert_close(found, torch.stack([cell.mean(dim=(1, 2)) for cell in cells]))


def test_tiles_of_another_size_are_resized_for_the_teacher(teacher_weights):
    teacher = tiny(teacher_weights)
    tiles = random_tiles(2, 56)
    pixels = nn.functional.interpolate(teacher.normalize(tiles), size=64, mode="bicubic", antialias=True)
    expected = teacher.feature_maps(teacher.backbone, pixels)[0]
    torch.testing.assert_close(teacher.features(tiles, 2), rows(expected))


def test_layers_lie_side_by_side_in_the_order_of_the_recipe(teacher_weights):
    tiles = random_tiles(2, 64)
    teacher = tiny(teacher_weights, layers=layers(-1, 0, 3))
    assert teacher.widths == (64, 16, 48)
    parts = teacher.features(tiles, 2).split(teacher.widths, dim=-1)
    for part, number in zip(parts, (4, 0, 3), strict=True):
        torch.testing.assert_close(part, tiny(teacher_weights, layers=layers(number)).features(tiles, 2))


def test_a_layer_that_does_not_exist_is_refused(teacher_weights):
    with pytest.raises(ValueError, match=r"names layer 5, but teacher test_efficientnet \(timm\) has 5 \(from 0"):
        tiny(teacher_weights, layers=layers(5))


def test_standardised_features_have_mean_0_and_deviation_1(teacher_weights):
    teacher = tiny(teacher_weights)
    pictures = [random_tiles(count, 56, seed=count) for count in (3, 1, 8)]
    plain = torch.cat([teacher.features(tiles, 2) for tiles in pictures]).flatten(0, 1)
    teacher.standardize(teacher.raw_features(tiles, 2) for tiles in pictures)
    features = torch.cat([teacher.features(tiles, 2) for tiles in pictures]).flatten(0, 1)
    torch.testing.assert_close(features.mean(dim=0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(features.std(dim=0, correction=0), torch.ones(64), atol=1e-3, rtol=0)
    expected = (plain - plain.mean(dim=0)) / plain.std(dim=0, correction=0)
    torch.testing.assert_close(features, expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(torch.cat([teacher.raw_features(tiles, 2) for tiles in pictures]).flatten(0, 1), plain)


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
        tiny(teacher_weights, name="tf_efficientnet_lite0")


def test_missing_weights_and_weights_that_would_run_code_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.checkpoint: no file .*gone\.pt"):
        tiny(str(tmp_path / "gone.pt"))
    torch.save({"weight": Path("x")}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        tiny(str(tmp_path / "evil.pt"))


# --- OpenCLIP --------------------------------------------------------------------------------------------------------


def open_clip_folder(folder: Path, vision: dict) -> open_clip.CLIP:
    """A tiny OpenCLIP model saved as the Hub has them: `open_clip_config.json` and safetensors."""
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 64, "patch_size": 16, **vision}, "text_cfg": text}
    preprocess = {"mean": MEAN, "std": STD}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return model


VIT = {"layers": 3, "width": 32, "head_width": 16}


def test_an_open_clip_tower_gives_the_patches_its_own_forward_pass_pools(tmp_path):
    own = open_clip_folder(tmp_path, VIT)
    config = {"kind": "open_clip", "name": f"local-dir:{tmp_path}", "image_size": 64}
    teacher = make_teacher(TeacherConfig(**config))
    own.visual.output_tokens = True
    tiles = random_tiles(2, 64)
    with torch.no_grad():
        _, patches = own.visual(normalized(tiles))
    assert patches.shape == (2, 16, 32)
    torch.testing.assert_close(teacher.features(tiles, 4), patches, atol=1e-5, rtol=0)
    both = make_teacher(TeacherConfig(**config, layers=layers(-1, 0)))
    assert both.widths == (32, 32)
    torch.testing.assert_close(both.features(tiles, 4)[..., :32], patches, atol=1e-5, rtol=0)
    assert (both.features(tiles, 4)[..., 32:] - patches).abs().max() > 0.1


def test_an_open_clip_tower_may_be_timms(tmp_path):
    own = open_clip_folder(tmp_path, {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"})
    teacher = make_teacher(TeacherConfig(kind="open_clip", name=f"local-dir:{tmp_path}", image_size=64))
    tiles = random_tiles(2, 64)
    with torch.no_grad():
        expected = own.visual.trunk.forward_features(normalized(tiles))[:, own.visual.trunk.num_prefix_tokens :]
    torch.testing.assert_close(teacher.features(tiles, 4), expected, atol=1e-5, rtol=0)


def test_an_open_clip_model_takes_a_weights_file_of_its_own(tmp_path, monkeypatch):
    own = open_clip_folder(tmp_path, VIT)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    weights = str(tmp_path / "open_clip_model.safetensors")
    teacher = make_teacher(TeacherConfig(kind="open_clip", name="tiny-clip", checkpoint=weights, image_size=64))
    assert torch.equal(teacher.backbone.conv1.weight, own.visual.conv1.weight)
    with pytest.raises(ValueError, match=r"teacher\.checkpoint is missing: which weights of tiny-clip\? .* none are"):
        make_teacher(TeacherConfig(kind="open_clip", name="tiny-clip", image_size=64))
    with pytest.raises(ValueError, match=r"which weights of ViT-B-32.*laion2b_s34b_b79k"):
        make_teacher(TeacherConfig(kind="open_clip", name="ViT-B-32", image_size=64))
    with pytest.raises(ValueError, match="open_clip cannot load tiny-clip with no-such-tag"):
        make_teacher(TeacherConfig(kind="open_clip", name="tiny-clip", checkpoint="no-such-tag", image_size=64))


def test_an_open_clip_tower_may_be_a_resnet(tmp_path):
    own = open_clip_folder(tmp_path, {"layers": [1, 1, 1, 1], "width": 8, "patch_size": None})
    teacher = make_teacher(
        TeacherConfig(kind="open_clip", name=f"local-dir:{tmp_path}", image_size=64, layers=layers(-1, -2))
    )
    tiles = random_tiles(2, 64)
    visual = own.visual
    with torch.no_grad():
        third = visual.layer3(visual.layer2(visual.layer1(visual.stem(normalized(tiles)))))
        last, before = teacher.features(tiles, 2).split(teacher.widths, dim=-1)
        torch.testing.assert_close(last, rows(visual.layer4(third)), atol=1e-5, rtol=0)
        expected = rows(nn.functional.adaptive_avg_pool2d(third, 2))
    torch.testing.assert_close(before, expected, atol=1e-5, rtol=0)


# --- transformers ----------------------------------------------------------------------------------------------------

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}


def siglip() -> SiglipModel:
    text = {**VISION, "vocab_size": 64, "projection_size": 32}
    text = SiglipTextConfig(
        **{name: value for name, value in text.items() if name not in ("image_size", "patch_size")}
    )
    return SiglipModel(SiglipConfig(text_config=text, vision_config=SiglipVisionConfig(**VISION)))


MODELS = {  # name -> (model, tokens before the patches)
    "SigLIP": (siglip, 0),
    "CLIP": (lambda: CLIPVisionModel(CLIPVisionConfig(**VISION)), 1),
    "DINOv2": (lambda: Dinov2Model(Dinov2Config(**VISION)), 1),
    "DINOv2 with registers": (
        lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**VISION, num_register_tokens=4)),
        5,
    ),
    "DINOv3": (lambda: DINOv3ViTModel(DINOv3ViTConfig(**VISION, num_register_tokens=4)), 5),
}


def save_with_processor(model, folder: Path) -> None:
    model.save_pretrained(folder)
    CLIPImageProcessorPil(image_mean=MEAN, image_std=STD).save_pretrained(folder)


def transformers_teacher(folder: Path, **fields) -> ImageTeacher:
    return make_teacher(TeacherConfig(**{"kind": "transformers", "name": str(folder), "image_size": 64, **fields}))


@pytest.mark.parametrize(("make", "num_extra"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("size", [64, 96])
def test_a_transformers_model_gives_its_patches_without_class_and_register_tokens(tmp_path, make, num_extra, size):
    torch.manual_seed(0)
    model = make().eval()
    save_with_processor(model, tmp_path)
    vision = getattr(model, "vision_model", model)
    tiles = random_tiles(2, size)
    options = {}
    if size != 64 and num_extra in (0, 1) and not isinstance(model, Dinov2Model):
        options = {"interpolate_pos_encoding": True}
    with torch.no_grad():
        outputs = vision(normalized(tiles), output_hidden_states=True, **options)
    teacher = transformers_teacher(tmp_path, image_size=size, layers=layers(-1, 0))
    assert teacher.widths == (32, 32)
    last, first = teacher.features(tiles, size // 16).split(32, dim=-1)
    torch.testing.assert_close(last, outputs.last_hidden_state[:, num_extra:], atol=1e-5, rtol=0)
    torch.testing.assert_close(first, outputs.hidden_states[1][:, num_extra:], atol=1e-5, rtol=0)
    assert last.shape == (2, (size // 16) ** 2, 32)


def test_flexible_siglip2_gets_patches_as_its_own_preprocessing_makes_them(tmp_path):
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    torch.manual_seed(0)
    fields = {name: value for name, value in VISION.items() if name != "image_size"}
    model = Siglip2VisionModel(Siglip2VisionConfig(**fields, num_patches=16)).eval()
    save_with_processor(model, tmp_path)
    tiles = random_tiles(2, 64)
    patches = torch.stack([convert_image_to_patches(tile, 16) for tile in normalized(tiles)])
    with torch.no_grad():
        expected = model(patches, torch.ones(2, 16, dtype=torch.long), torch.full((2, 2), 4)).last_hidden_state
    torch.testing.assert_close(transformers_teacher(tmp_path).features(tiles, 4), expected, atol=1e-5, rtol=0)


def test_a_transformers_convnet_gives_its_map(tmp_path):
    torch.manual_seed(0)
    model = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])).eval()
    save_with_processor(model, tmp_path)
    tiles = random_tiles(2, 64)
    with torch.no_grad():
        expected = rows(model(normalized(tiles)).last_hidden_state)
    found = transformers_teacher(tmp_path).features(tiles, round(expected.shape[1] ** 0.5))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_a_transformers_model_without_a_square_grid_is_refused(tmp_path):
    swin = SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=4)
    save_with_processor(SwinModel(swin), tmp_path)
    with pytest.raises(ValueError, match="gives 64 tokens for a picture of 64 px and patches of 4: it has no square"):
        transformers_teacher(tmp_path)


def test_a_picture_size_that_cuts_patches_is_refused(tmp_path):
    save_with_processor(Dinov2Model(Dinov2Config(**VISION)), tmp_path)
    with pytest.raises(ValueError, match=r"teacher\.image_size \(72\) must be a multiple of 16"):
        transformers_teacher(tmp_path, image_size=72)


# --- InternVL --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def internvl(tmp_path_factory) -> tuple[InternVLForConditionalGeneration, Path]:
    """A tiny InternVL as transformers saves it, with the folder of its vision tower alone in `tower`."""
    folder = tmp_path_factory.mktemp("internvl")
    vision = {**VISION, "image_size": [64, 64], "patch_size": [16, 16]}
    text = LlamaConfig(vocab_size=64, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    config = InternVLConfig(vision_config=vision, text_config=text, image_token_id=3)
    model = InternVLForConditionalGeneration(config).eval()
    save_with_processor(model, folder)
    save_with_processor(model.model.vision_tower, folder / "tower")
    return model, folder


def internvit(folder: Path, **fields) -> ImageTeacher:
    return make_teacher(TeacherConfig(**{"kind": "internvit", "name": str(folder), "image_size": 64, **fields}))


@pytest.mark.parametrize("part", ["", "tower"])
def test_internvit_gives_the_patches_of_the_vision_tower(internvl, part):
    model, folder = internvl
    tiles = random_tiles(2, 64)
    with torch.no_grad():
        outputs = model.model.vision_tower(normalized(tiles), output_hidden_states=True)
    teacher = internvit(folder / part, layers=layers(-1, 1))
    last, second = teacher.features(tiles, 4).split(32, dim=-1)
    torch.testing.assert_close(last, outputs.last_hidden_state[:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(second, outputs.hidden_states[2][:, 1:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [64, 96])
def test_projected_features_are_what_internvls_language_model_reads(internvl, size):
    model, folder = internvl
    tiles = random_tiles(2, size)
    with torch.no_grad():
        features = model.model.get_image_features(
            normalized(tiles), vision_feature_layer=-1, vision_feature_select_strategy="default"
        )
    teacher = internvit(folder, projected=True, image_size=size)
    assert teacher.widths == (24,)
    torch.testing.assert_close(teacher.features(tiles, size // 32), features.pooler_output, atol=1e-5, rtol=0)


def test_what_internvit_cannot_do_is_refused(internvl, tmp_path):
    _, folder = internvl
    with pytest.raises(ValueError, match=r"holds a vision tower alone; teacher\.projected needs the whole InternVL"):
        internvit(folder / "tower", projected=True)
    with pytest.raises(ValueError, match="projected goes with the last layer only"):
        internvit(folder, projected=True, layers=layers(0))
    with pytest.raises(ValueError, match=r"image_size \(80\) must be a multiple of 32 for InternViT"):
        internvit(folder, projected=True, image_size=80)
    save_with_processor(Dinov2Model(Dinov2Config(**VISION)), tmp_path)
    with pytest.raises(ValueError, match=r"holds a dinov2 model; kind internvit wants an InternVL folder"):
        internvit(tmp_path)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": ()}, r"(?s)layers.*at least 1 item"),
        ({"projected": True}, "projected is InternVL's own MLP; a timm teacher has none"),
        ({"kind": "internvit", "checkpoint": "x"}, "internvit teacher has its weights in the folder teacher.name"),
    ],
)
def test_contradictory_teachers_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TeacherConfig(name="x", image_size=64, **fields)


def test_layers_are_read_from_a_recipe(distillation_config):
    config = distillation_config("teacher.layers=[{teacher: 3, student: 0}, {teacher: -1}]")
    assert config.teacher[0].layers == (LayerMatch(teacher=3, student=0), LayerMatch(teacher=-1, student=-1))


# --- several at once -------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path) -> list[dict]:
    """Two timm teachers with random weights, one without its classifier and with other names for its tensors."""
    teachers = []
    for number, name in enumerate(("test_efficientnet", "mobilenetv2_050")):
        torch.manual_seed(number)
        weights = timm.create_model(name, pretrained=False).state_dict()
        if number:
            weights = {f"features.{place}": weights[key] for place, key in enumerate(list(weights)[:-2])}
        torch.save(weights, tmp_path / f"{name}.pt")
        fields = {"name": name, "checkpoint": str(tmp_path / f"{name}.pt"), "image_size": 64, "standardize": True}
        teachers.append(fields)
    return teachers


def test_weights_without_a_classifier_give_the_features_they_give_with_it(pair):
    torch.manual_seed(1)
    own = timm.create_model("mobilenetv2_050", pretrained=False).eval()
    teacher = make_teacher(TeacherConfig(**pair[1]))
    with torch.no_grad():
        tile = random_tiles(1, 64)
        pixels = normalized(tile, own.pretrained_cfg["mean"], own.pretrained_cfg["std"])
        expected = own.forward_intermediates(pixels, indices=[4], norm=True, intermediates_only=True)[0]
    torch.testing.assert_close(teacher.features(tile, 2), rows(expected), atol=1e-4, rtol=1e-4)
    assert [*teacher.backbone.state_dict()] == [*own.state_dict()][:-2]  # nothing random is left in it


def test_teachers_side_by_side_give_what_each_gives_standardised_by_itself(pair):
    alone = [make_teacher(TeacherConfig(**fields, layers=layers(1, -1))) for fields in pair]
    joint = side_by_side([make_teacher(TeacherConfig(**fields, layers=layers(1, -1))) for fields in pair])
    assert joint.widths == tuple(left + right for left, right in zip(*(item.widths for item in alone), strict=True))
    batch = TileBatch(pixel_values=random_tiles(3, 56))
    for teacher in (*alone, joint):
        teacher.standardize([teacher.raw_targets(batch, 2)])
    found = joint.targets(batch, 2).split(joint.widths, dim=-1)
    parts = [teacher.targets(batch, 2).split(teacher.widths, dim=-1) for teacher in alone]
    for layer, expected in zip(found, zip(*parts, strict=True), strict=True):
        assert torch.equal(layer, torch.cat(expected, dim=-1))
    assert side_by_side(alone[:1]) is alone[0]


def test_a_run_has_several_teachers_and_caches_give_the_same_but_for_rounding(distillation_config, pair, tmp_path):
    outputs = [tmp_path / "live", tmp_path / "cached", tmp_path / "mixed"]
    caches = [(None, None), (str(tmp_path / "cache"), str(tmp_path / "cache")), (None, str(tmp_path / "cache"))]
    for output, folders in zip(outputs, caches, strict=True):
        teachers = [{**fields, "cache": folder} for fields, folder in zip(pair, folders, strict=True)]
        run_stage(distillation_config(f"teacher={json.dumps(teachers)}", f"output={output}", "num_steps=2"))
    losses = [
        [json.loads(line).get("loss") for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for output in outputs
    ]
    told = [[loss for loss in found if loss is not None] for found in losses]
    assert len(told[0]) == 2
    assert told[1] == pytest.approx(told[0], abs=1e-4)
    assert told[2] == pytest.approx(told[0], abs=1e-4)
    assert len(list((tmp_path / "cache").iterdir())) == 2  # a folder for each


def test_teachers_that_cannot_stand_side_by_side_are_refused(distillation_config, pair):
    pair[1]["standardize"] = False
    with pytest.raises(ValueError, match=r"2 teachers stand side by side.* set standardize to true on each"):
        distillation_config(f"teacher={json.dumps(pair)}")
    pair[1] |= {"standardize": True, "layers": {"student": 0}}
    with pytest.raises(ValueError, match=r"same holistic layers; .* the student layers \(-1,\), \(0,\)"):
        distillation_config(f"teacher={json.dumps(pair)}")


def test_a_recipe_of_one_teacher_may_write_it_without_a_list(distillation_config):
    config = distillation_config("teacher.standardize=true")
    assert len(config.teacher) == 1
    assert with_new_fields({**config.to_dict(), "teacher": config.to_dict()["teacher"][0]}) == config.to_dict()
