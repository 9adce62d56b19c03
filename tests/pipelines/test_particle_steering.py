"""Particle steering on stock pipelines."""

import types

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, LCMScheduler
from tiny_pipelines import FAMILIES
from wrapping import brightness, g, stacked

from diffusers_align import Policy, sde_twin
from diffusers_align.algorithms import particle_steering as smc
from diffusers_align.pipelines import ParticleSteeringPipeline
from diffusers_align.pipelines.particle_steering import Steering, _Run, _seeds
from diffusers_align.rewards import InvalidReward


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan", "sd15_img2img"])
def test_without_a_reward_scale_particles_are_samples_of_the_sde(name, pipes):
    pipe, call = pipes(name)
    options = {"generator": g(), "output_type": "pt", "num_particles": 3, "reward_scale": 0.0, "ess_threshold": 1.0, "resample_every": 1}
    found = ParticleSteeringPipeline(pipe, brightness)(["a", "b"], returned="all", **options, **call)
    policy = Policy(FAMILIES[name].build(), **call)
    rollout = policy.rollout(["a"] * 3 + ["b"] * 3, seeds=_seeds(g(), 2, 3))
    assert torch.equal(stacked(found), policy.decode(rollout.final, rollout.condition))
    assert (found.ess > 3 - 1e-9).all() and (found.log_weights == 0).all() and found.chosen is None


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_steering_raises_the_reward_and_pays_exactly_what_is_owed(name, pipes):
    pipe, call = pipes(name)
    steer = ParticleSteeringPipeline(pipe, brightness)
    options = {"num_particles": 6, "resample_every": 1, "start": 0.0, "end": 1.0, "output_type": "pt", **call}
    base = steer(["a", "b"], reward_scale=0.0, generator=g(), **options)
    never = steer(["a", "b"], reward_scale=300.0, ess_threshold=0.0, generator=g(), **options)
    torch.testing.assert_close(never.rewards, base.rewards)
    torch.testing.assert_close(never.log_weights, 300.0 * base.rewards.double())
    torch.testing.assert_close(never.log_evidence, never.log_weights.exp().mean(1).log())
    steered = steer(["a", "b"], reward_scale=300.0, ess_threshold=1.0, generator=g(), **options)
    assert (steered.rewards.mean(1) > base.rewards.mean(1)).all() and (steered.ess < 6).all()
    assert not torch.equal(steered.log_evidence, never.log_evidence)
    torch.testing.assert_close(brightness(stacked(steered), None), steered.rewards.amax(1))
    assert steered.chosen.tolist() == steered.rewards.argmax(1).tolist()


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan"])
def test_particles_may_be_spread_over_calls(name, pipes):
    pipe, call = pipes(name)
    steer = ParticleSteeringPipeline(pipe, brightness)
    options = {"num_particles": 4, "reward_scale": 100.0, "resample_every": 1, "output_type": "pt", "returned": "sample", **call}
    whole, split = (steer(["a", "b"], generator=g(), batch_size=size, **options) for size in (None, 3))
    for key in ("rewards", "log_weights", "log_evidence", "ess"):
        torch.testing.assert_close(whole[key], split[key], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(stacked(whole), stacked(split), rtol=1e-3, atol=1e-4)


def test_a_prompts_particles_do_not_depend_on_other_prompts(pipes):
    pipe, call = pipes("sd3")
    steer = ParticleSteeringPipeline(pipe, brightness)
    options = {"num_particles": 4, "reward_scale": 100.0, "ess_threshold": 1.0, "resample_every": 1, "output_type": "pt", **call}
    both = steer(["a", "b"], generator=[g(1), g(2)], **options)
    swapped = steer(["b", "a"], generator=[g(2), g(1)], **options)
    alone = steer("b", generator=[g(2)], **options)
    torch.testing.assert_close(both.log_weights[1:], alone.log_weights, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(both.rewards.flip(0), swapped.rewards)
    never = steer(["a", "b"], generator=[g(1), g(2)], **(options | {"ess_threshold": 0.0}))
    assert (both.rewards != never.rewards).any(1).all()  # both were resampled


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_no_denoiser_call_is_made_twice(name, pipes):
    pipe, call = pipes(name)
    rows, model = [], getattr(pipe, "unet", None) or pipe.transformer
    forward = type(model).forward

    def counted(self, *args, **kwargs):
        rows.append(len(args[0] if args else kwargs["hidden_states"]))
        return forward(self, *args, **kwargs)

    steer = ParticleSteeringPipeline(pipe, brightness)
    options = {"num_particles": 4, "reward_scale": 100.0, "generator": g(), **call}
    steer("a", **options)  # closed gates know their shapes from here on
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", counted)
        steer("a", resample_every=1, start=0.0, end=1.0, **options)
    assert rows == [2 * 4] * call["num_inference_steps"]  # guidance doubles the rows


def test_a_slope_is_not_lost_in_float16():
    """Of 64 x 64 pixels the mean of a reward in small units has a gradient below what float16 holds."""
    state = torch.linspace(-1, 1, 4096).reshape(1, -1).to(torch.float16).requires_grad_()
    part, run = types.SimpleNamespace(states=[state]), types.SimpleNamespace(steering=types.SimpleNamespace(reward_scale=1.0))
    scores = 1e-4 * (state * state).mean(1)
    slope = _Run.slope(run, scores, part)
    assert slope.dtype == torch.float32
    torch.testing.assert_close(slope, 2e-4 / 4096 * state.detach().float(), rtol=2e-2, atol=5e-11)


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_twisted_proposals_follow_the_reward(name, pipes):
    pipe, call = pipes(name)
    options = {"num_particles": 6, "ess_threshold": 0.0, "output_type": "pt", **call}
    steer = ParticleSteeringPipeline(pipe, brightness)
    base = steer("a", reward_scale=100.0, generator=g(), **options)
    ratios, proposal_log_ratio = [], smc.proposal_log_ratio
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smc, "proposal_log_ratio", lambda *a: ratios.append(proposal_log_ratio(*a)) or ratios[-1])
        twisted = steer("a", reward_scale=100.0, gradient=True, generator=g(), **options)
    assert twisted.rewards.mean() > base.rewards.mean()
    assert len(ratios) >= 2 and all((ratio != 0).all() for ratio in ratios)
    torch.testing.assert_close(twisted.log_weights[0], 100.0 * twisted.rewards[0].double() + sum(ratios))
    torch.testing.assert_close(base.log_weights, 100.0 * base.rewards.double())
    # A flat reward has no gradient: nothing moves, nothing is to be corrected.
    flat = steer("a", reward=lambda images, prompts, **_: 0 * brightness(images, prompts) + 0.5, gradient=True, generator=g(), returned="all", **options)
    plain = steer("a", reward_scale=0.0, generator=g(), returned="all", **options)
    assert torch.equal(stacked(flat), stacked(plain)) and torch.allclose(flat.log_weights, torch.tensor(5.0).double())
    with pytest.raises(ValueError, match="has no gradient"):
        steer("a", reward=lambda images, prompts, **_: brightness(images.detach(), prompts), gradient=True, generator=g(), **options)


def test_copies_take_their_gradient_along(pipes):
    pipe, call = pipes("sd3")
    shifts, copies, twist = [], [], smc.twist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smc, "twist", lambda *a: shifts.append(a) or twist(*a))
        ParticleSteeringPipeline(pipe, brightness)("a", num_particles=6, reward_scale=300.0, ess_threshold=1.0, gradient=True, generator=g(), **call)
    for mean, _, gradient in shifts:
        copies += [(i, j) for i in range(6) for j in range(i) if torch.equal(mean[i], mean[j])]
        assert all(torch.equal(gradient[i], gradient[j]) == torch.equal(mean[i], mean[j]) for i in range(6) for j in range(i))
    assert len(copies) > 2


