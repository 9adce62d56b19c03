"""Blocks that a call runs: copies, with gradients where the call has them, that keep nothing."""

import copy

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LoopSequentialPipelineBlocks, ModelMixin, ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.modular_pipelines import ComponentSpec, InputParam, OutputParam
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from diffusers_align import Policy
from diffusers_align.driving.blocks import leaves, own_blocks, undecorated
from diffusers_align.driving.initial_noise import initial_noise
from diffusers_align.driving.outcome import images_of


class Denoiser(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(3, 3)

    def forward(self, x, t):
        return self.to_q(x) * (1 + t / 1000)


SCHEDULERS = [ComponentSpec("audio_scheduler", FlowMatchEulerDiscreteScheduler), ComponentSpec("scheduler", FlowMatchEulerDiscreteScheduler)]
PICTURES_AND_SOUND = ("latents", "audio_latents")


class Prepare(ModularPipelineBlocks):
    expected_components = SCHEDULERS
    inputs = [InputParam("prompt", required=True), InputParam("generator"), InputParam("num_inference_steps", default=4)]
    intermediate_outputs = [OutputParam(name) for name in (*PICTURES_AND_SOUND, "timesteps")]

    @torch.no_grad()
    def __call__(self, components, state):
        own = self.get_block_state(state)
        for scheduler in (components.scheduler, components.audio_scheduler):
            scheduler.set_timesteps(own.num_inference_steps)
        own.timesteps = components.scheduler.timesteps
        own.latents, own.audio_latents = (randn_tensor((len(own.prompt), length, 3), generator=own.generator) for length in (2, 5))
        self.set_block_state(state, own)
        return components, state


class Denoise(ModularPipelineBlocks):
    expected_components = [ComponentSpec("transformer", Denoiser)]
    inputs = [InputParam(name, required=True) for name in PICTURES_AND_SOUND]
    intermediate_outputs = [OutputParam("noise"), OutputParam("audio_noise")]

    @torch.no_grad()
    def __call__(self, components, state, i, t):
        with torch.no_grad(), torch.inference_mode():
            state.noise, state.audio_noise = (components.transformer(getattr(state, name), t) for name in PICTURES_AND_SOUND)
        return components, state


class Step(ModularPipelineBlocks):
    expected_components = SCHEDULERS
    inputs = []
    intermediate_outputs = [OutputParam(name) for name in PICTURES_AND_SOUND]

    @torch.no_grad()
    def __call__(self, components, state, i, t):
        state.latents = components.scheduler.step(state.noise, t, state.latents, return_dict=False)[0]
        state.audio_latents = components.audio_scheduler.step(state.audio_noise, t, state.audio_latents, return_dict=False)[0]
        return components, state


class Loop(LoopSequentialPipelineBlocks):
    block_classes, block_names = [Denoise, Step], ["denoise", "step"]
    loop_inputs = [InputParam("timesteps", required=True)]

    @torch.no_grad()
    def __call__(self, components, state):
        own = self.get_block_state(state)
        with self.progress_bar(total=len(own.timesteps)) as bar:
            self.seen = bar.disable
            for i, t in enumerate(own.timesteps):
                components, own = self.loop_step(components, own, i=i, t=t)
        self.set_block_state(state, own)
        return components, state


class Decode(ModularPipelineBlocks):
    expected_components = []
    inputs = [InputParam("latents", required=True), InputParam("output_type", default="pil")]
    intermediate_outputs = [OutputParam("images")]

    @torch.no_grad()
    def __call__(self, components, state):
        own = self.get_block_state(state)
        own.images = own.latents.sigmoid()[..., None, :].transpose(1, -1)
        self.set_block_state(state, own)
        return components, state


class Blocks(SequentialPipelineBlocks):
    block_classes, block_names = [Prepare, Loop, Decode], ["prepare", "denoise", "decode"]
    outputs = [OutputParam("images")]


def build():
    pipeline = Blocks().init_pipeline()
    torch.manual_seed(0)
    scheduler, other = FlowMatchEulerDiscreteScheduler(), FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipeline.update_components(transformer=Denoiser(), scheduler=scheduler, audio_scheduler=other)
    return pipeline


def test_two_schedulers_are_walked_as_one_policy():
    pipeline = build()
    policy = Policy(pipeline)
    assert policy.stock_scheduler.config.shift == 1.0
    trajectory = policy.rollout(["a", "b"], seeds=[1, 2], num_inference_steps=4)
    assert trajectory.states.shape == (2, 4, 2, 3) and [c.states.shape for c in trajectory.children] == [(2, 4, 5, 3)]
    assert not trajectory.children[0].log_probs[:, 1].isnan().any()
    parameters = policy.add_lora(rank=2, target_modules=["to_q"])
    policy.replay(trajectory, lambda k, kernel: kernel.log_prob(trajectory.actions[:, k]).sum().backward())
    assert sum(float(p.grad.abs().sum()) for p in parameters) > 0
    assert images_of(policy.drive(trajectory.condition, lambda step: None, output_type="pt")).shape == (2, 3, 1, 2)
    assert torch.equal(policy.rollout(["b"], seeds=[2], num_inference_steps=4).children[0].states[0, 0], trajectory.children[0].states[1, 0])


def test_the_noise_is_replaced_and_the_rest_drawn_as_ever():
    policy = Policy(build())
    condition = policy.condition(["a"], seeds=[1])
    expected = policy.rollout(condition)
    with initial_noise(policy.pipeline, torch.zeros_like):
        found = policy.rollout(condition)
    assert not found.states[:, 0].any() and torch.equal(found.children[0].states[:, 0], expected.children[0].states[:, 0])
    with pytest.raises(ValueError, match="drew no initial noise"), initial_noise(policy.pipeline, torch.zeros_like):
        pass


def test_blocks_are_copied_with_all_that_is_in_them():
    blocks = Blocks()
    before = [vars(block).copy() for block in leaves(blocks)]
    own = own_blocks(blocks, around=lambda block: lambda run, *args, **kwargs: run(*args, **kwargs))
    assert [type(block) is not type(copied) and isinstance(copied, type(block)) for block, copied in zip(leaves(blocks), leaves(own))] == [True] * 4
    assert [vars(block) for block in leaves(blocks)] == before
    assert [p.name for p in own.inputs] == [p.name for p in blocks.inputs] and list(own.sub_blocks) == list(blocks.sub_blocks)
    copy.deepcopy(own)


def test_an_error_comes_through_and_is_not_printed_at_each_level(caplog):
    policy = Policy(build())

    def on_step(step):
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        policy.drive(policy.condition(["a"], seeds=[1]), on_step)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@torch.no_grad()
def decorated(x):
    with torch.no_grad():
        return 2 * x


def test_no_grad_does_nothing_in_a_copy_and_goes_on_outside():
    x = torch.ones(1, requires_grad=True)
    assert undecorated(decorated)(x).requires_grad and not decorated(x).requires_grad
    assert undecorated(build) is build
