"""LoRA files: which bytes, which keys, who can read them, and what loads them; the model underneath with adapters of others."""

import copy
import logging
import os
import shutil
import stat

import pytest
import torch
from diffusers import WanPipeline
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from lora_tools import WEIGHTS, Sharded, compiled, drawn, moved, stock, trained, with_text_encoder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import FAMILIES, wan

from diffusers_align import Policy, load_lora, lora
from diffusers_align.driving.denoisers import denoisers
from diffusers_align.files import lora_finder, weight_files
from tests.families.cases import CASES

# --- wrappers ----------------------------------------------------------------------------------------------------------


def wrap_whole(pipeline):
    pipeline.transformer = compiled(pipeline.transformer)


def wrap_parts(pipeline):
    blocks = pipeline.transformer.transformer_blocks
    for i, block in enumerate(blocks):
        blocks[i] = compiled(block)


def wrap_in_place(pipeline):
    for block in pipeline.transformer.transformer_blocks:  # what `compile_repeated_blocks` does, which this class has not
        block.compile(backend="eager")


def wrap_sharded(pipeline):
    pipeline.transformer = Sharded(pipeline.transformer)


WRAPPINGS = {"whole": wrap_whole, "parts": wrap_parts, "in_place": wrap_in_place, "sharded": wrap_sharded}


@pytest.mark.parametrize("wrapping, when", [("whole", "before"), ("whole", "after"), ("parts", "before"), ("in_place", "before"), ("sharded", "before")])
def test_the_lora_of_a_wrapped_denoiser_has_plain_names_and_loads_anywhere(wrapping, when, tmp_path):
    with torch.compiler.set_stance("force_eager"):  # tracing takes long, and names do not depend on it
        check_wrapped(WRAPPINGS[wrapping], when, tmp_path)


def check_wrapped(wrap, when, tmp_path):
    pipeline = FAMILIES["sd3"].build()
    if when == "before":
        wrap(pipeline)
    policy = Policy(pipeline, **FAMILIES["sd3"].call)
    parameters = moved(policy.add_lora(rank=4))
    if when == "after":
        wrap(pipeline)
        assert len(policy.trainable_parameters()) == len(parameters)
    trajectory = policy.rollout(["a cat", "a dog"], seeds=[0, 1])
    errors = []
    policy.replay(trajectory, lambda k, transition: errors.append((transition.log_prob(trajectory.actions[:, k]) - trajectory.log_probs[:, k]).abs().max()))
    assert max(errors) == 0
    policy.save_lora(tmp_path)
    assert not any(mark in key for key in load_file(tmp_path / WEIGHTS) for mark in ("_orig_mod", "_fsdp", "module."))
    with policy.reference():
        base = policy.rollout(["a cat", "a dog"], seeds=[0, 1]).final
    plain = Policy(FAMILIES["sd3"].build(), **FAMILIES["sd3"].call)
    assert torch.equal(plain.rollout(["a cat", "a dog"], seeds=[0, 1]).final, base)

    expected = drawn(stock(policy), "sd3")
    fresh = FAMILIES["sd3"].build()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(drawn(fresh, "sd3"), expected)
    for add_first in (False, True):
        other = FAMILIES["sd3"].build()
        wrap(other)
        other = Policy(other, **FAMILIES["sd3"].call)
        if add_first:
            other.add_lora(rank=4)
        other.load_lora(tmp_path)
        assert torch.equal(drawn(stock(other), "sd3"), expected)


# --- copies ------------------------------------------------------------------------------------------------------------


def test_a_copy_that_is_made_in_the_middle_of_a_call_has_no_gate():
    policy = Policy(FAMILIES["sd3"].build(), **FAMILIES["sd3"].call)
    trajectory, copies = policy.rollout(["a cat"], seeds=[0]), []
    policy.replay(trajectory, lambda k, _: copies.append(copy.deepcopy(policy.pipeline.transformer)), steps=[1])
    with torch.no_grad():
        for parameter in copies[0].parameters():
            parameter.zero_()
    own = policy.pipeline.transformer
    latents = torch.randn(1, own.config.in_channels, 8, 8)
    inputs = {
        "timestep": torch.ones(1), "encoder_hidden_states": torch.randn(1, 4, own.config.joint_attention_dim),
        "pooled_projections": torch.randn(1, own.config.pooled_projection_dim), "return_dict": False,
    }  # fmt: skip
    assert copies[0](latents, **inputs)[0].abs().max() == 0 and own(latents, **inputs)[0].abs().max() > 0


