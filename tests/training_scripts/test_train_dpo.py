"""The scripts that learn from a data set, on data written here: what a pair shares, where training starts, and that it resumes."""

import argparse
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image
from script_tools import assert_same_lora, assert_same_run, load_script, make_run, rows, run_script, run_script_on_two_processes, write_task
from tiny_pipelines import FAMILIES

from diffusers_align import embedded
from diffusers_align.algorithms.diffusion_dpo import diffusion_dpo_loss
from diffusers_align.algorithms.diffusion_sdpo import safeguard_scale, scale_gradient
from diffusers_align.algorithms.dspo import dspo_loss
from diffusers_align.condition import Condition
from diffusers_align.data import LazyImage, TensorCache
from diffusers_align.driving import prompt_form
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.policy import Policy
from diffusers_align.training.offline.data_latents import LatentImages, Position, _held_by, disk_cache, image_shape
from diffusers_align.training.offline.descent import Measured, Reference, descend, measure
from diffusers_align.training.offline.held_out_pairs import trained_on
from diffusers_align.training.offline.loop import OfflineTraining, load_policy
from diffusers_align.training.offline.noised_latents import predict, predict_together
from diffusers_align.training.offline.pairs_and_batches import Examples, pairs_of
from diffusers_align.training.offline.rows import load_rows
from diffusers_align.training.run.costs import Cost
from diffusers_align.training.run.run import Run
from tests.families.cases import CASES
from tests.families.parts import quiet

torch.set_num_threads(1)
CAPTIONS = ("a cat", "two dogs", "a green apple", "a cat", "three birds", "a cat on grass")
MINI_SD = {"pretrained_model_name_or_path": "mini-sd", "call_kwargs": "{}"}
SET = {"dpo": "pair", "dspo": "pair", "kto": "binary", "rwr": "scored"}
# Each script on one of the embedded models, with some of what it can do besides.
FLAGS = {
    "dpo": {},
    "dspo": {**MINI_SD, "dspo_beta": 0.5, "two_pass": True},
    "kto": {"gamma": 0.5},
    "rwr": {**MINI_SD, "temperature": 0.5, "kl_weight": 0.1},
}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with prompts, rewards, and a data set of each kind: winners are blue."""
    folder = write_task(tmp_path_factory.mktemp("task"))
    generator, sets = torch.Generator().manual_seed(0), {name: [] for name in ("pair", "binary", "scored", "captioned")}
    for i, caption in enumerate(CAPTIONS):
        for name, color in (("w", (20, 20, 220)), ("l", (200, 60, 20))):
            noise = torch.randint(-20, 20, (40, 32, 3), generator=generator)
            pixels = (torch.tensor(color) + noise).clamp(0, 255).byte().numpy()
            Image.fromarray(pixels).save(folder / f"{i}{name}.png")
            row = {"prompt": caption, "image": f"{i}{name}.png"}
            sets["binary"].append({**row, "label": name == "w"})
            sets["scored"].append({**row, "reward": i / 10 + (name == "w")})
            sets["captioned"].append(row)
        sets["pair"].append({"prompt": caption, "image_0": f"{i}w.png", "image_1": f"{i}l.png", "label_0": 1})
    for name, found in sets.items():
        write(folder / f"{name}.jsonl", found)
    return folder


def write(path, found):
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def train(name, out, task, **flags):
    """Two batches per epoch, an optimizer step each."""
    return run_script(name, out, task, **{"dataset_name": task / f"{SET[name]}.jsonl", "num_samples_per_epoch": 4, **flags})


@pytest.fixture(scope="module")
def finished(task, tmp_path_factory):
    """Runs of two epochs, made when first asked for."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = train(name, tmp_path_factory.mktemp("runs") / name, task, num_epochs=2, **FLAGS[name])
        return made[name]

    return run


def prepared(folder, task, **flags):
    """A run without a script, its policy with a LoRA that has learned something, and what the scripts make of a data set of pairs."""
    script = load_script("dpo")
    values = {"pretrained_model_name_or_path": "mini-sd3", "call_kwargs": '{"max_sequence_length": 1}', "num_inference_steps": 3, "rank": 4}
    values |= {"dataset_name": task / "pair.jsonl", "output_dir": folder, "train_batch_size": 4, "num_samples_per_epoch": 8, **flags}
    run = make_run(folder, **vars(script.parse_args([f"--{name}" if value is True else f"--{name}={value}" for name, value in values.items()])))
    run.batches(run.args.num_samples_per_epoch)
    found = load_rows(run, "pair")
    policy = load_policy(run)
    for i, parameter in enumerate(policy.trainable_parameters()):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(i))
    return run, policy, found, Examples(run, policy, found)


# --- the four scripts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SET)
def test_a_run_leaves_metrics_and_a_lora_that_stock_pipelines_load(finished, name):
    out = finished(name)
    assert [row["epoch"] for row in rows(out)] == [0, 1]
    assert all(math.isfinite(value) for row in rows(out) for value in row.values())
    assert rows(out)[0]["grad_norm"] > 0
    model = FLAGS[name].get("pretrained_model_name_or_path", "mini-sd3")
    pipe, call = DiffusionPipeline.from_pretrained(embedded.path(model)), {"max_sequence_length": 1} if model == "mini-sd3" else {}

    def draw():
        return pipe("a cat", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="pt", **call).images

    before = draw()
    pipe.load_lora_weights(out)
    assert (draw() - before).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["dpo", "dspo"])
