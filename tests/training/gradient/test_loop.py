"""Updates by reward gradients: on any number of processes, by the adjoint."""

from types import SimpleNamespace

import pytest
import torch
from reward_gradients import brightness, loss_args, tiny

from diffusers_align.data.prompts import Prompt
from diffusers_align.gradients.rollout import differentiable_rollout
from diffusers_align.training.gradient.adjoints import adjoint_backward
from diffusers_align.training.gradient.loop import updates_of_epoch
from diffusers_align.training.run.run import Run


def fake_run(policy, rank, world, batch_size, **flags):
    args = loss_args(num_samples_per_epoch=8, seed=7, train_batch_size=batch_size, invalid_rewards="error", reward_timeout=None, **flags)
    accelerator = SimpleNamespace(process_index=rank, num_processes=world, autocast=torch.enable_grad)
    meter = SimpleNamespace(count_images=lambda number: None)
    return SimpleNamespace(args=args, accelerator=accelerator, meter=meter, chunks=Run.chunks, parameters=policy.trainable_parameters())


REPORT = SimpleNamespace(prompts=[Prompt(f"a cat number {i}") for i in range(5)], reward=brightness)


def test_updates_do_not_depend_on_the_number_of_processes():
    def updates(world):
        found = []
        for rank in range(world):
            run = fake_run(tiny("sd3"), rank, world, batch_size=2, gradient_accumulation_steps=2)
            Run.batches(run, 8)
            for number, update in enumerate(updates_of_epoch(run, tiny("sd3"), REPORT, 3)):
                samples = [pair for batch in update.batches for pair in zip(batch.condition.seeds, batch.condition.prompts)]
                found.append((number, int(torch.randint(10**9, (), generator=update.generator)), update.weight, samples))
        return found

    one, two = updates(1), updates(2)
    assert [u[0] for u in one] == [0, 1] and one[0][1] != one[1][1]
    for number in (0, 1):
        mine = [u for u in two if u[0] == number]
        assert {u[1] for u in mine} == {one[number][1]} and {u[2] for u in mine} == {one[number][2]} == {1 / 4}
        assert sorted(pair for u in mine for pair in u[3]) == sorted(one[number][3])


@pytest.mark.parametrize("truncation", [2, 4])
def test_the_adjoint_gives_the_same_gradient(truncation):
    policy, run = tiny("sd3"), fake_run(tiny("sd3"), 0, 1, 2, gradient_accumulation_steps=1)
    Run.batches(run, 8)
    update = next(updates_of_epoch(run, policy, REPORT, 0))
    batch = update.batches[0]
    rollout = differentiable_rollout(policy, batch.condition, grad_steps=range(4 - truncation, 4))
    expected = torch.autograd.grad(-batch.reward(rollout.images).sum() * update.weight, run.parameters)
    rewards, mismatch = adjoint_backward(run, policy, batch, truncation, update.weight)
    assert mismatch < 1e-5
    torch.testing.assert_close(rewards, batch.reward(rollout.images).detach())
    for parameter, gradient in zip(run.parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()) + 1e-12)
        parameter.grad = None
