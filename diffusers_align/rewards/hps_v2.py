"""HPS v2.1 (https://arxiv.org/abs/2306.09341): CLIP ViT-H/14 fine-tuned on 798 thousand choices that people made between generated images.

The score is the cosine of image and prompt, typically 0.2 to 0.35, as `hpsv2.score` of https://github.com/tgxs002/HPSv2 returns it
(tables multiply it by 100). The released file is an open_clip state dict; here its weights go into transformers' CLIPModel.

Compared with the package hpsv2 1.2.0 (`hpsv2.score`) at full size on random weights: model, preprocessing and tokens are equal, scores to 1e-7. Images
keep their aspect ratio: the longer side becomes 224 and black bars fill the square. Prompts are cleaned as its tokenizer does, with
ftfy (`pip install ".[hps]"` in a checkout). torchvision before 0.17, with which the published scores were made, did not antialias tensors, so
that its pixels differ from today's official ones and from ours. Published scores of the released weights were not compared.
"""

from __future__ import annotations

import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .clip_embedder import CLIPEmbedder
from .pick_score import PROCESSOR
from .preprocessing import Letterbox, flatten_frames, mean_over_frames, repeat_for_frames
from .registry import checkpoint_file, load_weights

VISION_HEAD_WIDTH, TEXT_HEAD_WIDTH = 80, 64  # of ViT-H/14's attention heads

# Names outside the blocks: open_clip's -> transformers'; True: the matrix is applied from the right, so it is transposed.
OUTER_NAMES = {
    "visual.class_embedding": ("vision_model.embeddings.class_embedding", False),
    "visual.positional_embedding": ("vision_model.embeddings.position_embedding.weight", False),
    "visual.conv1.weight": ("vision_model.embeddings.patch_embedding.weight", False),
    "visual.ln_pre.weight": ("vision_model.pre_layrnorm.weight", False),
    "visual.ln_pre.bias": ("vision_model.pre_layrnorm.bias", False),
    "visual.ln_post.weight": ("vision_model.post_layernorm.weight", False),
    "visual.ln_post.bias": ("vision_model.post_layernorm.bias", False),
    "visual.proj": ("visual_projection.weight", True),
    "token_embedding.weight": ("text_model.embeddings.token_embedding.weight", False),
    "positional_embedding": ("text_model.embeddings.position_embedding.weight", False),
    "ln_final.weight": ("text_model.final_layer_norm.weight", False),
    "ln_final.bias": ("text_model.final_layer_norm.bias", False),
    "text_projection": ("text_projection.weight", True),
    "logit_scale": ("logit_scale", False),
}
TOWERS = {"visual.transformer.resblocks.": "vision_model.encoder.layers.", "transformer.resblocks.": "text_model.encoder.layers."}
BLOCK_NAMES = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


class HPSv2(nn.Module):
    """Cosine of image and prompt by HPS v2.1; of a video, the mean over frames. Differentiable.

    Args:
        model: the checkpoint: a file, a folder or a Hub repository that holds `filename`.
        filename: `HPS_v2_compressed.pt` is version 2.0.
        tokenizer: of CLIP ViT-H/14; taken from the folder `model` if it holds one.
    """

    name = "hps_v2"

    def __init__(self, model: str | os.PathLike = "xswu/HPSv2", filename: str = "HPS_v2.1_compressed.pt", tokenizer: str | None = None):
        super().__init__()
        file = checkpoint_file(model, filename)
        clip = clip_from_open_clip(torch.load(file, map_location="cpu", weights_only=True), file)
        own = any((Path(model) / name).is_file() for name in ("tokenizer.json", "vocab.json"))
        self.clip = CLIPEmbedder(clip, str(tokenizer or (model if own else PROCESSOR)), Letterbox(clip.config.vision_config.image_size))
        self.clean = prompt_cleaner()

    def forward(self, images: Tensor, prompts: list[str], **columns: Any) -> Tensor:
        """images: (B, 3, H, W) or (B, F, 3, H, W) in [0, 1]. Returns (B,) cosines."""
        texts = repeat_for_frames(self.clip.texts([self.clean(prompt) for prompt in prompts]), images)
        cosine = (self.clip.images(flatten_frames(images)) * texts).sum(-1)
        return mean_over_frames(cosine, images).to(images.device)


