"""What cuts a gradient is found before training, and named."""

import diffusers
import pytest
import torch
from differentiated import PROMPTS, SEEDS, SUBJECTS, Subject, brightness, subject
from tiny_pipelines import FAMILIES
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusers_align import Policy
from diffusers_align.gradients.check import GradientError, UnscoredError, check_gradient, scaled_gradients


def test_a_pipeline_in_the_place_of_a_policy_and_prompts_in_that_of_a_condition_are_told_what_to_give(sd3):
    with pytest.raises(TypeError, match="policy must be a Policy, got a StableDiffusion3Pipeline: Policy.pipe. makes one"):
        check_gradient(sd3.policy.pipeline, sd3.condition, brightness, grad_steps=[1])
    with pytest.raises(TypeError, match=r"condition must be a Condition, got a list: policy.condition\(prompts, seeds="):
        check_gradient(sd3.policy, PROMPTS, brightness, grad_steps=[1])


# --- what cuts a gradient ------------------------------------------------------------------------------------------------


def refused(it, match, reward=brightness, **options):
    with pytest.raises(GradientError, match=match):
        check_gradient(it.policy, it.condition, reward, **{"grad_steps": [3], **options})


@pytest.mark.parametrize("family, solver", SUBJECTS)
def test_a_whole_chain_passes_the_check(family, solver):
    it = subject(family, solver)
    norms = check_gradient(it.policy, it.condition, brightness, grad_steps=[1, 2])
    assert list(norms) == ["images", "latents", "output", "parameters"] and min(norms.values()) > 0


@pytest.mark.parametrize(
    "solver, setting", [("DDIMScheduler", "clip_sample"), ("DDIMScheduler", "thresholding"), ("DPMSolverMultistepScheduler", "thresholding")]
)
def test_clipping_is_found(solver, setting):
    it = Subject("sd15", solver)
    it.policy.stock_scheduler = type(it.policy.stock_scheduler).from_config(it.policy.stock_scheduler.config, **{setting: True})
    refused(it, f"{solver} clips the clean sample", grad_steps=[1])


def test_a_denoiser_without_gradient_is_found(sd3):
    transformer = sd3.policy.pipeline.transformer
    transformer.forward = torch.no_grad()(transformer.forward)
    refused(sd3, "denoiser's output has no graph: transformer runs its layers under torch.no_grad")


def test_the_layer_that_turns_gradients_off_is_named(sd3):
    block = sd3.policy.pipeline.transformer.transformer_blocks[-1]
    block.forward = torch.inference_mode()(block.forward)
    refused(sd3, "transformer.transformer_blocks.1 runs its layers under torch.no_grad or inference_mode")


def test_reentrant_checkpointing_is_found(sd3):
    """Its blocks' inputs require no gradient where the LoRA starts inside them."""
    transformer = sd3.policy.pipeline.transformer
    for block in transformer.transformer_blocks:
        forward = block.forward
        block.forward = lambda forward=forward, **kwargs: checkpoint(lambda *values: forward(**dict(zip(kwargs, values))), *kwargs.values(), use_reentrant=True)
    with pytest.warns(UserWarning, match="None of the inputs have requires_grad"):
        refused(sd3, "reentrant checkpointing")


def test_reentrant_checkpointing_in_the_reward_is_found(sd3):
    with pytest.raises(GradientError, match="use_reentrant=False"):
        check_gradient(sd3.policy, sd3.condition, lambda images: checkpoint(brightness, images, use_reentrant=True), grad_steps=[3], decode_checkpoint=False)


def test_a_cache_is_found():
    it = Subject("flux")
    it.policy.pipeline.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.1))
    refused(it, r"transformer.disable_cache\(\)")


def test_a_decoder_without_gradient_is_found(sd3):
    vae = sd3.policy.pipeline.vae
    vae.decode = torch.no_grad()(vae.decode)
    refused(sd3, "latents have a graph, the images have none: vae runs its layers under torch.no_grad")


@pytest.mark.parametrize("form, reason", [("pil", "returned list instead of tensors"), ("np", "the images have none: the decoder detaches them")])
def test_pipelines_that_return_pil_or_arrays_are_found(sd3, form, reason):
    processor = sd3.policy.pipeline.image_processor
    postprocess = processor.postprocess
    processor.postprocess = lambda image, output_type: postprocess(image.detach(), output_type=form)
    refused(sd3, reason)


def test_saturated_pixels_are_found(sd3):
    sd3.policy.pipeline.vae.decoder.conv_out.bias.data += 100
    refused(sd3, "beyond \\[0, 1\\]")


class Judge(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.forward = wrap(self.forward)

    def forward(self, images):
        return self.layer(images.mean((2, 3)))[:, 0]


def numpy_brightness(images):
    return torch.from_numpy(images.numpy().mean((1, 2, 3)))


@pytest.mark.parametrize(
    "reward, match",
    [
        (Judge(torch.no_grad()), "the reward has none: reward runs its layers under torch.no_grad"),
        (lambda images: brightness(images.detach()), "the images have a graph, the reward has none: it detaches"),
        (numpy_brightness, "to NumPy or PIL"),
        (lambda images: brightness(images).tolist(), "returned a list"),
        (lambda images: brightness((255 * images).round()), "gradient with respect to the images is 0: the reward is flat"),
        (lambda images: brightness(images) * float("nan"), "the reward is NaN for all 2 images of the check"),
        (lambda images: (0 * images).flatten(1).sum(1).sqrt(), "gradient with respect to the images is nan"),
    ],
)
def test_rewards_without_gradient_are_found(reward, match):
    refused(subject("sd3"), f"(?i){match}", reward)


def test_nothing_to_train_is_found():
    it = subject("sd3")
    untrained = Policy(it.stock, **it.family.call)
    with pytest.raises(GradientError, match="add_lora"):
        check_gradient(untrained, it.condition, brightness, grad_steps=[3])
    refused(it, "grad_steps is empty", grad_steps=[])


# --- half precision ------------------------------------------------------------------------------------------------------


class Halved(torch.autograd.Function):
    """The identity, through float16 on the way back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.half().to(gradient)


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e6])
def test_gradients_neither_vanish_nor_overflow_in_float16(size):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    unused = torch.ones(1, requires_grad=True)
    total = size * Halved.apply(x).square().sum() if size < 1e5 else Halved.apply(x * size).square().sum() / size
    found = scaled_gradients(total, [x, unused], half=True)
    torch.testing.assert_close(found[0], 2 * size * torch.tensor([1.0, 2.0]), rtol=1e-3, atol=0)
    assert found[1] is None


def test_a_small_reward_passes_the_check_in_float16():
    """Gradients of 1e-6 an image are gone in float16 unless they are scaled on their way."""
    pipeline = FAMILIES["sd3"].build().to(torch.float16)
    policy = Policy(pipeline, **FAMILIES["sd3"].call)
    policy.add_lora(rank=2)
    norms = check_gradient(policy, policy.condition(PROMPTS, seeds=SEEDS), lambda images: 1e-4 * images.float().flatten(1).mean(1), grad_steps=[3])
    assert all(0 < norm < 1e-2 for norm in norms.values())


def test_a_check_without_any_score_says_so(sd3):
    with pytest.raises(UnscoredError, match="NaN for all 2 images"):
        check_gradient(sd3.policy, sd3.condition, lambda images: brightness(images) * torch.nan, grad_steps=[3])
