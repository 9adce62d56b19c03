"""What `Policy` promises beyond families: memory, micro-batches, reproducibility, errors that help."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusion3Pipeline
from policies import PROMPTS, SEEDS, make
from tiny_pipelines import FAMILIES

from diffusers_align import DDIMSDEScheduler, FlowMatchSDEScheduler, Policy, sde_twin


def gradient(policy, parameters, trajectories, steps=None):
    for parameter in parameters:
        parameter.grad = None
    for trajectory in trajectories:
        policy.replay(trajectory, lambda k, transition: transition.log_prob(trajectory.actions[:, k]).sum().backward(), steps)  # noqa: B023
    return torch.cat([p.grad.flatten() for p in parameters])


def saved_bytes(function):
    """Bytes that autograd keeps for the backward pass, each storage counted once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = function()
    return sum(storages.values()), result


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_a_transition_keeps_one_denoiser_steps_memory(name):
    policy, trajectory, _ = make(name, num_inference_steps=8)
    inputs, denoiser = {}, next(iter(policy.denoisers.values()))
    handle = denoiser.register_forward_pre_hook(lambda m, args, kwargs: inputs.update(args=args, kwargs=kwargs), with_kwargs=True)
    kept, _ = saved_bytes(lambda: policy.transition(trajectory, 3))
    handle.remove()
    bare, _ = saved_bytes(lambda: denoiser(*inputs["args"], **inputs["kwargs"]))
    assert bare <= kept <= 1.1 * bare + 16 * trajectory.final.numel() * 4


def test_gradient_checkpointing_saves_memory_and_keeps_the_gradient():
    policy, trajectory, parameters = make("sd3")
    kept, _ = saved_bytes(lambda: policy.transition(trajectory, 1))
    expected = gradient(policy, parameters, [trajectory])
    for module in policy.denoisers.values():
        module.enable_gradient_checkpointing()
    less, _ = saved_bytes(lambda: policy.transition(trajectory, 1))
    assert less < 0.7 * kept
    torch.testing.assert_close(gradient(policy, parameters, [trajectory]), expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["sd3", "sd15"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 3e-5)])
def test_micro_batches_and_single_steps_do_not_change_the_gradient(name, dtype, tolerance):
    """To 1e-6 where the denoiser's own rounding, which depends on the batch, is out of the way."""
    policy, _, parameters = make(name)
    policy.pipeline.to(dtype)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    for parameter in parameters:
        parameter.data.add_(0.01)
    whole = gradient(policy, parameters, [trajectory])
    parts = gradient(policy, parameters, [trajectory.select([0, 2]), trajectory.select([3]), trajectory.select([1])])
    assert float((whole - parts).norm() / whole.norm()) < tolerance
    steps = trajectory.stochastic.nonzero().flatten().tolist()
    one_by_one = sum(gradient(policy, parameters, [trajectory], [k]) for k in steps)
    assert float((whole - one_by_one).norm() / whole.norm()) < tolerance


@pytest.mark.parametrize("name", ["sd3", "sd15", "wan"])
def test_a_samples_noise_depends_on_its_seed_alone(name):
    policy, trajectory, _ = make(name)
    with policy.reference():
        alone = policy.rollout([PROMPTS[2]], seeds=[SEEDS[2]])
    torch.testing.assert_close(alone.states[0, 0], trajectory.states[2, 0])
    torch.testing.assert_close(alone.final[0], trajectory.final[2], rtol=1e-4, atol=1e-4)
    other = policy.rollout([PROMPTS[2]], seeds=[99])
    assert not torch.allclose(other.states[0, 0], trajectory.states[2, 0])


