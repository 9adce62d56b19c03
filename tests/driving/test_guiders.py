"""What a guider takes is an argument of the call, for the time of the call."""

import logging

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, AutoGuidance, ClassifierFreeGuidance, PerturbedAttentionGuidance, SkipLayerGuidance
from modular_pipelines import build

from diffusers_align import Policy
from diffusers_align.driving.guiders import guided, guider_parameters

PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]


class Pipeline:
    """A pipeline as far as guiders go."""

    def __init__(self, **components):
        self.components = components
        self.__dict__.update(components)


def test_each_guider_has_its_own_argument_beside_the_common_one():
    pipeline = Pipeline(guider=ClassifierFreeGuidance(3.0), guider_2=ClassifierFreeGuidance(4.0), audio_guider=ClassifierFreeGuidance(5.0))
    found = guider_parameters(pipeline)
    assert [found[name].default for name in ("guidance_scale", "guidance_scale_2", "audio_guidance_scale")] == [3.0, 4.0, 5.0]
    with guided(pipeline, {"guidance_scale": 1.5, "audio_guidance_scale": 2.5, "stop": None}):
        assert [g.guidance_scale for g in (pipeline.guider, pipeline.guider_2, pipeline.audio_guider)] == [1.5, 1.5, 2.5]
        assert pipeline.guider._stop == 1.0
    assert [g.guidance_scale for g in (pipeline.guider, pipeline.guider_2, pipeline.audio_guider)] == [3.0, 4.0, 5.0]
    assert guider_parameters(Pipeline(guider=None)) == {}


def test_a_guider_that_is_off_is_switched_on_by_a_setting():
    pipeline = Pipeline(guider=ClassifierFreeGuidance(3.0, enabled=False))
    with guided(pipeline, {}):
        assert pipeline.guider.num_conditions == 1
    with guided(pipeline, {"guidance_scale": 2.0}):
        assert pipeline.guider.num_conditions == 2
    with guided(pipeline, {"guidance_scale": 2.0, "enabled": False}):
        assert pipeline.guider.num_conditions == 1


def test_settings_that_say_how_others_are_made_have_their_effect():
    guider = AutoGuidance(auto_guidance_layers=[0], dropout=0.5)
    pipeline = Pipeline(guider=guider)
    with guided(pipeline, {"dropout": 0.9, "guidance_scale": 2.0}):
        assert [layers.dropout for layers in pipeline.guider.auto_guidance_config] == [0.9]
        assert pipeline.guider.guidance_scale == 2.0
    assert [layers.dropout for layers in guider.auto_guidance_config] == [0.5]
    pipeline = Pipeline(guider=PerturbedAttentionGuidance(perturbed_guidance_layers=[0], perturbed_guidance_scale=2.0))
    with guided(pipeline, {"perturbed_guidance_scale": 4.0}):
        assert pipeline.guider.skip_layer_guidance_scale == 4.0


def test_what_was_set_at_a_guider_stays_beside_a_calls_settings():
    pipeline = Pipeline(guider=ClassifierFreeGuidance(3.0, guidance_rescale=0.5))
    pipeline.guider.guidance_rescale = 0.7
    pipeline.guider.disable()
    with guided(pipeline, {"guidance_scale": 3.0}):
        assert (pipeline.guider.guidance_rescale, pipeline.guider.guidance_scale, pipeline.guider._enabled) == (0.7, 3.0, True)
    assert not pipeline.guider._enabled


@pytest.mark.parametrize(
    "settings, message",
    [
        *(({"guidance": value}, "guidance=False switches the guiders off") for value in (0, 7.5, "off")),
        ({"enabled": "no"}, "enabled must be True or False"),
        ({"guidance_scale": [1.0, 5.0]}, "guidance_scale must be a finite number"),
        ({"start": 0.9, "stop": 0.1}, "Expected `stop` to be between 0.9 and 1.0"),
    ],
)
def test_settings_that_are_none_are_refused(settings, message):
    with pytest.raises(ValueError, match=message), guided(Pipeline(guider=ClassifierFreeGuidance(3.0)), settings):
        pass


def test_diffusers_warns_of_a_calls_guider_once(caplog):
    pipeline = Pipeline(guider=ClassifierFreeGuidance(3.0))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            with guided(pipeline, {"guidance_scale": 1.23}):
                assert pipeline.guider.guidance_scale == 1.23
    assert len(caplog.messages) <= 2


def policy_with(guider=None, **call):
    pipeline, own = build("sd3")
    if guider is not None:
        pipeline.update_components(guider=guider)
        own.pop("guidance_scale")
    return Policy(pipeline, **{**own, **call})


@pytest.mark.parametrize(
    "guider", [None, SkipLayerGuidance(skip_layer_guidance_layers=[0], skip_layer_config=None, guidance_scale=3.0)], ids=["cfg", "skipped layers"]
)
def test_without_guidance_a_step_has_one_row_a_sample(guider):
    policy, rows = policy_with(guider), []
    denoiser = policy.pipeline.transformer
    handle = denoiser.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True)
    condition = policy.condition(PROMPTS, seeds=SEEDS)
    assert policy.guidance_off(condition) == {"guidance": False}
    latents = policy.rollout(condition).final
    times = torch.tensor([500.0, 500.0])
    rows.clear()
    plain = policy.predict(latents, times, condition)
    assert rows == [2] * 4
    rows.clear()
    assert not torch.equal(policy.predict(latents, times, condition, guidance=True), plain)
    assert len(rows) > 4
    handle.remove()


def test_a_momentum_does_not_pass_from_call_to_call():
    policy = policy_with(AdaptiveProjectedGuidance(guidance_scale=3.0, adaptive_projected_guidance_momentum=-0.5))
    trajectory = policy.rollout(PROMPTS, seeds=SEEDS)
    assert torch.equal(policy.rollout(PROMPTS, seeds=SEEDS).final, trajectory.final)
    policy.replay(trajectory, lambda k, kernel: None)
    with pytest.raises(ValueError, match="carries something from step to step"):
        policy.transition(trajectory, trajectory.noisy_steps[-1])


def test_guidance_by_nothing_is_said_once(caplog):
    policy = policy_with(negative_prompt=None)
    with caplog.at_level(logging.WARNING):
        policy.rollout(PROMPTS, seeds=SEEDS)
        policy.rollout(PROMPTS, seeds=SEEDS)
    assert [r for r in caplog.messages if 'Give negative_prompt=""' in r] == [m for m in caplog.messages if "guides by nothing" in m]
    assert sum("guides by nothing" in message for message in caplog.messages) == 1
    caplog.clear()
    policy_with().rollout(PROMPTS, seeds=SEEDS)
    assert not any("guides by nothing" in message for message in caplog.messages)
