"""JoyImage's edits: given pictures stand before the new one in the latents."""

from __future__ import annotations

import diffusers
import transformers

from ..case import Case
from ..parts import LATENT_CHANNELS, TEXT_WIDTH, causal_vae, pil_pictures, quiet, seeded, shifted_flow
from ..vision_language import qwen3_vl, vision_processor


def _joyimage(cls: type, processors: tuple[str, ...]):
    """The pipeline's sizes are of a megapixel; here pictures have 16 x 16 pixels."""
    transformer = seeded(
        getattr(diffusers, f"{cls.__name__.removesuffix('Pipeline')}Transformer3DModel"), patch_size=[1, 2, 2], in_channels=LATENT_CHANNELS, hidden_size=32,
        num_attention_heads=2, text_dim=TEXT_WIDTH, num_layers=1, rope_dim_list=[4, 6, 6], theta=256,
    )  # fmt: skip
    processor = vision_processor(transformers.Qwen3VLProcessor)
    text = {"tokenizer": processor.tokenizer, "text_encoder": qwen3_vl(), "processor": processor}
    vae = causal_vae(diffusers.AutoencoderKLWan, scale_factor_spatial=4)
    pipeline = cls(transformer=transformer, vae=vae, scheduler=shifted_flow(), **text)
    for name in processors:
        getattr(pipeline, name).get_default_height_width = lambda image, height=None, width=None: (16, 16)
    return quiet(pipeline)


CALL = {"height": 16, "width": 16, "num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "blurry"}

CASES: dict[str, list[Case]] = {
    "JoyImageEditPipeline": [
        Case(lambda: _joyimage(diffusers.JoyImageEditPipeline, ("vae_image_processor",)), {**CALL, "image": pil_pictures()[0]}, one_sample=True)
    ],
    "JoyImageEditPlusPipeline": [
        Case(lambda: _joyimage(diffusers.JoyImageEditPlusPipeline, ("image_processor",)), {**CALL, "images": pil_pictures()}, one_sample=True)
    ],
}

ABSENT: dict[str, str] = {}
