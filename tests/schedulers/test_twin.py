"""A stock scheduler's twin with noise: its table, its steps, what is refused; and recipes of noise by name."""

import copy
import inspect
import json
import logging
import types

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from schedules import SD, gen, randn

from diffusers_align import DDIMSDEScheduler, FlowMatchSDEScheduler, SigmaSDEScheduler, apply_recipe, sde_twin
from diffusers_align.files import paths
from diffusers_align.forward_process import ForwardProcess
from diffusers_align.schedulers import twin
from diffusers_align.schedulers.own_noise import OwnNoiseMixin
from diffusers_align.schedulers.twin import sde_twins

# Twins


SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
TABLES = [
    ("DDIMScheduler", SD),
    ("DDIMScheduler", {"trained_betas": [0.01 + 0.001 * i for i in range(100)], "num_train_timesteps": 100}),
    ("DDIMScheduler", {"beta_schedule": "squaredcos_cap_v2", "rescale_betas_zero_snr": True}),
    ("DDPMScheduler", {"beta_start": 0.0001, "beta_end": 0.02, "clip_sample": False}),
    ("DDPMScheduler", SDXL),
    ("PNDMScheduler", SDXL | {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),
    ("EulerDiscreteScheduler", SDXL | {"timestep_spacing": "leading", "steps_offset": 1}),
    ("EulerDiscreteScheduler", SDXL | {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
    ("EulerAncestralDiscreteScheduler", SDXL),
    ("HeunDiscreteScheduler", SDXL),
    ("DPMSolverMultistepScheduler", SDXL),
    ("DPMSolverSinglestepScheduler", SDXL | {"lower_order_final": True}),
    ("UniPCMultistepScheduler", SDXL),
    ("CogVideoXDDIMScheduler", {"snr_shift_scale": 3.0}),
    ("CogVideoXDDIMScheduler", {"snr_shift_scale": 1.0, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
    ("CogVideoXDPMScheduler", {"snr_shift_scale": 1.0, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}),
]


@pytest.mark.parametrize(("name", "config"), TABLES)
def test_twin_of_a_diffusion_scheduler_has_its_table(name, config, tmp_path):
    source = getattr(diffusers, name)(**config)
    twin = sde_twin(source, eta=0.5)
    twin.save_pretrained(tmp_path)
    for s in (twin, DDIMSDEScheduler.from_pretrained(tmp_path), sde_twin(twin)):
        assert type(s) is DDIMSDEScheduler and s.config.eta == 0.5
        s.set_timesteps(8)
        source.set_timesteps(8)
        assert torch.equal(s.alphas_cumprod, source.alphas_cumprod.to(torch.float32))
        assert s.config.prediction_type == source.config.prediction_type
        assert s.config.num_train_timesteps == source.config.num_train_timesteps
        for t in s.timesteps:
            out = s.step(randn(0), t, randn(1), generator=gen())
            assert out.prev_sample.isfinite().all()


@pytest.mark.parametrize(("name", "config"), [row for row in TABLES if row[0] not in ("DDIMScheduler", "DDPMScheduler") or "clip_sample" in row[1]])
def test_twin_clips_only_where_its_source_does(name, config):
    assert not sde_twin(getattr(diffusers, name)(**config)).config.clip_sample


def test_twin_clips_where_its_source_does():
    twin = sde_twin(diffusers.DDPMScheduler(clip_sample=True, clip_sample_range=2.0))
    assert twin.config.clip_sample and twin.config.clip_sample_range == 2.0


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
        ("EulerDiscreteScheduler", {"sigma_min": 0.002, "sigma_max": 80.0}),
        *((name, {entry: True}) for name in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
          for entry in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")),
        ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
        ("DEISMultistepScheduler", {"use_karras_sigmas": True}),
        ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", {"lambda_min_clipped": -5.1}),
        ("UniPCMultistepScheduler", {"sigma_max": 80.0}),
    ],
)  # fmt: skip
def test_noise_levels_off_the_table_are_walked_in_sigma_space(name, config, caplog):
    if any("beta_sigmas" in entry for entry in config):
        pytest.importorskip("scipy")
    source = getattr(diffusers, name)(**SDXL, **config)
    with caplog.at_level(logging.INFO):
        twin = sde_twin(source, eta=0.5)
    assert type(twin) is SigmaSDEScheduler and twin.config.eta == 0.5
    assert all(f" {entry}=" in caplog.text for entry in config if entry != "prediction_type"), "it is said why"
    assert name in caplog.text and "SigmaSDEScheduler" in caplog.text
    twin.set_timesteps(8)
    source.set_timesteps(8)
    assert float(twin.sigmas[0]) == pytest.approx(float(source.sigmas[0]))


def test_thresholding_off_the_table_is_refused_with_a_remedy():
    source = diffusers.DPMSolverMultistepScheduler(**SDXL, use_karras_sigmas=True, thresholding=True)
    with pytest.raises(ValueError, match=r"thresholding=True has no SDE twin off its table: .*from_config\(pipe.scheduler.config, thresholding=False\)"):
        sde_twin(source)
    assert type(sde_twin(type(source).from_config(source.config, thresholding=False))) is SigmaSDEScheduler
    # Another class's entry, which this one only hands on.
    assert type(sde_twin(diffusers.EulerDiscreteScheduler.from_config(source.config))) is SigmaSDEScheduler


def test_further_modalities_walk_with_the_main_ones_noise():
    euler = diffusers.EulerDiscreteScheduler(**SDXL)
    windowed = sde_twin(euler, sde_window=(0, 3), eta=0.5)
    second = sde_twins({"scheduler": euler, "second": DDIMScheduler()}, windowed)["second"]
    assert (tuple(second.config.sde_window), second.config.eta) == ((0, 3), 0.5)


def test_what_reads_sigmas_gets_a_twin_that_has_them():
    """A pipeline may ask the denoiser by the noise level of its scheduler, which lies on the table."""
    euler, ddim = diffusers.EulerDiscreteScheduler(**SDXL), diffusers.DDIMScheduler(clip_sample=False)
    assert type(sde_twins({"scheduler": euler})["scheduler"]) is DDIMSDEScheduler
    own = sde_twins({"scheduler": euler}, by_sigmas=True)["scheduler"]
    assert type(sde_twin(euler, by_sigmas=True, eta=0.5)) is type(own)
    assert type(own) is SigmaSDEScheduler
    for scheduler in (own, euler):
        scheduler.set_timesteps(5)
    assert torch.equal(own.sigmas, euler.sigmas) and torch.equal(own.timesteps, euler.timesteps)
    assert type(sde_twins({"scheduler": ddim}, by_sigmas=True)["scheduler"]) is DDIMSDEScheduler, "which has none itself"


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edms_schedulers_are_walked_in_their_sigma_space(name):
    assert type(sde_twin(getattr(diffusers, name)())) is SigmaSDEScheduler


def test_a_flow_scheduler_that_a_pipeline_takes_beyond_1_is_walked_in_sigma_space():
    source = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    assert type(sde_twin(source)) is FlowMatchSDEScheduler
    source.register_to_config(sigma_min=0.002, sigma_max=80.0)  # as Cosmos 2's pipelines do
    assert type(sde_twin(source)) is SigmaSDEScheduler


@pytest.mark.parametrize(
    ("name", "spacing"),
    [(name, spacing) for name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DDPMScheduler") for spacing in ("leading", "trailing")]
    + [("DPMSolverMultistepScheduler", "trailing"), ("UniPCMultistepScheduler", "trailing")],
)
def test_a_twin_steps_through_its_sources_timesteps(name, spacing):
    source = getattr(diffusers, name)(**SDXL, timestep_spacing=spacing, steps_offset=1)
    twin = sde_twin(source)
    for steps in (4, 10):
        source.set_timesteps(steps)
        twin.set_timesteps(steps)
        assert torch.equal(source.timesteps.float(), twin.timesteps.float())


@pytest.mark.parametrize(("final", "level"), [("zero", 1.0), ("sigma_min", None)])
def test_a_twin_ends_where_its_source_ends(final, level):
    source = diffusers.DPMSolverMultistepScheduler(**SDXL, final_sigmas_type=final, algorithm_type="dpmsolver++")
    twin = sde_twin(source)
    source.set_timesteps(8)
    expected = 1 / (1 + float(source.sigmas[-1]) ** 2)
    assert float(twin.final_alpha_cumprod) == pytest.approx(expected, rel=1e-5)
    assert level is None or float(twin.final_alpha_cumprod) == level


def test_a_table_that_ddim_knows_by_no_name_is_taken_over():
    source = diffusers.HeunDiscreteScheduler(beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample")
    assert torch.equal(sde_twin(source).alphas_cumprod, source.alphas_cumprod.to(torch.float32))


def test_stochastic_sampling_and_noise_levels_above_one_are_refused():
    with pytest.raises(ValueError, match="stochastic_sampling=True has no SDE twin"):
        sde_twin(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    with pytest.raises(ValueError, match="Noise levels up to 80 are none of flow matching"):
        FlowMatchSDEScheduler().set_timesteps(sigmas=[80.0, 1.0, 0.1])


FLOWS = [
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}, None),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "base_shift": 0.4, "max_shift": 1.2}, 0.7),
    ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True, "shift_terminal": 0.02, "time_shift_type": "linear"}, 0.7),
    ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, None),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}, None),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 5.0, "prediction_type": "flow_prediction"}, None),
    ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}, 0.7),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}, None),
    ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_dynamic_shifting": True}, 0.7),
]


