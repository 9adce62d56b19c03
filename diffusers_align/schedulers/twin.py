"""From any stock scheduler to the policy that walks the same noise table, and recipes that set its stochastic side."""

from __future__ import annotations

import inspect
import json
import logging
import math
from pathlib import Path

import torch

from ..files.paths import front_door
from .own_noise import OwnNoiseMixin
from .scheduling_ancestral_sde import LEARNED, DDPMSDEScheduler, UnCLIPSDEScheduler, WuerstchenSDEScheduler
from .scheduling_consistency_sde import CMSDEScheduler, FlowMatchLCMSDEScheduler, LCMSDEScheduler, SCMSDEScheduler, TCDSDEScheduler
from .scheduling_ddim_sde import DDIMSDEScheduler
from .scheduling_flow_match_sde import FlowMatchSDEScheduler
from .scheduling_sigma_sde import SigmaSDEScheduler
from .scheduling_utils import SDESchedulerMixin

logger = logging.getLogger(__name__)

SDE_FIELDS = {
    "DDIMSDEScheduler": ("eta", "sde_window"),
    "FlowMatchSDEScheduler": ("sde_type", "noise_level", "sde_window"),
    "SigmaSDEScheduler": ("eta", "sde_window"),
    "TCDSDEScheduler": ("eta",),
    "FlowMapSDEScheduler": ("eta",),
    **dict.fromkeys(("LCMSDEScheduler", "FlowMatchLCMSDEScheduler", "SCMSDEScheduler", "CMSDEScheduler"), ()),
    **dict.fromkeys(("DDPMSDEScheduler", "UnCLIPSDEScheduler", "WuerstchenSDEScheduler"), ()),
}
# Stock schedulers whose own step is a Gaussian draw: that one's density is theirs.
_OWN_NOISE = {
    "LCMScheduler": LCMSDEScheduler,
    "TCDScheduler": TCDSDEScheduler,
    "FlowMatchLCMScheduler": FlowMatchLCMSDEScheduler,
    "SCMScheduler": SCMSDEScheduler,
    "CMStochasticIterativeScheduler": CMSDEScheduler,
    "UnCLIPScheduler": UnCLIPSDEScheduler,
    "DDPMWuerstchenScheduler": WuerstchenSDEScheduler,
}
NO_KERNEL = {
    "KarrasVe": "its pipeline adds noise to the state and corrects it outside of `step`",
    "ScoreSde": "its pipeline corrects the state by Langevin steps outside of `step`",
    "DDIMInverse": "it walks from data to noise",
    "DPMSolverMultistepInverse": "it walks from data to noise",
    "HeliosDMD": "each stage re-noises with one and the same noise, that of its start, so that no step draws",
    "Helios": "its velocities lead from stage to stage, each with end points of its own, which are no noise levels",
    "MiniMaxH3": "its pipeline hands it one sample's tokens as rows, without an axis of samples, so that no density would be a sample's",
    "RePaint": "it jumps back and forth in time",
    "VQDiffusion": "its states are discrete",
    "Amused": "its states are discrete",
}

# Entries of a diffusion scheduler's config that put its steps on noise levels which a table of timesteps does not have, and what leaves them.
_OFF_THE_TABLE = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "use_lu_lambdas": False,
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
    "lambda_min_clipped": -math.inf,
}