@pytest.mark.parametrize("two_pass", [True, False])
def test_training_starts_at_the_reference_exactly(task, tmp_path, name, two_pass):
    # One optimizer step: all of the epoch is measured before it.
    flags = {"gradient_accumulation_steps": 2, "two_pass": True} if two_pass else {"gradient_accumulation_steps": 2, **MINI_SD}
    (first,) = rows(train(name, tmp_path / "run", task, **flags))
    assert (first["accuracy"], first["margin"], first["gradient_weight"]) == (0.5, 0, 0.5)
    assert first["error_w_change"] == first["error_l_change"] == 0
    assert first["error_w"] > 0 and first["error_l"] > 0 and first["grad_norm"] > 0
    if name == "dpo":
        assert first["loss"] == torch.tensor(2.0).log().item()
    else:
        assert first["ref_distance"] == 0 and first["loss"] == pytest.approx(first["error_w"], rel=1e-6)


def test_held_out_pairs_are_judged_at_validations(task, tmp_path, capsys):
    own = [json.loads(line) for line in (task / "pair.jsonl").read_text().splitlines()]
    renamed = [{"prompt": row["prompt"], "left": row["image_0"], "image_1": row["image_1"], "label_0": 1} for row in own]
    (task / "elsewhere" / "test").mkdir(parents=True)
    for name in ("named.jsonl", "elsewhere/test/metadata.jsonl"):
        write(task / name, renamed)
    flags = {"dataset_name": task / "named.jsonl", "column_map": "image_0=left", "image_root": task}
    flags |= {"eval_dataset_name": task / "elsewhere", "eval_dataset_split": "test"}
    flags |= {"validation_epochs": 1, "num_epochs": 2, "learning_rate": 1e-2, "timestep_scheme": "uniform"}
    train("dpo", tmp_path / "run", task, num_samples_per_epoch=8, train_batch_size=4, **flags)
    found = re.findall(r"implicit accuracy on 6 training pairs: (\S+) \[\S+ \S+\], margin (\S+)", capsys.readouterr().out)
    assert len(found) == 2 and float(found[-1][0]) > 0.5 and float(found[-1][1]) > float(found[0][1])


def test_pairs_are_judged_by_the_weights_that_are_saved(task, tmp_path, capsys):
    """A run that ends before its first validation: once, at its end. One of the pairs is trained on, under another spelling of its file."""
    own = [json.loads(line) for line in (task / "pair.jsonl").read_text().splitlines()]
    mixed = [{**own[0], "image_0": f"../{task.name}/{own[0]['image_0']}"}, {**own[1], "image_1": own[2]["image_1"]}]
    flags = {"eval_dataset_name": write(task / "mixed.jsonl", mixed), "learning_rate": 1e-2, "num_samples_per_epoch": 8, "train_batch_size": 4}
    out = train("dpo", tmp_path / "run", task, validation_epochs=4, num_epochs=2, **flags)
    (line,) = re.findall(r"implicit accuracy on 2 pairs \(1 of them trained on\): (\S+ \[\S+ \S+\]), margin", capsys.readouterr().out)
    assert f"| implicit accuracy on 2 pairs (1 of them trained on) | {line} |" in (out / "README.md").read_text()


def test_pairs_are_known_by_prompt_and_both_images():
    a, b, c = (LazyImage(Path(f"{name}.png")) for name in "abc")
    rows = [{"prompt": "p", "image": a, "label": True}, {"prompt": "p", "image": LazyImage(Path("folder/../b.png")), "label": False}]
    pair = {"prompt": "p", "image_0": b, "image_1": a}
    assert trained_on([pair, {**pair, "prompt": "q"}, {**pair, "image_0": c}], rows) == 1
    assert trained_on([{"prompt": "p", "image_0": LazyImage(b"1", "x"), "image_1": LazyImage(b"2")}], rows) == 0


def test_kto_and_rwr_start_where_their_pages_say(task, tmp_path):
    (first,) = rows(train("kto", tmp_path / "kto", task, gradient_accumulation_steps=2))
    assert (first["loss"], first["accuracy"], first["gradient_weight"], first["reference_point"]) == (0.5, 0.5, 1, 0)
    (first,) = rows(train("rwr", tmp_path / "rwr", task, gradient_accumulation_steps=2, weights="top_q", top_q=0.5, kl_weight=1.0))
    # The better half has weight 2, so 1 on average over all, which is what is drawn from.
    assert first["ref_distance"] == 0 and first["weighted_error"] == first["loss"] == pytest.approx(first["error"], rel=1e-6)
    assert first["effective_samples"] == pytest.approx(6) and first["max_weight"] == 2


def test_no_reward_is_needed(task, tmp_path):
    argv = ["--pretrained_model_name_or_path", "mini-sd", "--dataset_name", str(task / "pair.jsonl"), "--output_dir", str(tmp_path / "run")]
    sizes = {"num_samples_per_epoch": 2, "train_batch_size": 2, "num_epochs": 1, "num_inference_steps": 2, "num_eval_samples": 2, "num_validation_images": 2}
    load_script("dpo").main([*argv, *(word for name, value in sizes.items() for word in (f"--{name}", str(value)))])
    assert (tmp_path / "run" / "before_after.png").is_file() and "reward" not in rows(tmp_path / "run")[0]


# --- what a pair shares ------------------------------------------------------------------------------------------------


