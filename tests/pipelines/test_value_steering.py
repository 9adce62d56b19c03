"""Value steering on stock pipelines."""

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from tiny_pipelines import FAMILIES
from wrapping import g, stacked

from diffusers_align import Policy
from diffusers_align.pipelines import ValueSteeringPipeline
from diffusers_align.pipelines.value_steering import NoiseValue, SteeredPolicy, Steering, _seeds, load_value


class Mean(torch.nn.Module):
    """A value that is known: the mean of a state."""

    def __init__(self, steps):
        super().__init__()
        self.config = type("Config", (), {"num_steps": steps})
        self.steps = []

    def check(self, state, prompts):
        pass

    def forward(self, states, prompts, steps):
        self.steps += steps.unique().tolist()
        return states.float().flatten(1).mean(1)


def value_of(policy, call):
    torch.manual_seed(0)
    return NoiseValue.of_policy(policy, policy.condition(["a"], seeds=[0]), width=8)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "sd15_img2img"])
def test_one_noise_is_the_samplers_own(name, pipes):
    pipe, call = pipes(name)
    policy = Policy(FAMILIES[name].build(), **call)
    value = value_of(policy, call)
    found = ValueSteeringPipeline(pipe)(["a", "b"], value=value, num_noises=1, generator=g(), output_type="latent", **call)
    rollout = policy.rollout(["a", "b"], seeds=_seeds(g(), 2))
    assert torch.equal(found[0], rollout.final)
    assert found.step_values.shape == (2, len(rollout.noisy_steps))


def test_a_schedule_of_ones_own_is_walked():
    pipe, times = FAMILIES["sd15"].build(), [981, 501, 1]
    call = {**{name: value for name, value in FAMILIES["sd15"].call.items() if name != "num_inference_steps"}, "timesteps": times}
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    policy = Policy(pipe, **call)
    found = ValueSteeringPipeline(pipe)("a", value=value_of(policy, call), num_noises=1, generator=g(), output_type="latent", **call)
    assert torch.equal(found[0], policy.rollout(["a"], seeds=_seeds(g(), 1)).final)


def test_noises_are_picked_by_the_states_that_they_lead_to():
    call = {**FAMILIES["sd3"].call, "num_inference_steps": 3}
    policy = SteeredPolicy(FAMILIES["sd3"].build(), **call)
    plain = policy.rollout(["a", "b"], seeds=[1, 2])
    value = Mean(3)
    policy.steering = Steering(value, 32)
    steered = policy.rollout(["a", "b"], seeds=[1, 2])
    assert value.steps == [1, 2, 3], "where the steps lead"
    assert (steered.final.mean((1, 2, 3)) > plain.final.mean((1, 2, 3))).all()
    assert torch.equal(policy.worth[0], policy.taken[0]), "the best is what is taken"
    torch.testing.assert_close(policy.taken[0], steered.actions.float().flatten(2).mean(2))
    # The roll-out's own account of itself: its kernels give its actions the densities that it says.
    densities = {k: kernel.log_prob(steered.actions[:, k]) for k, kernel in policy.transitions(steered).items()}
    torch.testing.assert_close(torch.stack([densities[k] for k in steered.noisy_steps], 1), steered.log_probs[:, steered.noisy_steps])

    policy.steering = Steering(value, 32, follow=False)
    followed = policy.rollout(["a", "b"], seeds=[1, 2])
    assert torch.equal(followed.final, plain.final)
    assert (policy.worth[-1] > policy.taken[-1]).all()


def test_a_temperature_lies_between_the_best_and_any():
    policy = SteeredPolicy(FAMILIES["sd3"].build(), **{**FAMILIES["sd3"].call, "num_inference_steps": 3})
    means = []
    for alpha in (0.0, 0.02, float("inf")):
        policy.steering = Steering(Mean(3), 16, alpha)
        means.append(policy.rollout(["a"] * 16, seeds=list(range(16))).final.mean().item())
    assert means[0] > means[1] > means[2]


def test_a_sample_does_not_depend_on_its_batch(pipes):
    pipe, call = pipes("sd3")
    policy = SteeredPolicy(FAMILIES["sd3"].build(), **call)
    policy.steering = Steering(value_of(Policy(FAMILIES["sd3"].build(), **call), call), 8)
    both, one = policy.rollout(["a", "b"], seeds=[1, 2]), policy.rollout(["b"], seeds=[2])
    torch.testing.assert_close(both.final[1:], one.final, rtol=1e-3, atol=1e-4)


def test_a_value_is_saved_and_loaded_and_the_scheduler_comes_back(pipes, tmp_path):
    pipe, call = pipes("sd3")
    value, scheduler = value_of(Policy(FAMILIES["sd3"].build(), **call), call), pipe.scheduler
    value.save_pretrained(tmp_path / "run" / "value")
    steer = ValueSteeringPipeline(pipe)
    options = {"num_noises": 4, "generator": None, "output_type": "pt", **call}
    found = [stacked(steer("a", value=source, **{**options, "generator": g()})) for source in (value, tmp_path / "run", str(tmp_path / "run" / "value"))]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert pipe.scheduler is scheduler
    with pytest.raises(FileNotFoundError, match="train_value_steering.py"):
        load_value(tmp_path)


def test_what_a_value_was_not_made_for_is_refused(pipes):
    pipe, call = pipes("sd3")
    steer, value = ValueSteeringPipeline(pipe), value_of(Policy(FAMILIES["sd3"].build(), **call), call)
    with pytest.raises(ValueError, match="num_inference_steps="):
        steer("a", value=value, **{**call, "num_inference_steps": call["num_inference_steps"] + 1})
    with pytest.raises(ValueError, match="trained for"):
        steer("a", value=NoiseValue(3, value.config.prompt_size, value.config.num_steps), **call)
    with pytest.raises(ValueError, match="scheduler=sde_twin\\(pipe.scheduler, eta=0.5\\) in the place of eta"):
        steer("a", value=value, eta=0.5, **call)
    with pytest.raises(ValueError, match="needed: pass scheduler=sde_twin\\(pipe.scheduler\\) in the place of eta"):
        steer("a", value=value, eta=0.0, **call)
    with pytest.raises(ValueError, match="num_noises"):
        steer("a", value=value, num_noises=0, **call)
    policy = SteeredPolicy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call)
    policy.scheduler.register_to_config(eta=0.0)
    policy.steering = Steering(value, 2)
    with pytest.raises(ValueError, match="none to pick"):
        policy.rollout(["a"], seeds=[0])


def test_a_steered_rollout_draws_its_seeds_and_ignores_nothing():
    call = {**FAMILIES["sd3"].call, "num_inference_steps": 3}
    policy = SteeredPolicy(FAMILIES["sd3"].build(), **call)
    policy.steering = Steering(Mean(3), 4)
    first, second = (policy.rollout(["a", "b"], generator=torch.Generator().manual_seed(s)) for s in (0, 0))
    assert torch.equal(first.final, second.final) and not torch.equal(policy.rollout(["a", "b"]).final, first.final)
    number = len(policy.worth)
    condition = policy.condition(["a"], seeds=[1])
    for options in ({"share_prefix": True}, {"on_step": print}, {"num_inference_steps": 2}):
        with pytest.raises(ValueError, match="leave out on_step, share_prefix"):
            policy.rollout(condition, **options)
    assert len(policy.worth) == number