@pytest.mark.parametrize(("name", "config", "mu"), FLOWS)
def test_twin_of_a_flow_scheduler_follows_its_sigmas(name, config, mu, tmp_path):
    source = getattr(diffusers, name)(**config)
    twin = sde_twin(source, sde_type="dance_grpo", noise_level=0.2)
    twin.save_pretrained(tmp_path)
    kwargs = {} if mu is None else {"mu": mu}
    for s in (twin, FlowMatchSDEScheduler.from_pretrained(tmp_path), sde_twin(twin), copy.deepcopy(twin)):
        assert type(s) is FlowMatchSDEScheduler and (s.config.sde_type, s.config.noise_level) == ("dance_grpo", 0.2)
        s.set_timesteps(8, **kwargs)
        source.set_timesteps(8, **kwargs)
        assert torch.equal(s.sigmas, source.sigmas.to(torch.float32))
        assert torch.equal(s.timesteps, source.timesteps.to(torch.float32))
        assert len(s.stochastic_steps) == 8 and s.stochastic_steps.all()
        x = randn(0)
        for t in s.timesteps:
            out = s.step(randn(1), t, x, generator=gen())
            x = out.prev_sample
            assert x.isfinite().all() and out.log_prob.isfinite().all()
        assert s.step_index == 8


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("KarrasVeScheduler", "outside of `step`"),
        ("ScoreSdeVeScheduler", "Langevin steps outside of `step`"),
        ("RePaintScheduler", "back and forth"),
        ("IPNDMScheduler", "neither flow sigmas nor"),
        ("DDIMInverseScheduler", "noise"),
        ("DPMSolverMultistepInverseScheduler", "noise"),
        ("HeliosScheduler", "stage"),
        ("HeliosDMDScheduler", "no step draws"),
    ],
)
def test_schedulers_without_a_gaussian_kernel_are_refused_with_the_reason(name, reason):
    cls = getattr(diffusers, name, None)
    if cls is None:
        pytest.skip(f"this diffusers has no {name}")
    with pytest.raises(ValueError, match=f"{name} has no SDE twin: .*{reason}"):
        sde_twin(cls())


