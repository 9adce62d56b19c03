"""The methods: a recipe and what is changed of it, the data that it needs, and the two numbers that the search tries."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import yaml

from benchmarks.frontier.tasks import CALL, LIKES, PAIRS, SCORES, Task, flags_of
from diffusers_align.files.levels import script_of
from diffusers_align.files.paths import find_recipe

ONLINE, GRADIENT, OFFLINE, CLOSED, CONTROL, INFERENCE = "online RL", "reward gradient", "data", "behind the model", "control", "no training"
FACTORS = {"learning_rate": (0.3, 1.0, 3.0), "strength": (0.1, 1.0)}
DDIM = {"eta": 1.0}  # the noise of its twin, where the recipe is for flow matching


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        recipe: which its settings are taken from.
        data: the kind that it learns from; None if it samples for itself.
        settings: over the recipe's; None takes a key out.
        on: the same for one of the models alone; a model that is not there takes no further ones.
        strength: of the method's hold on the pretrained model, or of its pull away; what the search tries beside the learning rate.
        models: that it applies to.
        wrong: share of wrong labels, over the task's: 0.5 is chance.
        apart: pairs whose rewards differ by no more than this are left out.
        unlabelled: whether it learns from the images alone, so that every task has it.
    """

    route: str
    recipe: str
    strength: str | None = None
    data: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    on: dict[str, dict[str, Any]] = field(default_factory=dict)
    models: tuple[str, ...] = ("mini-sd3", "mini-sd")
    wrong: float | None = None
    apart: float = 0.0
    unlabelled: bool = False

    @property
    def script(self) -> str:
        return script_of(self.recipe)

    @property
    def tuned(self) -> dict[str, str]:
        """What the search tries, and the setting that it is."""
        rate = {} if self.settings.get("learning_rate", "the recipe's") is None else {"learning_rate": "learning_rate"}
        return rate | ({"strength": self.strength} if self.strength else {})

    def applies(self, task: Task, model: str) -> bool:
        """Whether it has a row for this task on this model."""
        if self.apart and task.data != "own":
            return False
        return model in self.models and (self.unlabelled or (task.online if self.data is None else self.data in task.kinds))


