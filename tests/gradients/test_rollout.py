"""Reward gradients through stock pipelines: the pipeline's own pictures, and the gradients of a loop written by hand."""

import copy

import diffusers
import pytest
import torch
from differentiated import PROMPTS, SEEDS, SOLVERS, SUBJECTS, Subject, brightness, close, score, subject
from diffusers.utils.torch_utils import randn_tensor
from oracles import linear_path
from tiny_pipelines import FAMILIES

from diffusers_align import Policy
from diffusers_align.algorithms import draft, srpo, vader
from diffusers_align.algorithms.continuous_adjoint import adjoint_gradient
from diffusers_align.driving.stock import stock_solver
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.gradients.check import GradientError, check_gradient
from diffusers_align.gradients.decoding import decode_latents
from diffusers_align.gradients.rollout import differentiable_rollout, outputs_along, solver_step
from diffusers_align.schedulers import sde_twin
from tests.families.cases import CASES

# --- the pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, solver", SUBJECTS)
def test_the_images_are_the_stock_pipelines(family, solver):
    it = subject(family, solver)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = it.stock(prompt=list(PROMPTS), generator=generators, output_type="pt", **it.family.call)[0]
    with it.policy.reference():
        rollout = it.rollout([0])
    assert torch.equal(rollout.images, expected)
    assert rollout.images.min() >= 0 and rollout.images.max() <= 1
    assert (it.rollout([]).images - expected).abs().max() > 1e-4, "the LoRA does nothing"


def test_images_reach_the_reward_in_the_whole_range():
    """Brought to [0, 1] once: twice would leave [0.5, 1]."""
    it = Subject("sd15")
    it.policy.pipeline.vae.decoder.conv_out.weight.data *= 30
    images = it.rollout([]).images
    assert images.min() == 0 and images.max() == 1


@pytest.mark.parametrize("family, solver", SUBJECTS)
def test_everything_is_left_as_it_was(family, solver):
    it = subject(family, solver)
    twin, solver = it.policy.scheduler, it.policy.stock_scheduler
    it.rollout([1])
    assert torch.equal(solver.timesteps, type(solver).from_config(solver.config).timesteps), "it was used, and may hold a graph"
    with pytest.raises(ValueError, match="names step 99, but the call took"):
        it.rollout([99])
    assert it.policy.scheduler is twin
    assert all("forward" not in module.__dict__ for module in it.policy.denoisers.values())
    assert "decode" not in it.policy.pipeline.vae.__dict__


def test_a_step_is_a_call_of_the_scheduler():
    number = FAMILIES["sd15"].call["num_inference_steps"]
    assert [subject("sd15", solver).steps() for solver in SOLVERS] == [number, number, 2 * number - 1, number]
    assert subject("sd15_img2img").steps() == 4


def test_the_stock_solver_of_an_sde_pipeline_is_its_deterministic_one():
    it = subject("sd3")
    pipeline = Subject("sd3").policy.pipeline
    pipeline.scheduler = sde_twin(pipeline.scheduler)
    second = Policy(pipeline, **it.family.call)
    with stock_solver(second):
        assert second.scheduler.deterministic
    images = differentiable_rollout(second, second.condition(PROMPTS, seeds=SEEDS), grad_steps=[]).images
    assert torch.equal(images, it.rollout([]).images)


# --- gradients: against a loop by hand -----------------------------------------------------------------------------------