@pytest.mark.parametrize("name", [*twin._OWN_NOISE, "FlowMapEulerDiscreteScheduler"])
def test_schedulers_that_draw_themselves_keep_their_own_step(name):
    if (cls := getattr(diffusers, name, None)) is None:
        pytest.skip(f"this diffusers has no {name}")
    own = sde_twin(cls())
    assert isinstance(own, cls) and isinstance(own, OwnNoiseMixin) and twin.own_noise_twin(own) is twin.own_noise_twin(cls()) is type(own)
    assert type(own).__name__ in twin.SDE_FIELDS and isinstance(sde_twin(own), type(own))
    with pytest.raises(ValueError, match=f"{type(own).__name__} has no noise_level"):
        sde_twin(cls(), noise_level=0.5)


def test_gamma_is_a_field_of_those_that_have_one():
    assert sde_twin(diffusers.TCDScheduler(), eta=0.6).config.eta == 0.6
    with pytest.raises(ValueError, match="LCMSDEScheduler has no eta"):
        sde_twin(diffusers.LCMScheduler(), eta=0.6)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler"])
def test_a_recipe_for_diffusion_or_flow_is_none_for_a_consistency_sampler(name):
    for recipe in ("ddpo", "flow_grpo"):
        with pytest.raises(ValueError, match=f"{name} becomes a"):
            apply_recipe(types.SimpleNamespace(scheduler=getattr(diffusers, name)()), recipe)