FLOW = ("mini-sd3",)
HELD = {"kl_weight": 0.1}  # as the other recipes of its family: its own is for a sum of two rewards
TWO_STEPS, FIVE_STEPS, OWN_LATENTS = {"sde_window": [0, 2]}, {"sde_window": [0, 5]}, {"same_latent": None}
NO_CLIP = {"clip_range": None, "gradient_accumulation_steps": None}  # one step of all samples
NO_RATE = {"learning_rate": None, "lr_scheduler": None}  # steps of a given KL
PLAIN = {"sft_weight": None, "safeguard_mu": None}
EQUAL = {"weights": "top_q", "top_q": 1.0, "scope": None, "temperature": None}  # every image weighs the same
RANDOM = {"reward": "benchmarks.frontier.controls:random_reward", "reward_model": None, "eval_reward": None, "eval_reward_model": None}
METHODS = {
    "DDPO-SF": Method(ONLINE, "ddpo_mini_sd", None, settings={"estimator": "sf", **NO_CLIP}),
    "DDPO-IS": Method(ONLINE, "ddpo_mini_sd", "clip_range"),
    # The recipe's two steps are too few for a radius of that size: "TRPO, noise in two steps" breaks the pictures.
    "TRPO": Method(ONLINE, "ddpo_mini_sd", "max_kl", settings={"update": "trpo", "cg_iterations": 3, "max_kl": 20.0, **FIVE_STEPS, **NO_CLIP, **NO_RATE}),
    "DPOK": Method(ONLINE, "dpok_mini_sd", "kl_weight"),
    "Flow-GRPO": Method(ONLINE, "flow_grpo_mini_sd3", "kl_weight", settings=HELD, on={"mini-sd": DDIM}),
    "Flow-CPS": Method(ONLINE, "flow_grpo_cps_mini_sd3", "kl_weight", models=FLOW),
    "DanceGRPO": Method(ONLINE, "flow_grpo_dance_mini_sd3", "kl_weight", models=FLOW),
    # The window moves halfway through the middle budget's eight epochs; by the recipe's interval it would stay where Flow-GRPO's is.
    "MixGRPO": Method(ONLINE, "flow_grpo_mix_mini_sd3", "kl_weight", settings={"sde_window_interval": 4}, models=FLOW),
    "GRPO-Guard": Method(ONLINE, "flow_grpo_guard_mini_sd3", "kl_weight", models=FLOW),
    "DenseGRPO": Method(ONLINE, "dense_grpo_mini_sd3", "kl_weight", models=FLOW),
    "MV-GRPO": Method(ONLINE, "mv_grpo_mini_sd3", "kl_weight", on={"mini-sd": DDIM}),
    "DiffusionNFT": Method(ONLINE, "nft_mini_sd3", "beta"),
    "AWM": Method(ONLINE, "awm_mini_sd3", "ema_beta"),
    "DRaFT-1": Method(GRADIENT, "draft_mini_sd3", settings={"truncation": 1}),
    "DRaFT-3": Method(GRADIENT, "draft_mini_sd3"),
    "DRaFT": Method(GRADIENT, "draft_mini_sd3", settings={"method": "draft", "truncation": None}),
    "DRaFT-LV": Method(GRADIENT, "draft_mini_sd3", settings={"method": "draft_lv", "truncation": None}),
    "DRTune": Method(GRADIENT, "draft_mini_sd3", settings={"method": "drtune", "truncation": None, "num_trained_steps": 3, "skip_last_steps": 2}),
    "ReFL": Method(GRADIENT, "refl_mini_sd3", "reward_scale", settings={"reward_map": "shortfall", "reward_target": 1.0}),
    "AlignProp": Method(GRADIENT, "alignprop_mini_sd", "reward_scale"),
    "Adjoint Matching": Method(GRADIENT, "adjoint_matching_mini_sd3", "reward_scale", settings={"num_prompts_per_epoch": 48}),
    "D3PO": Method(ONLINE, "d3po_mini_sd3", "clip_range"),
    "SPO": Method(ONLINE, "spo_mini_sd3", "clip_range", on={"mini-sd": DDIM}),
    "Diffusion-DPO": Method(OFFLINE, "dpo_mini_sd3", "beta", PAIRS, PLAIN),
    "DPO, pairs apart": Method(OFFLINE, "dpo_mini_sd3", "beta", PAIRS, PLAIN, apart=0.2),
    "DPO, safeguard": Method(OFFLINE, "dpo_mini_sd3", "beta", PAIRS),
    "MaPO": Method(OFFLINE, "dpo_mini_sd3", "beta", PAIRS, {**PLAIN, "loss": "mapo", "beta": 0.1}),
    "Linear-DPO": Method(OFFLINE, "dpo_mini_sd3", "beta", PAIRS, {**PLAIN, "loss": "linear", "linear_eta": 0.001, "reference_decay": 0.99}),
    "InPO": Method(OFFLINE, "dpo_mini_sd3", "beta", PAIRS, {**PLAIN, "inversion_steps": 2}),
    "DSPO": Method(OFFLINE, "dspo_mini_sd3", "beta", PAIRS),
    "Diffusion-KTO": Method(OFFLINE, "kto_mini_sd3", "beta", LIKES),
    "RWR": Method(OFFLINE, "rwr_mini_sd3", "temperature", SCORES),
    "PFM": Method(CLOSED, "pfm_likes_blue_mini_sd", None, PAIRS, {"learning_rate": 1e-3}, models=("mini-sd",)),
    "plain fine-tuning": Method(CONTROL, "rwr_mini_sd3", None, SCORES, EQUAL, unlabelled=True),
    "DPO, shuffled": Method(CONTROL, "dpo_mini_sd3", "beta", PAIRS, PLAIN, wrong=0.5),
    "KTO, shuffled": Method(CONTROL, "kto_mini_sd3", "beta", LIKES, wrong=0.5),
    "RWR, shuffled": Method(CONTROL, "rwr_mini_sd3", "temperature", SCORES, wrong=0.5),
    "random reward": Method(CONTROL, "flow_grpo_mini_sd3", "kl_weight", settings={**HELD, **RANDOM}, on={"mini-sd": DDIM}),
}
# Watched during training by a judge that neither trains nor fills the tables, at the guidance that images are judged with; see `running.LOOK`.
STOP = {"eval_reward": "scene_judge", "early_stop_hacking": 3.0, "eval_guidance_scale": 3.0}
STOPPED = {f"{name}, stopped": name for name in ("ReFL", "AlignProp", "DRTune", "Diffusion-DPO")}
METHODS |= {name: replace(METHODS[of], settings={**METHODS[of].settings, **STOP}) for name, of in STOPPED.items()}
# Why the ones learn more of equal rows than the others: where the noise is, and whether the samples of a prompt share the latents that they begin with.
TRIED = {
    **{f"{name}, noise in five steps": (name, FIVE_STEPS) for name in ("DDPO-SF", "DDPO-IS", "DPOK", "Flow-GRPO")},
    "TRPO, noise in two steps": ("TRPO", TWO_STEPS),
    "Flow-GRPO, own latents": ("Flow-GRPO", OWN_LATENTS),
    "Flow-GRPO, own latents, noise in five steps": ("Flow-GRPO", OWN_LATENTS | FIVE_STEPS),
}
METHODS |= {name: replace(METHODS[of], settings={**METHODS[of].settings, **changes}) for name, (of, changes) in TRIED.items()}
# Of a recipe's settings: what belongs to its own reward and data, and what would end a run before its budget.
DROPPED = ("eval_reward", "eval_reward_model", "reward_model", "cache_dir", "outputs", "early_stop_hacking")
# A control, or a method on other data, with a stop or with noise elsewhere, is trained with what was found for the method itself.
TUNED_AS = {
    **STOPPED,
    **{name: of for name, (of, _) in TRIED.items()},
    "DPO, pairs apart": "Diffusion-DPO",
    "DPO, shuffled": "Diffusion-DPO",
    "KTO, shuffled": "Diffusion-KTO",
    "RWR, shuffled": "RWR",
    "plain fine-tuning": "RWR",
    "random reward": "Flow-GRPO",
}


