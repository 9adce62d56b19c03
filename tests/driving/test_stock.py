"""What is measured is what users get: the stock pipeline's own images, by its own solver."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from accelerate import Accelerator
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.data.prompts import Prompt
from diffusers_align.driving.stock import stock_images, stock_solver
from diffusers_align.policy import noise_seed
from diffusers_align.schedulers import sde_twin
from diffusers_align.training.online.sampling import describe_walk, evaluate

torch.set_num_threads(1)
PROMPTS, SEEDS = ["a cat", "a large red dog"], [11, 12]
SOLVERS = [None, "DPMSolverMultistepScheduler", "PNDMScheduler", "UniPCMultistepScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"]


def built(family, solver=None):
    pipeline = FAMILIES[family].build()
    if solver is not None:
        pipeline.scheduler = getattr(diffusers, solver).from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)  # as the policy's: on some processors kernels are chosen, and round, by that flag
    return pipeline


def called(pipeline, call, seeds=SEEDS):
    """The stock call, as a user types it."""
    images = pipeline(PROMPTS, generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="pt", **call)[0]
    return torch.stack(list(images)) if isinstance(images, (list, tuple)) else images


@pytest.mark.parametrize("family, solver", [*(("sd15", solver) for solver in SOLVERS), ("sd3", None), ("flux", None), ("wan", None), ("cogvideox", None)])
def test_stock_images_are_those_of_the_stock_call_bit_for_bit(family, solver):
    call = FAMILIES[family].call
    policy = Policy(built(family, solver), **call)
    twin = policy.scheduler
    images = stock_images(policy, policy.condition(PROMPTS, seeds=SEEDS))
    assert torch.equal(images, called(built(family, solver), call))
    assert policy.scheduler is twin, "the policy's own scheduler is back"


def test_another_solver_gives_other_images_than_the_twin():
    call = FAMILIES["sd15"].call
    policy = Policy(built("sd15", "DPMSolverMultistepScheduler"), **call)
    condition = policy.condition(PROMPTS, seeds=SEEDS)
    ode = policy.decode(policy.rollout(condition, deterministic=True).final, condition)
    assert (stock_images(policy, condition) - ode).abs().mean() > 1e-3


def test_a_second_policy_on_a_pipeline_knows_what_it_came_with():
    pipeline = built("sd15", "DPMSolverMultistepScheduler")
    first = Policy(pipeline, **FAMILIES["sd15"].call)
    second = Policy(pipeline, sde_twin(pipeline.scheduler, eta=0.5), **FAMILIES["sd15"].call)
    third = Policy(pipeline, second.scheduler, **FAMILIES["sd15"].call)
    for policy in (first, second, third):
        assert type(policy.stock_scheduler).__name__ == "DPMSolverMultistepScheduler"
    with stock_solver(third):
        assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"


def test_images_without_seeds_are_refused():
    policy = Policy(built("sd3"), **FAMILIES["sd3"].call)
    with pytest.raises(ValueError, match="need seeds"):
        stock_images(policy, policy.condition(PROMPTS))


def evaluated(policy, scheduler, batch=2):
    flags = {"seed": 7, "train_batch_size": batch, "eval_num_inference_steps": None, "eval_guidance_scale": None}
    args = SimpleNamespace(**flags, invalid_rewards="error", reward_timeout=None, eval_scheduler=scheduler)
    run = SimpleNamespace(args=args, accelerator=Accelerator(), print=print)
    return evaluate(run, policy, {"reward": lambda images, prompts: images.flatten(1).mean(1)}, [Prompt(p) for p in PROMPTS], 4, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_evaluation_scores_the_images_of_the_stock_call(dtype):
    call = FAMILIES["sd15"].call
    policy = Policy(built("sd15", "DPMSolverMultistepScheduler").to(dtype=dtype), **call)
    found = evaluated(policy, "stock")
    seeds = [noise_seed(7, "evaluation", i) for i in range(4)]
    stock = built("sd15", "DPMSolverMultistepScheduler").to(dtype=dtype)
    expected = torch.cat([called(stock, call, seeds[:2]), called(stock, call, seeds[2:])]).float()
    assert found.solver == "DPMSolverMultistepScheduler" and torch.equal(torch.stack(found.images), expected)
    torch.testing.assert_close(found.rewards["reward"], expected.flatten(1).mean(1))


def test_the_twin_is_evaluated_where_it_is_asked_for():
    policy = Policy(built("sd15", "DPMSolverMultistepScheduler"), **FAMILIES["sd15"].call)
    found = evaluated(policy, "twin")
    seeds = [noise_seed(7, "evaluation", i) for i in range(2)]
    ode = policy.rollout(PROMPTS, seeds=seeds, deterministic=True)
    assert found.solver == "DDIMSDEScheduler" and torch.equal(torch.stack(found.images[:2]), policy.decode(ode.final, ode.condition))


@pytest.mark.parametrize("solver, said", [("DPMSolverMultistepScheduler", "DDIMSDEScheduler at the timesteps {}"), ("DDIMScheduler", None)])
def test_training_says_what_it_walks_in_the_place_of_the_pipelines_solver(solver, said):
    policy = Policy(built("sd15", solver), **FAMILIES["sd15"].call)
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    words = describe_walk(policy, trajectory)
    assert bool(words) == (said is not None)
    if said:
        assert said.format(", ".join(f"{t:g}" for t in trajectory.timesteps.tolist())) in words[0] and f"own {solver}" in words[0]
