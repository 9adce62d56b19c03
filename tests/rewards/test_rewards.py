"""Rewards: hand-checked values, parity with the models' own code, gradients to the pixels, and errors that tell what to do."""

import ast
import io
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import PROMPTS, image_processor, photo_like, save_clip
from torch import nn
from transformers import CLIPModel, CLIPTokenizer

import diffusers_align.rewards
from diffusers_align.embedded import scenes
from diffusers_align.rewards import InvalidReward, WeightedSum, load_reward, score
from diffusers_align.rewards.aesthetic import AestheticMLP, AestheticScore
from diffusers_align.rewards.clip_embedder import CLIPEmbedder, pooled
from diffusers_align.rewards.clip_score import CLIPScore
from diffusers_align.rewards.jpeg import jpeg_compressibility, jpeg_incompressibility
from diffusers_align.rewards.pick_score import PickScore
from diffusers_align.rewards.preprocessing import Preprocessing
from diffusers_align.rewards.scene import SceneScore

BUILT_IN_NAMES = (
    "jpeg_compressibility", "jpeg_incompressibility", "aesthetic", "background_color", "clip_score", "hps_v2", "image_reward", "ocr",
    "pick_score", "scene_score", "vlm_judge",
)  # fmt: skip


def brightness(images, prompts, **columns):
    return images.flatten(1).mean(1)


class Scaled:
    def __init__(self, factor: float = 1.0, device: str = "cpu"):
        self.factor, self.device = factor, device

    def __call__(self, images, prompts, **columns):
        return {"reward": self.factor * brightness(images, prompts), "contrast": images.flatten(1).std(1)}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def aesthetic_checkpoint(tmp_path_factory):
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("aesthetic") / "head.pth"
    torch.save(AestheticMLP(24).state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def bytes_of(images):
    """(B, 3, H, W) in [0, 1] as a list of (H, W, 3) uint8 arrays."""
    return list((images * 255).round().byte().permute(0, 2, 3, 1).numpy())


# --- score and WeightedSum ------------------------------------------------------------------------------------------


def test_score_normalises_every_kind_of_answer():
    images = torch.rand(2, 3, 4, 4)
    expected = images.flatten(1).mean(1)
    torch.testing.assert_close(score(brightness, images, PROMPTS)["reward"], expected)
    torch.testing.assert_close(score(lambda i, p: expected.double().numpy(), images, PROMPTS)["reward"], expected)
    torch.testing.assert_close(score(lambda i, p: {"anything": expected}, images, PROMPTS), {"reward": expected})
    assert score(lambda i, p: [1, 2], images, PROMPTS)["reward"].tolist() == [1.0, 2.0]
    assert score(lambda i, p: torch.tensor([1, 0]), images, PROMPTS)["reward"].dtype == torch.float32
    assert set(score(Scaled(), images, PROMPTS)) == {"reward", "contrast"}


def test_score_passes_the_columns_and_keeps_the_graph():
    images = torch.rand(2, 3, 4, 4, requires_grad=True)
    result = score(lambda images, prompts, weight: brightness(images, prompts) * weight, images, PROMPTS, weight=torch.tensor([1.0, 2.0]))
    result["reward"].sum().backward()
    torch.testing.assert_close(images.grad[1], torch.full((3, 4, 4), 2 / 48))


def test_a_wrong_shape_is_an_error():
    with pytest.raises(InvalidReward, match=r"'bad' returned the shape \(2, 1\) for 'reward', for 2 images: expected \(2,\), one number per image"):

        def bad(images, prompts):
            return torch.zeros(2, 1)

        score(bad, torch.rand(2, 3, 4, 4), PROMPTS)
    with pytest.raises(InvalidReward, match=r"none of which is called 'reward'"):
        score(lambda i, p: {"a": torch.zeros(2), "b": torch.zeros(2)}, torch.rand(2, 3, 4, 4), PROMPTS)
    with pytest.raises(InvalidReward, match="returned a str for 'reward'"):
        score(lambda i, p: "good", torch.rand(2, 3, 4, 4), PROMPTS)
    with pytest.raises(ValueError, match="got 2 images and 1 prompts"):
        score(brightness, torch.rand(2, 3, 4, 4), ["a cat"])
    with pytest.raises(ValueError, match="on_invalid"):
        score(brightness, torch.rand(2, 3, 4, 4), PROMPTS, on_invalid="ignore")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_errors_or_masked(value):
    def broken(images, prompts):
        return torch.tensor([1.0, value, value, 2.0, value, value])

    images, prompts = torch.rand(6, 3, 4, 4), [f"prompt {i}" for i in range(6)]
    with pytest.raises(InvalidReward) as caught:
        score(broken, images, prompts)
    message = str(caught.value)
    assert "'broken' is NaN or infinite for 4 of 6 images" in message
    assert "'prompt 1', 'prompt 2', 'prompt 4', ..." in message and "prompt 5" not in message
    assert "--invalid_rewards mask" in message
    masked = score(broken, images, prompts, on_invalid="mask")["reward"]
    assert masked.isnan().tolist() == [False, True, True, False, True, True] and masked[3] == 2


def test_weighted_sum_adds_and_reports_components():
    images = torch.rand(2, 3, 4, 4)
    light = brightness(images, PROMPTS)
    result = score(WeightedSum([(brightness, 2.0), (Scaled(10), -0.1, "scaled")]), images, PROMPTS)
    torch.testing.assert_close(result["reward"], 2 * light - light)
    torch.testing.assert_close(result["brightness"], light)
    torch.testing.assert_close(result["scaled"], 10 * light)
    torch.testing.assert_close(result["scaled/contrast"], images.flatten(1).std(1))
    torch.testing.assert_close(score(WeightedSum({brightness: 3}), images, PROMPTS)["reward"], 3 * light)


def test_weighted_sum_blames_the_component():
    def broken(images, prompts):
        return torch.tensor([1.0, float("nan")])

    total = WeightedSum({brightness: 1.0, broken: 0.5})
    with pytest.raises(InvalidReward, match=r"'brightness\*1\+broken\*0.5' is NaN or infinite for 1 of 2 images because of 'broken'. Prompts: 'two dogs'"):
        score(total, torch.rand(2, 3, 4, 4), PROMPTS)
    assert score(total, torch.rand(2, 3, 4, 4), PROMPTS, on_invalid="mask")["reward"].isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match="different names"):
        WeightedSum([(brightness, 1.0), (brightness, 2.0)])
    with pytest.raises(ValueError, match="at least one"):
        WeightedSum({})


