"""Preference flow matching (https://arxiv.org/abs/2405.19806) as a diffusers pipeline: any images in, preferred ones out.

The images may come from anywhere, a closed API included: nothing but them and their prompts is asked for. The algorithm's page is
`algorithms/preference_flow_matching.py`; `training_scripts/train_pfm.py` trains the vector field.
"""

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, UNet2DModel
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from PIL.Image import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from ..algorithms.preference_flow_matching import transport
from ..checks.ranges import Count, Probability, checked
from ..data.images import LazyImage

# The vector field's time, 0 to 1, in the units of diffusers' time embeddings.
TIME_SCALE = 1000.0
# By how much images may leave [0, 1].
ROUNDING = 1e-3


class PreferenceFlowPipeline(DiffusionPipeline):
    """Carries images along a learned flow from less to more preferred ones.

    Args:
        vector_field: a stock UNet, v(y, t) in the space of the flow: `UNet2DConditionModel` sees the prompt, `UNet2DModel` does not.
        vae: the flow is one of its scaled latents; of pixels in [-1, 1] without it.
        text_encoder, tokenizer: CLIP's, for a vector field that sees the prompt.

    Raises:
        TypeError: the vector field is no model, such as a path.
        ValueError: the vector field sees the prompt and the text encoder or the tokenizer is missing, or the other way round; or it has
            other channels than the space of the flow.
    """

    model_cpu_offload_seq = "text_encoder->vector_field->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer"]

    def __init__(
        self,
        vector_field: UNet2DConditionModel | UNet2DModel,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        text_encoder: CLIPTextModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
    ):
        _check_loaded(vector_field)
        super().__init__()
        self.register_modules(vector_field=vector_field, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.image_processor = VaeImageProcessor(do_resize=True, vae_scale_factor=1, do_normalize=False, do_convert_rgb=True)
        conditional = "cross_attention_dim" in vector_field.config
        for name, component in (("text_encoder", text_encoder), ("tokenizer", tokenizer)):
            if conditional != (component is not None):
                raise ValueError(
                    f"{type(vector_field).__name__} {'sees the prompt: pass the' if conditional else 'does not see the prompt: leave out the'} {name}."
                )
        channels = 3 if vae is None else vae.config.latent_channels
        if vector_field.config.in_channels != channels or vector_field.config.out_channels != channels:
            raise ValueError(
                f"The vector field maps {vector_field.config.in_channels} to {vector_field.config.out_channels} channels, "
                f"but the space of the flow has {channels}: {'pixels, as there is no vae' if vae is None else 'the latents of the vae'}."
            )

    @property
    def multiple(self) -> int:
        """What heights and widths are padded to a multiple of."""
        blocks = len(self.vector_field.config.block_out_channels) - 1
        if self.vae is not None:
            blocks += len(getattr(self.vae.config, "block_out_channels", self.vae.config.get("encoder_block_out_channels"))) - 1
        return 2**blocks

    # --- the space of the flow ---------------------------------------------------------------------------------------

    def padded(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) with their last row and column repeated until both sides are multiples of `multiple`: the call cuts that off again."""
        height, width = images.shape[-2:]
        return F.pad(images, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to the space of the flow, float32: scaled latents (the mode of their distribution), or pixels."""
        pixels = images * 2 - 1
        if self.vae is None:
            return pixels.float()
        encoded = self.vae.encode(pixels.to(self.vae.dtype))
        latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
        return (latents.float() - _shift(self.vae)) * self.vae.config.scaling_factor

    def decode(self, y: Tensor) -> Tensor:
        """The inverse of `encode`, as far as the autoencoder allows, float32 in [0, 1]."""
        if self.vae is not None:
            y = self.vae.decode((y / self.vae.config.scaling_factor + _shift(self.vae)).to(self.vae.dtype)).sample
        return (y.float() / 2 + 0.5).clamp(0, 1)

    def encode_prompt(self, prompts: list[str]) -> Tensor | None:
        """The text encoder's last hidden states (B, L, E), or None for a vector field that does not see the prompt."""
        if self.text_encoder is None:
            return None
        tokens = self.tokenizer(prompts, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.text_encoder.device))[0]

    def velocity(self, t: Tensor, y: Tensor, prompt_embeds: Tensor | None) -> Tensor:
        """The field at y (B, *D) and times t (B,) in [0, 1], (B, *D) float32. Differentiable."""
        field = self.vector_field
        states = {} if prompt_embeds is None else {"encoder_hidden_states": prompt_embeds.to(field.dtype)}
        return field(y.to(field.dtype), t * TIME_SCALE, **states).sample.float()

    # --- the call ----------------------------------------------------------------------------------------------------

    @checked
    @torch.no_grad()
    def __call__(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        *,
        num_inference_steps: Count = 10,
        iterations: Count = 1,
        strength: Probability = 1.0,
        solver: str = "heun",
        reverse: bool = False,
        height: Count | None = None,
        width: Count | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Carry images to what is preferred. Nothing is drawn at random.

        Args:
            image: one or several: PIL images, arrays (B, H, W, 3) or tensors (B, 3, H, W) in [0, 1]. Several must have one size, unless
                height and width are given. PIL images are read as those of the training were: upright, in sRGB, on white.
            prompt: what the images were made from: one for all, or one each. Nothing (the empty prompt) if absent.
            num_inference_steps: solver steps of a pass.
            iterations: passes; each starts at the result of the one before.
            strength: how far along the flow a pass goes, in [0, 1]; at 0 the images come back as they are.
            solver: `euler`, `heun` or `rk4`: one, two or four evaluations of the vector field a step.
            reverse: towards what is less preferred.
            height, width: resize the images to this first; their own size if absent.
            output_type: `pil`, `np`, `pt`, or `latent` for the result in the space of the flow.

        Raises:
            TypeError: a path in the place of a picture.
            ValueError: no images, of several kinds or sizes, or tensors and arrays that are not RGB in [0, 1]; a number of prompts that is neither 1
                nor that of the images; an unknown solver, a strength outside [0, 1].
        """
        image = _read(image)
        _check_images(image, height is not None and width is not None)
        images = self.image_processor.preprocess(image, height, width).to(self._execution_device)
        prompts = [prompt or ""] if prompt is None or isinstance(prompt, str) else list(prompt)
        prompts = prompts * len(images) if len(prompts) == 1 else prompts
        if len(prompts) != len(images):
            raise ValueError(f"{len(images)} images need as many prompts, or one for all, got {len(prompts)}.")
        embeds, size = self.encode_prompt(prompts), images.shape[-2:]

        def field(t: float, y: Tensor) -> Tensor:
            return self.velocity(torch.full((len(y),), t, device=y.device), y, embeds)

        passes = {"num_steps": num_inference_steps, "solver": solver, "strength": strength, "iterations": iterations, "reverse": reverse}
        if strength > 0 or output_type == "latent":
            y = self.encode(self.padded(images))
            with self.progress_bar(total=iterations * num_inference_steps if strength > 0 else 0) as bar:
                y = transport(field, y, **passes, on_step=bar.update)
            images = y if output_type == "latent" else self.decode(y)[..., : size[0], : size[1]]
        result = images if output_type == "latent" else self.image_processor.postprocess(images, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)


def _shift(vae) -> float:
    return getattr(vae.config, "shift_factor", None) or 0.0


def _check_loaded(vector_field: Any) -> None:
    if not isinstance(vector_field, torch.nn.Module):
        raise TypeError(
            f"PreferenceFlowPipeline is made of loaded models, got {vector_field!r:.200} for the vector field. To load the folder or the Hub repository of one "
            "that train_pfm.py has trained: PreferenceFlowPipeline.from_pretrained(NAME)."
        )


def _read(image: PipelineImageInput) -> PipelineImageInput:
    """PIL images as data sets have them (`data.images`); all else as it is.

    Raises:
        TypeError: one of them is something else, such as a path.
        ValueError: there are none, of several kinds, or of no known range.
    """
    parts = image if isinstance(image, (list, tuple)) else [image]
    kinds = {next((kind for kind in (Image, np.ndarray, Tensor) if isinstance(part, kind)), None) for part in parts}
    if None in kinds:
        other = next(part for part in parts if not isinstance(part, (Image, np.ndarray, Tensor)))
        raise TypeError(f"image must be PIL pictures, arrays or tensors, got a {type(other).__name__}: {other!r:.200}. Open a file by PIL.Image.open(path).")
    if len(kinds) != 1:
        got = ", ".join(sorted({type(part).__name__ for part in parts})) or "an empty list"
        raise ValueError(f"image is a PIL image, an array or a tensor, or a list of one of these kinds, got {got}.")
    if kinds != {Image}:
        return image
    read = [LazyImage(part).open() for part in parts]
    return read if isinstance(image, (list, tuple)) else read[0]


def _check_images(image: PipelineImageInput, resized: bool) -> None:
    """Refuse what preprocessing would resize or read as another range without a word."""
    parts = image if isinstance(image, (list, tuple)) else [image]
    sizes = {part.shape[-2:] if isinstance(part, Tensor) else part.shape[-3:-1] if isinstance(part, np.ndarray) else part.size[::-1] for part in parts}
    if len(sizes) > 1 and not resized:
        raise ValueError(f"The images have {len(sizes)} sizes {sorted(tuple(size) for size in sizes)}: give height and width, or call with one size at a time.")
    for part in parts:
        if not isinstance(part, Image) and (0 in part.shape or part.ndim < 3 or part.shape[-3 if isinstance(part, Tensor) else -1] != 3):
            raise ValueError(f"Images are RGB, tensors (B, 3, H, W) or arrays (B, H, W, 3), got the shape {tuple(part.shape)}.")
    for part in (torch.as_tensor(part) for part in parts if not isinstance(part, Image)):
        low, high = part.min().item(), part.max().item()
        if not part.is_floating_point() or not -ROUNDING <= low <= high <= 1 + ROUNDING:
            raise ValueError(
                f"Tensors and arrays must be floats in [0, 1], got {part.dtype} from {low:g} to {high:g}: divide bytes by 255, map [-1, 1] by x / 2 + 0.5."
            )
