"""ImageReward: weights go where they belong, and its score is that of an independent forward pass."""

import pytest
import torch
from reward_models import PROMPTS, attend, linear, norm, normalised, photo_like, weights
from torch.nn import functional as F
from transformers import BertTokenizer

from diffusers_align.rewards import load_reward, score
from diffusers_align.rewards.image_reward import MEAN, STD, ImageReward, split_state
from diffusers_align.rewards.preprocessing import CLIP_MEAN, CLIP_STD

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


# --- what the image models see -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rest, start", [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2), (5, 2), (6, 3), (7, 4), (103, 52), (101, 50)])
def test_an_odd_rest_is_cropped_as_torchvision_does(image_reward_folder, rest, start):
    rows = torch.arange(SIZE + rest).float() / 200
    tall = rows[:, None].expand(1, 3, -1, SIZE)
    reward = ImageReward(image_reward_folder)
    for images, axis in ((tall, -2), (tall.transpose(2, 3), -1)):
        seen = reward.preprocess(images).select(axis, 0) * torch.tensor(CLIP_STD)[:, None] + torch.tensor(CLIP_MEAN)[:, None]
        torch.testing.assert_close(seen, torch.full_like(seen, start / 200))


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