# --- load_reward ----------------------------------------------------------------------------------------------------


def test_load_reward_finds_built_ins_modules_and_files(tmp_path, monkeypatch):
    assert load_reward("jpeg_compressibility") is jpeg_compressibility
    assert load_reward(brightness) is brightness
    source = "import torch\nclass Constant:\n    def __init__(self, value=1.0): self.value = value\n"
    source += "    def __call__(self, images, prompts, **columns): return torch.full((len(images),), self.value)\n"
    (tmp_path / "my_test_rewards.py").write_text(source + "def one(images, prompts): return torch.ones(len(images))\nnumber = 3\n")
    images = torch.rand(2, 3, 4, 4)
    file = tmp_path / "my_test_rewards.py"
    assert score(load_reward(f"{file}:one"), images, PROMPTS)["reward"].tolist() == [1, 1]
    assert score(load_reward(f"{file}:Constant", value=4.0), images, PROMPTS)["reward"].tolist() == [4, 4]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert score(load_reward("my_test_rewards:Constant"), images, PROMPTS)["reward"].tolist() == [1, 1]
    result = score(load_reward("my_test_rewards.py:one*2 + my_test_rewards:Constant*-1e-1 + jpeg_compressibility", value=5.0), images, PROMPTS)
    torch.testing.assert_close(result["reward"], 2 - 0.5 + jpeg_compressibility(images, PROMPTS))
    assert set(result) == {"reward", "one", "Constant", "jpeg_compressibility"}


