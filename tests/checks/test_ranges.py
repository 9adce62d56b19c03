"""Arguments out of range are refused, by one mechanism, in every pipeline and in the library."""

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_type_hints

import numpy as np
import pytest
import torch
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, pipelines
from diffusers_align.algorithms.guidance import Guidance, preset
from diffusers_align.checks.ranges import (
    Count,
    CountOrNone,
    NonNegative,
    Positive,
    PositiveOrInfinite,
    PositiveShare,
    Probability,
    Range,
    check_fields,
    checked,
)
from diffusers_align.condition import Condition
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.pipelines import base
from diffusers_align.pipelines.particle_steering import Steering
from diffusers_align.rewards import WeightedSum, score
from diffusers_align.rewards.remote import RemoteReward
from diffusers_align.rewards.vlm_judge import VLMJudge
from diffusers_align.schedulers import DDIMSDEScheduler, FlowMatchSDEScheduler, SigmaSDEScheduler, sde_twin

torch.set_num_threads(1)
NAN, INF = math.nan, math.inf
BAD_FOR_ALL = [NAN, -INF, "3", "", True, [3], torch.ones(2)]
WRAPPED = [pipelines.BestOfNPipeline, pipelines.ParticleSteeringPipeline, pipelines.RewardGuidedPipeline, pipelines.NoiseOptimizationPipeline]


# --- the mechanism -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "annotation, good, bad",
    [
        (Count, [1, 10**9, np.int64(3), torch.tensor(2)], [0, -1, 1.0, INF, None]),
        (CountOrNone, [0, 7], [-1, 0.5, None]),
        (NonNegative, [0, 0.0, 1e9, np.float32(2)], [-1e-9, INF, None]),
        (Positive, [1e-9, 3, torch.tensor(0.5)], [0, -1.0, INF]),
        (PositiveOrInfinite, [1.0, INF], [0.0]),
        (Probability, [0, 1, 0.5], [-0.1, 1.1, INF]),
        (PositiveShare, [1, 0.1], [0, 1.1]),
        (float, [-3.0, 0, 1e30], [INF, None]),
        (int, [-3, 0], [1.5, None]),
        (Count | None, [None, 1], [0]),
        (Annotated[int, Range(-1, 2)], [-1, 2], [-2, 3]),
    ],
    ids=str,
)
def test_a_number_is_in_its_range_or_refused(annotation, good, bad):
    @checked
    def function(x: annotation):
        return x

    for value in good:
        assert function(value) is value
    for value in [*bad, *BAD_FOR_ALL]:
        with pytest.raises(ValueError, match="^x must be a .*, got ") as error:
            function(x=value)
        assert str(error.value).endswith(f"got {value!r}.")


def test_sentences():
    @checked
    def function(n: Count = 1, share: PositiveShare = 1, s: float = 0, kind: Literal["a", "b"] = "a", on: bool = False, free: str = ""):
        return n

    for bad, said in [
        ({"n": 0}, "n must be a whole number, at least 1, got 0."),
        ({"share": 0}, "share must be a finite number, above 0 and at most 1, got 0."),
        ({"s": NAN}, "s must be a finite number, got nan."),
        ({"kind": "c"}, "Unknown kind 'c'; choose one of a, b."),
        ({"on": "no"}, "on must be True or False, got 'no'."),
    ]:
        with pytest.raises(ValueError) as error:
            function(**bad)
        assert str(error.value) == said
    assert function(2, free=3) == 2, "what has no rule is let be"
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        function(m=1)


def test_fields_of_a_dataclass():
    @dataclass
    class Settings:
        rate: Positive = 1.0

        def __post_init__(self):
            check_fields(self)

    assert Settings(0.5).rate == 0.5
    with pytest.raises(ValueError, match="rate must be a finite number, above 0, got nan"):
        Settings(NAN)


# --- every pipeline ------------------------------------------------------------------------------------------------------


@functools.cache
def stock():
    pipeline = FAMILIES["sd3"].build()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def numbers_of(cls):
    """The arguments of a pipeline's call that are numbers, with their annotations."""
    hints = get_type_hints(cls.__call__.__wrapped__.__wrapped__, include_extras=True)
    return {name: hint for name, hint in hints.items() if "int" in str(hint) or "float" in str(hint)}


@pytest.mark.parametrize("cls", WRAPPED, ids=lambda cls: cls.__name__)
def test_no_number_of_a_pipelines_call_is_taken_unchecked(cls, monkeypatch):
    monkeypatch.setattr(base, "drive", lambda *args, **kwargs: pytest.fail("the pipeline ran"))
    pipe = cls(stock(), reward=lambda images, prompts: images.mean((1, 2, 3)))
    numbers = numbers_of(cls)
    assert len(numbers) >= 4
    for name in set(numbers) - {"grad_steps"}:
        for value in [NAN, -INF, "3", "", [2]]:
            with pytest.raises(ValueError, match=f"{name} must be"):
                pipe("a cat", **{name: value}, **FAMILIES["sd3"].call)
        if name != "reward_scale":
            with pytest.raises(ValueError, match=f"{name} must be"):
                pipe("a cat", **{name: -1}, **FAMILIES["sd3"].call)