def test_svdd_goes_on_with_the_best_candidate(pipes):
    pipe, call = pipes("sd3")
    steer = ParticleSteeringPipeline(pipe, brightness)
    options = {"generator": None, "output_type": "pt", **call}
    base = steer("a", num_particles=6, reward_scale=0.0, **(options | {"generator": g()}))
    greedy = steer("a", method="svdd", num_particles=6, **(options | {"generator": g()}))
    assert greedy.rewards.mean() > base.rewards.mean() and greedy.rewards.std() < base.rewards.std()
    one = steer("a", method="svdd", num_particles=1, returned="all", **(options | {"generator": g()}))
    alone = steer("a", num_particles=1, returned="all", **(options | {"generator": g()}))
    assert torch.equal(stacked(one), stacked(alone))
    assert greedy.log_evidence is None
    last = {"method": "svdd", "num_particles": 6, "returned": "sample", **options}
    cold = [steer("a", alpha=1e-9, **(last | {"generator": g(i)})) for i in range(3)]
    assert all(int(found.chosen) == int(found.rewards.argmax()) for found in cold)
    assert any(int(steer("a", alpha=1e9, **(last | {"generator": g(i)})).chosen) != int(found.rewards.argmax()) for i, found in enumerate(cold))


@pytest.mark.parametrize("output_type", ["pt", "np", "pil", "latent"])
def test_returned_particles_are_decoded_in_batches(output_type, pipes):
    pipe, call = pipes("sd15")
    decoded, decode = [], pipe.vae.decode
    options = {"num_particles": 3, "returned": "all", "output_type": output_type, **call}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipe.vae, "decode", lambda z, *a, **k: decoded.append(len(z)) or decode(z, *a, **k), raising=False)
        parts = ParticleSteeringPipeline(pipe, brightness)(["a", "b"], batch_size=2, generator=g(), **options)
        whole = ParticleSteeringPipeline(pipe, brightness)(["a", "b"], batch_size=2, return_dict=False, generator=g(), **options)
    assert max(decoded) == 2 and len(parts.images) == len(whole[0]) == 6
    assert type(parts.images) is type(whole[0]) and parts.nsfw_content_detected is whole[1] is None