def test_winner_loser_and_reference_see_one_noise_time_and_caption(task, tmp_path, monkeypatch):
    noised, seen, add_noise, predict = [], [], ForwardProcess.add_noise, Policy.predict

    def record_noise(self, x0, noise, t):
        noised.append((x0, noise, t))
        return add_noise(self, x0, noise, t)

    def record_call(self, latents, timesteps, condition, guidance=False):
        layer = next(m for m in next(iter(self.denoisers.values())).modules() if isinstance(m, BaseTunerLayer))
        seen.append((latents.detach(), timesteps, tuple(condition.prompts), layer.disable_adapters, guidance))
        return predict(self, latents, timesteps, condition, guidance)

    monkeypatch.setattr(ForwardProcess, "add_noise", record_noise)
    monkeypatch.setattr(Policy, "predict", record_call)
    train("dpo", tmp_path / "run", task, proportion_empty_prompts=0.5, num_samples_per_epoch=8, train_batch_size=4)
    assert len(noised) == 4 and len(seen) == 4, "two batches: two images with noise, both seen in one call of the reference and one of the model"
    for (x0_w, noise_w, t_w), (x0_l, noise_l, t_l) in zip(noised[::2], noised[1::2]):
        assert torch.equal(noise_w, noise_l) and torch.equal(t_w, t_l) and not torch.equal(x0_w, x0_l)
        assert len(set(t_w.tolist())) == 4
    for reference, own in (seen[:2], seen[2:]):
        assert (reference[3], own[3]) == (True, False) and reference[4] is own[4] is False
        assert torch.equal(reference[0], own[0]) and torch.equal(reference[1], own[1]) and reference[2] == own[2]
        latents, times, prompts = reference[:3]
        assert torch.equal(times[:4], times[4:]) and prompts[:4] == prompts[4:] and not torch.equal(latents[:4], latents[4:])
    prompts = [prompt for call in seen for prompt in call[2]]
    assert "" in prompts and set(prompts) & set(CAPTIONS)


def test_pipelines_of_one_prompt_see_side_after_side(task, tmp_path, monkeypatch):
    run, policy, found, examples = prepared(tmp_path, task)
    sides, _, _ = examples.pairs(0, 0)
    asked, predict_all = [], Policy.predict
    monkeypatch.setattr(
        Policy, "predict", lambda self, x, t, condition, guidance=False: (asked.append(len(x)), predict_all(self, x, t, condition, guidance))[1]
    )
    for refused, expected in (((), [8]), (("others",), [8]), (("texts",), [4, 4])):
        monkeypatch.setitem(prompt_form._SINGLE, type(policy.pipeline), refused)
        asked.clear()
        measure(run, policy, *sides)
        assert asked == expected


def test_sides_together_answer_as_each_by_itself(task, tmp_path):
    """One call of all rows is the calls of each side up to rounding, in outputs and in the LoRA's gradient; a pair's prompts are encoded once."""
    run, policy, found, examples = prepared(tmp_path, task)
    sides, _, _ = examples.pairs(0, 0)
    encoded, gradients = [], []
    policy.pipeline.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len((args or [kwargs["input_ids"]])[0])), with_kwargs=True
    )
    for apart in (False, True):
        policy.prompt_memory.entries.clear()
        outputs = [predict(run, policy, side) for side in sides] if apart else predict_together(run, policy, sides)
        sum((output * (i + 1)).square().sum() for i, output in enumerate(outputs)).backward()
        gradients.append([*outputs, torch.cat([p.grad.flatten() for p in policy.trainable_parameters()])])
        for parameter in policy.trainable_parameters():
            parameter.grad = None
    assert gradients[0][2].norm() > 1e-3
    for together, by_itself in zip(*gradients):
        torch.testing.assert_close(together, by_itself, rtol=1e-4, atol=1e-5 * by_itself.abs().max().item())
    different = len(set(sides[0].condition.prompts))
    assert set(encoded) <= {1, 2, different}, "two probes by themselves and together, and the batch's different prompts"


@pytest.mark.parametrize("decay", [None, 0.5])
def test_no_gradient_goes_into_the_reference(task, tmp_path, decay):
    run, policy, found, examples = prepared(tmp_path, task)
    sides, _, _ = examples.pairs(0, 0)
    reference = Reference(run, policy, decay)
    reference(*sides)
    errors, ref_errors = [measured.error for measured in measure(run, policy, *sides)], [side.ref_error for side in sides]
    assert all(error.requires_grad for error in errors) and not any(error.requires_grad for error in ref_errors)
    diffusion_dpo_loss(*errors, *ref_errors, beta=5000.0).sum().backward()
    trained = {id(parameter) for parameter in policy.trainable_parameters()}
    parameters = [parameter for module in policy.denoisers.values() for parameter in module.parameters()]
    assert trained and all((parameter.grad is not None) == (id(parameter) in trained) for parameter in parameters)


def test_adapters_are_on_again_after_an_error_in_the_reference(task, tmp_path, monkeypatch):
    run, policy, found, examples = prepared(tmp_path, task)
    (side, _), _, _ = examples.pairs(0, 0)
    own = predict(run, policy, side).detach()
    parameters = [p.detach().clone() for p in policy.trainable_parameters()]
    for decay in (None, 0.9):
        reference = Reference(run, policy, decay)
        if decay:
            reference.lagging.values[0].zero_()
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of luck"):
            patch.setattr(Policy, "predict", lambda *_: (_ for _ in ()).throw(RuntimeError("out of luck")))
            reference(side)
        assert torch.equal(predict(run, policy, side), own)
        assert all(torch.equal(p, before) for p, before in zip(policy.trainable_parameters(), parameters))
        reference(side)
        assert not side.reference.requires_grad and not torch.equal(side.reference, own)


def test_the_reference_may_follow_the_model(task, tmp_path):
    run, policy, found, examples = prepared(tmp_path, task)
    (side, _), _, _ = examples.pairs(0, 0)
    reference = Reference(run, policy, 0.5)
    (parameter, *_), before = policy.trainable_parameters(), policy.trainable_parameters()[0].detach().clone()
    with torch.no_grad():
        parameter.add_(1.0)
    reference.follow()
    torch.testing.assert_close(reference.lagging.values[0], before + 0.5)