def test_twin_refuses_fields_of_the_other_kind():
    with pytest.raises(ValueError, match="DDIMSDEScheduler has no noise_level, sde_type; its fields are eta"):
        sde_twin(DDIMScheduler(), sde_type="cps", noise_level=0.8)
    with pytest.raises(ValueError, match="FlowMatchSDEScheduler has no eta; its fields are sde_type, noise_level, sde_window"):
        sde_twin(FlowMatchEulerDiscreteScheduler(), eta=1.0)


@pytest.mark.parametrize("wrong", ["mini-sd", None, types.SimpleNamespace(config={}, components={}, scheduler=DDIMScheduler())])
def test_what_is_no_scheduler_is_refused_with_what_to_give(wrong):
    with pytest.raises(TypeError, match="takes a loaded scheduler, got a .*: give it pipe.scheduler"):
        sde_twin(wrong)


def test_twin_of_a_twin_changes_only_the_given_fields():
    twin = sde_twin(FlowMatchEulerDiscreteScheduler(shift=2.5), sde_type="cps", noise_level=0.8, sde_window=(0, 4))
    again = sde_twin(twin, noise_level=0.5)
    assert (again.config.shift, again.config.sde_type, again.config.noise_level, tuple(again.config.sde_window)) == (2.5, "cps", 0.5, (0, 4))
    assert again is not twin and twin.config.noise_level == 0.8


# Recipes


RECIPES = paths.names("schedulers")
STOCK = {
    "DDIMSDEScheduler": diffusers.PNDMScheduler(beta_start=0.001, beta_end=0.013, beta_schedule="scaled_linear", set_alpha_to_one=False, steps_offset=1),
    "FlowMatchSDEScheduler": FlowMatchEulerDiscreteScheduler(shift=2.5, use_dynamic_shifting=True, base_shift=0.4, max_shift=1.4),
}


# What the config does not say, or says to others