def test_load_reward_passes_options_to_those_that_take_them():
    images = torch.rand(2, 3, 16, 16)
    worse = load_reward("jpeg_incompressibility", quality=10)(images, PROMPTS)
    torch.testing.assert_close(worse, jpeg_incompressibility(images, PROMPTS, quality=10))
    assert (worse < jpeg_incompressibility(images, PROMPTS)).all()
    assert load_reward(f"{__file__}:Scaled", factor=2.0, device="meta").device == "meta"
    with pytest.raises(ValueError, match="'jpeg_compressibility' takes no option 'model'"):
        load_reward("jpeg_compressibility", model="x")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("clip_scor", r"There is no reward 'clip_scor'. Did you mean 'clip_score'\?.*pick_score.*'module:function'"),
        ("nothing_like_it", r"There is no reward 'nothing_like_it'. Built in: aesthetic, background_color, clip_score"),
        ("no_such_module:f", "there is no module 'no_such_module', neither installed nor in"),
        ("no_such_file.py:f", "there is no file .*no_such_file.py"),
        ("math:squrt", r"'math' has no 'squrt'. Did you mean 'sqrt'\?"),
        ("math:pi", "'math:pi' is a float: a function or a class is needed"),
        ("fractions:Fraction", "objects of that class cannot be called"),
        ("clip_score*", "Cannot read the reward"),
        ("clip_score*a", "Cannot read the reward"),
        ("", "Cannot read the reward"),
    ],
)
def test_a_name_that_finds_nothing_says_what_to_write(spec, message):
    with pytest.raises(ValueError, match=message):
        load_reward(spec)


def test_an_import_error_inside_a_reward_is_not_hidden(tmp_path):
    (tmp_path / "broken.py").write_text("import a_dependency_that_is_missing\n")
    with pytest.raises(ModuleNotFoundError, match="a_dependency_that_is_missing"):
        load_reward(f"{tmp_path / 'broken.py'}:f")


def test_built_ins_are_complete_and_importing_them_is_light():
    assert set(diffusers_align.rewards.BUILT_INS) == set(BUILT_IN_NAMES)
    light = set(sys.stdlib_module_names) | {"torch", "__future__"}
    for file in Path(diffusers_align.rewards.__file__).parent.glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                parts = {node.module or alias.name for alias in node.names} if node.level > 1 else set()
                assert parts <= {"checks.ranges", "files"}, f"{file.name} imports a part of the package that is not light at its top level"
                names = [node.module] if node.level == 0 else []
            assert {name.split(".")[0] for name in names} <= light, file.name


# --- jpeg -----------------------------------------------------------------------------------------------------------


def test_jpeg_is_the_size_that_pil_writes_in_kb():
    images = torch.rand(2, 3, 24, 40)
    sizes = []
    for array in bytes_of(images):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, format="JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    assert jpeg_incompressibility(images, PROMPTS).tolist() == pytest.approx(sizes)
    assert jpeg_compressibility(images, PROMPTS).tolist() == pytest.approx([-s for s in sizes])


