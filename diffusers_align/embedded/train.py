"""Make the embedded models from nothing but composed scenes.

    python -m diffusers_align.embedded.train vae sd3 sd clip classifier noisy_classifier noisy_clip --output_dir models --minutes 10 60 60 8 4 8 13

Needs no GPU: the shipped files were made on two shared CPU cores. Every stage draws its own scenes, prints its loss, saves
what it has every five minutes and leaves a folder in diffusers' or transformers' own format. `vae` must come first, `clip` before `noisy_clip`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from .classifier import SceneClassifier
from .noisy_classifier import CLASSES, NoisySceneClassifier
from .noisy_clip import NoisyCLIP, TextTower
from .scenes import COLORS, OBJECTS
from .teaching import (
    IMAGE_SIZE,
    LATENT_SIZE,
    LatentScenes,
    NoisedScenes,
    build_tokenizer,
    contrast,
    fit,
    judged_images,
    make_scenes,
    save_half,
    save_pipeline,
    text_config,
    tokenize,
)

# --- the autoencoder that both pipelines share --------------------------------------------------------------------


def gradients(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of neighbouring pixels, down and across."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def train_vae(out: Path, minutes: float, resume: bool) -> None:
    """AutoencoderKL of factor 2 (32 px to 16 x 16 x 4): L1 on pixels and on their gradients, a light KL."""
    images = make_scenes(20000, seed=1)[0].float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1, latent_channels=4, norm_num_groups=8, mid_block_add_attention=False, sample_size=IMAGE_SIZE,
    ).to(memory_format=torch.channels_last)  # fmt: skip

    def loss_fn() -> Tensor:
        batch = images[torch.randint(0, len(images), (32,))]
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        edges = sum(F.l1_loss(a, b) for a, b in zip(gradients(decoded), gradients(batch)))
        return F.l1_loss(decoded, batch) + 0.5 * edges + 1e-4 * posterior.kl().mean() / LATENT_SIZE**2

    def save() -> None:
        with torch.no_grad():
            latents = vae.encode(images[:2048]).latent_dist.mode()
            decoded = vae.decode(latents[:256]).sample
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4))
        vae.save_pretrained(out / "vae")
        psnr = 10 * torch.log10(4 / F.mse_loss(decoded, images[:256]))
        print(f"vae: PSNR {psnr:.2f} dB, scaling factor {vae.config.scaling_factor}", flush=True)

    fit("vae", [vae], loss_fn, save, minutes, lr=2e-3)


# --- mini-sd3: flow matching ---------------------------------------------------------------------------------------


def silent_t5(width: int) -> tuple[T5EncoderModel, PreTrainedTokenizerFast]:
    """A T5 that says nothing: its last norm's weight is 0, and its tokenizer reads every text as empty.

    StableDiffusion3Pipeline does not load without a third encoder.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, processors

    encoder = T5EncoderModel(T5Config(vocab_size=3, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=1))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    backend.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return encoder, PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>", model_max_length=512)


def train_sd3(out: Path, minutes: float, resume: bool) -> None:
    """SD3 transformer, velocity loss at logit-normal times (https://arxiv.org/abs/2403.03206), text encoders trained along.

    The third encoder is silent: it appends `max_sequence_length` (256 by default) zero tokens to the text. The model sees none
    in most updates and all in some, and so learns to ignore them: pass `max_sequence_length=1` to save the work.
    """
    tokenizer = build_tokenizer()
    data = LatentScenes(out, tokenizer)
    encoders = [CLIPTextModelWithProjection(text_config(tokenizer, 64, 3)) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE, patch_size=2, in_channels=4, out_channels=4, num_layers=6, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=128, caption_projection_dim=128, pooled_projection_dim=128, pos_embed_max_size=LATENT_SIZE,
    )  # fmt: skip

    if resume:
        transformer.load_state_dict(SD3Transformer2DModel.from_pretrained(out / "mini-sd3" / "transformer").state_dict())
        encoders = [CLIPTextModelWithProjection.from_pretrained(out / "mini-sd3" / name) for name in ("text_encoder", "text_encoder_2")]

    def loss_fn() -> Tensor:
        x0, ids = data.batch(64)
        encoded = [encoder(ids, output_hidden_states=True) for encoder in encoders]
        tokens = torch.cat([e.hidden_states[-2] for e in encoded], -1)
        padding = 256 if random.random() < 0.06 else 0
        tokens = torch.cat([tokens, tokens.new_zeros(len(ids), padding, tokens.shape[-1])], 1)
        pooled = torch.cat([e.text_embeds for e in encoded], -1)
        noise, sigma = torch.randn_like(x0), torch.sigmoid(torch.randn(len(x0)))
        mix = sigma.view(-1, 1, 1, 1)
        velocity = transformer((1 - mix) * x0 + mix * noise, tokens, pooled, timestep=1000 * sigma).sample
        return F.mse_loss(velocity, noise - x0)

    def save() -> None:
        vae = AutoencoderKL.from_pretrained(out / "vae")
        t5, t5_tokenizer = silent_t5(128)
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0), vae=vae, text_encoder=encoders[0],
            tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer, text_encoder_3=t5, tokenizer_3=t5_tokenizer,
        )  # fmt: skip
        save_pipeline(pipeline, out / "mini-sd3")

    fit("sd3", [transformer, *encoders], loss_fn, save, minutes, lr=1e-3)