def prompt_cleaner() -> Callable[[str], str]:
    """What open_clip's tokenizer does to a text first: mend its Unicode, straighten its quotes, resolve HTML entities, one space each, lower case.

    Raises:
        ImportError: ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise ImportError("The reward 'hps_v2' cleans prompts with ftfy, as its official tokenizer does. Run `pip install ftfy`.") from error
    return lambda text: " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split()).lower()


def clip_from_open_clip(checkpoint: dict[str, Any], origin: Any = "the checkpoint"):
    """A `CLIPModel` with the weights of an open_clip state dict (or of a checkpoint with the key `state_dict`).

    Raises:
        ValueError: it is no such state dict: a weight is missing or has no place, as for the official loader, which is strict.
    """
    from transformers import CLIPConfig, CLIPModel

    state = checkpoint.get("state_dict", checkpoint)
    if not OUTER_NAMES.keys() <= state.keys():
        raise ValueError(f"{origin} is no open_clip checkpoint: it lacks {', '.join(sorted(OUTER_NAMES.keys() - state.keys())[:3])}.")
    model = CLIPModel(CLIPConfig(**clip_config(state)))
    load_weights(model, rename(state, origin), origin)
    return model


def clip_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of `CLIPConfig` for the sizes that the state dict has. open_clip's ViT-H/14 has exact GELUs."""
    patch, positions, words = state["visual.conv1.weight"], state["visual.positional_embedding"], state["token_embedding.weight"]
    projection = state["text_projection"].shape[1]

    def tower(prefix: str, width: int, head_width: int) -> dict[str, Any]:
        return {
            "hidden_size": width,
            "intermediate_size": state[f"{prefix}0.mlp.c_fc.weight"].shape[0],
            "num_hidden_layers": len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}),
            "num_attention_heads": width // head_width,
            "projection_dim": projection,
            "hidden_act": "gelu",
        }

    vision, text = tower("visual.transformer.resblocks.", patch.shape[0], VISION_HEAD_WIDTH), tower("transformer.resblocks.", words.shape[1], TEXT_HEAD_WIDTH)
    vision |= {"patch_size": patch.shape[-1], "image_size": patch.shape[-1] * round((positions.shape[0] - 1) ** 0.5)}
    # CLIP's vocabulary ends with the start and the end of a text.
    text |= {"vocab_size": words.shape[0], "max_position_embeddings": state["positional_embedding"].shape[0]}
    text |= {"bos_token_id": words.shape[0] - 2, "eos_token_id": words.shape[0] - 1}
    return {"vision_config": vision, "text_config": text, "projection_dim": projection}


def rename(state: dict[str, Tensor], origin: Any = "the checkpoint") -> dict[str, Tensor]:
    """An open_clip state dict in the names and shapes of transformers' `CLIPModel`; fused projections are split."""
    renamed = {}
    for name, value in state.items():
        if name in OUTER_NAMES:
            target, transposed = OUTER_NAMES[name]
            renamed[target] = value.T.contiguous() if transposed else value
            continue
        prefix = next((prefix for prefix in TOWERS if name.startswith(prefix)), None)
        if prefix is None:
            raise ValueError(f"{origin}: the weight {name!r} has no place in CLIP ViT-H/14.")
        number, _, rest = name.removeprefix(prefix).partition(".")
        block = f"{TOWERS[prefix]}{number}."
        if rest.startswith("attn.in_proj_"):
            kind = rest.removeprefix("attn.in_proj_")
            renamed |= {f"{block}self_attn.{letter}_proj.{kind}": part for letter, part in zip("qkv", value.chunk(3))}
        else:
            layer, _, kind = rest.rpartition(".")
            if layer not in BLOCK_NAMES:
                raise ValueError(f"{origin}: the weight {name!r} has no place in CLIP ViT-H/14.")
            renamed[f"{block}{BLOCK_NAMES[layer]}.{kind}"] = value
    return renamed
