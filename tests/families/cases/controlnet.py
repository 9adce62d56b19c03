"""Stable Diffusion with a second network that reads a picture: ControlNet, ControlNet-XS, T2I-Adapter."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from ..case import Case
from ..parts import LATENT_CHANNELS, masks, pictures, seeded, unet, xl_unet
from .stable_diffusion import EDIT, SMALL, stable_diffusion
from .stable_diffusion_xl import stable_diffusion_xl


def control_net(denoiser: torch.nn.Module | None = None, cls: type = diffusers.ControlNetModel, **config: Any) -> torch.nn.Module:
    """A control net for the denoiser, whose output layers are not zero."""
    source = (denoiser or unet()).config
    names = (
        "block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim", "down_block_types", "cross_attention_dim", "use_linear_projection",
        "addition_embed_type", "addition_time_embed_dim", "transformer_layers_per_block", "projection_class_embeddings_input_dim",
    )  # fmt: skip
    fields = {name: source[name] for name in names}
    return seeded(cls, in_channels=LATENT_CHANNELS, conditioning_embedding_out_channels=(8, 16), **{**fields, **config})


def controlled(cls: type, **components: Any):
    return stable_diffusion(cls, controlnet=control_net(), **components)


def controlled_xl(cls: type, **components: Any):
    return stable_diffusion_xl(cls, controlnet=control_net(xl_unet()), **components)


def controlled_by_union(cls: type):
    net = control_net(
        xl_unet(), diffusers.ControlNetUnionModel, num_control_type=6, num_trans_channel=8, num_proj_channel=8, num_trans_head=2, num_trans_layer=1
    )
    return stable_diffusion_xl(cls, controlnet=net)


def several():
    return stable_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=[control_net(), control_net()])


def controlled_by_adapter(cls: type, build, denoiser: torch.nn.Module):
    adapter = diffusers.ControlNetXSAdapter.from_unet(
        denoiser, size_ratio=0.5, learn_time_embedding=True, conditioning_embedding_out_channels=(8, 16), num_attention_heads=2
    )
    return build(cls, unet=denoiser, controlnet=drawn(adapter))


def drawn(module: torch.nn.Module) -> torch.nn.Module:
    """Its matrices drawn anew, so that no output layer is zero."""
    return seeded(lambda: module)


def t2i_adapter(downscale_factor: int, kind: str) -> torch.nn.Module:
    return seeded(diffusers.T2IAdapter, in_channels=3, channels=[8, 16], num_res_blocks=1, downscale_factor=downscale_factor, adapter_type=kind)


def adapted():
    """Adapters of Stable Diffusion 1 count on attention in the first block."""
    denoiser = unet(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    return stable_diffusion(diffusers.StableDiffusionAdapterPipeline, unet=denoiser, adapter=t2i_adapter(2, "full_adapter"))


PICTURE, CONTROL = {"image": pictures()}, {"control_image": pictures()}
INPAINT = {**PICTURE, **CONTROL, "mask_image": masks()}
UNION = {"control_image": torch.cat(pictures())}  # a list would be one picture for each way of control
RESIZED = {**SMALL, **EDIT}
CASES: dict[str, list[Case]] = {
    "StableDiffusionControlNetPipeline": [
        Case(lambda: controlled(diffusers.StableDiffusionControlNetPipeline), SMALL, PICTURE),
        Case(several, {**SMALL, "image": [pictures()[0], pictures()[1]]}, variant="two nets", remark="both samples share the two pictures"),
    ],
    "StableDiffusionControlNetImg2ImgPipeline": [Case(lambda: controlled(diffusers.StableDiffusionControlNetImg2ImgPipeline), RESIZED, {**PICTURE, **CONTROL})],
    "StableDiffusionControlNetInpaintPipeline": [Case(lambda: controlled(diffusers.StableDiffusionControlNetInpaintPipeline), RESIZED, INPAINT)],
    "StableDiffusionXLControlNetPipeline": [Case(lambda: controlled_xl(diffusers.StableDiffusionXLControlNetPipeline), SMALL, PICTURE)],
    "StableDiffusionXLControlNetImg2ImgPipeline": [
        Case(lambda: controlled_xl(diffusers.StableDiffusionXLControlNetImg2ImgPipeline), RESIZED, {**PICTURE, **CONTROL}),
    ],
    "StableDiffusionXLControlNetInpaintPipeline": [Case(lambda: controlled_xl(diffusers.StableDiffusionXLControlNetInpaintPipeline), RESIZED, INPAINT)],
    "StableDiffusionXLControlNetUnionPipeline": [
        Case(lambda: controlled_by_union(diffusers.StableDiffusionXLControlNetUnionPipeline), {**SMALL, "control_mode": 1}, UNION),
    ],
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": [
        Case(lambda: controlled_by_union(diffusers.StableDiffusionXLControlNetUnionImg2ImgPipeline), {**RESIZED, "control_mode": 1}, {**PICTURE, **UNION}),
    ],
    "StableDiffusionXLControlNetUnionInpaintPipeline": [
        Case(lambda: controlled_by_union(diffusers.StableDiffusionXLControlNetUnionInpaintPipeline), {**RESIZED, "control_mode": 1}, {**INPAINT, **UNION}),
    ],
    "StableDiffusionControlNetXSPipeline": [
        Case(lambda: controlled_by_adapter(diffusers.StableDiffusionControlNetXSPipeline, stable_diffusion, unet(layers_per_block=2)), SMALL, PICTURE),
    ],
    "StableDiffusionXLControlNetXSPipeline": [
        Case(lambda: controlled_by_adapter(diffusers.StableDiffusionXLControlNetXSPipeline, stable_diffusion_xl, xl_unet(layers_per_block=2)), SMALL, PICTURE),
    ],
    "StableDiffusionAdapterPipeline": [Case(adapted, SMALL, PICTURE)],
    "StableDiffusionXLAdapterPipeline": [
        Case(lambda: stable_diffusion_xl(diffusers.StableDiffusionXLAdapterPipeline, adapter=t2i_adapter(4, "full_adapter_xl")), SMALL, PICTURE),
    ],
}

ABSENT: dict[str, str] = {}
