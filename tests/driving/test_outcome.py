"""What a pipeline made, as rewards get it: sounds in one form with their rate, and the sound of videos from all parts of a trajectory."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from diffusers.pipelines.pipeline_utils import AudioPipelineOutput, ImagePipelineOutput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from diffusers.utils import BaseOutput
from torch import nn

from diffusers_align import Policy
from diffusers_align.driving.modular import Output
from diffusers_align.driving.outcome import Outcome, by_sample, images_of, outcome, sampling_rate_of, waveforms
from diffusers_align.driving.stock import stock_images, stock_outcome
from diffusers_align.pipelines import BestOfNPipeline, ParticleSteeringPipeline
from diffusers_align.rewards import InvalidReward
from tests.families.cases import audio, ltx2

torch.set_num_threads(1)
SEEDS = [11, 12]


def policy_of(cases, name):
    (case,) = cases.CASES[name]
    pipeline = case.build()
    pipeline.set_progress_bar_config(disable=True)
    return Policy(pipeline, **case.call), case


# --- which rate ----------------------------------------------------------------------------------------------------------


class Part(nn.Module):
    def __init__(self, decodes=True, **config):
        super().__init__()
        self.config = SimpleNamespace(**config)
        if decodes:
            self.decode = lambda z: z


def made_of(pipeline_says=None, **components):
    own = {} if pipeline_says is None else {"sampling_rate": pipeline_says}
    return SimpleNamespace(components=components, **own)


@pytest.mark.parametrize(
    "pipeline, rate",
    [
        (made_of(vae=Part(sampling_rate=44100)), 44100),
        (made_of(vae=Part(sample_rate=24000)), 24000),
        (made_of(vae=Part(), vocoder=Part(decodes=False, sampling_rate=16000)), 16000),
        (made_of(audio_vae=Part(sample_rate=16000), vocoder=Part(decodes=False, input_sampling_rate=16000, output_sampling_rate=48000)), 48000),
        (made_of(text_encoder=Part(decodes=False, sampling_rate=8000), vae=Part(sampling_rate=22050)), 22050),
        (made_of(22050, vae=Part()), 22050),
    ],
)
def test_the_rate_is_that_of_what_makes_the_wave(pipeline, rate):
    assert sampling_rate_of(pipeline) == rate


def test_an_unknown_rate_is_said_with_what_to_do():
    with pytest.raises(ValueError, match=r"neither the config of Part nor the pipeline's attribute `sampling_rate`. .*pipe.sampling_rate = 44100"):
        sampling_rate_of(made_of(vae=Part()))
    with pytest.raises(ValueError, match="which rate"):
        outcome(made_of(vae=Part()), AudioPipelineOutput(audios=torch.zeros(2, 1, 8)))


# --- which form ----------------------------------------------------------------------------------------------------------


def test_sounds_have_channels_and_lie_between_minus_one_and_one():
    sound = torch.tensor([[0.5, -3.0, 2.0]], requires_grad=True)
    assert waveforms(sound).tolist() == [[[0.5, -1.0, 1.0]]]
    assert images_of(AudioPipelineOutput(audios=sound.detach().numpy())).shape == (1, 1, 3)
    waveforms(sound).sum().backward()
    assert sound.grad.tolist() == [[1.0, 0.0, 0.0]]
    pictures = torch.rand(2, 3, 4, 4) * 3
    assert torch.equal(images_of((pictures,)), pictures), "nobody clamps pictures here"


def test_a_single_video_has_an_axis_of_samples():
    """Some pipelines make one video a call, and hand out its frames."""
    frames = torch.rand(5, 3, 4, 4)
    assert images_of(WanPipelineOutput(frames=frames)).shape == (1, 5, 3, 4, 4)
    assert images_of(WanPipelineOutput(frames=frames.movedim(1, -1).numpy())).shape == (1, 5, 3, 4, 4)
    assert images_of(WanPipelineOutput(frames=frames[None])).shape == (1, 5, 3, 4, 4)
    assert images_of(ImagePipelineOutput(images=frames)).shape == (5, 3, 4, 4)


def test_what_a_modular_pipeline_was_given_is_not_what_it_made():
    output = Output({"videos": torch.rand(2, 3, 3, 4, 4), "audio": torch.rand(2, 1, 9), "sampling_rate": 8000}, {})
    output.main, output.made = "videos", ("videos",)
    pipeline = made_of(vae=Part())
    assert outcome(pipeline, output).audio is None
    output.made = ("videos", "audio", "sampling_rate")
    made = outcome(pipeline, output)
    assert made.audio.shape == (2, 1, 9) and made.sampling_rate == 8000
    assert len(made[:1]) == 1 and made[[1]].audio.shape == (1, 1, 9) and made.to(torch.float64).audio.dtype == torch.float64


@pytest.mark.parametrize("name, channels, rate", [("AudioLDM2Pipeline", 1, 16000), ("StableAudio3Pipeline", 2, 16), ("LongCatAudioDiTPipeline", 1, 240)])
def test_sound_pipelines_make_waveforms_with_their_rate(name, channels, rate):
    policy, case = policy_of(audio, name)
    trajectory = policy.rollout(list(case.prompts), seeds=SEEDS)
    made = policy.outcome(trajectory)
    assert made.images.shape[:2] == (2, channels) and made.images.ndim == 3 and made.images.abs().max() <= 1
    assert made.sampling_rate == policy.sampling_rate == rate and made.audio is None
    with torch.no_grad():
        assert torch.equal(made.images, policy.decode(trajectory.final, trajectory.condition))
        assert torch.equal(policy.outcome(trajectory.final, trajectory.condition).images, made.images)
    stock = stock_outcome(policy, trajectory.condition)
    assert torch.equal(stock.images, stock_images(policy, trajectory.condition)) and stock.sampling_rate == rate


# --- videos with sound ---------------------------------------------------------------------------------------------------


def loudness(videos, prompts, audio, sampling_rate):
    return audio.abs().mean((1, 2)) * sampling_rate


@torch.no_grad()
def test_the_sound_of_a_video_is_that_of_its_trajectory():
    policy, case = policy_of(ltx2, "LTX2Pipeline")
    trajectory = policy.rollout(list(case.prompts), seeds=SEEDS)
    assert len(trajectory.children) == 1
    made = policy.outcome(trajectory)
    assert made.audio.shape[:2] == (2, 2) and made.audio.ndim == 3 and made.sampling_rate == 16000

    def repeat(step):
        tape = trajectory if step.child == 0 else trajectory.children[step.child - 1]
        step.skip()
        return step.like(tape.actions[:, step.k])

    whole = policy.drive(trajectory.condition, repeat, needs_denoiser=lambda k: False, output_type="pt")
    assert torch.equal(made.audio, whole.audio.clamp(-1, 1)) and torch.equal(made.images, whole.frames)
    other = policy.rollout(list(case.prompts), seeds=[21, 22])
    assert not torch.equal(policy.outcome(other).audio, made.audio)
    alone = policy.outcome(trajectory.final, trajectory.condition)
    assert torch.equal(alone.images, made.images) and alone.audio is None and alone.sampling_rate is None, "latents of the video alone have no sound"


def test_searches_hear_the_sound_of_videos():
    _, case = policy_of(ltx2, "LTX2Pipeline")
    pipeline = BestOfNPipeline(case.build(), reward=loudness)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(case.prompts[0], num_candidates=2, generator=torch.Generator().manual_seed(0), output_type="pt", **case.call)
    best = int(output.rewards[0].argmax())
    assert output.chosen.tolist() == [best] and output.rewards[0].unique().numel() == 2
    assert float(output.audio.clamp(-1, 1).abs().mean() * 16000) == pytest.approx(float(output.rewards[0, best]), rel=1e-4)


def test_what_has_no_sound_says_so():
    _, case = policy_of(ltx2, "LTX2Pipeline")
    pipeline = ParticleSteeringPipeline(case.build(), reward=loudness)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(InvalidReward, match="its argument `audio`, and there is none with these.*states on the way"):
        pipeline(case.prompts[0], num_particles=2, generator=torch.Generator().manual_seed(0), **case.call)
    policy, case = policy_of(audio, "AudioLDM2Pipeline")
    pipeline = BestOfNPipeline(case.build(), reward=loudness)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(InvalidReward, match="these are sounds themselves, its first argument"):
        pipeline(case.prompts[0], num_candidates=1, **case.call)


@dataclass
class Directions(BaseOutput):
    """
    Args:
        prediction (`torch.Tensor`): Directions with values in the range [-1, 1].
        uncertainty (`torch.Tensor`): Of them, in [0, 1].
    """

    prediction: torch.Tensor
    uncertainty: torch.Tensor | None = None


def test_a_depth_is_grey_and_what_is_said_to_lie_around_zero_is_brought_to_0_to_1():
    depth = torch.rand(2, 1, 4, 4)
    assert torch.equal(images_of((depth,)), depth.expand(2, 3, 4, 4))
    directions = torch.rand(2, 3, 4, 4) * 2 - 1
    torch.testing.assert_close(images_of(Directions(prediction=directions)), directions / 2 + 0.5)
    assert torch.equal(images_of((directions,)), directions)


def test_several_pictures_of_a_sample_are_its_frames():
    images = torch.rand(6, 3, 4, 4)
    made = by_sample(Outcome(images), 2)
    assert made.images.shape == (2, 3, 3, 4, 4) and torch.equal(made.images[1, 0], images[3])
    assert by_sample(Outcome(images), 6).images is images and by_sample(Outcome(images), 4).images is images


def test_a_sound_that_the_chosen_blocks_do_not_make_is_none():
    output = Output({"videos": torch.rand(1, 2, 3, 4, 4)}, {})
    output.main, output.made = "videos", ("videos", "sound")
    assert outcome(None, output).audio is None