def test_unseeded_rollouts_take_their_seeds_from_the_generator():
    policy, _, _ = make()
    first, second = (policy.rollout(PROMPTS[:1], generator=torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(first.final, second.final)
    assert not torch.equal(policy.rollout(PROMPTS[:1]).final, first.final)


@pytest.mark.parametrize("name", ["sd3", "sd15"])
def test_a_rollout_hands_out_the_kernels_that_a_replay_computes_again(name):
    (policy, _, _), found = make(name), {}
    trajectory = policy.rollout(["a fox", "a cat"], seeds=[3, 4], on_step=found.__setitem__)
    again = policy.transitions(trajectory)
    assert list(found) == list(again) == trajectory.noisy_steps
    for k, kernel in found.items():
        assert torch.equal(kernel.mean, again[k].mean) and torch.equal(kernel.std, again[k].std) and not kernel.mean.requires_grad


def test_replaying_moved_weights_shows_in_the_ratio():
    policy, trajectory, _ = make()
    ratios = []
    with torch.no_grad():
        policy.replay(trajectory, lambda k, t: ratios.append(t.log_prob(trajectory.actions[:, k]) - trajectory.log_probs[:, k]))
    assert all(bool((r != 0).all()) for r in ratios)
    with torch.no_grad(), policy.reference():
        exact = []
        policy.replay(trajectory, lambda k, t: exact.append(torch.equal(t.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k])))
    assert all(exact)


def test_another_caption_gives_another_density_of_the_same_action():
    policy, trajectory, _ = make()
    view = policy.condition(["a house"] * 4, seeds=SEEDS)
    own, other = (policy.transition(trajectory, 1, c).log_prob(trajectory.actions[:, 1]) for c in (None, view))
    assert not torch.equal(own, other)


def test_a_loaded_trajectory_replays(tmp_path):
    from diffusers_align import Trajectory

    policy, trajectory, _ = make()
    trajectory.save(tmp_path / "t.safetensors")
    loaded = Trajectory.load(tmp_path / "t.safetensors")
    with policy.reference(), torch.no_grad():
        log_prob = policy.transition(loaded, 0).log_prob(loaded.actions[:, 0])
    assert torch.equal(log_prob, trajectory.log_probs[:, 0])


def test_reference_restores_on_an_exception():
    policy, trajectory, parameters = make()
    before = policy.transition(trajectory, 0).mean
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(policy.transition(trajectory, 0).mean, before) and all(p.requires_grad for p in parameters)


def test_everything_but_the_lora_is_frozen_and_in_eval_mode():
    policy, _, parameters = make("sd3")
    trainable = [p for c in policy.pipeline.components.values() if isinstance(c, torch.nn.Module) for p in c.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in parameters} == {id(p) for p in policy.trainable_parameters()}
    assert all(p.dtype == torch.float32 for p in parameters)


def test_the_twin_is_chosen_by_the_pipelines_scheduler():
    assert isinstance(Policy(FAMILIES["sd15"].build()).scheduler, DDIMSDEScheduler)
    assert isinstance(Policy(FAMILIES["sd3"].build()).scheduler, FlowMatchSDEScheduler)


def test_decode_is_in_range_and_differentiable():
    policy, trajectory, _ = make("sd15")
    latents = (0.1 * trajectory.final).requires_grad_()
    images = policy.decode(latents)
    assert images.shape[:2] == (4, 3) and 0 <= images.min().item() and images.max().item() <= 1
    images.sum().backward()
    assert float(latents.grad.abs().sum()) > 0


class TestErrors:
    def test_call_arguments_that_the_pipeline_lacks(self):
        policy, _, _ = make()
        with pytest.raises(ValueError, match="has no guidance"):
            policy.rollout(PROMPTS, guidance=3)

    def test_no_prompts_or_seeds_of_another_number(self):
        policy, _, _ = make()
        with pytest.raises(ValueError, match="No prompts"):
            policy.rollout([])
        with pytest.raises(ValueError, match="4 prompts need as many seeds"):
            policy.rollout(PROMPTS, seeds=[1])

    def test_a_replay_with_other_seeds_is_refused(self):
        policy, trajectory, _ = make()
        with pytest.raises(ValueError, match="another state than the one recorded"):
            policy.transition(trajectory, 0, policy.condition(PROMPTS, seeds=[5, 6, 7, 8]))

    def test_steps_that_do_not_exist(self):
        policy, trajectory, _ = make()
        with pytest.raises(ValueError, match="steps must be a whole number, from 0 to"):
            policy.transition(trajectory, 99)
        with pytest.raises(ValueError, match="k must be a whole number, from 0 to"):
            policy.complete(trajectory, 99)

    def test_a_deterministic_trajectory_has_no_log_prob(self):
        policy, _, _ = make()
        trajectory = policy.rollout(PROMPTS, seeds=SEEDS, deterministic=True)
        assert not trajectory.stochastic.any() and trajectory.log_probs.isnan().all()
        with pytest.raises(ValueError, match="no log-probability"):
            policy.scheduler.deterministic = True
            policy.transition(trajectory, 0).log_prob(trajectory.actions[:, 0])

    def test_a_stock_scheduler_is_no_policy(self):
        with pytest.raises(TypeError, match="sde_twin"):
            Policy(FAMILIES["sd15"].build(), DDIMScheduler())

    def test_dropout_and_second_adapters_are_refused(self):
        policy, _, _ = make()
        with pytest.raises(ValueError, match="carries an adapter"):
            policy.add_lora(rank=4)
        with pytest.raises(ValueError, match="lora_dropout must be 0"):
            Policy(FAMILIES["sd15"].build()).add_lora(rank=4, lora_dropout=0.1)

    def test_images_of_another_size_cannot_be_encoded(self):
        policy, _, _ = make("sd15")
        with pytest.raises(ValueError, match="pass images of the size"):
            policy.encode(torch.rand(1, 3, 64, 64))

    def test_predict_wants_a_time_for_each_sample(self):
        policy, trajectory, _ = make()
        with pytest.raises(ValueError, match="need latents and timesteps of as many"):
            policy.predict(trajectory.final, trajectory.timesteps[:2], trajectory.condition)


def test_guidance_is_off_whatever_an_earlier_condition_asked_for():
    policy, trajectory, _ = make("sd3")
    times = trajectory.timesteps[:1].repeat(4)
    plain, strong = (policy.condition(PROMPTS, seeds=SEEDS, guidance_scale=g) for g in (1.0, 5.0))
    with torch.no_grad():
        first, second = (policy.predict(trajectory.final, times, c) for c in (plain, strong))
        guided = policy.predict(trajectory.final, times, strong, guidance=True)
    torch.testing.assert_close(second, first)
    assert not torch.allclose(guided, second)


def test_a_stochastic_completion_draws_noise_of_its_own():
    policy, _, _ = make("sd3")
    with policy.reference():
        trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
        again = policy.complete(trajectory, 0, deterministic=False)
        same = policy.complete(trajectory, 0, deterministic=False)
        other = policy.complete(trajectory, 0, deterministic=False, seeds=[9, 8, 7, 6])
    assert not torch.allclose(again, trajectory.final) and torch.equal(again, same) and not torch.allclose(again, other)


def test_a_lora_that_is_only_loaded_is_frozen(tmp_path):
    policy, _, _ = make("sd3")
    policy.save_lora(tmp_path)
    loaded = Policy(FAMILIES["sd3"].build(), **FAMILIES["sd3"].call)
    loaded.load_lora(tmp_path)
    assert loaded.trainable_parameters() == []


@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart_sigma"])
def test_a_plain_call_with_an_sde_scheduler_is_governed_by_its_generator(name):
    policy, _, _ = make(name)
    policy.pipeline.scheduler = policy.scheduler
    call = {**FAMILIES[name].call, "prompt": PROMPTS[0], "output_type": "latent"}
    finals = [policy.pipeline(**call, generator=torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2)]
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])
    assert policy.scheduler.generator is None