# --- files -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_lora_that_is_saved_again_is_the_same_file(name, tmp_path):
    policy = Policy(FAMILIES[name].build(), **FAMILIES[name].call)
    policy.add_lora(rank=4)
    contents = set()
    for i in range(8):  # the library writes its metadata in another order each time
        policy.save_lora(tmp_path / str(i))
        contents.add((tmp_path / str(i) / WEIGHTS).read_bytes())
    assert len(contents) == 1
    found = lora_finder.configuration(tmp_path / "0" / WEIGHTS)
    assert found["target_modules"] == sorted(found["target_modules"]), "not the order of a set, which is another in each process"


def test_what_runs_leave_in_a_models_folder_is_no_part_of_it(tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "A", "unet": ["diffusers", "B"], "vae": [null, null]}')
    weights = tmp_path / "unet" / "model.safetensors"
    weights.write_bytes(b"1" * 100)
    before = weight_files.digest_of_model(str(tmp_path))
    for left in ("checkpoint-5", "own/trajectories"):
        (tmp_path / left).mkdir(parents=True)
        (tmp_path / left / "a.safetensors").write_bytes(b"x")
    assert weight_files.digest_of_model(str(tmp_path)) == before and weight_files.digest_of_model("a/b") is None
    weights.write_bytes(b"2" * 100)
    assert weight_files.digest_of_model(str(tmp_path)) != before


def test_equal_contents_make_equal_files_that_all_may_read(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, 2, dtype=torch.bfloat16)}
    metadata = {f"key{i}": str(i) for i in range(40)}  # more than the writer keeps in order by chance
    before = os.umask(0o027)
    try:
        weight_files.save(tensors, tmp_path / "a.safetensors", metadata)
        save_file(tensors, tmp_path / "b.safetensors", {"format": "pt", **dict(reversed(metadata.items()))})
        weight_files.settle_all(tmp_path)
    finally:
        os.umask(before)
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    assert one.read_bytes() == two.read_bytes()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (one, two)] == [0o640, 0o640]
    assert all(torch.equal(value, tensors[name]) for name, value in load_file(one).items())
    with safe_open(one, "pt") as file:
        assert file.metadata() == {"format": "pt", **metadata}
    assert len(list(tmp_path.iterdir())) == 2


def test_a_pipeline_whose_loader_has_no_place_for_its_denoiser_gets_a_file_of_its_own(tmp_path, caplog, monkeypatch):
    pipeline = FAMILIES["sd3"].build()
    monkeypatch.setattr(type(pipeline), "_lora_loadable_modules", ["unet", "text_encoder"])  # as diffusers has it for some transformers
    with caplog.at_level(logging.WARNING):
        expected = trained(pipeline, "sd3", tmp_path, use_rslora=True, rank_pattern={"to_k": 2})
    assert "no LoRA loader for its transformer" in caplog.text and "diffusers_align.load_lora" in caplog.text
    fresh = FAMILIES["sd3"].build()
    load_lora(fresh, tmp_path)
    assert torch.equal(drawn(fresh, "sd3"), expected)
    assert lora.stock_lines(fresh, {"transformer": fresh.transformer}, "me/it") == ['diffusers_align.load_lora(pipe, "me/it")']
    lora.unload(fresh)
    assert torch.equal(drawn(fresh, "sd3"), drawn(FAMILIES["sd3"].build(), "sd3"))


def test_a_loader_that_cannot_write_is_none(tmp_path, caplog):
    """Anima's reads LoRAs in diffusers 0.42.1, and has no save_lora_weights of its own."""
    case = CASES["AnimaModularPipeline"][0]
    policy = Policy(case.build(), **case.call)
    moved(policy.add_lora(rank=2))
    with caplog.at_level(logging.WARNING):
        policy.save_lora(tmp_path)
    assert "no LoRA loader for its transformer" in caplog.text
    fresh = case.build()
    load_lora(fresh, tmp_path)
    expected, found = (it.rollout(list(case.prompts), seeds=[1, 2]).final for it in (policy, Policy(fresh, **case.call)))
    assert torch.equal(found, expected)
    with policy.reference():
        assert not torch.allclose(policy.rollout(list(case.prompts), seeds=[1, 2]).final, expected, rtol=1e-2)


def test_a_loader_that_reads_a_text_encoder_which_the_pipeline_lacks_is_none(tmp_path, caplog):
    """Kolors' image to image has the one of Stable Diffusion XL, with its two text encoders."""
    case = CASES["KolorsImg2ImgPipeline"][0]
    policy = Policy(case.build(), **case.call)
    moved(policy.add_lora(rank=2))
    asked = {"seeds": [1, 2], "per_sample": case.per_sample}
    with caplog.at_level(logging.WARNING):
        policy.save_lora(tmp_path)
    assert "no LoRA loader for its unet" in caplog.text
    fresh = case.build()
    load_lora(fresh, tmp_path)
    expected, found = (it.rollout(list(case.prompts), **asked).final for it in (policy, Policy(fresh, **case.call)))
    assert torch.equal(found, expected)
    with policy.reference():
        assert not torch.allclose(policy.rollout(list(case.prompts), **asked).final, expected, rtol=1e-2)


