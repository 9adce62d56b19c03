"""How a denoiser is computed: compiled and with other attention kernels, replays are of the policy that drew, and files have plain names."""

import copy
from argparse import Namespace

import pytest
import torch
from diffusers.models import attention_dispatch
from lora_tools import drawn, moved, stock
from safetensors.torch import load_file
from tiny_pipelines import FAMILIES
from torch._dynamo.utils import counters

from diffusers_align import Policy
from diffusers_align.training.run import kernels
from diffusers_align.training.run.kernels import compile_denoiser, set_up, use_attention

torch.set_num_threads(1)
PROMPTS, SEEDS = ["a cat", "a dog"], [0, 1]
PLAIN = {"gradient_checkpointing": False, "attention_backend": None, "compile": False}


def policy_of(name, **lora):
    policy = Policy(FAMILIES[name].build(), **FAMILIES[name].call)
    moved(policy.add_lora(rank=4, **lora), by=0.05)
    return policy, next(iter(policy.denoisers.values()))


def ratios(policy, trajectory, gradients=True):
    """exp(log p - log p of the roll-out) of all steps; gradients are left in the LoRA."""
    found = []

    def look(k, kernel):
        log_prob = kernel.log_prob(trajectory.actions[:, k])
        found.append((log_prob.detach() - trajectory.log_probs[:, k]).exp())
        if gradients:
            log_prob.sum().backward()

    with torch.set_grad_enabled(gradients):
        policy.replay(trajectory, look)
    return torch.stack(found)


@pytest.fixture(autouse=True)
def from_scratch():
    torch._dynamo.reset()
    counters.clear()
    yield
    attention_dispatch._AttentionBackendRegistry.set_active_backend(attention_dispatch.AttentionBackendName.NATIVE)


def reference_of(policy, trajectory):
    with policy.reference():
        return policy.transitions(trajectory, [1])[1].mean


# --- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_rollouts_replays_and_the_reference_are_those_of_one_graph(name):
    """Block by block in the first, whole in the second. Gated calls and switched LoRAs come by the same graphs again, and log-probabilities are equal."""
    policy, module = policy_of(name)
    eager = policy.rollout(PROMPTS, seeds=SEEDS)
    assert torch.equal(ratios(policy, eager), torch.ones(len(eager.noisy_steps), 2))
    gradients, reference = [parameter.grad for parameter in policy.trainable_parameters()], reference_of(policy, eager)
    compile_denoiser(module, backend="aot_eager")
    graphs = []
    for _ in range(3):
        for parameter in policy.trainable_parameters():
            parameter.grad = None
        trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
        torch.testing.assert_close(trajectory.actions, eager.actions, rtol=1e-5, atol=1e-5)
        for with_gradients in (True, False):
            assert torch.equal(ratios(policy, trajectory, with_gradients), torch.ones(len(trajectory.noisy_steps), 2))
        assert torch.equal(policy.transition(trajectory, 1).mean, policy.transitions(trajectory)[1].mean), "a step by itself, behind gated calls"
        torch.testing.assert_close(reference_of(policy, trajectory), reference, rtol=1e-5, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2] > 0, "no call is compiled twice"
    for parameter, gradient in zip(policy.trainable_parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7)


def test_calls_without_gradients_keep_no_graph_and_run_that_of_calls_with_them(monkeypatch):
    policy, module = policy_of("flux")
    modes, trajectory = [], policy.rollout(PROMPTS, seeds=SEEDS)
    forward = module.transformer_blocks[0].forward
    module.transformer_blocks[0].forward = lambda *args, **kwargs: modes.append(torch.is_grad_enabled()) or forward(*args, **kwargs)
    monkeypatch.setattr(type(module), "compile_repeated_blocks", lambda self, backend: None)
    compile_denoiser(module)
    assert not policy.rollout(PROMPTS, seeds=SEEDS).actions.requires_grad
    assert not policy.transitions(trajectory, [1])[1].mean.requires_grad and policy.transition(trajectory, 1).mean.requires_grad
    assert modes and all(modes)


def test_the_flags_say_how_a_denoiser_is_computed(monkeypatch):
    seen, module = [], FAMILIES["flux"].build().transformer
    monkeypatch.setattr(kernels, "compile_denoiser", seen.append)
    set_up(Namespace(**PLAIN), "transformer", module)
    assert not seen and not module.is_gradient_checkpointing
    set_up(Namespace(**{**PLAIN, "compile": True, "gradient_checkpointing": True}), "transformer", module)
    assert seen == [module] and module.is_gradient_checkpointing


@pytest.mark.slow
def test_a_compiled_denoisers_lora_has_plain_names_and_its_copies_are_not_compiled(tmp_path):
    for name in ("flux", "sd3"):
        policy, module = policy_of(name)
        policy.save_lora(tmp_path / name / "plain")
        compile_denoiser(module, backend="eager")
        policy.save_lora(tmp_path / name / "compiled")
        plain, compiled = (load_file(tmp_path / name / kind / "pytorch_lora_weights.safetensors") for kind in ("plain", "compiled"))
        assert plain.keys() == compiled.keys() and all(torch.equal(plain[key], compiled[key]) for key in plain)
        assert copy.deepcopy(module).forward.__func__ is type(module).forward
        want, fresh = drawn(stock(policy), name), FAMILIES[name].build()
        fresh.load_lora_weights(tmp_path / name / "compiled")
        torch.testing.assert_close(drawn(fresh, name), want, rtol=1e-5, atol=1e-5)


# --- attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_replays_are_of_the_rollouts_kernels(backend):
    policy, module = policy_of("flux")
    own = policy.rollout(PROMPTS, seeds=SEEDS)
    set_up(Namespace(**{**PLAIN, "attention_backend": backend}), "transformer", module)
    assert {block.attn.processor._attention_backend for block in module.transformer_blocks} == {backend}
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    torch.testing.assert_close(trajectory.actions, own.actions, rtol=1e-4, atol=1e-4)
    assert torch.equal(ratios(policy, trajectory), torch.ones(len(trajectory.noisy_steps), 2))
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in module.named_parameters() if "to_q.lora_B" in name)


@pytest.mark.parametrize(
    "name, backend, message",
    [
        ("flux", "nativ", "diffusers has flash, .*native.*did you mean 'native'"),
        ("flux", "sage", "does not run here, on cpu in float32: .*sage"),
        ("sd15", "native", r"the attention of the unet \(UNet2DConditionModel\) goes by none of diffusers' back ends"),
    ],
)
def test_a_back_end_that_cannot_have_its_effect_is_refused(name, backend, message):
    module = next(iter(FAMILIES[name].build().components[key] for key in ("transformer", "unet") if key in FAMILIES[name].build().components))
    with pytest.raises(ValueError, match=f"(?i)--attention_backend {backend}.*{message}"):
        use_attention("unet" if name == "sd15" else "transformer", module, backend)


def test_kernels_without_a_gradient_are_refused(monkeypatch):
    """As quantised ones are: nothing before an attention would be trained, without a word."""
    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", lambda query, key, value, backend: query.detach())
    with pytest.raises(ValueError, match="--attention_backend native has no gradient"):
        use_attention("transformer", FAMILIES["flux"].build().transformer, "native")
