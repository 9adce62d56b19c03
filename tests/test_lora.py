"""LoRA files: which bytes, which keys, who can read them, and what loads them; the model underneath with adapters of others."""

import copy
import json
import logging
import os
import pickle
import stat

import pytest
import torch
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pipelines import FAMILIES, wan
from torch import nn

from diffusers_align import Policy, load_lora, lora
from diffusers_align.driving.steps import denoisers
from diffusers_align.driving.wrappers import bare, unwrapped
from diffusers_align.files import lora_files, weight_files
from diffusers_align.training.run.costs import Meter

WEIGHTS = lora_files.WEIGHTS


def moved(parameters, seed=0, by=0.2):
    """Parameters that are no longer a fresh LoRA's."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return list(parameters)


def drawn(pipeline, name):
    """Latents of the pipeline's own call."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return torch.as_tensor(pipeline(prompt=["a cat", "a dog"], generator=generators, output_type="latent", **FAMILIES[name].call)[0])


def stock(policy):
    policy.pipeline.scheduler = policy.stock_scheduler
    return policy.pipeline


def trained(pipeline, name, folder, **lora_config):
    """What a pipeline with a LoRA draws; the LoRA in `folder`."""
    policy = Policy(pipeline, **FAMILIES[name].call)
    moved(policy.add_lora(rank=4, **lora_config))
    policy.save_lora(folder)
    return drawn(stock(policy), name)


# --- wrappers ----------------------------------------------------------------------------------------------------------


def compiled(module):
    return torch.compile(module, backend="eager")


def wrap_whole(pipeline):
    pipeline.transformer = compiled(pipeline.transformer)


def wrap_parts(pipeline):
    blocks = pipeline.transformer.transformer_blocks
    for i, block in enumerate(blocks):
        blocks[i] = compiled(block)


def wrap_in_place(pipeline):
    for block in pipeline.transformer.transformer_blocks:  # what `compile_repeated_blocks` does, which this class has not
        block.compile(backend="eager")


class Sharded(nn.Module):
    """A wrapper that keeps what it wraps as FSDP does."""

    def __init__(self, module):
        super().__init__()
        self._fsdp_wrapped_module = module

    def forward(self, *args, **kwargs):
        return self._fsdp_wrapped_module(*args, **kwargs)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_fsdp_wrapped_module"), name)


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


def test_parallel_wrappers_are_taken_off_and_put_back():
    inner = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    assert unwrapped(nn.DataParallel(compiled(inner))) is inner
    wrapped = inner[1] = Sharded(compiled(inner[1]))
    with bare(nn.DataParallel(inner)) as module:
        assert module is inner and [name for name, _ in module.named_parameters()] == ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    assert inner[1] is wrapped
    with pytest.raises(KeyError), bare(inner):
        raise KeyError
    assert inner[1] is wrapped


def test_a_pipeline_whose_denoiser_has_another_name_may_be_compiled_too():
    class Prior(FAMILIES["sd3"].build().transformer.__class__):
        pass

    class Pipeline:
        components = {"prior": compiled(FAMILIES["sd3"].build().transformer), "vae": FAMILIES["sd3"].build().vae}

    assert list(denoisers(Pipeline)) == ["prior"]


# --- copies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_watched_denoiser_is_a_copy(copied):
    module, meter = nn.Linear(2, 2), Meter()
    meter.watch([module])
    other = copied(module)
    with torch.no_grad():
        other.weight.zero_()
        other.bias.zero_()
    with meter.running():
        assert other(torch.ones(3, 2)).abs().max() == 0 and module(torch.ones(3, 2)).abs().max() > 0
    assert meter.total().denoiser_evaluations == 3, "the copy is not watched"


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
    found = lora_files.configuration(tmp_path / "0" / WEIGHTS)
    assert found["target_modules"] == sorted(found["target_modules"]), "not the order of a set, which is another in each process"


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


def test_a_denoiser_without_a_file_is_named(two, tmp_path, caplog):
    (tmp_path / WEIGHTS).write_bytes((two[0] / WEIGHTS).read_bytes())
    with caplog.at_level(logging.WARNING):
        load_lora(two_denoisers(), tmp_path)
    assert "left out: transformer_2" in caplog.text and str(tmp_path / "transformer_2" / WEIGHTS) in caplog.text
    assert lora_files.digest(tmp_path) != lora_files.digest(two[0])


# --- files of other tools ----------------------------------------------------------------------------------------------