def test_jpeg_prefers_flat_images_and_rounds():
    noise, flat = torch.rand(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    assert jpeg_compressibility(flat, ["x"]) > jpeg_compressibility(noise, ["x"])
    eighth = (noise * 255).round() / 255
    for shift in (-0.4 / 255, 0.4 / 255):  # truncation would change the pixels
        torch.testing.assert_close(jpeg_compressibility(eighth + shift, ["x"]), jpeg_compressibility(eighth, ["x"]))


def test_jpeg_of_videos_is_the_mean_and_a_nan_pixel_is_no_score():
    videos = torch.rand(2, 3, 3, 16, 16)
    expected = jpeg_incompressibility(videos.flatten(0, 1), ["x"] * 6).view(2, 3).mean(1)
    torch.testing.assert_close(jpeg_incompressibility(videos, PROMPTS), expected)
    images = videos[:, 0].clone()
    images[1, 0, 0, 0] = float("nan")
    assert jpeg_compressibility(images, PROMPTS).isnan().tolist() == [False, True]
    with pytest.raises(ValueError, match=r"got the shape \(2, 1, 8, 8\)"):
        jpeg_compressibility(torch.rand(2, 1, 8, 8), PROMPTS)


# --- CLIP: preprocessing, clip_score, pick_score, aesthetic ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (32, 45), (64, 64), (90, 51), (20, 24)])
def test_preprocessing_follows_transformers(clip_folder, shape):
    images = photo_like(2, 3, *shape)
    expected = torch.tensor(np.stack(image_processor()(bytes_of(images))["pixel_values"]))
    ours = Preprocessing.from_pretrained(clip_folder)(images)
    assert ours.shape == (2, 3, 32, 32)
    tolerance = 1e-5 if min(shape) == 32 else 0.025  # where it resizes, transformers rounds to 8 bits: half a level, in units of std
    torch.testing.assert_close(ours, expected, atol=tolerance, rtol=0)


def test_preprocessing_of_hard_edges_stays_in_range(clip_folder):
    images = photo_like(2, 3, 50, 50).round()  # black and white: bicubic interpolation overshoots
    preprocess = Preprocessing.from_pretrained(clip_folder)
    ours = preprocess(images)
    torch.testing.assert_close(ours, torch.tensor(np.stack(image_processor()(bytes_of(images))["pixel_values"])), atol=0.025, rtol=0)
    pixels = ours * torch.tensor(preprocess.std).view(3, 1, 1) + torch.tensor(preprocess.mean).view(3, 1, 1)
    assert pixels.min() > -1e-6 and pixels.max() < 1 + 1e-6


def test_preprocessing_reads_every_setting(tmp_path):
    settings = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2}
    image_processor(16, **settings).save_pretrained(tmp_path / "a")
    assert Preprocessing.from_pretrained(str(tmp_path / "a")) == Preprocessing(16, (16, 16), (0.5,) * 3, (0.25,) * 3, "bilinear")
    image_processor(16, do_resize=False, do_center_crop=False, do_normalize=False).save_pretrained(tmp_path / "b")
    plain = Preprocessing.from_pretrained(str(tmp_path / "b"))
    images = torch.rand(1, 3, 9, 7)
    torch.testing.assert_close(plain(images), images)
    padded = Preprocessing(None, (9, 10), (0.0,) * 3, (1.0,) * 3)(images)
    assert padded.shape == (1, 3, 9, 10)
    torch.testing.assert_close(padded[..., 2:9], images)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "preprocessor_config.json").write_text('{"crop_size": 8, "size": 8}')  # as the oldest checkpoints have it
    assert Preprocessing.from_pretrained(str(tmp_path / "c")) == Preprocessing(8, (8, 8))


def reference_cosines(folder, images, prompts):
    """Diagonal of the cosines by transformers alone, from 8-bit images."""
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    pixels = torch.tensor(np.stack(image_processor()(bytes_of(images))["pixel_values"]))
    with torch.no_grad():
        out = model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, pixel_values=pixels)
    return (out.logits_per_image / model.logit_scale.exp()).diag(), model.logit_scale.exp().detach()


def test_clip_score_is_transformers_cosine(clip_folder):
    images, prompts = photo_like(2, 3, 32, 32), ["a cat", "two dogs and " + "many more words " * 9]
    expected, _ = reference_cosines(clip_folder, images, prompts)
    reward = load_reward("clip_score", model=clip_folder, device="cpu")
    torch.testing.assert_close(score(reward, images, prompts)["reward"], expected, atol=1e-5, rtol=0)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_pick_score_is_the_logit_over_26(clip_folder):
    images = photo_like(2, 3, 32, 32)
    cosines, scale = reference_cosines(clip_folder, images, PROMPTS)
    torch.testing.assert_close(PickScore(clip_folder)(images, PROMPTS), scale * cosines / 26, atol=1e-5, rtol=0)
    torch.testing.assert_close(PickScore(clip_folder, raw=True)(images, PROMPTS), scale * cosines, atol=1e-4, rtol=0)