def settings(method: Method, task: Task, model: str, train: str, tuned: dict[str, float]) -> dict[str, Any]:
    """A recipe of its own for a run: the method's recipe on this task and model, with the learning rate falling linearly to 0.

    Args:
        train: the training prompts.
        tuned: factors of the search, by `learning_rate` and `strength`.
    """
    found = yaml.safe_load(find_recipe(method.recipe).read_text(encoding="utf-8"))
    found = {name: value for name, value in found.items() if name not in DROPPED}
    found |= {"pretrained_model_name_or_path": model, "prompts": train, **flags_of(task.reward), "lr_scheduler": "linear"}
    if method.route != CLOSED:
        found |= {"eval_prompts": train, "call_kwargs": CALL[model]}
    found |= {**method.settings, **method.on.get(model, {})}
    for name, factor in tuned.items():
        if key := method.tuned.get(name):
            found[key] *= factor
    return {name: value for name, value in found.items() if value is not None}


def numbers(method: Method, task: Task, model: str, tuned: dict[str, float]) -> dict[str, float]:
    """What a run has of the numbers that the search tries, by the names of their flags."""
    found = settings(method, task, model, "", tuned)
    return {name: found[name] for name in method.tuned.values()}


def grid(method: Method) -> list[dict[str, float]]:
    """What the search tries of a method: the same factors of its recipe's numbers for all that have them."""
    return [dict(zip(method.tuned, factors)) for factors in product(*(FACTORS[name] for name in method.tuned))]