def kohya(weights):
    """The same in kohya's keys."""
    found = {}
    for key, value in weights.items():
        base, half = key.removeprefix("unet.").split(".lora", 1)
        name = "lora_unet_" + base.replace(".", "_").replace("_processor", "")
        found[f"{name}.lora_{'down' if '_A' in half or '.down' in half else 'up'}.weight"] = value
        found[f"{name}.alpha"] = torch.tensor(4.0)
    return found


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder with a LoRA, `ours`, and the same as `kohya`; and what the trained pipeline draws."""
    folder = tmp_path_factory.mktemp("foreign")
    expected = trained(FAMILIES["sd15"].build(), "sd15", folder / "ours", alpha=4)
    (folder / "kohya").mkdir()
    save_file(kohya(load_file(folder / "ours" / WEIGHTS)), folder / "kohya" / WEIGHTS)
    (folder / "named").mkdir()
    (folder / "named" / "my_style.safetensors").write_bytes((folder / "kohya" / WEIGHTS).read_bytes())
    return folder, expected


@pytest.mark.parametrize("path", ["ours", f"ours/{WEIGHTS}", "kohya", f"kohya/{WEIGHTS}", "named", "named/my_style.safetensors"])
def test_files_of_other_tools_load_from_a_folder_as_alone(foreign, path):
    from diffusers_align.training.report.evaluation import find_lora, lora_loaded

    folder, expected = foreign
    pipeline = FAMILIES["sd15"].build()
    base = drawn(pipeline, "sd15")
    with lora_loaded(pipeline, find_lora(str(folder / path)), "it"):
        torch.testing.assert_close(drawn(pipeline, "sd15"), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(drawn(pipeline, "sd15"), base)
    policy = Policy(pipeline, **FAMILIES["sd15"].call)
    policy.add_lora(rank=4, alpha=4)
    policy.load_lora(folder / path)
    torch.testing.assert_close(drawn(stock(policy), "sd15"), expected, rtol=1e-5, atol=1e-5)


def test_a_lora_of_another_model_or_scale_is_refused(foreign, tmp_path):
    folder, _ = foreign
    pipeline = FAMILIES["sd15"].build()
    base = drawn(pipeline, "sd15")
    half = dict(list(load_file(folder / "ours" / WEIGHTS).items())[:-2])
    save_file({**half, **{f"unet.elsewhere.{i}.lora.{side}.weight": torch.ones(4, 4) for i in range(3) for side in ("down", "up")}}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"is not of this .*: \d+ of its \d+ tensors found a place"):
        load_lora(pipeline, tmp_path)
    assert torch.equal(drawn(pipeline, "sd15"), base)
    policy = Policy(FAMILIES["sd15"].build())
    policy.add_lora(rank=4, alpha=8)
    with pytest.raises(ValueError, match="has alpha 4, the LoRA that is there 8: .*another scale"):
        policy.load_lora(folder / "ours")
    with pytest.raises(ValueError, match="has alpha 4, the LoRA that is there 8: .*another scale"):
        policy.load_lora(folder / "kohya")
    policy = Policy(FAMILIES["sd15"].build())
    policy.add_lora(rank=2, alpha=4)
    with pytest.raises(ValueError, match="does not fit the LoRA that is there, of rank 2: size mismatch"):
        policy.load_lora(folder / "ours")


def test_where_no_lora_is_the_message_says_what_is(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"No LoRA 'nofile'.*no such folder or file"):
        lora_files.find("nofile")
    for name in ("one", "two"):
        save_file({"a": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match=r"several files \(one.safetensors, two.safetensors\)"):
        lora_files.find(tmp_path)
    with pytest.raises(FileNotFoundError, match="has: one.safetensors, two.safetensors"):
        lora_files.find(tmp_path / "three.safetensors")
    (tmp_path / "pickle.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="may hold code"):
        lora_files.find(tmp_path / "pickle.bin")
    with pytest.raises(ValueError, match="unet has no LoRA to save"):
        Policy(FAMILIES["sd15"].build()).save_lora(tmp_path)


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
        assert not policy.trainable_parameters()
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


def test_the_configuration_travels_with_the_file(tmp_path):
    trained(FAMILIES["sd3"].build(), "sd3", tmp_path, alpha=3, use_rslora=True)
    found = lora_files.configuration(tmp_path / WEIGHTS)
    assert (found["r"], found["lora_alpha"], found["use_rslora"]) == (4, 3, True)
    assert found["target_modules"] == sorted(found["target_modules"])
    assert json.loads(lora_files.metadata(tmp_path / WEIGHTS)[lora_files.METADATA])
