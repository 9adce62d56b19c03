"""LoRAs that were trained a little, and what a pipeline draws with them."""

import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny_pipelines import FAMILIES
from torch import nn

from diffusers_align import Policy
from diffusers_align.files import lora_finder

WEIGHTS = lora_finder.WEIGHTS


def moved(parameters, seed=0, by=0.2):
    """Parameters that are no longer a fresh LoRA's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return list(parameters)


def drawn(pipeline, name):
    """Latents of the pipeline's own call."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return torch.as_tensor(pipeline(prompt=["a cat", "a dog"], generator=generators, output_type="latent", **FAMILIES[name].call)[0])


def stock(policy):
    policy.pipeline.scheduler = policy.stock_scheduler
    return policy.pipeline


def trained(pipeline, name, folder, **lora_config):
    """What a pipeline with a LoRA draws; the LoRA in `folder`."""
    policy = Policy(pipeline, **FAMILIES[name].call)
    moved(policy.add_lora(rank=4, **lora_config))
    policy.save_lora(folder)
    return drawn(stock(policy), name)


def with_text_encoder(folder):
    """A file for Stable Diffusion's denoiser and its text encoder, as other tools write it."""
    pipeline, targets = FAMILIES["sd15"].build(), {"unet": ["to_q", "to_v"], "text_encoder": ["q_proj", "v_proj"]}
    torch.manual_seed(0)
    for name, layers in targets.items():
        getattr(pipeline, name).add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=layers, init_lora_weights=False))
    states = {name: get_peft_model_state_dict(getattr(pipeline, name)) for name in targets}
    pipeline.save_lora_weights(folder, convert_state_dict_to_diffusers(states["unet"]), states["text_encoder"])
    return drawn(pipeline, "sd15")


# --- wrappers ----------------------------------------------------------------------------------------------------------


def compiled(module):
    return torch.compile(module, backend="eager")


class Sharded(nn.Module):
    """A wrapper that keeps what it wraps as FSDP does."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_fsdp_wrapped_module"), name)