# --- gradients ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["safeguard", "dspo"])
def test_two_passes_give_the_gradient_of_one(task, tmp_path, name):
    run, policy, found, examples = prepared(tmp_path, task)
    sides, labels, weights = examples.pairs(0, 0)
    Reference(run, policy)(*sides)
    ref_errors, scales = [side.ref_error for side in sides], []

    def loss(winner, loser):
        if name == "dspo":
            return dspo_loss(winner.error, loser.error, *ref_errors, winner.distance, beta=20.0, dspo_beta=0.8)
        scale = safeguard_scale(*(side.residual(own.output) for side, own in zip(sides, (winner, loser))), mu=0.9, per_sample=True)
        scales.append(scale)
        return diffusion_dpo_loss(winner.error, scale_gradient(loser.error, scale), *ref_errors, beta=20.0, label=labels)

    gradients = []
    for two_pass in (False, True):
        run.args.two_pass = two_pass
        value, measured = descend(run, policy, loss, sides, 0.25)
        gradients.append(torch.cat([p.grad.flatten() for p in policy.trainable_parameters()]))
        assert value.shape == (4,) and not any(tensor.requires_grad for own in measured for tensor in (value, own.error, own.distance, own.output))
        for parameter in policy.trainable_parameters():
            parameter.grad = None
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6 * gradients[0].abs().max().item())
    assert name == "dspo" or bool((scales[0] < 1).any()), "the safeguard does something"


# Adam divides by the gradient's size, which would blow up rounding: not at this epsilon.
STEADY = {"num_samples_per_epoch": 8, "adam_epsilon": 0.1, "learning_rate": 0.1, "num_epochs": 2}


@pytest.mark.parametrize("name, flags", [("dpo", {"safeguard_mu": 0.9}), ("kto", {"gamma": 0.5, "beta": 20}), ("rwr", {})])
def test_results_do_not_depend_on_the_batch_size(task, tmp_path, name, flags):
    one = train(name, tmp_path / "one", task, train_batch_size=4, gradient_accumulation_steps=1, **STEADY, **flags)
    two = train(name, tmp_path / "two", task, train_batch_size=2, gradient_accumulation_steps=2, **STEADY, **flags)
    for mine, theirs in zip(rows(one), rows(two)):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4) and mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert_same_lora(one, two, rtol=1e-3, atol=1e-5)
    assert rows(one)[0]["loss"] != rows(one)[1]["loss"]


@pytest.mark.parametrize("batches, evaluations", [(1, 2), (2, 3)])
def test_kto_measures_a_step_of_one_batch_once(task, tmp_path, batches, evaluations):
    flags = {"train_batch_size": 4 // batches, "gradient_accumulation_steps": batches, "gamma": 0.5, "num_epochs": 2, "checkpointing_epochs": 1}
    out = train("kto", tmp_path, task, **flags)
    first, both = (Cost.read(out / name).denoiser_evaluations for name in ("checkpoint-1", "checkpoint-2"))
    assert both - first == 4 * evaluations, "the reference's and the model's; of several batches one has a graph at a time, so the model's again"


@pytest.mark.long
@pytest.mark.parametrize("name, flags", [("dpo", {}), ("kto", {"reference_point": "class_mean", "gamma": 0.5, "beta": 20})])
def test_results_do_not_depend_on_the_number_of_processes(task, tmp_path, name, flags):
    # At a step of two and gamma 1/2, each process sees images of one class only.
    flags |= {"train_batch_size": 2 if name == "kto" else 4, "gradient_accumulation_steps": 1, **STEADY}
    one = train(name, tmp_path / "one", task, **flags)
    flags |= {"dataset_name": task / f"{SET[name]}.jsonl"}
    two = run_script_on_two_processes(name, tmp_path / "two", task, **flags)
    for mine, theirs in zip(rows(one), rows(two)):
        assert mine.keys() == theirs.keys()
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4) and mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert_same_lora(one, two, rtol=1e-3, atol=1e-5)


# --- options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, logged",
    [
        ({"loss": "mapo"}, "margin"),
        ({"loss": "ipo", "sft_weight": 0.5, "safeguard_mu": 0.6, "error_weighting": "eps"}, "safeguard"),
        ({"inversion_steps": 2, **MINI_SD}, "margin"),
        ({"loss": "linear", "reference_decay": 0.5, "random_flip": True, "random_crop": True}, "linear_weight"),
    ],
)
def test_the_relatives_of_dpo_train(task, tmp_path, flags, logged):
    first = rows(train("dpo", tmp_path / "run", task, **flags))[-1]
    assert math.isfinite(first[logged]) and first["grad_norm"] > 0


@pytest.mark.parametrize("flags", [{"reference_point": "mismatched", "train_batch_size": 1}, {"reference_point": "class_mean", "utility": "logistic"}])
def test_kto_takes_pairs_and_other_reference_points(task, tmp_path, flags, capsys):
    (only,) = rows(train("kto", tmp_path / "run", task, dataset_name=task / "pair.jsonl", gamma=0.5, lambda_d=2.0, clamp=True, **flags))
    assert only["grad_norm"] > 0
    printed = capsys.readouterr().out
    assert "data: 6 desirable and 6 undesirable images, weighing 1 to 1" in printed
    assert "an epoch: 2 desirable and 2 undesirable images, weighing 2 to 1; KTO advises" in printed


def test_mismatched_images_get_the_next_ones_captions(task, tmp_path):
    run, policy, found, examples = prepared(tmp_path, task, proportion_empty_prompts=0)
    (side, other), _, _ = examples.pairs(0, 0)
    others, captions = load_script("kto").with_others_captions, side.condition.prompts + other.condition.prompts
    turned = others([side, other], captions, [range(4), range(4, 8)])
    assert [prompt for own in turned for prompt in own.condition.prompts] == captions[1:] + captions[:1]
    assert turned[0].x_t is side.x_t

    (turned,) = others([side], ["a", "a", "b", "a"], [range(4)])
    assert list(turned.condition.prompts) == ["b", "b", "a", "b"], "nobody keeps a caption of his own"
    (turned,) = others([side], [*"aaaa", *"abba"], [range(4, 8)])
    assert list(turned.condition.prompts) == ["b", "a", "a", "b"], "the step's captions on other processes count"
    with pytest.raises(ValueError, match="one caption .'a'. has no other's"):
        others([side], ["a"] * 4, [range(4)])