FOREIGN = {"clip_sample": True, "thresholding": True, "rescale_betas_zero_snr": True, "set_alpha_to_one": False}
FOREIGN |= {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize("name", ["DDIM", "DDPM", "PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep"])
def test_what_a_scheduler_was_made_of_and_does_not_read_is_not_its_twins(name):
    """A config keeps entries of the class that it was saved by, to hand them on."""
    cls = getattr(diffusers, f"{name}Scheduler")
    foreign = {entry: value for entry, value in FOREIGN.items() if entry not in inspect.signature(cls.__init__).parameters}
    assert foreign, "there is nothing to tell"
    found, plain = (sde_twin(cls.from_config({"_class_name": cls.__name__, **SDXL, **more})) for more in (foreign, {}))
    assert type(found) is type(plain) is DDIMSDEScheduler and torch.equal(found.alphas_cumprod, plain.alphas_cumprod)
    entries = [entry for entry in plain.config if not entry.startswith("_")]
    assert {entry: found.config[entry] for entry in entries} == {entry: plain.config[entry] for entry in entries}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        *((f"{name}Scheduler", {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"})
          for name in ("UniPCMultistep", "DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep")),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "timestep_spacing": "leading"}),
        ("DDPMScheduler", {"variance_type": "fixed_large"}),
        ("PNDMScheduler", {"skip_prk_steps": True}),
    ],
)  # fmt: skip
def test_a_scheduler_of_the_twins_config_is_what_the_twin_was_made_of(name, config, tmp_path, caplog, monkeypatch):
    """As with any two classes of diffusers: pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=5.0)."""
    source = getattr(diffusers, name)(**config)
    twin = sde_twin(source)
    twin.save_pretrained(tmp_path)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level(logging.WARNING, "diffusers"):
        again = type(twin).from_pretrained(tmp_path)
    assert "will be ignored" not in caplog.text
    for found in (twin, again, sde_twin(twin)):
        back = type(source).from_config(found.config)
        back.set_timesteps(5)
        source.set_timesteps(5)
        assert torch.equal(back.timesteps, source.timesteps) and all(back.config[entry] == value for entry, value in config.items())
        assert type(sde_twin(back)) is type(twin)


def test_a_class_of_ones_own_reads_what_its_parent_does():
    class Own(DDIMScheduler):
        def __init__(self, **config):
            super().__init__(**config)

    found, plain = sde_twin(Own(**SD)), sde_twin(DDIMScheduler(**SD))
    assert {name: value for name, value in found.config.items() if name[0] != "_"} == {name: value for name, value in plain.config.items() if name[0] != "_"}


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"])
def test_a_shift_that_was_set_is_the_twins_too(name):
    scheduler = getattr(diffusers, name)(shift=3.0)
    scheduler.set_shift(6.0)
    shifted = sde_twin(scheduler)
    for s in (scheduler, shifted, sde_twin(shifted), copy.deepcopy(shifted)):
        s.set_timesteps(5)
        assert torch.equal(s.sigmas, scheduler.sigmas)
    plain = sde_twin(getattr(diffusers, name)(shift=3.0))
    plain.set_timesteps(5)
    assert (plain.sigmas[1:4] - shifted.sigmas[1:4]).abs().min() > 0.01
    if name != "FlowMatchLCMScheduler":
        assert ForwardProcess(shifted)._shift == 6.0 and ForwardProcess(plain)._shift == 3.0


def test_scales_of_a_few_step_sampler_that_were_set_are_the_twins_too():
    scheduler = diffusers.FlowMatchLCMScheduler()
    scheduler.set_scale_factors([0.5, 1.0], "nearest")
    scaled = sde_twin(scheduler)
    assert (scaled._scale_factors, scaled._upscale_mode) == (scheduler._scale_factors, "nearest")


@pytest.mark.parametrize("given", [{"sigmas": [1.0, 0.5, 0.2]}, {"timesteps": [900, 500]}])
def test_levels_that_a_source_does_not_take_are_refused(given):
    (name,), source = given, diffusers.UniPCMultistepScheduler if "timesteps" in given else diffusers.DPMSolverMultistepScheduler
    if name in inspect.signature(source.set_timesteps).parameters:
        pytest.skip("this version of diffusers takes them")
    followed = sde_twin(source(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0))
    for number in (None, 3):
        with pytest.raises(ValueError, match=f"{source.__name__} takes no {name} of one's own"):
            followed.set_timesteps(number, **given)