class WithSound(StableDiffusion3Pipeline):
    """Denoises a second modality beside the first, with a copy of its scheduler."""

    def __call__(self, prompt=None, height=16, width=16, num_inference_steps=4, guidance_scale=3.0, generator=None, output_type="pil", max_sequence_length=32):
        scheduler, sound = copy.deepcopy(self.scheduler), torch.ones(len(prompt), 6)
        scheduler.set_timesteps(num_inference_steps)

        def step(pipeline, k, t, tensors):
            nonlocal sound
            sound = scheduler.step(torch.tanh(sound), scheduler.timesteps[k], sound, return_dict=False)[0]
            assert sound.shape == (len(prompt), 6)
            return tensors

        return super().__call__(
            prompt, height=height, width=width, num_inference_steps=num_inference_steps, guidance_scale=guidance_scale, generator=generator,
            output_type=output_type, max_sequence_length=max_sequence_length, callback_on_step_end=step,
        )  # fmt: skip


@torch.no_grad()
def test_a_second_modality_keeps_its_own_latents():
    parts = FAMILIES["sd3"].build()
    policy, alone = Policy(WithSound(**parts.components)), Policy(parts, **FAMILIES["sd3"].call)
    trajectory, expected = policy.rollout(PROMPTS, seeds=SEEDS), alone.rollout(PROMPTS, seeds=SEEDS)
    assert torch.equal(trajectory.final, expected.final) and trajectory.children[0].final.shape == (4, 6)
    assert not torch.equal(trajectory.children[0].final[0], trajectory.children[0].final[1])
    images = policy.decode(trajectory.final, trajectory.condition)
    assert torch.equal(images, alone.decode(expected.final, expected.condition))
    times = trajectory.timesteps[[1, 1, 2, 2]]
    assert torch.equal(policy.predict(trajectory.final, times, trajectory.condition), alone.predict(expected.final, times, expected.condition))
    assert torch.equal(policy.encode(images, trajectory.condition), alone.encode(images, expected.condition))
    kernels = policy.transitions(trajectory)
    assert all(torch.equal(kernel.log_prob(trajectory.actions[:, k]), trajectory.log_probs[:, k]) for k, kernel in kernels.items())