def test_kto_finds_a_class_that_is_missing_before_it_loads_a_model(task, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "load_policy", lambda *_: pytest.fail("the model was loaded"))
    liked = write(task / "liked.jsonl", [{"prompt": "a cat", "image": "0w.png", "label": True}])
    with pytest.raises(ValueError, match="There are no undesirable rows, but gamma=0.5"):
        train("kto", tmp_path / "run", task, dataset_name=liked, gamma=0.5)


@pytest.mark.parametrize("name, flags", [("dpo", ["--loss", "mapo"]), ("dpo", ["--loss", "linear", "--linear_eta", "0"]), ("dspo", ["--dspo_beta", "0.8"])])
def test_a_soft_label_weighs_a_pair_and_its_opposite(name, flags):
    """Without a label of their own these losses take p as the two pairs of `ties="keep"`; a certain one changes nothing, and a tie has no direction."""
    script, numbers = load_script(name), torch.rand(6, 3, generator=torch.Generator().manual_seed(0))
    args = script.parse_args(["--pretrained_model_name_or_path=m", "--dataset_name=d", "--output_dir=o", "--beta=2", *flags])

    def loss(winner, loser, labels):
        labels = torch.tensor(labels)
        if name == "dspo":
            sides = [Measured(numbers[side], numbers[4 + side], None) for side in (winner, loser)]
            return script.pair_loss(args, *sides, [numbers[2 + winner], numbers[2 + loser]], labels)
        return script.pair_loss(args, [numbers[winner], numbers[loser]], [numbers[2 + winner], numbers[2 + loser]], labels)

    own, opposite = loss(0, 1, [1.0] * 3), loss(1, 0, [1.0] * 3)
    found = loss(0, 1, [1.0, 0.8, 0.5])
    assert found[0] == own[0] and not torch.allclose(own, opposite)
    torch.testing.assert_close(found[1:], torch.tensor([0.8, 0.5]) * own[1:] + torch.tensor([0.2, 0.5]) * opposite[1:])


def test_linear_dpo_has_its_recipes_reference_and_floor():
    script = load_script("dpo")

    def parse(*flags):
        return script.parse_args(["--pretrained_model_name_or_path=m", "--dataset_name=d", "--output_dir=o", *flags])

    assert [parse(*flags).reference_decay for flags in ([], ["--loss=linear"], ["--loss=linear", "--reference_decay=0"])] == [None, 0.99, 0]
    errors, ref_errors, labels = [torch.tensor([0.1]), torch.tensor([0.5])], [torch.tensor([0.3]), torch.tensor([0.3])], torch.ones(1)
    for eta in (0.2, 0.3):  # far beyond the reference, the weight is the floor
        args = parse("--loss=linear", "--beta=100", f"--linear_eta={eta}")
        assert script.pair_loss(args, errors, ref_errors, labels).item() == pytest.approx(eta * (0.1 - 0.5))
        assert script.pair_metrics(args, errors, ref_errors, labels)["linear_weight"] == pytest.approx(eta)
    loss = script.pair_loss(parse("--loss=ipo", "--beta=1", "--ipo_tau=0.25"), errors, ref_errors, labels)
    assert loss.item() == pytest.approx((0.2 - 2) ** 2), "the logit is 0.2, its aim 1 / (2 tau)"


def test_inversion_draws_no_noise_of_the_timesteps_stream(task, tmp_path, monkeypatch):
    run, policy, found, examples = prepared(tmp_path, task, inversion_steps=2, **MINI_SD)
    script, places, seeds = load_script("dpo"), examples.positions(0, 0), []
    monkeypatch.setattr(script, "invert", lambda x0, *_, generator: seeds.extend(g.initial_seed() for g in generator) or x0)
    condition = examples.condition(places)
    script.inverted(examples, examples.latents(pairs_of(found, places, policy.device)[0][0], places, condition), places, condition)
    assert len(set(seeds)) == 4 and not set(seeds) & {place.seed for place in places}


def test_rwr_pretrains_besides_and_refuses_a_collapse(task, tmp_path):
    flags = {"pretrain_weight": 0.5, "pretrain_dataset_name": task / "captioned.jsonl", "scope": "prompt", "weights": "rank"}
    (only,) = rows(train("rwr", tmp_path / "run", task, gradient_accumulation_steps=2, **flags))
    assert only["loss"] > only["weighted_error"] > 0
    many = [{"prompt": "a cat", "image": "0w.png", "reward": float(i == 0)} for i in range(200)]
    flags = {"dataset_name": write(task / "many.jsonl", many), "temperature": 0.01}
    with pytest.raises(ValueError, match="The weights are those of 1 samples out of 200.*force to go on"):
        train("rwr", tmp_path / "collapsed", task, **flags)
    train("rwr", tmp_path / "forced", task, force=True, **flags)


def test_images_that_weigh_nothing_beside_the_others_are_left_out(capsys):
    """Of 20 temperatures below the best a weight is 2e-9 of its; of 30, 1e-13."""
    rows = [{"prompt": "x", "reward": reward} for reward in [0.0, 0.0, -0.2, -0.3, -100.0]]
    args = argparse.Namespace(weights="softmax", temperature=0.01, scope="global", top_k=1, top_q=0.1, max_weight=20.0, force=False)
    kept, weights, statistics = load_script("rwr").weighted(argparse.Namespace(args=args, print=print), rows)
    assert [row["reward"] for row in kept] == [0.0, 0.0, -0.2] and statistics["max_weight"] == pytest.approx(2.5)
    assert weights.tolist() == pytest.approx([2.5 * 3 / 5, 2.5 * 3 / 5, 2.5 * 3 / 5 * math.exp(-20)], rel=1e-6)
    assert "2 of 5 images weigh nothing beside the others and are left out" in capsys.readouterr().out