def sde_twin(scheduler, *, by_sigmas: bool = False, **sde_fields):
    """The SDE scheduler with the same noise table as `scheduler`.

    Diffusion schedulers (DDIM, DDPM, PNDM, Euler, DPM-Solver, CogVideoX's ...) become a `DDIMSDEScheduler` with the same
    `alphas_cumprod`; those of flow matching (FlowMatchEuler, UniPC and DPM-Solver with flow sigmas) a `FlowMatchSDEScheduler`
    that follows the same sigmas; those whose noise levels lie off the table (Karras', exponential, beta, continuous timesteps, EDM's) a
    `SigmaSDEScheduler`, on the same sigmas too. Those that draw from a Gaussian themselves keep their own step: consistency samplers (LCM, TCD, SCM ...),
    flow maps, UnCLIP, Wuerstchen, and DDPM with a learned variance. An SDE scheduler is copied.

    Args:
        by_sigmas: the pipeline reads the scheduler's `sigmas`: the twin has them too, though its levels lie on a table.
        sde_fields: `sde_window`, and `eta` or `sde_type` and `noise_level`; where absent the class's defaults, or those of an SDE scheduler that is copied.

    Raises:
        TypeError: it is no scheduler, such as a pipeline or a name.
        ValueError: the scheduler has no Gaussian kernel of these forms, or a field belongs to another form.
    """
    if not hasattr(scheduler, "config") or hasattr(scheduler, "components"):
        raise TypeError(f"sde_twin takes a loaded scheduler, got a {type(scheduler).__name__}: give it pipe.scheduler.")
    cls = _twin_class(scheduler)
    if by_sigmas and cls is DDIMSDEScheduler and hasattr(scheduler, "sigmas") and not isinstance(scheduler, SDESchedulerMixin):
        cls = SigmaSDEScheduler
    if unknown := sorted(set(sde_fields) - set(SDE_FIELDS[cls.__name__])):
        fields = f"its fields are {', '.join(SDE_FIELDS[cls.__name__])}" if SDE_FIELDS[cls.__name__] else "its noise is the sampler's own, and has none to set"
        raise ValueError(f"{cls.__name__} has no {', '.join(unknown)}; {fields}.")
    if isinstance(scheduler, SDESchedulerMixin):
        copy = cls.from_config(scheduler.config, **sde_fields)
        copy.made_of = getattr(scheduler, "made_of", None)
        return _as_set(copy, scheduler)
    config = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    if issubclass(cls, OwnNoiseMixin):
        return _as_set(cls.from_config(config, **sde_fields), scheduler)
    source = {"_class_name": type(scheduler).__name__, **config}
    build = {FlowMatchSDEScheduler: _flow_twin, DDIMSDEScheduler: _ddim_twin, SigmaSDEScheduler: _sigma_twin}[cls]
    twin = build(scheduler, config, source, sde_fields)
    _hand_on(twin, scheduler)
    twin.made_of = scheduler  # for `sde_twins`, where a pipeline asks for more than this kind of twin has
    return _as_set(twin, scheduler)


def sde_twins(schedulers: dict, main: SDESchedulerMixin | None = None, by_sigmas: bool = False) -> dict:
    """The SDE twins of a pipeline's schedulers by name, the main one first; those of further modalities walk with the main one's noise.

    Args:
        main: in the place of the first one's twin.
        by_sigmas: the pipeline reads the first one's `sigmas`: its twin has them too, though its levels lie on a table. A main one without them
            is made anew, with its noise, of what it was made of.
    """
    (name, stock), *others = schedulers.items()
    main = sde_twin(stock, by_sigmas=by_sigmas) if main is None else main
    if by_sigmas and isinstance(main, DDIMSDEScheduler) and (source := getattr(main, "made_of", None)) is not None:
        main = sde_twin(source, by_sigmas=True, **{field: main.config[field] for field in SDE_FIELDS["DDIMSDEScheduler"]})
    kind = type(main).__name__
    fields = {field: main.config[field] for field in SDE_FIELDS.get(kind, ())}
    return {name: main, **{other: sde_twin(s, **(fields if _twin_class(s).__name__ == kind else {})) for other, s in others}}


def _as_set(twin: SDESchedulerMixin, scheduler) -> SDESchedulerMixin:
    """The twin with what was set on the scheduler after it was made, of which its config does not know."""
    if hasattr(scheduler, "set_shift") and scheduler.shift != twin.shift:
        twin.set_shift(scheduler.shift)
    if getattr(scheduler, "_scale_factors", None):
        twin.set_scale_factors(scheduler._scale_factors, scheduler._upscale_mode)
    return twin