def test_a_loader_that_reads_what_the_denoisers_config_lacks_is_none(tmp_path):
    """diffusers' loader asks each denoiser under it for the width of a picture encoder."""
    case = CASES["WanAnimate2ModularPipeline"][0]
    policy, fresh = Policy(case.build()), case.build()
    assert "image_dim" not in fresh.transformer.config
    moved(policy.add_lora(2))
    policy.save_lora(tmp_path)
    assert lora.stock_lines(fresh, denoisers(fresh), str(tmp_path))[0].startswith("diffusers_align.load_lora")
    load_lora(fresh, tmp_path)
    before, after = (dict(module.named_parameters()) for module in (policy.pipeline.transformer, fresh.transformer))
    names = [name for name in before if ".lora_B." in name]
    assert names and all(torch.equal(before[name], after[name]) and bool(before[name].any()) for name in names)


def test_layers_without_an_older_name_reach_the_stock_loader_with_all_others(tmp_path):
    """Of a file in two formats it would load a part, without a word: attention here, or the keys and values that pixel models add to it."""
    expected = trained(FAMILIES["sd15"].build(), "sd15", tmp_path, target_modules=["to_k", "proj_in"])
    fresh = FAMILIES["sd15"].build()
    fresh.load_lora_weights(tmp_path)
    assert torch.equal(drawn(fresh, "sd15"), expected) and not torch.equal(expected, drawn(FAMILIES["sd15"].build(), "sd15"))


def test_a_pipeline_that_inherits_a_loader_for_another_denoiser_gets_a_file_of_its_own(tmp_path, caplog, monkeypatch):
    pipeline = FAMILIES["sd3"].build()
    stock_save = StableDiffusionLoraLoaderMixin.save_lora_weights  # of a unet
    monkeypatch.setattr(type(pipeline), "save_lora_weights", classmethod(stock_save.__func__))
    with caplog.at_level(logging.WARNING):
        expected = trained(pipeline, "sd3", tmp_path)
    assert "no LoRA loader for its transformer" in caplog.text
    fresh = FAMILIES["sd3"].build()
    load_lora(fresh, tmp_path)
    assert torch.equal(drawn(fresh, "sd3"), expected)


@pytest.mark.parametrize("targets, missing", [(["nope"], "'nope'"), (["to_q", "to_kk"], "'to_kk' for a LoRA. Did you mean 'to_k'")])
def test_layers_that_no_denoiser_has_are_named(targets, missing):
    with pytest.raises(ValueError, match=f"The transformer has no layer {missing}"):
        lora.add({"transformer": FAMILIES["sd3"].build().transformer}, rank=2, target_modules=targets)


# --- two denoisers -----------------------------------------------------------------------------------------------------