def test_aesthetic_is_the_published_head_on_unit_embeddings(clip_folder, aesthetic_checkpoint):
    images = photo_like(2, 3, 32, 32)
    state = torch.load(aesthetic_checkpoint, weights_only=True)
    assert list(state) == [f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    model = CLIPModel.from_pretrained(clip_folder)
    with torch.no_grad():
        x = pooled(model.get_image_features(pixel_values=torch.tensor(np.stack(image_processor()(bytes_of(images))["pixel_values"]))))
        x = x / x.norm(dim=-1, keepdim=True)
        for i in (0, 2, 4, 6, 7):
            x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    reward = load_reward("aesthetic", model=clip_folder, checkpoint=aesthetic_checkpoint)
    torch.testing.assert_close(score(reward, images, PROMPTS)["reward"], x[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(reward(images), reward(images))  # dropout is off


def test_aesthetic_errors_teach(clip_folder, tmp_path):
    torch.save(AestheticMLP(768).state_dict(), tmp_path / "large.pth")
    with pytest.raises(ValueError, match="made for embeddings of size 768, .* has 24"):
        AestheticScore(clip_folder, tmp_path / "large.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="lacks 'layers.0.weight'"):
        AestheticScore(clip_folder, tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint .*absent.pth"):
        AestheticScore(clip_folder, tmp_path / "absent.pth")


def test_features_may_be_a_tensor_or_an_object():
    tensor = torch.rand(2, 4)
    assert pooled(tensor) is tensor and pooled(type("Output", (), {"pooler_output": tensor})()) is tensor


@pytest.fixture(params=["clip_score", "pick_score", "aesthetic", "scene_score"])
def model_reward(request, clip_folder, aesthetic_checkpoint):
    makers = {
        "clip_score": lambda: CLIPScore(clip_folder),
        "pick_score": lambda: PickScore(clip_folder),
        "aesthetic": lambda: AestheticScore(clip_folder, aesthetic_checkpoint),
        "scene_score": SceneScore,
    }
    return makers[request.param]()


def test_model_rewards_have_a_gradient_and_are_frozen(model_reward):
    images = photo_like(2, 3, 48, 48).requires_grad_()
    result = score(model_reward, images, PROMPTS)["reward"]
    result.sum().backward()
    assert images.grad.isfinite().all() and all(g.norm() > 0 for g in images.grad)
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in model_reward.parameters())
    assert not any(module.training for module in model_reward.modules())
    assert model_reward.to("cpu") is model_reward


def test_model_rewards_of_videos_are_means_over_frames(model_reward):
    videos = photo_like(2, 3, 3, 32, 32)
    frames = score(model_reward, videos.flatten(0, 1), [prompt for prompt in PROMPTS for _ in range(3)])["reward"]
    torch.testing.assert_close(score(model_reward, videos, PROMPTS)["reward"], frames.view(2, 3).mean(1), atol=1e-5, rtol=1e-5)


def test_a_nan_pixel_is_caught(model_reward):
    images = photo_like(2, 3, 32, 32)
    images[1, 0, 5, 5] = float("nan")
    assert score(model_reward, images, PROMPTS, on_invalid="mask")["reward"].isnan().tolist() == [False, True]


def test_half_precision_images_are_scored_in_float32(clip_folder):
    images = photo_like(2, 3, 32, 32).bfloat16()
    reward = CLIPScore(clip_folder)
    torch.testing.assert_close(reward(images, PROMPTS), reward(images.float(), PROMPTS))


def test_embedder_has_unit_embeddings(clip_folder):
    clip = CLIPEmbedder(clip_folder)
    torch.testing.assert_close(clip.images(photo_like(2, 3, 32, 32)).norm(dim=-1), torch.ones(2))
    texts = clip.texts(["a cat", "two dogs with a long caption"])
    torch.testing.assert_close(texts.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(texts[:1], clip.texts(["a cat"]))  # padding plays no part


# --- scene_score ----------------------------------------------------------------------------------------------------


class FakeClassifier(nn.Module):
    """Always sees two cats, probability 0.8 and 0.6, on a red background (0.9), centred at (0.38, 0.5)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        def logits(classes, chosen, probability):
            rest = (1 - probability) / (len(classes) - 1)
            values = [probability if name == chosen else rest for name in classes]
            return torch.tensor(values).log().expand(len(images), -1) + self.weight

        return {
            "object": logits(scenes.OBJECTS, "cat", 0.8),
            "count": logits(scenes.COUNTS, 2, 0.6),
            "color": logits(scenes.COLORS, "red", 0.9),
            "center": torch.tensor([[0.38, 0.5]]).expand(len(images), -1),
        }


def test_scene_score_is_the_mean_probability_of_what_was_asked():
    reward = SceneScore()
    reward.classifier = FakeClassifier()
    prompts = ["two cats", "two cats on a red background", "a cat on the left", "two dogs on a blue background", "two cats on the left", "an idea"]
    result = score(reward, torch.rand(6, 3, 32, 32), prompts, on_invalid="mask")
    left = torch.sigmoid(torch.tensor(1.0)).item()  # (0.41 - 0.38) / 0.03
    other = [0.2 / 31, 0.2, 0.1 / 9]
    rewards = [(0.8 + 0.6) / 2, (0.8 + 0.6 + 0.9) / 3, (0.8 + other[1] + left) / 3, (other[0] + 0.6 + other[2]) / 3, (0.8 + 0.6 + left) / 3, float("nan")]
    assert result["reward"].tolist() == pytest.approx(rewards, nan_ok=True, abs=1e-5)
    assert result["correct"].tolist() == pytest.approx([1, 1, 0, 0, 1, float("nan")], nan_ok=True)
    assert result["object"].tolist() == pytest.approx([0.8] * 3 + [other[0], 0.8, float("nan")], nan_ok=True, abs=1e-5)
    assert result["color"].isnan().tolist() == [True, False, True, False, True, True]
    assert result["position"].tolist() == pytest.approx([float("nan")] * 2 + [left, float("nan"), left, float("nan")], nan_ok=True, abs=1e-5)
    with pytest.raises(InvalidReward, match="'scene_score' is NaN or infinite for 1 of 6 images. Prompts: 'an idea'"):
        score(reward, torch.rand(6, 3, 32, 32), prompts)


@pytest.mark.parametrize("position, center", [("left", (0.2, 0.5)), ("right", (0.8, 0.5)), ("top", (0.5, 0.2)), ("bottom", (0.5, 0.8))])
def test_positions_are_where_they_say(position, center):
    reward = SceneScore()
    fake = FakeClassifier()
    reward.classifier = fake
    see = fake.forward
    fake.forward = lambda images: see(images) | {"center": torch.tensor([center]).expand(len(images), -1)}
    prompts = [f"a cat {phrase}" for phrase in scenes.POSITIONS.values()]
    found = score(reward, torch.rand(4, 3, 32, 32), prompts)["position"]
    assert ((found > 0.99) == torch.tensor([name == position for name in scenes.POSITIONS])).all()
    assert found[[name != position for name in scenes.POSITIONS]].max() < 0.06


def test_scene_score_knows_rendered_scenes():
    rng = random.Random(5)
    drawn = [scenes.sample_scene(rng) for _ in range(64)]
    images = torch.stack([torch.from_numpy(np.array(scenes.render(scene, rng))).permute(2, 0, 1) / 255 for scene in drawn])
    captions = [scene.caption() for scene in drawn]
    reward = load_reward("scene_score")
    with torch.no_grad():
        right, wrong = score(reward, images, captions), score(reward, images, captions[1:] + captions[:1])
    assert right["reward"].mean() > wrong["reward"].mean() + 0.3
    assert right["correct"].mean() > 0.7 and wrong["correct"].mean() < 0.2


def test_scene_score_judges_against_wanted_captions_where_there_are_some():
    from diffusers_align.embedded.teaching import make_scenes

    images, truth, _ = make_scenes(20, seed=5)
    captions, wrong = [s.caption() for s in truth], ["a bus" if s.object != "bus" else "a cat" for s in truth]
    reward = load_reward("scene_score")
    expected = reward(images.float() / 255, captions)["reward"]
    torch.testing.assert_close(reward(images.float() / 255, wrong, wanted=captions)["reward"], expected)
    torch.testing.assert_close(reward(images.float() / 255, captions, wanted=[None] * 20)["reward"], expected)


def test_background_color_is_minus_the_distance_of_the_border():
    from diffusers_align.embedded.scenes import COLORS

    blue = torch.tensor(COLORS["blue"]).view(3, 1, 1) / 255
    images = torch.stack([blue.expand(3, 32, 32), (blue + 0.1).expand(3, 32, 32), blue.expand(3, 32, 32)]).clone()
    images[:, :, 8:24, 8:24] = 0.3  # the inside does not count
    reward = load_reward("background_color")
    expected = torch.tensor([0.0, -0.1, torch.nan])
    torch.testing.assert_close(reward(images, ["a fox", "a fox on a blue background", "a fox"], background=["blue", None, None]), expected, equal_nan=True)
    images.requires_grad_()
    reward(images[1:2], ["a fox on a blue background"]).sum().backward()
    assert float(images.grad[1].abs().sum()) > 0 and float(images.grad[1, :, 8:24, 8:24].abs().sum()) == 0
