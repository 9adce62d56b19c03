"""HPS v2: weights go where they belong, and its score is OpenCLIP's cosine."""

import sys

import pytest
import torch
from reward_models import PROMPTS, letterboxed, normalised, photo_like, save_clip, weights
from torch import nn
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from diffusers_align.rewards import load_reward, score
from diffusers_align.rewards.aesthetic import AestheticMLP
from diffusers_align.rewards.hps_v2 import HPSv2, clip_from_open_clip, rename

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
    assert (expected[0] - expected[1]).abs() > 1e-4
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