def _hand_on(twin: SDESchedulerMixin, scheduler) -> None:
    """Keep in the twin's config what the scheduler's class reads beside it, as diffusers does from class to class: `UniPCMultistepScheduler.from_config`
    of the twin of a UniPC with flow sigmas has them again."""
    known = {entry for cls in twin._get_compatibles() for entry in inspect.signature(cls.__init__).parameters}
    own = {n: value for n, value in scheduler.config.items() if n in known and n not in twin.config and _reads(scheduler, n)}
    usual = set(scheduler.config.get("_use_default_values", ())) & set(own)
    twin.register_to_config(**own, _use_default_values=[*twin.config.get("_use_default_values", ()), *sorted(usual)])


def _reads(scheduler, entry: str) -> bool:
    """Whether the scheduler's class, or one that it is a kind of, reads an entry: a config also holds what other classes read, which it was made of."""
    return any(entry in inspect.signature(cls.__init__).parameters for cls in type(scheduler).__mro__)


def _twin_class(scheduler) -> type:
    if isinstance(scheduler, SDESchedulerMixin):
        return [cls for cls in type(scheduler).__mro__ if cls.__name__ in SDE_FIELDS][-1]
    name = type(scheduler).__name__
    if (own := own_noise_twin(scheduler)) is not None:
        return own
    for prefix, reason in NO_KERNEL.items():
        if name.startswith(prefix):
            raise ValueError(f"{name} has no SDE twin: {reason}. Give the pipeline a DDIM or a FlowMatchEuler scheduler if its model allows.")
    if _explodes(scheduler):
        return SigmaSDEScheduler
    flow_sigmas = _reads(scheduler, "use_flow_sigmas") and scheduler.config.get("use_flow_sigmas")
    if name.startswith("FlowMatch") or flow_sigmas or scheduler.config.get("prediction_type") == "flow_prediction":
        return FlowMatchSDEScheduler
    if getattr(scheduler, "alphas_cumprod", None) is not None:
        return SigmaSDEScheduler if _off_the_table(scheduler) else DDIMSDEScheduler
    raise ValueError(f"{name} has no SDE twin: it has neither flow sigmas nor an alphas_cumprod table.")


def own_noise_twin(scheduler) -> type | None:
    """The class of the twin of a scheduler that draws from a Gaussian itself, or is such a twin; None of another one."""
    if isinstance(scheduler, OwnNoiseMixin):
        return type(scheduler)
    name = type(scheduler).__name__
    if name == "FlowMapEulerDiscreteScheduler":  # not in every diffusers
        from .scheduling_flow_map_sde import FlowMapSDEScheduler

        return FlowMapSDEScheduler
    if name == "DDPMScheduler" and scheduler.config.variance_type in LEARNED:
        return DDPMSDEScheduler
    return _OWN_NOISE.get(name)


def _explodes(scheduler) -> bool:
    """Whether the scheduler walks in EDM's sigma space: those made for it, and FlowMatchEuler with noise levels beyond 1, where flow matching has none."""
    name = type(scheduler).__name__
    return name.startswith(("EDM", "CosineDPM")) or name.startswith("FlowMatchEuler") and (scheduler.config.get("sigma_max") or 0) > 1


def _off_the_table(scheduler) -> list[str]:
    """Entries of the config by which the scheduler's steps are not those of its table, so that a twin on the table would ask the model at other levels."""
    given = ((entry, scheduler.config.get(entry, usual), usual) for entry, usual in _OFF_THE_TABLE.items() if _reads(scheduler, entry))
    return [f"{entry}={value!r}" for entry, value, usual in given if value not in (usual, None)]


def _sigma_twin(scheduler, config: dict, source: dict, sde_fields: dict) -> SigmaSDEScheduler:
    name, known = type(scheduler).__name__, inspect.signature(SigmaSDEScheduler.__init__).parameters
    if _reads(scheduler, "thresholding") and config.get("thresholding"):
        raise ValueError(
            f"{name} with thresholding=True has no SDE twin off its table: it scales clean samples by their own quantiles, unlike the twin. Give the pipeline "
            f"{name}.from_config(pipe.scheduler.config, thresholding=False)."
        )
    logger.info("%s%s walks its own noise levels as a SigmaSDEScheduler.", name, "".join(f" {entry}" for entry in _off_the_table(scheduler)))
    return SigmaSDEScheduler(**{n: value for n, value in config.items() if n in known}, source=source, **sde_fields)