# --- mini-sd: denoising diffusion ----------------------------------------------------------------------------------


def train_sd(out: Path, minutes: float, resume: bool) -> None:
    """UNet, epsilon loss with min-SNR weights of gamma 5 (https://arxiv.org/abs/2303.09556), text encoder trained along."""
    tokenizer = build_tokenizer()
    data = LatentScenes(out, tokenizer)
    encoder = CLIPTextModel(text_config(tokenizer, 128, 2))
    unet = UNet2DConditionModel(
        sample_size=LATENT_SIZE, block_out_channels=(48, 96), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=128, attention_head_dim=4, norm_num_groups=16,
    ).to(memory_format=torch.channels_last)  # fmt: skip
    if resume:
        unet.load_state_dict(UNet2DConditionModel.from_pretrained(out / "mini-sd" / "unet").state_dict())
        encoder = CLIPTextModel.from_pretrained(out / "mini-sd" / "text_encoder")
    # Not Stable Diffusion's betas: on 16 x 16 latents their last step still shows the mean, which is the background's colour.
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    alphas = scheduler.alphas_cumprod
    weights = (alphas / (1 - alphas)).clamp(max=5) / (alphas / (1 - alphas))

    def loss_fn() -> Tensor:
        x0, ids = data.batch(64)
        noise, t = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),))
        noised = scheduler.add_noise(x0, noise, t).contiguous(memory_format=torch.channels_last)
        error = (unet(noised, t, encoder(ids)[0]).sample - noise).square().mean((1, 2, 3))
        return (weights[t] * error).mean()

    def save() -> None:
        vae = AutoencoderKL.from_pretrained(out / "vae")
        # StableDiffusionPipeline knows no shift: the mean of the latents is folded into the data by training without it.
        vae.register_to_config(shift_factor=None)
        pipeline = StableDiffusionPipeline(
            unet=unet, scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer, safety_checker=None,
            feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
        save_pipeline(pipeline, out / "mini-sd")

    data.latents += data.vae.config.shift_factor * data.vae.config.scaling_factor
    fit("sd", [unet, encoder], loss_fn, save, minutes, lr=1e-3)


# --- the judges: mini-clip and the scene classifier ----------------------------------------------------------------


def train_classifier(out: Path, minutes: float, resume: bool) -> None:
    """Cross-entropy of object, colour and count, a smooth L1 of the centre."""
    images, scenes, centers = judged_images(out, 16000, seed=3)
    objects = torch.tensor([list(OBJECTS).index(s.object) for s in scenes])
    colors = torch.tensor([list(COLORS).index(s.color) for s in scenes])
    counts = torch.tensor([s.count - 1 for s in scenes])
    classifier = SceneClassifier().to(memory_format=torch.channels_last)

    def loss_fn() -> Tensor:
        index = torch.randint(0, len(images), (96,))
        predicted = classifier((images[index].float() / 255).contiguous(memory_format=torch.channels_last))
        classes = (("object", objects), ("color", colors), ("count", counts))
        loss = sum(F.cross_entropy(predicted[name], labels[index], label_smoothing=0.02) for name, labels in classes)
        return loss + 10 * F.smooth_l1_loss(predicted["center"], centers[index], beta=0.05)

    fit("classifier", [classifier], loss_fn, lambda: classifier.save_pretrained(out / "scene-classifier"), minutes, lr=2e-3)


def train_noisy_classifier(out: Path, minutes: float, resume: bool) -> None:
    """Cross-entropy at every noise level, without label smoothing: its gradient is used as a score, so it must be calibrated."""
    data = NoisedScenes(out, seed=5)
    labels = {name: torch.tensor([classes.index(getattr(scene, name)) for scene in data.scenes]) for name, classes in CLASSES.items()}
    classifier = NoisySceneClassifier().to(memory_format=torch.channels_last)

    def loss_fn() -> Tensor:
        index, state = data.batch(96)
        logits = classifier(*state)
        return sum(F.cross_entropy(logits[name], labels[name][index]) for name in CLASSES)

    fit("noisy classifier", [classifier], loss_fn, lambda: save_half(classifier, out / "noisy-classifier"), minutes, lr=2e-3)


def train_noisy_clip(out: Path, minutes: float, resume: bool) -> None:
    """The image tower of a noise-aware CLIP: the contrast of `train_clip` at every noise level, against mini-clip's text tower, frozen."""
    data = NoisedScenes(out, seed=6)
    captions = [scene.caption() for scene in data.scenes]
    tower = TextTower(out / "mini-clip")
    texts = torch.cat([tower(captions[start : start + 500]) for start in range(0, len(captions), 500)])
    clip = NoisyCLIP(projection_dim=texts.shape[1]).to(memory_format=torch.channels_last)
    caption_id = torch.tensor([hash(c) for c in captions])

    def loss_fn() -> Tensor:
        index, state = data.batch(128)
        return contrast(clip.logit_scale.exp() * clip(*state) @ texts[index].T, caption_id[index])

    fit("noisy clip", [clip], loss_fn, lambda: save_half(clip, out / "noisy-clip"), minutes, lr=2e-3)


def train_clip(out: Path, minutes: float, resume: bool) -> None:
    """CLIPModel with a ViT on 4-pixel patches; the contrast leaves out pairs whose captions are equal."""
    images, scenes, _ = judged_images(out, 16000, seed=4)
    tokenizer, captions = build_tokenizer(), [scene.caption() for scene in scenes]
    ids = tokenize(tokenizer, captions)
    caption_id = torch.tensor([hash(c) for c in captions])
    vision = {
        "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": IMAGE_SIZE,
        "patch_size": 4, "projection_dim": 64,
    }  # fmt: skip
    text = text_config(tokenizer, 96, 2).to_dict() | {"projection_dim": 64}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))

    def loss_fn() -> Tensor:
        index = torch.randint(0, len(images), (128,))
        pixels = images[index].float() / 127.5 - 1
        return contrast(clip(input_ids=ids[index], pixel_values=pixels).logits_per_image, caption_id[index])

    def save() -> None:
        clip.save_pretrained(out / "mini-clip")
        tokenizer.save_pretrained(out / "mini-clip")
        settings = {"crop_size": IMAGE_SIZE, "size": {"shortest_edge": IMAGE_SIZE}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        from transformers import CLIPImageProcessor

        CLIPImageProcessor(**settings).save_pretrained(out / "mini-clip")

    fit("clip", [clip], loss_fn, save, minutes, lr=1e-3)


STAGES = {
    "vae": train_vae, "sd3": train_sd3, "sd": train_sd, "clip": train_clip, "classifier": train_classifier,
    "noisy_classifier": train_noisy_classifier, "noisy_clip": train_noisy_clip,
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run the stages that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=list(STAGES))
    parser.add_argument("--minutes", nargs="+", type=float, required=True, help="training time of each stage")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--resume", action="store_true", help="sd and sd3: go on from the weights in the output folder")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(argv)
    if len(args.minutes) != len(args.stages):
        parser.error(f"{len(args.stages)} stages need as many --minutes, got {len(args.minutes)}")
    torch.set_num_threads(args.threads)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for stage, minutes in zip(args.stages, args.minutes):
        torch.manual_seed(int(args.resume))
        STAGES[stage](args.output_dir, minutes, args.resume)


if __name__ == "__main__":
    main()