@pytest.mark.parametrize("weights, scope, advice", [("softmax", "prompt", "take --scope global"), ("top_k", "global", "take other --weights")])
def test_rewards_that_make_no_weights_are_refused(weights, scope, advice):
    """Each prompt has one image, and the best of one is itself: training would be the same whatever the rewards."""
    found = [{"prompt": f"a cat {i}", "reward": float(i)} for i in range(4)]
    own = {"weights": weights, "scope": scope, "temperature": 1.0, "top_k": 4, "top_q": 0.1, "max_weight": 20.0, "force": False, "dataset_name": "mine"}
    run = argparse.Namespace(args=argparse.Namespace(**own, allow_no_signal=False), print=print)
    with pytest.raises(ValueError, match=f"mine: all 4 images weigh alike by --weights {weights} --scope {scope}.*{advice}"):
        load_script("rwr").weighted(run, found)
    run.args.allow_no_signal = True
    assert load_script("rwr").weighted(run, found)[1].tolist() == [1.0] * 4


def test_weights_are_updated_when_the_loop_comes_back(task, tmp_path, monkeypatch):
    """Nothing is updated where the loop's body raises, and each step of each epoch otherwise."""
    values = {"pretrained_model_name_or_path": "mini-sd3", "call_kwargs": '{"max_sequence_length": 1}', "num_inference_steps": 2, "rank": 2}
    values |= {"dataset_name": task / "pair.jsonl", "output_dir": tmp_path, "train_batch_size": 2, "num_samples_per_epoch": 6, "num_epochs": 2}
    values |= {"gradient_accumulation_steps": 2, "num_eval_samples": 2, "num_validation_images": 1}
    run = Run(load_script("dpo").parse_args(["--allow_no_signal", *(f"--{name}={value}" for name, value in values.items())]), "Test")
    run.batches(6)
    training, happened = OfflineTraining(run, load_rows(run, "pair")), []
    monkeypatch.setattr(run, "optimizer_step", lambda: happened.append("update") or 0.0)
    monkeypatch.setattr(training.reference, "follow", lambda: happened.append("follow"))
    monkeypatch.setattr(training.report, "start", lambda: happened.append("start"))
    monkeypatch.setattr(training.report, "validate", lambda epoch: happened.append(f"validate {epoch}"))
    monkeypatch.setattr(training.report, "finish", lambda: happened.append("finish"))
    monkeypatch.setattr(run, "checkpoint", lambda: None)
    with pytest.raises(RuntimeError, match="in the body"):
        for _ in training.steps():
            raise RuntimeError("in the body")
    assert happened == ["start"] and run.epoch == 0
    run.registered.clear()
    happened.clear()
    for step in training.steps(constant=3.0):
        happened.append(f"body {step.epoch} {list(step.batches)} {step.weight:.3f}")
        step.log(loss=1.0 + step.batches[0])
    epochs = [[f"body {e} [0, 1] 0.250", "update", "follow", f"body {e} [2] 0.500", "update", "follow", f"validate {e}"] for e in (0, 1)]
    assert happened == ["start", *epochs[0], *epochs[1], "finish"]
    assert [(row["loss"], row["constant"]) for row in run.history] == [(2.0, 3.0)] * 2
    run.finished = True


# --- data --------------------------------------------------------------------------------------------------------------


def test_cached_latents_are_equal_and_encoded_once(task, tmp_path, monkeypatch):
    _, policy, found, plain = prepared(tmp_path / "plain", task)
    run, policy, found, cached = prepared(tmp_path / "cached", task, cache_dir=tmp_path / "cache")
    encoded, encode = [], Policy.encode
    monkeypatch.setattr(Policy, "encode", lambda self, images, condition: encoded.append(len(images)) or encode(self, images, condition))
    places = plain.positions(0, 0)
    images, condition = pairs_of(found, places, policy.device)[0][0], plain.condition(places)
    expected = plain.latents(images, places, condition)
    assert encoded == [4]
    for calls in ([4, 4], [4, 4]):
        assert torch.equal(cached.latents(images, places, condition), expected)
        assert encoded == calls


def test_a_cache_tells_the_models_that_one_folder_has_held(task, tmp_path):
    """A model that was trained on and saved in its place: its autoencoder's latents and its text encoder's states are others."""
    run, policy, found, examples = prepared(tmp_path / "run", task, cache_dir=tmp_path / "cache")
    places = examples.positions(0, 0)
    images, condition = pairs_of(found, places, policy.device)[0][0], examples.condition(places)
    before = examples.latents(images, places, condition)
    for part in ("vae", "text_encoder"):
        old = [disk_cache(run.args, policy, kind).folder for kind in ("latents", "prompts")]
        assert old == [disk_cache(run.args, policy, kind).folder for kind in ("latents", "prompts")]
        with torch.no_grad():
            for parameter in getattr(policy.pipeline, part).parameters():
                parameter.mul_(1.1)
        assert not set(old) & {disk_cache(run.args, policy, kind).folder for kind in ("latents", "prompts")}
    assert not torch.equal(Examples(run, policy, found).latents(images, places, condition), before)
    whole = LatentImages(run, policy).cache.folder
    run.args.vae_tiling = True
    assert LatentImages(run, policy).cache.folder != whole, "an autoencoder also encodes in tiles"