def by_hand(it, call, noise=None):
    """Stable Diffusion's loop, with `call(k, unet, x, ...)` for the denoiser; the images."""
    pipe, solver = it.policy.pipeline, copy.deepcopy(it.policy.stock_scheduler)
    positive, negative = (e.detach() for e in pipe.encode_prompt(PROMPTS, "cpu", 1, True))
    solver.set_timesteps(it.family.call["num_inference_steps"])
    drawn = randn_tensor((2, 4, 8, 8), [torch.Generator().manual_seed(seed) for seed in SEEDS])
    x = (drawn if noise is None else noise) * solver.init_noise_sigma
    for k, t in enumerate(solver.timesteps):
        doubled = solver.scale_model_input(torch.cat([x] * 2), t)
        uncond, cond = call(k, doubled, t, torch.cat([negative, positive])).chunk(2)
        x = solver.step(uncond + it.family.call["guidance_scale"] * (cond - uncond), t, x).prev_sample
    return (pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_gradient_is_that_of_a_loop_by_hand(solver):
    """Outputs detached before the cut, as in AlignProp's code: the solver's own path stays."""
    it = subject("sd15", solver)
    unet = it.policy.pipeline.unet
    for cut in (0, 2, it.steps() - 1):

        def call(k, x, t, embeddings):
            output = unet(x, t, embeddings).sample
            return output.detach() if k < cut else output

        expected = by_hand(it, call)
        rollout = it.rollout(range(cut, it.steps()))
        close(rollout.images, expected, 1e-6)
        close(it.gradient(score(rollout.images).sum()), it.gradient(score(expected).sum()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_sparse_steps_keep_the_solvers_path(solver):
    it = subject("sd15", solver)

    def call(k, x, t, e):
        output = it.policy.pipeline.unet(x, t, e).sample
        return output if k in (0, 2) else output.detach()

    close(it.gradient(score(it.rollout([0, 2]).images).sum()), it.gradient(score(by_hand(it, call)).sum()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_stopped_inputs_are_those_of_a_loop_by_hand(solver):
    it = subject("sd15", solver)
    expected = by_hand(it, lambda k, x, t, e: it.policy.pipeline.unet(x.detach(), t, e).sample)
    actual = it.gradient(score(it.rollout(range(it.steps()), detach_input=True).images).sum())
    close(actual, it.gradient(score(expected).sum()))
    whole = it.gradient(score(it.rollout(range(it.steps())).images).sum())
    assert float((actual - whole).norm() / whole.norm()) > 0.01


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_stopped_inputs_leave_the_linear_path(family):
    """For Euler steps of flow matching: the sum of (sigma_{k+1} - sigma_k) (dv_k / dtheta)^T a_K."""
    it = subject(family)
    rollout = it.rollout(range(4), detach_input=True)
    loss = score(rollout.images).sum()
    a = torch.autograd.grad(loss, rollout.latents, retain_graph=True)[0]
    sigmas = [t / 1000 for t in rollout.timesteps] + [0.0]
    lengths = linear_path([1.0] * 4, [b - c for c, b in zip(sigmas, sigmas[1:])])
    expected = sum(it.gradient(rollout.steps[k].model_output, grad_outputs=lengths[k] * a, retain_graph=True) for k in range(4))
    close(it.gradient(loss), expected)


@pytest.mark.parametrize("family, solver", [("sd15", "DDIMScheduler"), ("sd15", "EulerDiscreteScheduler"), ("sd3", None), ("flux", None)])
def test_the_adjoint_step_by_step_is_the_whole_gradient(family, solver):
    it = subject(family, solver)
    rollout = it.rollout(range(it.steps()))
    loss = score(rollout.images).sum()
    final = torch.autograd.grad(loss, rollout.latents, retain_graph=True)[0]
    states = [*rollout.states, rollout.latents.detach()]
    found = adjoint_gradient(lambda k, x: solver_step(it.policy, it.condition, k, x), states, final, it.parameters)
    close(torch.cat([g.flatten() for g in found.gradients]), it.gradient(loss))
    assert found.mismatch < 1e-5


def test_the_adjoint_refuses_a_solver_with_a_memory():
    it = subject("sd15", "DPMSolverMultistepScheduler")
    rollout = it.rollout(range(4))
    states = [*rollout.states, rollout.latents.detach()]
    with pytest.raises(ValueError, match="one-step solver"):
        adjoint_gradient(lambda k, x: solver_step(it.policy, it.condition, k, x), states, torch.ones_like(states[-1]), it.parameters)


@pytest.mark.parametrize("family, solver", SUBJECTS)
def test_checkpointing_changes_nothing(family, solver):
    it = subject(family, solver)
    plain = it.rollout(range(it.steps()), checkpoint=False, decode_checkpoint=False)
    recomputed = it.rollout(range(it.steps()))
    assert torch.equal(plain.images, recomputed.images)
    close(it.gradient(score(recomputed.images).sum()), it.gradient(score(plain.images).sum()), 1e-6)


# --- with respect to the initial noise ------------------------------------------------------------------------------------


def noise_gradient(it, rollout):
    return torch.autograd.grad(score(rollout.images).sum(), rollout.noise)[0]


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_noises_gradient_is_that_of_a_loop_by_hand(solver):
    """Of standard normal noise, whatever the solver scales it by."""
    it = subject("sd15", solver)
    rollout = it.rollout(range(it.steps()), noise_gradient=True)
    assert rollout.noise.is_leaf and abs(float(rollout.noise.detach().std()) - 1) < 0.1
    noise = rollout.noise.detach().clone().requires_grad_()
    expected = score(by_hand(it, lambda k, x, t, e: it.policy.pipeline.unet(x, t, e).sample, noise)).sum()
    close(noise_gradient(it, rollout), torch.autograd.grad(expected, noise)[0])


@pytest.mark.parametrize(
    "family, solver, h", [*(("sd15", solver, 1e-4) for solver in SOLVERS), ("sd15_img2img", None, 1e-4), ("sd3", None, 1e-3), ("flux", None, 1e-3)]
)
def test_the_noises_gradient_is_the_slope(family, solver, h):
    """By central differences in float64, as far as solvers compute in it."""
    it = Subject(family, solver)
    it.policy.pipeline.to(torch.float64)
    rollout = it.rollout(range(it.steps()), noise_gradient=True, decode=False)
    noise, along = rollout.noise.detach(), torch.randn(rollout.noise.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    after, before = (score(it.rollout([], noise=noise + step * along, decode=False).latents.double()).sum() for step in (h, -h))
    (gradient,) = torch.autograd.grad(score(rollout.latents.double()).sum(), rollout.noise)
    close((gradient * along).sum()[None], (after - before)[None] / (2 * h), 5e-3)


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_the_noise_is_put_where_it_was_drawn(family):
    it = subject(family)
    plain, rollout = it.rollout([]), it.rollout([0], noise_gradient=True)
    assert torch.equal(rollout.images, plain.images) and plain.noise is None
    again = it.rollout([], noise=rollout.noise.detach())
    assert torch.equal(again.images, plain.images) and torch.equal(again.finals[0], plain.latents)
    assert not torch.equal(it.rollout([], noise=-rollout.noise.detach()).images, plain.images)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    seedless = it.policy.condition(PROMPTS)
    assert torch.equal(differentiable_rollout(it.policy, seedless, grad_steps=[], generator=generators).images, plain.images)
    assert "prepare_latents" not in it.policy.pipeline.__dict__


def test_noise_that_does_not_fit_is_refused():
    it = subject("sd15")
    with pytest.raises(ValueError, match="noise has the shape"):
        it.rollout([], noise=torch.zeros(1, 4, 8, 8))
    given = it.policy.condition(PROMPTS, seeds=SEEDS, latents=torch.zeros(2, 4, 8, 8))
    with pytest.raises(ValueError, match="leave `latents` out"):
        differentiable_rollout(it.policy, given, grad_steps=[], noise_gradient=True)


def test_memory_of_the_noises_gradient_does_not_grow_with_the_steps():
    it = subject("sd3")
    few, many = (it.policy.condition(PROMPTS, seeds=SEEDS, num_inference_steps=number) for number in (2, 8))

    def kept(condition, number, **options):
        return saved_bytes(lambda: differentiable_rollout(it.policy, condition, grad_steps=range(number), noise_gradient=True, decode=False, **options))

    latents = it.rollout([]).latents
    assert kept(many, 8, checkpoint=False) > 3 * kept(few, 2, checkpoint=False) > 30 * kept(few, 2)
    assert kept(many, 8) - kept(few, 2) <= 8 * 6 * latents.numel() * latents.element_size()


@pytest.mark.parametrize("steps, again", [([2], 0), ([1, 2], 2)])
def test_a_single_step_with_gradient_is_not_computed_again_by_itself(steps, again):
    it = subject("sd3")
    gradients, calls = [], []
    for checkpoint in (None, True, False):
        number = []

        def count(forward, *args, number=number, **kwargs):
            number.append(1)
            return forward(*args, **kwargs)

        with it.policy.denoising(count):
            images = it.rollout(steps, checkpoint=checkpoint).images
        gradients.append(it.gradient(images.square().sum()))
        calls.append(len(number) - it.steps())
    assert calls == [again, len(steps), 0]
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert gradients[0].abs().max() > 0


def saved_bytes(make):
    """What autograd keeps for the way back, and checkpoints do not."""
    total = [0]

    def pack(x):
        total[0] += x.numel() * x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        make()
    return total[0]


@pytest.mark.parametrize("family, solver", [("sd15", "HeunDiscreteScheduler"), ("sd3", None)])
def test_memory_does_not_grow_with_the_gradient_steps(family, solver):
    it = subject(family, solver)
    number = it.steps()
    one, all_ = (saved_bytes(lambda s=s: it.rollout(range(s, number), checkpoint=True)) for s in (number - 1, 0))
    plain_one, plain_all = (saved_bytes(lambda s=s: it.rollout(range(s, number), checkpoint=False)) for s in (number - 1, 0))
    latents = it.rollout([]).latents
    assert plain_all > 3 * plain_one > 30 * one
    assert all_ - one <= 8 * number * latents.numel() * latents.element_size()
    assert saved_bytes(lambda: it.rollout([], decode=False)) == 0


# --- where the walk ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, solver", SUBJECTS)
def test_stopping_decodes_the_predicted_clean_sample(family, solver):
    it = subject(family, solver)
    calls, k = [0], 1
    handles = [m.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1)) for m in it.policy.denoisers.values()]
    rollout = it.rollout([k], stop_step=k)
    for handle in handles:
        handle.remove()
    whole = it.rollout([k])
    assert torch.equal(rollout.steps[k].model_output, whole.steps[k].model_output)
    assert not torch.equal(rollout.images, whole.images)
    assert len(rollout.states) == k + 1
    output, x = rollout.steps[k].model_output, rollout.states[k]
    if family.startswith("sd15"):
        abar = it.policy.stock_scheduler.alphas_cumprod[int(rollout.timesteps[k])]
        # Euler's and Heun's states are not scaled down with the noise.
        scaled = x * abar.sqrt() if solver in ("EulerDiscreteScheduler", "HeunDiscreteScheduler") else x
        expected = (scaled - (1 - abar).sqrt() * output) / abar.sqrt()
    else:
        expected = x - rollout.timesteps[k] / 1000 * output
    close(rollout.latents, expected, 1e-4)
    assert it.gradient(score(rollout.images).sum()).norm() > 0


@pytest.mark.parametrize(
    "name, options",
    [
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}), ("UniPCMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True}), ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}), ("EDMDPMSolverMultistepScheduler", {"prediction_type": "epsilon"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("k", [0, 2])
def test_stopping_on_solvers_off_the_table_decodes_the_clean_sample_at_their_own_level(name, options, k):
    pipeline = FAMILIES["sd15"].build()
    kept = {} if name.startswith("EDM") else pipeline.scheduler.config
    pipeline.scheduler = getattr(diffusers, name).from_config({**kept, "_class_name": name, **options})
    policy = Policy(pipeline, **FAMILIES["sd15"].call)
    policy.add_lora(rank=2)
    rollout = differentiable_rollout(policy, policy.condition(PROMPTS, seeds=SEEDS), grad_steps=[k], stop_step=k, checkpoint=False)
    solver = copy.deepcopy(policy.stock_scheduler)
    solver.set_timesteps(FAMILIES["sd15"].call["num_inference_steps"])
    x, output, sigma = rollout.states[k].double(), rollout.steps[k].model_output.double(), solver.sigmas[k].double()
    if name.startswith("EDM"):
        expected = solver.precondition_outputs(x, output, sigma)
    else:
        alpha = 1 / (sigma**2 + 1).sqrt()
        expected = (x - alpha * sigma * output) / alpha
    close(rollout.latents, expected.float(), 1e-4)
    assert torch.autograd.grad(score(rollout.images).sum(), policy.trainable_parameters()[-1])[0].isfinite().all()


def test_stopping_saves_the_later_denoiser_calls(sd3):
    transformer, calls = sd3.policy.pipeline.transformer, [0]
    forward = transformer.forward

    def counted(*args, **kwargs):
        calls[0] += 1
        return forward(*args, **kwargs)

    transformer.forward = counted
    sd3.rollout([1], stop_step=1)
    assert calls[0] == 2


@pytest.mark.parametrize(
    "grad_steps, options, message",
    [
        ([-1], {}, "grad_steps count solver steps from 0"),
        ([1.5], {}, "grad_steps must be whole numbers"),
        (2, {}, "grad_steps must be whole numbers"),
        ([4], {}, "grad_steps names step 4, but the call took 4 solver steps, 0 to 3"),
        ([0], {"stop_step": -1}, "stop_step count solver steps from 0"),
        ([0], {"stop_step": 0.5}, "stop_step must be a whole number"),
        ([0], {"stop_step": 9}, "stop_step names step 9"),
        ([], {"noise": [0.0]}, "noise must be a Tensor"),
        ([], {"noise": torch.zeros(2, 4, 8, 8, dtype=torch.long)}, "noise must be a tensor of finite floats"),
        ([], {"noise": torch.full((2, 4, 8, 8), torch.nan)}, "noise must be a tensor of finite floats"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_by_name(grad_steps, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        subject("sd3").rollout(grad_steps, decode=False, **options)


def test_gradients_beyond_the_stop_are_refused():
    it = subject("sd3")
    with pytest.raises(ValueError, match="reach beyond"):
        it.rollout([2], stop_step=1)
    with pytest.raises(ValueError, match="seeds"):
        differentiable_rollout(it.policy, it.policy.condition(PROMPTS), grad_steps=[0])


# --- the reference, and the policy's own kernels -------------------------------------------------------------------------


@pytest.mark.parametrize("family, solver", SUBJECTS)
def test_outputs_along_are_those_of_the_rollout(family, solver):
    it = subject(family, solver)
    rollout = it.rollout([1, 2])
    again = outputs_along(it.policy, rollout)
    assert sorted(again) == [1, 2]
    for k in (1, 2):
        close(again[k].model_output, rollout.steps[k].model_output.detach(), 1e-6)
    reference = outputs_along(it.policy, rollout, reference=True)
    penalty = sum(draft.deviation(rollout.steps[k].model_output, reference[k].model_output, per_dim=1) for k in (1, 2))
    assert (penalty > 0).all() and it.gradient(penalty.sum()).norm() > 0


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_stochastic_rollouts_are_the_policys(family):
    it = subject(family, "DDIMScheduler" if family == "sd15" else None)
    trajectory = it.policy.rollout(it.condition)
    rollout = it.rollout(range(4), stochastic=True)
    assert torch.equal(rollout.latents, trajectory.final)
    stochastic = trajectory.stochastic.nonzero().flatten().tolist()
    assert [k for k in range(4) if rollout.steps[k].transition is not None] == stochastic
    with torch.no_grad(), it.policy.reference():
        reference, expected = outputs_along(it.policy, rollout), it.policy.transitions(trajectory)
    k = stochastic[1]
    close(reference[k].transition.mean, expected[k].mean, 1e-6)
    assert torch.equal(reference[k].next_state, rollout.steps[k].next_state.detach())
    kl = draft.deviation(rollout.steps[k].model_output, reference[k].model_output, rollout.steps[k].transition, reference[k].transition, per_dim=1)
    close(kl.detach(), it.policy.transitions(trajectory)[k].kl(expected[k]), 1e-4)
    assert it.gradient(kl.sum(), retain_graph=True).norm() > 0


@pytest.mark.parametrize(
    "family, solver, stochastic", [("sd15", "DDIMScheduler", True), ("sd3", None, True), ("sd15", "EulerAncestralDiscreteScheduler", False)]
)
def test_step_seeds_govern_the_noise_of_the_steps(family, solver, stochastic):
    it = subject(family, solver)
    conditions = [it.policy.condition(PROMPTS, seeds=SEEDS, step_seeds=seeds) for seeds in (None, [1, 2], [1, 2], [3, 4])]
    stock, one, same, other = (differentiable_rollout(it.policy, c, grad_steps=[3], stochastic=stochastic, decode=False) for c in conditions)
    assert all(torch.equal(r.states[0], stock.states[0]) for r in (one, same, other))
    assert torch.equal(one.latents, same.latents)
    assert not any(torch.equal(a.latents, b.latents) for a, b in ((one, other), (one, stock)))
    again = outputs_along(it.policy, one)
    close(again[3].next_state.detach(), one.steps[3].next_state.detach(), 1e-6)


@pytest.mark.parametrize("family, solver", [("sd15", "DDIMScheduler"), ("sd3", None)])
def test_a_generator_governs_a_stochastic_rollout(family, solver):
    it = subject(family, solver)
    condition = it.policy.condition(PROMPTS)
    finals = []
    for seed in (4, 4, 5):
        generator = torch.Generator().manual_seed(seed)
        finals.append(differentiable_rollout(it.policy, condition, grad_steps=[3], stochastic=True, decode=False, generator=generator).latents)
    assert torch.equal(finals[0], finals[1]) and not torch.equal(finals[0], finals[2])


# --- single evaluations: DRaFT-LV and SRPO -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_low_variance_draft_through_a_pipeline(family):
    """The renoised sample's image is that of the chain if it is noised by what the chain denoised."""
    it = subject(family, "DDIMScheduler" if family == "sd15" else None)
    last = it.steps() - 1
    rollout, forward = it.rollout([last], stop_step=last), ForwardProcess(it.policy.scheduler)
    t = torch.full((2,), rollout.timesteps[last])
    alpha, sigma = (level(t).reshape(-1, 1, 1, 1) for level in (forward.alpha, forward.sigma))
    noise = (rollout.states[last] - alpha * rollout.latents.detach()) / sigma
    x = draft.renoised(rollout.latents, noise, alpha=alpha, sigma=sigma)
    clean = forward.to_x0(it.policy.predict(x, t, it.condition, guidance=True), x, t)
    images = decode_latents(it.policy, clean, it.condition)
    close(images, rollout.images, 1e-4)
    close(it.gradient(score(images).sum()), it.gradient(score(rollout.images).sum()), 1e-3)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_direct_alignment_through_a_pipeline(family):
    it = subject(family, "DDIMScheduler" if family == "sd15" else None)
    x0, forward = it.rollout([], decode=False).latents, ForwardProcess(it.policy.scheduler)
    noise, t = torch.randn(x0.shape, generator=torch.Generator().manual_seed(5)), torch.full((2,), 600.0)
    x = forward.add_noise(x0, noise, t)
    velocity = forward.to_velocity(it.policy.predict(x, t, it.condition), x, t)
    perfect = srpo.recovered_sample(x0, noise, forward.to_velocity(forward.target(x0, noise, t), x, t), sigma=0.6, sigma_next=0.5)
    close(perfect, x0, 1e-5)
    images = decode_latents(it.policy, srpo.recovered_sample(x0, noise, velocity, sigma=0.6, sigma_next=0.5), it.condition)
    assert it.gradient(srpo.srpo_loss(brightness(images), brightness(images)).sum()).norm() > 0


# --- videos --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, solver", [("wan", "FlowMatchEulerDiscreteScheduler"), ("cogvideox", "CogVideoXDDIMScheduler")])
@pytest.mark.parametrize("mode, frame_mode", [("last", "random"), ("random", "ends"), ("specific", "alternate")])
def test_vader_is_autograd_of_the_end_of_the_chain(family, solver, mode, frame_mode):
    """Step by step from the state at the cut, the whole video decoded and its frames scored one by one."""
    it, draws = subject(family, solver), torch.Generator().manual_seed(6)
    steps = vader.grad_steps(it.steps(), draws, mode=mode)
    frames = vader.frame_indices(5, draws, mode=frame_mode)
    assert steps == {"last": [3], "random": [2, 3], "specific": [1, 2, 3]}[mode] and len(frames) == {"random": 1, "ends": 3, "alternate": 3}[frame_mode]
    rollout = it.rollout(steps, frames=frames)
    state = rollout.states[steps[0]]
    with torch.enable_grad():
        for k in steps:
            state = solver_step(it.policy, it.condition, k, state)
        video = it.policy.decode(state, it.condition)
        rewards = brightness(video[:, frames].flatten(0, 1))
    close(rollout.images, video[:, frames], 1e-4)
    expected = it.gradient(rewards.reshape(-1, len(frames)).mean(1).sum())
    close(it.gradient(brightness(rollout.images).sum()), expected, 1e-3)


# --- pipelines that write into their latents ------------------------------------------------------------------------------


class OneBuffer:
    """A step callback that keeps all states of a call in the first one's tensor, as some pipelines do."""

    def __call__(self, pipeline, k, timestep, given):
        if k == 0:
            self.buffer = given["latents"].clone()
        self.buffer[:] = given["latents"]
        return {"latents": self.buffer}


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_state_that_the_pipeline_overwrites_has_its_own_gradient(checkpoint):
    def gradient(**call):
        it = Subject("sd15")
        condition = it.policy.condition(PROMPTS, seeds=SEEDS, guidance_scale=1.0, **call)
        differentiable_rollout(it.policy, condition, grad_steps=range(4), checkpoint=checkpoint).images.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in it.policy.trainable_parameters()])

    expected = gradient()

    close(gradient(callback_on_step_end=OneBuffer()), expected)


def test_a_pipeline_that_decodes_without_a_gradient_is_named():
    """Its renderer runs under torch.no_grad; it decodes by another name, and is no denoiser."""
    case = CASES["ShapEPipeline"][0]
    policy = Policy(case.build(), **case.call)
    assert set(policy.denoisers) == {"prior"}
    policy.add_lora(rank=2)
    condition = policy.condition(["a cat"], seeds=[1])
    with pytest.raises(GradientError, match="The latents have a graph, the images have none"):
        check_gradient(policy, condition, lambda images: images.flatten(1).mean(1), grad_steps=[0])
    assert differentiable_rollout(policy, condition, grad_steps=[0], decode=False).latents.requires_grad