def two_denoisers():
    one, two = wan(), wan()
    with torch.no_grad():
        for parameter in two.transformer.parameters():
            parameter.mul_(0.9)
    parts = {name: component for name, component in one.components.items() if name not in ("transformer_2",)}
    pipeline = WanPipeline(**parts, transformer_2=two.transformer, boundary_ratio=0.8)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder of a LoRA of two denoisers, and what the trained pipeline draws."""
    folder = tmp_path_factory.mktemp("two")
    return folder, trained(two_denoisers(), "wan", folder)


def run_lines(lines, pipe):
    for line in lines:
        exec(line, {"pipe": pipe})


def test_one_call_loads_both_denoisers(two):
    folder, expected = two
    for path in (folder, folder / WEIGHTS, str(folder)):
        pipeline = two_denoisers()
        load_lora(pipeline, path)
        assert torch.equal(drawn(pipeline, "wan"), expected)
        policy = Policy(two_denoisers(), **FAMILIES["wan"].call)
        policy.load_lora(path)
        assert torch.equal(drawn(stock(policy), "wan"), expected)
    assert not torch.equal(drawn(two_denoisers(), "wan"), expected)


def test_the_lines_of_the_card_load_both_denoisers_into_the_stock_pipeline(two):
    folder, expected = two
    pipeline = two_denoisers()
    lines = lora.stock_lines(pipeline, denoisers(pipeline), str(folder))
    assert len(lines) == 2 and "load_into_transformer_2=True" in lines[1]
    run_lines(lines, pipeline)
    assert torch.equal(drawn(pipeline, "wan"), expected)


def test_the_lines_load_both_denoisers_from_wherever_the_folder_lies(two, tmp_path, monkeypatch):
    folder, expected = two
    pipeline = two_denoisers()
    lines = lora.stock_lines(pipeline, denoisers(pipeline), "copy")  # a card names a folder before anybody has it
    shutil.copytree(folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path)
    run_lines(lines, pipeline)
    assert torch.equal(drawn(pipeline, "wan"), expected)
    assert 'load_lora_weights("copy", subfolder="transformer_2"' in lora.stock_lines(pipeline, denoisers(pipeline), "copy", on_hub=True)[1]


def test_a_denoiser_without_a_file_is_named(two, tmp_path, caplog):
    (tmp_path / WEIGHTS).write_bytes((two[0] / WEIGHTS).read_bytes())
    with caplog.at_level(logging.WARNING):
        load_lora(two_denoisers(), tmp_path)
    assert "left out: transformer_2" in caplog.text and str(tmp_path / "transformer_2" / WEIGHTS) in caplog.text
    assert lora_finder.digest(tmp_path) != lora_finder.digest(two[0])


# --- adapters of others ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def style(tmp_path_factory):
    folder = tmp_path_factory.mktemp("style")
    trained(FAMILIES["sd3"].build(), "sd3", folder, target_modules=["to_q", "ff.net.0.proj"])
    return folder


def styled(style, weight=0.7):
    pipeline = FAMILIES["sd3"].build()
    pipeline.load_lora_weights(style, adapter_name="style")
    pipeline.set_adapters(["style"], [weight])
    return pipeline


def test_a_style_that_was_active_stays_in_the_reference(style, tmp_path):
    expected = drawn(styled(style), "sd3")
    assert not torch.equal(expected, drawn(FAMILIES["sd3"].build(), "sd3"))
    policy = Policy(styled(style), **FAMILIES["sd3"].call)
    with policy.reference():
        assert torch.equal(drawn(stock(policy), "sd3"), expected)
    parameters = policy.add_lora(rank=4)
    assert torch.equal(drawn(stock(policy), "sd3"), expected), "a fresh LoRA changes nothing"
    moved(parameters)
    both = drawn(stock(policy), "sd3")
    with policy.reference():
        assert torch.equal(drawn(stock(policy), "sd3"), expected)
    assert torch.equal(drawn(stock(policy), "sd3"), both) and not torch.equal(both, expected)
    assert {id(p) for p in policy.trainable_parameters()} == {id(p) for p in parameters}

    policy.save_lora(tmp_path)
    assert not any("ff.net" in key for key in load_file(tmp_path / WEIGHTS)), "what was trained alone"
    again = Policy(styled(style), **FAMILIES["sd3"].call)
    again.load_lora(tmp_path)
    torch.testing.assert_close(drawn(stock(again), "sd3"), both, rtol=1e-5, atol=1e-5)
    with again.reference():
        assert torch.equal(drawn(stock(again), "sd3"), expected)
    lora.unload(again.pipeline)
    assert torch.equal(drawn(stock(again), "sd3"), expected)


@pytest.mark.parametrize("beside", [False, True])
def test_no_gradient_goes_through_the_reference_to_what_is_trained(style, beside):
    policy = Policy(styled(style) if beside else FAMILIES["sd3"].build(), **FAMILIES["sd3"].call)
    moved(policy.add_lora(rank=4))
    trajectory = policy.rollout(["a cat"], seeds=[1])
    with policy.reference():
        assert not policy.transition(trajectory, 1).mean.requires_grad
    assert policy.transition(trajectory, 1).mean.requires_grad


def test_several_styles_keep_their_weights_and_one_that_was_off_stays_off(style):
    pipeline = styled(style)
    pipeline.load_lora_weights(style, adapter_name="second")
    pipeline.set_adapters(["style", "second"], [0.3, -0.6])
    expected = drawn(pipeline, "sd3")
    policy = Policy(pipeline, **FAMILIES["sd3"].call)
    moved(policy.add_lora(rank=4))
    with policy.reference():
        assert torch.equal(drawn(stock(policy), "sd3"), expected)

    pipeline = styled(style)
    pipeline.disable_lora()
    policy = Policy(pipeline, **FAMILIES["sd3"].call)
    moved(policy.add_lora(rank=4))
    plain = drawn(FAMILIES["sd3"].build(), "sd3")
    assert not torch.equal(drawn(stock(policy), "sd3"), plain)
    with policy.reference():
        assert torch.equal(drawn(stock(policy), "sd3"), plain)


def test_a_fused_style_is_the_base_once_it_is_unloaded_and_refused_before(style):
    pipeline = styled(style)
    pipeline.fuse_lora()
    policy = Policy(pipeline, **FAMILIES["sd3"].call)
    with pytest.raises(ValueError, match="fused into the transformer but still there.*unload_lora_weights"):
        policy.add_lora(rank=4)
    with pytest.raises(ValueError, match="fused into the weights"), lora.disabled([pipeline.transformer]):
        pass
    pipeline.unload_lora_weights()
    fused = drawn(stock(policy), "sd3")
    moved(policy.add_lora(rank=4))
    with policy.reference():
        assert torch.equal(drawn(stock(policy), "sd3"), fused)


def test_what_a_file_has_for_the_text_encoder_comes_and_goes_with_it(tmp_path, monkeypatch):
    """Whatever the policy has encoded before."""
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.10.0")  # newer ones want a newer peft for what it does here
    tuned, call = with_text_encoder(tmp_path), FAMILIES["sd15"].call
    base = drawn(FAMILIES["sd15"].build(), "sd15")
    policy = Policy(FAMILIES["sd15"].build(), **call)

    def rolled():
        return policy.rollout(["a cat", "a dog"], seeds=[0, 1], deterministic=True).final

    assert torch.equal(rolled(), base)
    policy.load_lora(tmp_path)
    assert torch.equal(rolled(), tuned) and not torch.equal(tuned, base)
    with policy.reference():
        assert torch.equal(rolled(), base)
    assert torch.equal(rolled(), tuned)
    lora.unload(policy.pipeline)
    assert torch.equal(rolled(), base)


def weights_of(policy):
    return [parameter.clone() for layer in lora.layers_of(policy.pipeline.transformer) for parameter in layer.parameters()]


DIFFERENT = {
    "lacks layers": ({"target_modules": ["to_q", "to_v"]}, {}, "lacks layers of the LoRA that is there, such as .*(to|add)_k"),
    "more layers": ({}, {"target_modules": ["to_q", "to_v"]}, "has layers beside those of the LoRA that is there, such as .*(to|add)_k"),
    "by roots": ({"use_rslora": True}, {}, "another scale.* has 4 in the file, 2 here"),
    "one layer's scale": ({"alpha_pattern": {"to_q": 32}}, {}, "another scale.*to_q has 8 in the file, 2 here"),
    "one layer's rank": ({"rank_pattern": {"to_q": 2}}, {}, r"does not fit .*to_q\S+ is \(2, \d+\) in it, \(4, \d+\) here"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_file_takes_the_place_of_a_lora_or_is_refused(name, tmp_path):
    """No mixture of two, at no other scale; where the adapter is alike, it is the file's."""
    stored, there, match = DIFFERENT[name]
    expected = trained(FAMILIES["sd3"].build(), "sd3", tmp_path, **stored)
    alike, other = (Policy(FAMILIES["sd3"].build(), **FAMILIES["sd3"].call) for _ in range(2))
    moved(alike.add_lora(rank=4, **stored), seed=1)
    alike.load_lora(tmp_path)
    assert torch.equal(drawn(stock(alike), "sd3"), expected)
    moved(other.add_lora(rank=4, **there), seed=1)
    before = weights_of(other)
    with pytest.raises(ValueError, match=f"{match}.*lora.unload"):
        other.load_lora(tmp_path)
    assert all(map(torch.equal, before, weights_of(other)))
    lora.unload(other.pipeline)
    other.load_lora(tmp_path)
    assert torch.equal(drawn(stock(other), "sd3"), expected)


def test_a_file_that_says_no_alpha_acts_at_scale_one(tmp_path):
    """As in stock diffusers."""
    trained(FAMILIES["sd3"].build(), "sd3", tmp_path / "ours")
    (tmp_path / "bare").mkdir()
    save_file(load_file(tmp_path / "ours" / WEIGHTS), tmp_path / "bare" / WEIGHTS)
    expected = FAMILIES["sd3"].build()
    expected.load_lora_weights(tmp_path / "bare")
    policy = Policy(FAMILIES["sd3"].build(), **FAMILIES["sd3"].call)
    policy.add_lora(rank=4)
    with pytest.raises(ValueError, match="another scale.* has 1 in the file, 2 here"):
        policy.load_lora(tmp_path / "bare")
    lora.unload(policy.pipeline)
    policy.add_lora(rank=4, alpha=4)
    policy.load_lora(tmp_path / "bare")
    assert torch.equal(drawn(stock(policy), "sd3"), drawn(expected, "sd3"))