def test_cached_latents_are_a_rows_own_where_it_keeps_a_part(tmp_path):
    """Two rows of one picture that were painted into other pictures, elsewhere; without such inputs keys are what they were."""
    case = next(case for case in CASES["StableDiffusionInpaintPipeline"] if case.variant == "blending")
    policy = Policy(quiet(case.build()), **case.call)
    pictures = [Image.effect_noise((16, 16), 90).convert("RGB") for _ in range(3)]
    masks = [Image.fromarray(np.kron(np.array([row], np.uint8), np.full((16, 8), 255, np.uint8))) for row in ([0, 1], [1, 0])]
    latents = object.__new__(LatentImages)
    latents.args, latents.policy, latents.shape = argparse.Namespace(random_crop=False, random_flip=False, seed=0), policy, torch.Size([3, 16, 16])

    def encoded(cache):
        latents.cache = cache
        conditions = [policy.condition(["a"], seeds=[1], per_sample={"image": [pictures[i]], "mask_image": [masks[i]]}) for i in range(2)]
        return torch.cat([latents([LazyImage(pictures[2])], [Position(i, i, 0)], condition) for i, condition in enumerate(conditions)])

    expected = encoded(None)
    assert not torch.equal(expected[0], expected[1])
    for _ in range(2):
        assert torch.equal(encoded(TensorCache(tmp_path, "model")), expected)
    assert TensorCache(tmp_path, "model").size()[0] == 2
    plain = policy.condition(["a"], seeds=[1], per_sample={"image": pictures[:1], "mask_image": masks[:1]})
    assert _held_by(plain, 0) and _held_by(Condition(["a"], per_sample={"negative_prompt": ["b"]}), 0) == []


def test_later_epochs_and_runs_encode_nothing(task, tmp_path, monkeypatch):
    encoded, load = [], Run.load_policy

    def counted(self, **fields):
        policy = load(self, **fields)
        for encoder in (policy.pipeline.text_encoder, policy.pipeline.vae.encoder):
            encoder.register_forward_pre_hook(lambda *_: encoded.append(1))
        return policy

    monkeypatch.setattr(Run, "load_policy", counted)
    flags = {"cache_dir": tmp_path / "cache", "num_samples_per_epoch": 6, "proportion_empty_prompts": 0.3}
    train("dpo", tmp_path / "one", task, num_epochs=1, **flags)
    once = len(encoded)
    train("dpo", tmp_path / "two", task, num_epochs=2, **flags)
    assert once > 0 and len(encoded) == once + 1, "what an image of the pipeline's size is, is found by encoding one"
    train("dpo", tmp_path / "again", task, num_epochs=2, **flags)
    assert_same_run(tmp_path / "again", tmp_path / "two", "checkpoint-2")


@pytest.mark.parametrize("family", ["sd15", "flux", "wan"])
def test_the_size_of_images_is_known_without_a_denoiser_call(family):
    policy, calls = Policy(FAMILIES[family].build(), **FAMILIES[family].call), []
    condition = policy.condition(["a cat"], seeds=[0])
    expected = policy.decode(policy.rollout(condition, deterministic=True).final, condition).shape[1:]
    for module in policy.denoisers.values():
        for child in module.children():  # a gate closes the denoiser itself
            child.register_forward_pre_hook(lambda *_: calls.append(1))
    assert image_shape(policy, condition) == expected and not calls


def test_crops_and_flips_are_a_pairs_own_and_new_each_epoch(task, tmp_path):
    _, policy, found, examples = prepared(tmp_path, task, random_crop=True, random_flip=True)
    draw = examples.latents._augmentation
    places = [Position(row=3, seed=0, epoch=epoch) for epoch in range(8)]
    assert draw(places[0]) == draw(places[0])
    assert {draw(place).flip for place in places} == {True, False} and len({draw(place).top for place in places}) == 8


def test_ties_bad_rows_and_max_rows(task, tmp_path, capsys):
    pairs = [json.loads(line) for line in (task / "pair.jsonl").read_text().splitlines()]
    pairs[1]["label_0"], pairs[2]["image_1"], pairs[3]["label_0"], pairs[4]["weight"] = 0.5, "gone.png", 0.2, 3
    source = write(task / "flawed.jsonl", pairs)
    run, policy, found, _ = prepared(tmp_path / "soft", task, dataset_name=source, ties="soft", max_rows=5)
    assert "row 3: image_1: no file" in capsys.readouterr().out
    images, labels, weights = pairs_of(found, [Position(row, 0, 0) for row in range(4)], policy.device)
    assert [winner.source.name for winner in images[0]] == ["0w.png", "1w.png", "3l.png", "4w.png"]
    torch.testing.assert_close(labels, torch.tensor([1.0, 0.5, 0.8, 1.0]))
    assert weights.tolist() == [1, 1, 1, 3]
    _, _, found, _ = prepared(tmp_path / "drop", task, dataset_name=source)
    assert len(found) == 4 and all(row["label_0"] != 0.5 for row in found)
    with pytest.raises(ValueError, match="flawed.jsonl, row 3: image_1: no file"):
        prepared(tmp_path / "error", task, dataset_name=source, bad_rows="error")


@pytest.mark.parametrize("ties", ["soft", "keep"])
def test_ties_alone_are_nothing_to_learn_from(task, tmp_path, ties):
    pairs = [json.loads(line) | {"label_0": 0.5} for line in (task / "pair.jsonl").read_text().splitlines()]
    with pytest.raises(ValueError, match="all pairs are ties, so there is nothing to learn"):
        prepared(tmp_path, task, dataset_name=write(task / "ties.jsonl", pairs), ties=ties)
    pairs[0]["label_0"] = 1
    assert len(prepared(tmp_path, task, dataset_name=write(task / "one.jsonl", pairs), ties=ties)[2]) >= len(pairs)