def test_a_policys_own_scheduler_without_sigmas_is_made_anew_with_its_noise():
    stock = diffusers.EulerDiscreteScheduler(**SDXL)
    given = sde_twin(stock, eta=0.3, sde_window=(0, 2))
    (found,) = sde_twins({"scheduler": stock}, given, by_sigmas=True).values()
    (recipe,) = sde_twins({"scheduler": given}, by_sigmas=True).values()
    for anew in (found, recipe):
        assert type(anew) is SigmaSDEScheduler and (anew.config.eta, tuple(anew.config.sde_window)) == (0.3, (0, 2))
        anew.set_timesteps(4)
        stock.set_timesteps(4)
        assert torch.equal(anew.sigmas, stock.sigmas)
    assert sde_twins({"scheduler": stock}, given)["scheduler"] is given


def test_recipes_of_the_documentation_are_there():
    assert {"ddpo", "flow_grpo", "flow_grpo_fast", "dance_grpo", "cps", "memoryless"} <= set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("by", ["name", "folder"])
def test_recipe_sets_its_fields_and_keeps_the_rest(recipe, by):
    folder = paths.front_door("schedulers", recipe)
    fields = json.loads((folder / "scheduler_config.json").read_text())
    stock = STOCK[fields.pop("_class_name")]
    pipeline = types.SimpleNamespace(scheduler=stock)
    assert apply_recipe(pipeline, recipe if by == "name" else folder) is pipeline
    config = pipeline.scheduler.config
    assert fields and all(config[name] == value for name, value in fields.items())
    for name in ("shift", "base_shift", "max_shift", "use_dynamic_shifting", "beta_start", "beta_end", "beta_schedule", "set_alpha_to_one", "steps_offset"):
        assert config.get(name) == stock.config.get(name)
    assert isinstance(pipeline.scheduler, (FlowMatchSDEScheduler, DDIMSDEScheduler))


def test_a_recipe_leaves_nothing_of_the_one_before():
    pipeline = types.SimpleNamespace(scheduler=STOCK["FlowMatchSDEScheduler"])
    apply_recipe(apply_recipe(pipeline, "flow_grpo_fast"), "flow_grpo")
    assert pipeline.scheduler.config.sde_window is None and pipeline.scheduler.config.noise_level == 0.7


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_for_the_other_kind_of_model_is_refused(recipe):
    wanted = json.loads((paths.front_door("schedulers", recipe) / "scheduler_config.json").read_text())["_class_name"]
    (other,) = set(STOCK) - {wanted}
    pipeline = types.SimpleNamespace(scheduler=STOCK[other])
    with pytest.raises(ValueError, match=f"is for {wanted}, but the pipeline's {type(STOCK[other]).__name__} becomes a {other}"):
        apply_recipe(pipeline, recipe)
    assert pipeline.scheduler is STOCK[other]


def test_a_recipe_of_eta_is_for_both_kinds_of_diffusion_model():
    pipeline = types.SimpleNamespace(scheduler=diffusers.EulerDiscreteScheduler(**SDXL, use_karras_sigmas=True))
    assert type(apply_recipe(pipeline, "ddpo").scheduler) is SigmaSDEScheduler and pipeline.scheduler.config.eta == 1.0


def test_unknown_recipe_names_those_there_are():
    with pytest.raises(FileNotFoundError, match="flow_grpo"):
        apply_recipe(types.SimpleNamespace(scheduler=STOCK["FlowMatchSDEScheduler"]), "no_such_recipe")


def test_recipes_hold_only_sde_fields():
    """A full scheduler config would replace the pipeline's own table."""
    for recipe in RECIPES:
        fields = json.loads((paths.front_door("schedulers", recipe) / "scheduler_config.json").read_text())
        assert set(fields) <= {"_class_name", "eta", "sde_type", "noise_level", "sde_window"}