@pytest.mark.parametrize("cls", [*WRAPPED], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize(
    "bad",
    [{"num_inference_steps": 0}, {"num_inference_steps": 2.0}, {"guidance_scale": NAN}, {"num_images_per_prompt": 0}, {"height": 0}, {"width": -8}],
    ids=str,
)
def test_the_stock_calls_numbers_are_checked(cls, bad, monkeypatch):
    monkeypatch.setattr(base, "drive", lambda *args, **kwargs: pytest.fail("the pipeline ran"))
    pipe = cls(stock(), reward=lambda images, prompts: images.mean((1, 2, 3)))
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be"):
        pipe("a cat", **{**FAMILIES["sd3"].call, **bad})


@pytest.mark.parametrize("bad", [{"num_inference_steps": 0}, {"guidance_scale": INF}, {"height": -1}], ids=str)
def test_a_policys_call_has_the_same_rule(bad):
    policy = Policy(FAMILIES["sd3"].build())
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be"):
        policy.rollout(["a cat"], seeds=[0], **bad)


@pytest.mark.parametrize("columns", ["ab", ["a"], {"weight": 3}, {"weight": "ab"}, {"weight": []}], ids=str)
def test_columns_that_are_no_lists_by_name_are_refused(columns):
    pipe = pipelines.BestOfNPipeline(stock(), reward=lambda images, prompts, **more: images.mean((1, 2, 3)))
    with pytest.raises(ValueError, match="column"):
        pipe("a cat", columns=columns, **FAMILIES["sd3"].call)


# --- settings and schedulers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["noisy", "variance", "mean", "smoothing", "start", "stop", "iterations", "draws", "recurrence"])
@pytest.mark.parametrize("value", [NAN, INF, "1"])
def test_guidance_has_no_strength_that_is_no_number(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Guidance(**{"variance": 1.0, name: value})
    with pytest.raises(ValueError, match=f"{name} must be"):
        preset("dps", **{name: value})


@pytest.mark.parametrize("bad", [{"alpha": NAN}, {"reward_scale": INF}, {"ess_threshold": NAN}, {"num_particles": 2.0}, {"resample_every": 0}], ids=str)
def test_steering(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be"):
        Steering(**bad)


WRONG_FORMS = [{"sde_window": 3}, {"sde_window": (0,)}, {"sde_window": (0, 1, 2)}, {"noise_level": []}, {"noise_level": "0.5"}, {"noise_level": True}]


@pytest.mark.parametrize(
    "bad",
    [
        {"noise_level": NAN},
        {"noise_level": INF},
        {"noise_level": -1},
        {"noise_level": [0.5, NAN]},
        {"sde_window": (0, 1.5)},
        {"sde_window": (-1, 2)},
        *WRONG_FORMS,
    ],
)
def test_schedulers(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be"):
        FlowMatchSDEScheduler(**bad)


@pytest.mark.parametrize("scheduler", [DDIMSDEScheduler, SigmaSDEScheduler])
@pytest.mark.parametrize("window", [3, (0,), (0, 1, 2), (0, 1.5), (-1, 2), (3, 3)])
def test_windows_of_diffusion(scheduler, window):
    with pytest.raises(ValueError, match="sde_window must be"):
        scheduler(sde_window=window)


@pytest.mark.parametrize("eta", [NAN, INF, -1, "1", True, None])
def test_eta(eta):
    with pytest.raises(ValueError, match="eta must"):
        sde_twin(FAMILIES["sd15"].build().scheduler, eta=eta)


@pytest.mark.parametrize("bad", [{"rank": 0}, {"rank": 2.5}, {"rank": -1}, {"alpha": 0}, {"alpha": NAN}, {"alpha": -4}], ids=str)
def test_a_lora_that_could_learn_nothing_is_refused(bad):
    policy = Policy(FAMILIES["sd3"].build())
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be"):
        policy.add_lora(**bad)


def test_a_list_of_noise_levels_has_one_for_each_step():
    policy = Policy(FAMILIES["sd3"].build(), FlowMatchSDEScheduler(noise_level=[0.5, 0.5]), **FAMILIES["sd3"].call)
    with pytest.raises(ValueError, match="noise_level has 2 values, one a solver step, and none for step 2"):
        policy.rollout(["a cat"], seeds=[0])


# --- the policy and what stands on it ------------------------------------------------------------------------------------


@functools.cache
def rolled_out():
    policy = Policy(FAMILIES["sd15"].build(), **FAMILIES["sd15"].call)
    return policy, policy.rollout(["a", "b"], seeds=[0, 1])


@pytest.mark.parametrize("k", [0.5, True, -1, NAN, "1", 99], ids=str)
def test_a_step_that_there_is_not(k):
    policy, trajectory = rolled_out()
    for call, name in (
        (lambda: policy.replay(trajectory, lambda *_: None, [k]), "steps"),
        (lambda: policy.transition(trajectory, k), "steps"),
        (lambda: policy.transitions(trajectory, [0, k]), "steps"),
        (lambda: policy.complete(trajectory, k), "k"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must be a whole number"):
            call()
    for options, name in (({"grad_steps": [k]}, "grad_steps"), ({"grad_steps": [0], "stop_step": k}, "stop_step")):
        with pytest.raises(ValueError, match=f"^{name} (must be (a )?whole number|count solver steps|names step 99)"):
            differentiable_rollout(policy, trajectory.condition, **options)


def test_arguments_of_a_policy_that_would_be_taken_for_others():
    policy, trajectory = rolled_out()
    condition, latents, times = trajectory.condition, trajectory.final, torch.tensor([5, 5])
    images = policy.decode(latents, condition)
    for call, said in (
        (lambda: policy.complete(trajectory, 1, seeds=[1, 2]), "seeds draw the noise of the new steps"),
        (lambda: policy.complete(trajectory, 1, deterministic=False, seeds=[]), "2 prompts need as many step_seeds, got 0"),
        (lambda: policy.rollout(["a"], deterministic="no"), "deterministic must be True or False"),
        (lambda: policy.rollout(["a"], seeds=[True]), "seeds are whole numbers"),
        (lambda: policy.predict(latents, times, condition, guidance=1), "guidance must be True or False"),
        (lambda: policy.predict(latents, torch.tensor([NAN, 1]), condition), "timesteps are numbers from 0 to 1000"),
        (lambda: policy.predict(latents, torch.tensor([-1, 1]), condition), "timesteps are numbers from 0 to 1000"),
        (lambda: policy.predict(latents, torch.tensor([1001, 1]), condition), "timesteps are numbers from 0 to 1000"),
        (lambda: policy.predict(torch.randn(2, 4, 16, 16), times, condition), "those given .2, 4, 16, 16.: the condition's height, width"),
        (lambda: policy.encode((images * 255).byte()), "floats in .0, 1.; got torch.uint8"),
        (lambda: policy.encode(images * 255), "lie in .0, 1., got values from"),
        (lambda: policy.encode(images * NAN), "got values from nan to nan"),
        (lambda: policy.encode(images[0]), "Images to encode are a tensor"),
        (lambda: policy.transition(trajectory, 1).log_prob(trajectory.actions[:1, 1]), "is none of this kernel"),
        (lambda: Condition("abc"), "prompts are a list of strings"),
        *((lambda b=b: policy.remember_prompts(b), "batches must be a whole number, at least 1") for b in (0, -1, NAN, "3", True)),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    for call, said in (
        (lambda: policy.predict(latents, [5, 5], condition), "timesteps must be a Tensor, got a list"),
        (lambda: policy.predict(latents, times, ["a", "b"]), "condition must be a Condition, got a list: policy.condition"),
        (lambda: policy.decode(trajectory, condition), "latents must be a Tensor, got a Trajectory"),
        (lambda: policy.replay(condition, print), "trajectory must be a Trajectory, got a Condition: policy.rollout"),
        (lambda: policy.prompt_features(["a"]), "condition must be a Condition"),
    ):
        with pytest.raises(TypeError, match=said):
            call()
    with pytest.raises(TypeError, match=r"Policy\(pipe.pipeline\)"):
        Policy(pipelines.BestOfNPipeline(policy.pipeline))


@pytest.mark.parametrize("scale", [NAN, INF, True, "power_-1", "power_nan", "step_2", "step_-1", "cosine"], ids=str)
def test_adapter_scales(scale):
    pipeline = FAMILIES["sd15"].build()
    Policy(pipeline).add_lora(rank=1)
    with pytest.raises(ValueError, match="adapter_scale must be"):
        pipelines.AdapterGuidancePipeline(pipeline)("a", adapter_scale=scale, **FAMILIES["sd15"].call)


@pytest.mark.parametrize("bad", [{"retries": -1}, {"retries": 0.5}, {"timeout": NAN}, {"timeout": 0}, {"backoff": -1}], ids=str)
def test_patience_with_servers(bad):
    (name,) = bad
    for cls, options in ((RemoteReward, {"url": "http://127.0.0.1:9"}), (VLMJudge, {"model": "judge", "url": "http://127.0.0.1:9"})):
        with pytest.raises(ValueError, match=f"{name} must be"):
            cls(**options, **bad)


def test_scores_of_what_is_no_batch():
    images = torch.rand(2, 3, 8, 8)

    def mean(images, prompts, **columns):
        return images.flatten(1).mean(1)

    for call, said in (
        (lambda: score(mean, images, "ab"), "got 2 images and the text 'ab'"),
        (lambda: score(mean, images, ["a", "b"], tag=["x"]), "column 'tag' has 1 entries for 2 images"),
        (lambda: score(mean, images[0], ["a", "b", "c"]), r"judges pictures, and these are sounds .* = .3, 8, 8."),
        (lambda: WeightedSum([(mean, NAN)]), "weight must be a finite number"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
