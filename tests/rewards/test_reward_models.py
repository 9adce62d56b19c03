"""Rewards that stand on published models or packages: weights go where they belong, arithmetic against an independent forward pass."""

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import PROMPTS, photo_like, save_clip
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, BertTokenizer, CLIPModel

from diffusers_align.rewards import load_reward, score
from diffusers_align.rewards.aesthetic import AestheticMLP
from diffusers_align.rewards.hps_v2 import HPSv2, clip_from_open_clip, rename
from diffusers_align.rewards.image_reward import MEAN, STD, ImageReward, split_state
from diffusers_align.rewards.ocr import OCRScore, edit_distance, quoted, text_score
from diffusers_align.rewards.preprocessing import CLIP_MEAN, CLIP_STD, Letterbox

torch.set_num_threads(1)


def normalised(images):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    return (images - mean) / std


def weights(shapes, seed=0):
    """Random weights; norms near 1, and large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator)
        is_scale = name.endswith("weight") and len(shape) == 1
        state[name] = 1 + 0.1 * value if is_scale else value * (0.3 if len(shape) == 1 else (1 / math.sqrt(shape[-1])))
    return state


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x, eps):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def attend(q, k, v, heads, mask=None):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(-3, -2) for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return ((logits if mask is None else logits + mask).softmax(-1) @ v).transpose(-3, -2).flatten(-2)


# --- ImageReward -------------------------------------------------------------------------------------------------------

WIDTH, TEXT, SIZE, PATCH, DEPTH = 128, 64, 32, 8, 2
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "two", "cat", "dogs", "on", "the", "left"]


def affine(name, out, inner):
    return {f"{name}.weight": (out, inner), f"{name}.bias": (out,)}


def layer_norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def official_shapes():
    """Every key of ImageReward.pt, as the classes in its repository make them."""
    v, t = "blip.visual_encoder.", "blip.text_encoder."
    shapes = {f"{v}cls_token": (1, 1, WIDTH), f"{v}pos_embed": (1, (SIZE // PATCH) ** 2 + 1, WIDTH)}
    shapes |= {f"{v}patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH), f"{v}patch_embed.proj.bias": (WIDTH,)}
    for i in range(DEPTH):
        b = f"{v}blocks.{i}."
        shapes |= layer_norm(f"{b}norm1", WIDTH) | affine(f"{b}attn.qkv", 3 * WIDTH, WIDTH) | affine(f"{b}attn.proj", WIDTH, WIDTH)
        shapes |= layer_norm(f"{b}norm2", WIDTH) | affine(f"{b}mlp.fc1", 2 * WIDTH, WIDTH) | affine(f"{b}mlp.fc2", WIDTH, 2 * WIDTH)
    shapes |= layer_norm(f"{v}norm", WIDTH)
    shapes |= {f"{t}embeddings.word_embeddings.weight": (len(WORDS), TEXT), f"{t}embeddings.position_embeddings.weight": (40, TEXT)}
    shapes |= layer_norm(f"{t}embeddings.LayerNorm", TEXT)
    for i in range(DEPTH):
        b = f"{t}encoder.layer.{i}."
        for kind, inner in (("attention", TEXT), ("crossattention", WIDTH)):
            shapes |= affine(f"{b}{kind}.self.query", TEXT, TEXT) | affine(f"{b}{kind}.self.key", TEXT, inner) | affine(f"{b}{kind}.self.value", TEXT, inner)
            shapes |= affine(f"{b}{kind}.output.dense", TEXT, TEXT) | layer_norm(f"{b}{kind}.output.LayerNorm", TEXT)
        shapes |= affine(f"{b}intermediate.dense", 2 * TEXT, TEXT) | affine(f"{b}output.dense", TEXT, 2 * TEXT) | layer_norm(f"{b}output.LayerNorm", TEXT)
    shapes |= affine("blip.vision_proj", 256, WIDTH) | affine("blip.text_proj", 256, TEXT)
    for i, (out, inner) in {0: (1024, TEXT), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}.items():
        shapes |= affine(f"mlp.layers.{i}", out, inner)
    return shapes


def official_score(state, images, ids, mask):
    """ImageReward's forward pass on its own names."""
    v = "blip.visual_encoder."
    x = F.conv2d(normalised(images), state[f"{v}patch_embed.proj.weight"], state[f"{v}patch_embed.proj.bias"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state[f"{v}cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{v}pos_embed"]
    for i in range(DEPTH):
        b = f"{v}blocks.{i}."
        x = x + linear(state, f"{b}attn.proj", attend(*linear(state, f"{b}attn.qkv", norm(state, f"{b}norm1", x, 1e-6)).chunk(3, -1), WIDTH // 64))
        x = x + linear(state, f"{b}mlp.fc2", F.gelu(linear(state, f"{b}mlp.fc1", norm(state, f"{b}norm2", x, 1e-6))))
    x = norm(state, f"{v}norm", x, 1e-6)

    t = "blip.text_encoder."
    h = state[f"{t}embeddings.word_embeddings.weight"][ids] + state[f"{t}embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = norm(state, f"{t}embeddings.LayerNorm", h, 1e-12)
    hidden = torch.where(mask[:, None, None] > 0, 0.0, -torch.inf)
    for i in range(DEPTH):
        b = f"{t}encoder.layer.{i}."
        for kind, m in (("attention", hidden), ("crossattention", None)):
            source = h if kind == "attention" else x
            q, k, value = (linear(state, f"{b}{kind}.self.{n}", s) for n, s in (("query", h), ("key", source), ("value", source)))
            h = norm(state, f"{b}{kind}.output.LayerNorm", h + linear(state, f"{b}{kind}.output.dense", attend(q, k, value, TEXT // 64, m)), 1e-12)
        inner = F.gelu(linear(state, f"{b}intermediate.dense", h))
        h = norm(state, f"{b}output.LayerNorm", h + linear(state, f"{b}output.dense", inner), 1e-12)
    y = h[:, 0]
    for i in (0, 2, 4, 6, 7):
        y = linear(state, f"mlp.layers.{i}", y)
    return (y[:, 0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def image_reward_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    state = weights(official_shapes()) | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    torch.save(state, folder / "ImageReward.pt")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    try:
        BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    except TypeError:  # transformers 4
        BertTokenizer(folder / "vocab.txt").save_pretrained(folder)
    return folder


def test_image_reward_is_the_official_forward_pass(image_reward_folder):
    state = torch.load(image_reward_folder / "ImageReward.pt", weights_only=True)
    images, prompts = photo_like(3, 3, SIZE, SIZE), ["a cat", "two dogs on the left", "a cat on the left " * 20]
    ids = torch.tensor([[2, 4, 6, 3] + [0] * 31, [2, 5, 7, 8, 9, 10, 3] + [0] * 28, [2] + ([4, 6, 8, 9, 10] * 7)[:33] + [3]])
    expected = official_score(state, images, ids, (ids > 0).long())
    reward = load_reward("image_reward", model=image_reward_folder)
    torch.testing.assert_close(score(reward, images, prompts)["reward"], expected, atol=2e-5, rtol=1e-5)
    assert expected.std() > 0.01 and not torch.allclose(reward(images, prompts), reward(images, prompts[::-1]), atol=1e-3)
    assert not torch.allclose(reward(images, prompts), reward(images.flip(0), prompts), atol=1e-3)
    assert (MEAN, STD) == (0.16717362830052426, 1.0333394966054072)


def test_every_official_weight_has_one_place(image_reward_folder):
    state = torch.load(image_reward_folder / "ImageReward.pt", weights_only=True)
    vision, text, head = split_state(state)
    unused = [name for name in state if name.startswith(("blip.vision_proj", "blip.text_proj")) or name.endswith("position_ids")]
    assert len(vision) + len(text) + len(head) + len(unused) == len(state) and len(unused) == 5
    reward = ImageReward(image_reward_folder)
    for module, part in ((reward.vision, vision), (reward.text, text), (reward.head, head)):
        assert set(part) == set(module.state_dict())
        assert all(torch.equal(value, part[name]) for name, value in module.state_dict().items())


def test_image_reward_has_gradients_and_takes_videos(image_reward_folder):
    reward = ImageReward(image_reward_folder / "ImageReward.pt", tokenizer=str(image_reward_folder))
    videos = photo_like(2, 3, 3, 48, 40).requires_grad_()
    result = score(reward, videos, PROMPTS)["reward"]
    result.sum().backward()
    assert all(frame.norm() > 0 for frame in videos.grad.flatten(0, 1)) and videos.grad.isfinite().all()
    assert not any(p.requires_grad for p in reward.parameters()) and not any(m.training for m in reward.modules())
    frames = reward(videos.detach().flatten(0, 1), [prompt for prompt in PROMPTS for _ in range(3)]).view(2, 3)
    torch.testing.assert_close(result.detach(), frames.mean(1), atol=1e-5, rtol=1e-5)


def test_image_reward_names_a_wrong_checkpoint(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"ImageReward.pt is no ImageReward checkpoint: .*blip.visual_encoder.*\['conv.weight'\]"):
        ImageReward(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint .*absent/ImageReward.pt|no checkpoint .*absent"):
        ImageReward(tmp_path / "absent")


# --- HPS v2 ------------------------------------------------------------------------------------------------------------

VISION_WIDTH, TEXT_WIDTH, JOINT = 160, 128, 24  # two heads each, of 80 and 64


class Block(nn.Module):
    """open_clip's ResidualAttentionBlock, on torch's own attention."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2, self.attn = nn.LayerNorm(width), nn.LayerNorm(width), nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        for name, module in (("c_fc", nn.Linear(width, 2 * width)), ("gelu", nn.GELU()), ("c_proj", nn.Linear(2 * width, width))):
            self.mlp.add_module(name, module)

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Tower(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads) for _ in range(2)])


class OpenCLIP(nn.Module):
    """open_clip's CLIP with the names of its state dict."""

    def __init__(self, vocabulary):
        super().__init__()
        self.visual = nn.Module()
        self.visual.class_embedding, self.visual.positional_embedding = nn.Parameter(torch.zeros(VISION_WIDTH)), nn.Parameter(torch.zeros(17, VISION_WIDTH))
        self.visual.conv1 = nn.Conv2d(3, VISION_WIDTH, 8, 8, bias=False)
        self.visual.ln_pre, self.visual.ln_post = nn.LayerNorm(VISION_WIDTH), nn.LayerNorm(VISION_WIDTH)
        self.visual.transformer, self.visual.proj = Tower(VISION_WIDTH, 2), nn.Parameter(torch.zeros(VISION_WIDTH, JOINT))
        self.transformer, self.token_embedding = Tower(TEXT_WIDTH, 2), nn.Embedding(vocabulary, TEXT_WIDTH)
        self.positional_embedding, self.ln_final = nn.Parameter(torch.zeros(16, TEXT_WIDTH)), nn.LayerNorm(TEXT_WIDTH)
        self.text_projection, self.logit_scale = nn.Parameter(torch.zeros(TEXT_WIDTH, JOINT)), nn.Parameter(torch.tensor(4.6))
        self.load_state_dict(weights({name: tuple(value.shape) for name, value in self.state_dict().items() if value.ndim}), strict=False)

    def images(self, pixels):
        x = self.visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.visual.class_embedding.expand(len(x), 1, -1), x], 1) + self.visual.positional_embedding
        x = self.visual.ln_pre(x)
        for block in self.visual.transformer.resblocks:
            x = block(x)
        return F.normalize(self.visual.ln_post(x[:, 0]) @ self.visual.proj, dim=-1)

    def texts(self, ids):
        x = self.token_embedding(ids) + self.positional_embedding[: ids.shape[1]]
        mask = torch.full((ids.shape[1],) * 2, -torch.inf).triu(1)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        return F.normalize(self.ln_final(x)[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection, dim=-1)


@pytest.fixture(scope="module")
def hps(tmp_path_factory):
    """A folder with checkpoint and tokenizer, and the open_clip model whose weights they are."""
    folder = tmp_path_factory.mktemp("hps")
    clip_tokenizer = AutoTokenizer.from_pretrained(save_clip(tmp_path_factory.mktemp("tiny")))
    # CLIP's vocabulary ends with the start and the end of a text
    vocab = [word for word in clip_tokenizer.get_vocab() if not word.startswith("<|")] + ["<|startoftext|>", "<|endoftext|>"]
    type(clip_tokenizer)(vocab={word: i for i, word in enumerate(vocab)}, merges=[], model_max_length=16).save_pretrained(folder)
    model = OpenCLIP(len(vocab)).eval().requires_grad_(False)
    torch.save({"epoch": 1, "state_dict": model.state_dict()}, folder / "HPS_v2.1_compressed.pt")
    return folder, model


def test_hps_v2_is_open_clips_cosine(hps):
    folder, model = hps
    images, prompts = photo_like(2, 3, 32, 32), ["a cat", "two dogs with a very long caption indeed"]
    reward = load_reward("hps_v2", model=folder)
    ids = reward.clip.tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt").input_ids
    assert ids[1].argmax() == 15 and ids[0].argmax() == 5
    expected = (model.images(normalised(images)) * model.texts(ids)).sum(-1)
    torch.testing.assert_close(score(reward, images, prompts)["reward"], expected, atol=1e-5, rtol=0)
    assert (expected[0] - expected[1]).abs() > 1e-3
    torch.testing.assert_close(reward.clip.images(images), model.images(normalised(images)), atol=1e-5, rtol=0)


def test_every_open_clip_weight_has_one_place(hps):
    state = hps[1].state_dict()
    renamed, model = rename(state), clip_from_open_clip({"state_dict": state})
    assert isinstance(model, CLIPModel) and set(renamed) == set(model.state_dict())
    assert sum(v.numel() for v in renamed.values()) == sum(v.numel() for v in state.values())
    assert model.config.vision_config.hidden_act == model.config.text_config.hidden_act == "gelu"
    with pytest.raises(ValueError, match="'visual.other' has no place in CLIP"):
        rename(state | {"visual.other": torch.zeros(1)})
    with pytest.raises(ValueError, match="no open_clip checkpoint: it lacks"):
        clip_from_open_clip({"conv.weight": torch.zeros(1)})


def test_hps_v2_has_gradients_and_takes_videos(hps):
    reward = HPSv2(hps[0])
    videos = photo_like(2, 3, 3, 40, 48).requires_grad_()
    result = score(reward, videos, PROMPTS)["reward"]
    result.sum().backward()
    assert all(frame.norm() > 0 for frame in videos.grad.flatten(0, 1)) and not any(p.requires_grad for p in reward.parameters())
    frames = reward(videos.detach().flatten(0, 1), [prompt for prompt in PROMPTS for _ in range(3)]).view(2, 3)
    torch.testing.assert_close(result.detach(), frames.mean(1), atol=1e-5, rtol=1e-5)


# --- what the image models see -----------------------------------------------------------------------------------------


def letterboxed(image, size):
    """(3, H, W) in [0, 1] as `ResizeMaxSize` and normalisation make it, by PIL's floats and numpy: (3, size, size)."""
    height, width = image.shape[1:]
    scale = size / float(max(height, width))
    rows, columns = max(1, round(height * scale)), round(width * scale)
    canvas = np.zeros((3, size, size), dtype=np.float32)
    for channel in range(3):
        small = Image.fromarray(image[channel].numpy(), "F").resize((columns, rows), Image.Resampling.BICUBIC)
        canvas[channel, (size - rows) // 2 : (size - rows) // 2 + rows, (size - columns) // 2 : (size - columns) // 2 + columns] = np.asarray(small)
    return torch.tensor((canvas - np.array(CLIP_MEAN)[:, None, None]) / np.array(CLIP_STD)[:, None, None], dtype=torch.float32)


@pytest.mark.parametrize(
    "size, shape",
    [(32, s) for s in [(32, 32), (64, 64), (40, 60), (60, 40), (33, 100), (100, 33), (20, 13), (5, 90), (45, 32), (32, 31), (1, 64)]]
    + [(224, (300, 225)), (224, (240, 416)), (224, (304, 208)), (224, (224, 100))],
)
def test_the_letterbox_is_the_official_resize_and_pad(size, shape):
    images = torch.stack([photo_like(3, *shape, seed=seed) for seed in range(2)])
    images[1] = (images[1] > 0.5).float()  # hard edges, where bicubic overshoots
    ours = Letterbox(size)(images)
    for image, mine in zip(images, ours):
        torch.testing.assert_close(mine, letterboxed(image, size), atol=2e-4, rtol=0)  # a level of 8 bits is 0.015
    bars = normalised(torch.zeros(3, 1, 1))
    if shape[0] > shape[1] + 2:
        assert torch.equal(ours[:, :, :, :1], bars.expand(2, 3, size, 1)) and torch.equal(ours[:, :, :, -1:], bars.expand(2, 3, size, 1))


def test_odd_bars_are_wider_behind():
    ours = Letterbox(32)(torch.ones(1, 3, 64, 54)) > 0  # 27 columns of 32: 2 bars before, 3 behind
    assert ours[0, 0, 0].tolist() == [False] * 2 + [True] * 27 + [False] * 3
    assert (Letterbox(32)(torch.ones(1, 3, 10, 400)) > 0)[0, 0, :, 0].tolist() == [False] * 15 + [True] + [False] * 16


@pytest.mark.parametrize("shape", [(48, 40), (40, 60), (96, 33)])
def test_hps_v2_scores_the_whole_image_whatever_its_shape(hps, shape):
    folder, model = hps
    images, prompts = photo_like(2, 3, *shape), ["a cat", "two dogs"]
    reward = HPSv2(folder)
    ids = reward.clip.tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt").input_ids
    expected = (model.images(torch.stack([letterboxed(image, 32) for image in images])) * model.texts(ids)).sum(-1)
    torch.testing.assert_close(reward(images, prompts), expected, atol=2e-5, rtol=0)
    edge = images.clone()
    edge[..., :2, :] = 1 - edge[..., :2, :]
    assert (reward(edge, prompts) - reward(images, prompts)).abs().min() > 1e-5, "the border counts"


@pytest.mark.parametrize("rest, start", [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4), (103, 52), (101, 50)])
def test_an_odd_rest_is_cropped_as_torchvision_does(image_reward_folder, rest, start):
    rows = torch.arange(SIZE + rest).float() / 200
    tall = rows[:, None].expand(1, 3, -1, SIZE)
    reward = ImageReward(image_reward_folder)
    for images, axis in ((tall, -2), (tall.transpose(2, 3), -1)):
        seen = reward.preprocess(images).select(axis, 0) * torch.tensor(CLIP_STD)[:, None] + torch.tensor(CLIP_MEAN)[:, None]
        torch.testing.assert_close(seen, torch.full_like(seen, start / 200))


@pytest.mark.parametrize(
    "prompt, cleaned",
    [
        ("  A  Cat\n on\ta mat ", "a cat on a mat"),
        ("a \u201ccurly\u201d cat\u2019s day", 'a "curly" cat\'s day'),
        ("salt &amp; pepper, 1 &lt; 2, &quot;yes&quot;", 'salt & pepper, 1 < 2, "yes"'),
        ("&amp;amp;", "&"),
        ("\uff21\uff22 \ufb01sh", "ab fish"),
        ("schÃ¶n", "schön"),
        ("a cat", "a cat"),
        ("", ""),
        ("猫", "猫"),
    ],
)
def test_prompts_are_cleaned_as_the_official_tokenizer_does(hps, monkeypatch, prompt, cleaned):
    reward, seen = HPSv2(hps[0]), []
    tokenizer = reward.clip.tokenizer
    monkeypatch.setattr(reward.clip, "tokenizer", lambda texts, **options: seen.append(texts) or tokenizer(texts, **options))
    reward(torch.rand(1, 3, 32, 32), [prompt])
    assert seen == [[cleaned]]


def test_hps_v2_says_what_to_install(hps, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ImportError, match="'hps_v2' cleans prompts with ftfy.*`pip install ftfy`"):
        HPSv2(hps[0])


# --- checkpoints with more or less in them -----------------------------------------------------------------------------


def test_image_reward_leaves_out_what_it_does_not_need_and_says_so(image_reward_folder, tmp_path):
    state = torch.load(image_reward_folder / "ImageReward.pt", weights_only=True)
    images, tokenizer = photo_like(2, 3, SIZE, SIZE), str(image_reward_folder)
    expected = ImageReward(image_reward_folder)(images, PROMPTS)
    less = {name: value for name, value in state.items() if not name.startswith(("blip.vision_proj", "blip.text_proj"))}
    torch.save(less, tmp_path / "less.pt")
    assert torch.equal(ImageReward(tmp_path / "less.pt", tokenizer=tokenizer)(images, PROMPTS), expected)
    for extra in ("blip.itm_head.weight", "blip.text_encoder.pooler.dense.weight", "blip.visual_encoder.extra", "mlp.other", "step"):
        torch.save(state | {extra: torch.zeros(2)}, tmp_path / "more.pt")
        with pytest.warns(UserWarning, match=r"more.pt: left out, as the official loader leaves it out: .*" + extra.split(".")[-1]):
            reward = ImageReward(tmp_path / "more.pt", tokenizer=tokenizer)
        assert torch.equal(reward(images, PROMPTS), expected)
    for lost in ("mlp.layers.4.bias", "blip.visual_encoder.norm.bias", "blip.text_encoder.encoder.layer.1.output.dense.weight"):
        torch.save({name: value for name, value in state.items() if name != lost}, tmp_path / "lost.pt")
        with pytest.raises(ValueError, match="lost.pt lacks .*: without them the reward would be random numbers"):
            ImageReward(tmp_path / "lost.pt", tokenizer=tokenizer)


def test_strict_loaders_name_what_is_missing_or_has_no_place(hps, tmp_path):
    state = hps[1].state_dict()
    lost = {name: value for name, value in state.items() if name != "transformer.resblocks.1.mlp.c_fc.bias"}
    with pytest.raises(ValueError, match="the checkpoint lacks text_model.encoder.layers.1.mlp.fc1.bias of CLIPModel"):
        clip_from_open_clip(lost)
    head, clip = AestheticMLP(24).state_dict(), save_clip(tmp_path / "clip")
    for change, message in (
        ({"layers.8.weight": torch.zeros(1)}, "head.pth has weights that have no place in AestheticMLP: layers.8.weight"),
        ({"layers.2.weight": torch.zeros(1, 2)}, r"weights of another shape than AestheticMLP: layers.2.weight \(1, 2\) for \(128, 1024\)"),
    ):
        torch.save(head | change, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=message):
            load_reward("aesthetic", model=clip, checkpoint=tmp_path / "head.pth")


def test_a_clip_checkpoint_that_would_be_partly_random_is_refused(tmp_path):
    folder = save_clip(tmp_path)
    state = load_file(f"{folder}/model.safetensors")
    save_file({name.replace("text_model.encoder", "text_model.other"): value for name, value in state.items()}, f"{folder}/model.safetensors")
    with pytest.raises(ValueError, match="lacks .*text_model.encoder.*would be random numbers"):
        load_reward("clip_score", model=folder)


# --- OCR ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a, b, distance", [("", "", 0), ("abc", "", 3), ("", "ab", 2), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("same", "same", 0)])
def test_edit_distance(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize(
    "recognised, wanted, expected",
    [
        ("Hello World", "hello world", 1.0),
        ("big HELLO\nWORLD sign", "Hello World", 1.0),  # contained, without case and space
        ("Helo", "Hello", 0.8),
        ("Jelo Wrld", "Hello World", 0.7),
        ("", "Hello", 0.0),
        ("something quite different", "Yo", 0.0),  # never below 0
        ("anything", " ", math.nan),
    ],
)
def test_text_score(recognised, wanted, expected):
    assert text_score(recognised, wanted) == pytest.approx(expected, nan_ok=True)


def test_the_wanted_text_is_the_column_or_what_the_prompt_quotes():
    assert quoted('a sign that says "New York" and "Jazz"') == "New York" and quoted("a sign \u201cJazz\u201d") == "Jazz" and quoted("a cat") is None
    seen = []

    def reader(picture):
        seen.append(picture.getpixel((0, 0)))
        return "jazz"

    images = torch.rand(4, 3, 16, 16)
    prompts = ['a sign "Jazz"', 'a sign "Jazz"', "a cat", 'a "Jaz"']
    result = score(OCRScore(reader), images, prompts, on_invalid="mask", text=[None, "blue", None, ""])["reward"]
    assert result.tolist() == pytest.approx([1.0, 0.0, math.nan, 1.0], nan_ok=True)
    assert seen == [tuple((images[i, :, 0, 0] * 255).round().int().tolist()) for i in (0, 1, 3)]
    images[0, 0, 0, 0] = torch.nan
    assert OCRScore(reader)(images, prompts).isnan().tolist() == [True, False, True, False]


def test_ocr_of_videos_is_the_mean_over_frames():
    reward = OCRScore(lambda picture: "jazz" if picture.getpixel((0, 0))[0] > 127 else "")
    videos = torch.zeros(2, 4, 3, 8, 8)
    videos[0, 0], videos[1, 1:] = 1, 1
    assert reward(videos, ['a "jazz"', 'a "jazz"']).tolist() == [0.25, 0.75]


def test_ocr_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ImportError, match="pip install rapidocr onnxruntime"):
        load_reward("ocr")