def test_how_images_are_checked_and_pairs_weigh(task, tmp_path):
    pairs = [json.loads(line) for line in (task / "pair.jsonl").read_text().splitlines()]
    (task / "cut.png").write_bytes((task / "0w.png").read_bytes()[:200])
    pairs[1]["image_1"] = "cut.png"
    data = {"dataset_name": write(task / "checked.jsonl", pairs), "image_root": task, "column_map": None, "dataset_split": "train", "max_rows": None}
    flags = load_script("dpo").parse_args(["--pretrained_model_name_or_path=m", "--dataset_name=d", "--output_dir=o"])

    def weights(**given):
        return [row["weight"] for row in load_rows(make_run(tmp_path, **{**vars(flags), **data, **given}), "pair")]

    assert weights() == [1] * 5 and weights(verify="header") == [1] * 6
    assert weights(pair_weighting="prompt") == [0.5, 1, 0.5, 1, 1], "a cat is there twice"


@pytest.mark.parametrize(
    "name, flags, message",
    [
        ("dpo", ["--max_rows", "0"], "--max_rows must be a whole number from 1 to 1e9, got 0"),
        ("dpo", ["--proportion_empty_prompts", "2"], "--proportion_empty_prompts must be a number from 0 to 1, got 2"),
        ("dpo", ["--cache_dir", "x", "--random_crop"], "leave out one of them"),
        ("dpo", ["--column_map", "prompt"], "'prompt' is not NAME=COLUMN"),
        ("kto", ["--prompt_column", "caption"], "--prompt_column caption is for prompt files, and there is none"),
        ("dpo", ["--prompt_column", "caption"], "by --column_map prompt=caption"),
        ("dpo", ["--loss", "mapo", "--sft_weight", "1"], "--sft_weight has no effect without --loss sigmoid or hinge or ipo or dmpo"),
        ("dpo", ["--loss", "mapo", "--reference_decay", "0.9"], "--loss mapo has no reference"),
        ("dpo", ["--beta", "-1"], "--beta must be a number above 0 and at most 1e9, got -1"),
        ("dpo", ["--linear_eta", "0.6"], "--linear_eta must be a number from 0 to 0.5, got 0.6"),
        ("dspo", ["--dspo_beta", "-1"], "--dspo_beta must be a number from 0 to 1e9, got -1"),
        ("kto", ["--beta", "0"], "--beta must be a number above 0 and at most 1e9, got 0"),
        ("kto", ["--lambda_u", "-1"], "--lambda_u must be a number from 0 to 1e9, got -1"),
        ("d3po", ["--num_train_timesteps", "0"], "--num_train_timesteps must be a whole number from 1 to 1000, got 0"),
        ("dpo", ["--safeguard_mu", "1.5"], "--safeguard_mu must be a number from 0 to 1, got 1.5"),
        ("kto", ["--gamma", "8"], "--gamma must be a number from 0 to 1, got 8"),
        ("rwr", ["--pretrain_weight", "1"], "--pretrain_weight has no effect without --pretrain_dataset_name"),
        ("rwr", [], "--dataset_name is required"),
    ],
)
def test_flags_that_make_no_sense_are_named(name, flags, message, capsys):
    data = ["--trajectories", "data"] if name == "d3po" else ["--dataset_name", "data"] if flags else []
    with pytest.raises(SystemExit) as exit:
        load_script(name).parse_args(["--pretrained_model_name_or_path", "mini-sd", "--output_dir", "out", *data, *flags])
    assert exit.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_names_of_the_last_version_are_taken(capsys):
    old = ["--beta_kl=0.5", "--beta_pretrain=0.2", "--pretraining_dataset=photos"]
    args = load_script("rwr").parse_args(["--pretrained_model_name_or_path=mini-sd", "--dataset_name=data", "--output_dir=out", *old])
    assert (args.kl_weight, args.pretrain_weight, args.pretrain_dataset_name) == (0.5, 0.2, "photos")
    assert "--beta_kl is now called --kl_weight" in capsys.readouterr().err


# --- resuming, and other pipelines -------------------------------------------------------------------------------------

STATEFUL = {
    "dpo": {"loss": "linear", "reference_decay": 0.5, "use_ema": True, "ema_interval": 1, "lr_scheduler": "linear", "lr_warmup_steps": 3},
    "kto": {"reference_point": "ema", "no-clamp": True, "gamma": 0.5},
}


@pytest.mark.parametrize("name", STATEFUL)
def test_resumed_equals_uninterrupted(task, tmp_path, name):
    expected = train(name, tmp_path / "whole", task, num_epochs=2, **STATEFUL[name])
    train(name, tmp_path / "run", task, num_epochs=1, **STATEFUL[name])
    train(name, tmp_path / "run", task, num_epochs=2, resume_from_checkpoint="latest", **STATEFUL[name])
    assert_same_run(tmp_path / "run", expected, "checkpoint-2")
    assert name == "dpo" or rows(expected)[-1]["reference_point"] != 0


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "flux", "qwen_image", "wan"])
def test_the_same_script_trains_any_pipeline(task, tmp_path, family, monkeypatch):
    FAMILIES[family].build().save_pretrained(tmp_path / "model")
    call = {**FAMILIES[family].call, "num_inference_steps": 2}
    flags = {name: call.pop(name) for name in ("num_inference_steps", "guidance_scale", "height", "width") if call.get(name) is not None}
    call.pop("guidance_scale", None)
    steps, step = [], Run.optimizer_step
    monkeypatch.setattr(Run, "optimizer_step", lambda self: steps.append(step(self)) or steps[-1])
    flags |= {"pretrained_model_name_or_path": tmp_path / "model", "call_kwargs": json.dumps(call), "gradient_accumulation_steps": 2}
    (only,) = rows(train("dpo", tmp_path / "run", task, **flags))
    assert only["loss"] == torch.tensor(2.0).log().item() and steps[0] > 0