def _flow_twin(scheduler, config: dict, source: dict, sde_fields: dict) -> FlowMatchSDEScheduler:
    if config.get("stochastic_sampling"):
        raise ValueError(
            f"{type(scheduler).__name__} with stochastic_sampling=True has no SDE twin: it draws without a density, also where the policy walks the ODE. Give "
            "the pipeline one with stochastic_sampling=False; sde_type and noise_level set the noise."
        )
    if type(scheduler).__name__.startswith("FlowMatch"):
        known = inspect.signature(FlowMatchSDEScheduler.__init__).parameters
        # The noise is the kernel's; what is left without it is the ODE.
        config = {name: value for name, value in config.items() if name in known} | {"stochastic_sampling": False}
        return FlowMatchSDEScheduler.from_config(config, **sde_fields)
    return FlowMatchSDEScheduler(num_train_timesteps=config["num_train_timesteps"], shift=config.get("flow_shift") or 1.0, source=source, **sde_fields)


def _ddim_twin(scheduler, config: dict, source: dict, sde_fields: dict) -> DDIMSDEScheduler:
    known = inspect.signature(DDIMSDEScheduler.__init__).parameters
    # DDIM clips by default, latent models must not be clipped: clip only where the source asks for it.
    config = {"clip_sample": False} | {name: value for name, value in config.items() if name in known and _reads(scheduler, name)}
    if _reads(scheduler, "final_sigmas_type") and scheduler.config.get("final_sigmas_type") == "sigma_min":
        config["set_alpha_to_one"] = False  # the last step ends at the table's first noise level
    if type(scheduler).__name__.startswith("CogVideoX"):
        config["clip_sample"] = False  # registered by these classes, True by default, but never read
    if config.get("timestep_spacing") == "linspace":
        # DDIM steps by num_train_timesteps // K, which leaves a linspace grid; trailing also starts at the last timestep.
        config["timestep_spacing"] = "trailing"
    if config.get("beta_schedule") not in (None, "linear", "scaled_linear", "squaredcos_cap_v2"):
        config |= {"beta_schedule": "linear", "trained_betas": scheduler.betas.tolist()}  # DDIM knows no other by name
    twin = DDIMSDEScheduler.from_config(config, **sde_fields)
    if torch.equal(twin.alphas_cumprod, scheduler.alphas_cumprod.cpu().to(torch.float32)):
        return twin
    return DDIMSDEScheduler.from_config(config, source=source, **sde_fields)


def apply_recipe(pipeline, recipe: str | Path):
    """Give `pipeline` the SDE twin of its own scheduler with the fields of a recipe, and return the pipeline.

    Args:
        recipe: a folder with a `scheduler_config.json` that holds SDE fields only, or the name of one that ships with the
            package: `ddpo`, `flow_grpo`, `flow_grpo_fast`, `dance_grpo`, `cps`, `memoryless`.

    Raises:
        FileNotFoundError: no such recipe.
        ValueError: the recipe is for another kind of model (diffusion or flow matching).
    """
    folder = Path(recipe) if Path(recipe).is_dir() else front_door("schedulers", str(recipe))
    fields = json.loads((folder / "scheduler_config.json").read_text())
    wanted, twin = fields.pop("_class_name"), _twin_class(pipeline.scheduler)
    actual, usual = twin.__name__, inspect.signature(twin.__init__).parameters
    if wanted != actual and {wanted, actual} != {"DDIMSDEScheduler", "SigmaSDEScheduler"}:
        raise ValueError(f"Recipe {recipe} is for {wanted}, but the pipeline's {type(pipeline.scheduler).__name__} becomes a {actual}.")
    # What a recipe before this one has set and this one does not name is as usual again.
    given = {name: fields.get(name, usual[name].default) for name in SDE_FIELDS[actual]}
    unknown = {name: value for name, value in fields.items() if not name.startswith("_") and name not in given}
    pipeline.scheduler = sde_twin(pipeline.scheduler, **given, **unknown)
    return pipeline