def test_the_pipeline_is_left_as_it_was():
    pipe, call = FAMILIES["sd3"].build(), FAMILIES["sd3"].call
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.train().requires_grad_(True)
    next(pipe.transformer.parameters()).requires_grad_(False)
    scheduler, flags = pipe.scheduler, [p.requires_grad for p in pipe.transformer.parameters()]
    steer = ParticleSteeringPipeline(pipe, brightness)
    steer("a", num_particles=2, generator=g(), **call)
    with pytest.raises(RuntimeError, match="broken"):
        steer("a", reward=lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")), num_particles=2, **call)
    assert pipe.scheduler is scheduler and type(scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert [p.requires_grad for p in pipe.transformer.parameters()] == flags and all(m.training for m in pipe.transformer.modules())
    assert "prepare_latents" not in vars(pipe) and "encode_prompt" not in vars(pipe)


def test_a_particle_without_a_reward_has_weight_zero_or_stops_the_call(pipes):
    pipe, call = pipes("sd3")

    def half(images, prompts, **columns):
        rewards = brightness(images, prompts)
        return torch.where(rewards < rewards.median(), torch.nan, rewards)

    options = {"num_particles": 4, "generator": g(), **call}
    with pytest.raises(InvalidReward, match="half"):
        ParticleSteeringPipeline(pipe, half)("a", **options)
    found = ParticleSteeringPipeline(pipe, half)("a", on_invalid="mask", **options)
    lost = found.rewards.isnan()
    assert lost.any() and (found.log_weights[lost] == -torch.inf).all() and not found.rewards[0, found.chosen].isnan()
    with pytest.raises(InvalidReward, match="no reward at all"):
        ParticleSteeringPipeline(pipe, lambda images, prompts, **_: torch.full((len(images),), torch.nan))("a", on_invalid="mask", **options)


def test_samplers_without_noise_cannot_be_steered(pipes):
    pipe, call = pipes("sd15")
    steer, stock = ParticleSteeringPipeline(pipe, brightness), pipe.scheduler
    with pytest.raises(ValueError, match="noise_level"):
        steer("a", scheduler=sde_twin(stock, eta=0.0), **call)
    with pytest.raises(TypeError, match="no log-probabilities"):
        steer("a", scheduler=stock, **call)
    try:
        pipe.scheduler = LCMScheduler()
        with pytest.raises(ValueError, match="No step of the sampler has noise"):
            steer("a", **{**call, "num_inference_steps": 1})
        assert steer("a", **{**call, "num_inference_steps": 3})[0] is not None  # a consistency sampler draws but in its last step
    finally:
        pipe.scheduler = stock


@pytest.mark.parametrize("levels, steps", [({"timesteps": [981, 501, 201, 1]}, 4), ({"sigmas": [14.0, 5.0, 1.0, 0.0]}, 3)])
def test_particles_walk_a_schedule_of_ones_own(levels, steps):
    """Where the pipeline's scheduler takes it; otherwise it is said what to do."""
    pipe = FAMILIES["sd15"].build()
    call = {**{name: value for name, value in FAMILIES["sd15"].call.items() if name != "num_inference_steps"}, **levels}
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    options = {"num_particles": 2, "reward_scale": 0.0, "returned": "all", "output_type": "latent"}
    found = ParticleSteeringPipeline(pipe, brightness)("a", generator=g(), **options, **call)
    rollout = Policy(pipe, **call).rollout(["a"] * 2, seeds=_seeds(g(), 1, 2))
    assert rollout.num_steps == steps and torch.equal(found.images, rollout.final)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="takes no (timesteps|sigmas) of one's own: give num_inference_steps"):
        ParticleSteeringPipeline(pipe, brightness)("a", **options, **call)


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("reward_scale must be a finite number, at least 0, got -1.0", {"reward_scale": -1.0}),
        ("reward_scale must be a finite number, at least 0, got nan", {"reward_scale": float("nan")}),
        ("smc, svdd", {"method": "greedy"}),
        ("difference, max, add", {"potential": "sum"}),
        ("systematic, stratified", {"resampler": "residual"}),
        ("best, sample, all", {"returned": "first"}),
        ("at least 1", {"num_particles": 0}),
        ("ess_threshold must be", {"ess_threshold": 2.0}),
        ("start must not lie behind end", {"start": 0.9, "end": 0.1}),
        ("alpha must be a finite number, at least 0", {"alpha": -1.0}),
        ("alpha must be", {"alpha": float("nan")}),
        ("batch_size must be", {"batch_size": 0}),
        ("gradient=True is for", {"method": "svdd", "gradient": True}),
        ("sde_twin.pipe.scheduler, eta=0.3", {"eta": 0.3}),
        ("callback_on_step_end would see", {"callback_on_step_end": lambda *a: {}}),
    ],
)
def test_wrong_arguments_of_steering_say_what_to_do(message, arguments, pipes):
    pipe, call = pipes("sd15")
    with pytest.raises(ValueError, match=message):
        ParticleSteeringPipeline(pipe, brightness)("a", **arguments, **call)


def test_particles_are_weighed_where_the_paper_weighs_them():
    assert Steering().stops([True] * 100) == [20, 40, 60, 80]
    assert Steering(resample_every=2, start=0.0, end=1.0).stops([True] * 5) == [1, 3]
    # Behind the last noise copies could not part.
    assert Steering(resample_every=1, start=0.0, end=1.0).stops([True, True, True, False]) == [1, 2]
    assert Steering(method="svdd").stops([True] * 4) == Steering(gradient=True).stops([True] * 4) == [1, 2, 3]
