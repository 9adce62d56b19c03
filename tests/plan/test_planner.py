"""Plans against the runs that they are of."""

import pytest
import torch
from shallow_models import shallow as shallow

from benchmarks import plan as benchmark
from diffusers_align.plan import plan, report
from diffusers_align.plan.planner import component_of


@pytest.mark.long
@pytest.mark.parametrize("name", benchmark.CASES)
def test_a_plan_is_within_a_tenth_of_the_run(name, shallow, tmp_path):  # noqa: F811
    model = shallow[benchmark.CASES[name][1]]
    made = benchmark.planned(name, model, tmp_path)
    work, _ = benchmark.run(name, model, tmp_path)
    assert benchmark.of_an_epoch(made) == pytest.approx(work.peak, rel=0.1)
    assert max(stage.work.kept for stage in made.stages) == pytest.approx(work.kept, rel=0.1, abs=1024)
    assert made.rows[1] == work.rows[True]
    assert made.rows[0] == pytest.approx(work.rows[False], abs=16)  # what a run finds out by trying, once, over two epochs
    assert made.flops == pytest.approx(work.flops, rel=0.1)


@pytest.mark.slow
def test_checkpointing_batches_and_a_small_card_are_weighed():
    made = plan("flow_grpo_mini_sd3", gpu="24GB", train_batch_size=8, num_inference_steps=3, eval_num_inference_steps=3, kl_weight=0)
    (step,) = [stage for stage in made.stages if stage.has_gradient]
    assert step.peaks[True] < 0.6 * step.peaks[False] and made.fits and not made.advice
    assert made.total == made.frozen + sum(made.state.values()) + made.stored + made.activations
    text = report(made)
    for words in ("transformer", "LoRA", "with --gradient_checkpointing", "decoding", "text encoding", "rows through the denoiser", "Fits: 49.1 MB within"):
        assert words in text


@pytest.mark.long
def test_a_card_that_is_too_small_gets_advice_that_fits():
    made = plan("dpo_mini_sd3", gpu="60MB", num_samples_per_epoch=64, train_batch_size=32)
    assert not made.fits and made.advice and made.advice[0].startswith("--gradient_checkpointing")
    assert "Does not fit" in report(made)
    none = plan("dpo_mini_sd3", gpu="10MB", num_samples_per_epoch=2, train_batch_size=2)
    assert "as small as its flags make it" in report(none)


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["dspo_mini_sd3", "alignprop_mini_sd", "refl_mini_sd3"])
def test_scripts_that_share_a_step_have_a_plan(recipe, shallow):  # noqa: F811
    model = shallow["mini-sd" if recipe.endswith("mini_sd") else "mini-sd3"]
    made = plan(recipe, gpu="24GB", pretrained_model_name_or_path=model, num_samples_per_epoch=8, train_batch_size=4, num_inference_steps=3)
    assert made.fits and made.rows[1] > 0 and made.flops > 0 and any(stage.has_gradient for stage in made.stages)


@pytest.mark.long
def test_the_kl_at_a_share_of_the_steps_takes_fewer_rows(shallow):  # noqa: F811
    flags = {
        "pretrained_model_name_or_path": shallow["mini-sd3"],
        "num_prompts_per_epoch": 1,
        "group_size": 4,
        "train_batch_size": 4,
        "num_inference_steps": 5,
        "eval_num_inference_steps": 5,
    }
    whole, half = (plan("flow_grpo_mini_sd3", kl_share=share, **flags) for share in (1.0, 0.5))
    assert whole.rows[1] == half.rows[1] == 8, "the recipe's window is of two steps"
    assert (whole.rows[0], half.rows[0]) == (20 + 8, 20 + 4)


@pytest.mark.long
def test_less_work_has_its_plan():
    """Rows are those of the run: several steps in a forward are as many rows, rows without the prompt lose their gradient, scouts take theirs."""
    flags = {"num_prompts_per_epoch": 1, "group_size": 4, "train_batch_size": 4, "num_inference_steps": 5, "eval_num_inference_steps": 5, "kl_weight": 0}
    plain, joint, scouts = (
        plan("flow_grpo_mini_sd3", **flags, **own) for own in ({}, {"replay_steps_per_forward": 2}, {"scout_pool": 12, "same_latent": False})
    )
    assert plain.rows == joint.rows == (20, 8) and scouts.rows == (20 + 12 * 2, 8)
    guided, less = (plan("flow_grpo_mini_sd3", **flags, guidance_scale=3.0, unconditional_gradient=whole) for whole in (True, False))
    assert guided.rows == (40, 16) and less.rows == (40 + 8, 8)
    assert joint.activations > 1.5 * plain.activations and less.activations < 0.7 * guided.activations


@pytest.mark.long
def test_a_plan_knows_what_is_away_and_what_is_packed(shallow):  # noqa: F811
    """By arithmetic on the components of one plan: each flag takes off what it says."""
    size = {
        "pretrained_model_name_or_path": shallow["mini-sd"],
        "num_samples_per_epoch": 8,
        "train_batch_size": 2,
        "num_inference_steps": 2,
        "sde_window": (0, 1),
    }
    whole, away = plan("ddpo_mini_sd", **size), plan("ddpo_mini_sd", **size, offload_text_encoders=True)
    encoders = sum(part.size for name, part in whole.components.items() if name.startswith("text_encoder"))
    assert away.away == encoders > 0 == whole.away and away.stored < whole.stored
    assert whole.total - away.total == encoders + whole.stored - away.stored
    packed = plan("ddpo_mini_sd", **size, base_quantization="torchao_int8", gradient_checkpointing=True)
    assert packed.components["text_encoder"] == whole.components["text_encoder"]
    assert packed.components["unet"].size < whole.components["unet"].size and packed.unpacked > 0 == whole.unpacked


def test_a_quantised_layer_weighs_its_bytes_and_scales():
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64)) for _ in range(2)])})
    weights, biases = 4 * 64 * 32, 2 * 4 * (32 + 64)
    assert component_of(model).size == 4 * weights + biases and component_of(model).unpacked == 0
    eight, four = component_of(model, "torchao_int8"), component_of(model, "bnb_4bit")
    assert eight.size == weights + 2 * 4 * (32 + 64) + biases and four.size == weights // 2 + 4 * weights // 64 + biases
    assert eight.unpacked == 2 * 4 * 64 * 32, "a block's two layers"
    assert four.unpacked == 4 * 64 * 32, "one layer"