def replayed(policy, trajectory):
    """Log-probabilities (B, noisy steps) of the actions under the weights that are in place."""
    with torch.no_grad():
        found = policy.transitions(trajectory, list(trajectory.noisy_steps))
    return torch.stack([found[k].log_prob(trajectory.actions[:, k]) for k in trajectory.noisy_steps], 1)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_the_pipelines_own_call_is_as_ever(name):
    """What users look at after training is the model as it is used, not as it is explored."""

    def picture(pipeline):
        return pipeline("a fox", generator=torch.Generator().manual_seed(0), output_type="pt", num_inference_steps=3).images

    pipeline = FAMILIES[name].build()
    before, scheduler = picture(pipeline), pipeline.scheduler
    policy = Policy(pipeline, num_inference_steps=3)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    assert pipeline.scheduler is scheduler is policy.stock_scheduler and torch.equal(picture(pipeline), before)
    for parameter in policy.add_lora(rank=2):
        parameter.data.normal_()
    assert not torch.equal(picture(pipeline), before), "with the LoRA"
    with policy.reference():
        assert torch.equal(picture(pipeline), before)
        assert torch.equal(replayed(policy, trajectory), trajectory.log_probs[:, trajectory.noisy_steps])


def test_policies_of_one_pipeline_do_not_disturb_each_other():
    pipeline = FAMILIES["sd3"].build()
    first = Policy(pipeline, sde_twin(pipeline.scheduler, sde_window=(0, 2)), num_inference_steps=4)
    trajectory = first.rollout(PROMPTS, seeds=SEEDS)
    second = Policy(pipeline, sde_twin(pipeline.scheduler, noise_level=0.4), num_inference_steps=4)
    other = second.rollout(PROMPTS, seeds=SEEDS)
    assert list(trajectory.noisy_steps) == [0, 1] and list(other.noisy_steps) == [0, 1, 2, 3]
    pipeline.scheduler = copy.deepcopy(first.stock_scheduler)  # as users put theirs back
    for policy, walked in ((first, trajectory), (second, other)):
        assert torch.equal(replayed(policy, walked), walked.log_probs[:, walked.noisy_steps]), "the ratio before any update is 1 to the bit"
        assert torch.equal(policy.rollout(PROMPTS, seeds=SEEDS).final, walked.final)
        policy.predict(walked.final, torch.full((len(PROMPTS),), 500.0), policy.condition(PROMPTS))
    assert second.scheduler.config.sde_window is None, "a twin of the pipeline's own, not of the first one's"


def test_a_second_policy_of_a_pipeline_leaves_the_lora_of_the_first_one_to_train():
    pipeline = FAMILIES["sd3"].build()
    first = Policy(pipeline, **FAMILIES["sd3"].call)
    trajectory, parameters = first.rollout(PROMPTS, seeds=SEEDS), first.add_lora(rank=2)
    second = Policy(pipeline, **FAMILIES["sd3"].call)
    assert list(map(id, second.trainable_parameters())) == list(map(id, first.trainable_parameters())) == list(map(id, parameters))
    first.transition(trajectory, 1).log_prob(trajectory.actions[:, 1]).sum().backward()
    assert any(bool(parameter.grad.any()) for parameter in parameters)
