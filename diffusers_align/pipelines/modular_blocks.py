"""Reward guidance and best-of-n as blocks of a modular pipeline: they go into a user's own blocks, and its call stays the modular one.

| block | where it stands | what it reads of the call |
|---|---|---|
| `RewardGuidedStep` | around the block that denoises (`RewardGuidedStep().around(blocks)`) | `reward`, `reward_scale`, `preset`, `columns` |
| `BestOfNStep` | behind the last block (`BestOfNStep().around(blocks)`) | `reward`, `columns`; the prompt's outputs (`num_images_per_prompt`) |

>>> blocks = RewardGuidedStep().around(pipe.blocks)  # doctest: +SKIP
>>> guided = blocks.init_pipeline()  # doctest: +SKIP
>>> guided.update_components(**pipe.components)  # doctest: +SKIP
>>> guided(prompt="a fox", reward="clip_score", reward_scale=2.0, output="images")  # doctest: +SKIP

Both call the engines of `RewardGuidedPipeline` and `BestOfNPipeline`, which need no change of blocks and do more (micro-batches, search).
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from diffusers import ModularPipeline, ModularPipelineBlocks, SequentialPipelineBlocks
from diffusers.modular_pipelines import InputParam, OutputParam, PipelineState
from torch import Tensor

from ..algorithms.best_of_n import best
from ..algorithms.guidance import Guidance
from ..algorithms.guidance import preset as find_preset
from ..checks.ranges import check_value
from ..condition import Condition
from ..data.images import in_srgb
from ..driving.calls import calls_of
from ..driving.outcome import WAVES, images_of, waveforms
from ..rewards import load_reward
from .draws import copied
from .guided_sampling import guided_sample
from .judge import Judge
from .reward_guided import noise_seeds

_REWARD = InputParam("reward", description="a name of diffusers_align.rewards, or a callable (images, prompts, **columns) -> (B,)")
_COLUMNS = InputParam("columns", type_hint=dict, description="other arguments of the reward, a list for each with an entry per prompt")
_OUTPUTS = ("images", "videos", *WAVES)


class RewardGuidedStep(SequentialPipelineBlocks):
    """Denoises under the guidance of a reward: wherever the block inside steps a scheduler, its prediction is moved along the reward's gradient.

    Without a `reward`, or with `reward_scale=0`, it is the block inside, bit for bit.

    Args:
        inside: the block that denoises: what follows it in the pipeline decodes. `around` finds it.
    """

    def __init__(self, inside: ModularPipelineBlocks | None = None):
        self.block_names, self.block_classes = ([], []) if inside is None else (["denoise"], [inside])
        super().__init__()

    def around(self, blocks: ModularPipelineBlocks) -> SequentialPipelineBlocks:
        """Copies of a pipeline's blocks, in which the one that denoises is inside a step of this kind.

        Raises:
            ValueError: no block steps a scheduler.
        """
        blocks = copy.deepcopy(blocks)
        stepping = [name for name, part in blocks.sub_blocks.items() if _steps(part)]
        if not stepping:
            raise ValueError(f"No block of {type(blocks).__name__} steps a scheduler, so there is nothing to guide.")
        blocks.sub_blocks[stepping[-1]] = type(self)(blocks.sub_blocks[stepping[-1]])
        return blocks

    @property
    def description(self) -> str:
        return "Denoises under the guidance of a reward's gradient."

    @property
    def inputs(self) -> list[InputParam]:
        own = [
            _REWARD,
            InputParam("reward_scale", type_hint=float, default=1.0, description="lambda: samples lean to p(x) exp(lambda reward(x)); 0 is the plain pipeline"),
            InputParam("preset", type_hint=str, default="dps", description="a name of diffusers_align.algorithms.guidance.PRESETS, or a Guidance"),
            _COLUMNS,
        ]
        return [*super().inputs, *own]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [*super().intermediate_outputs, OutputParam("guided_values", type_hint=Tensor, description="(B, guided steps), s before each of them")]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        inside, scale = self.sub_blocks["denoise"], state.get("reward_scale", 1.0)
        check_value("reward_scale", scale, float)
        if not _rewarded(state):
            if scale not in (0, 1):
                raise ValueError(f"reward_scale={scale:g} is the weight of a reward, and the call has none: give it as well, or leave reward_scale out.")
            return inside(components, state)
        if scale == 0:
            return inside(components, state)
        preset = state.get("preset") or "dps"
        guidance = preset if isinstance(preset, Guidance) else find_preset(preset)
        if guidance.noisy:
            raise ValueError("This preset follows a noise-aware reward, which the block does not take: wrap the pipeline, RewardGuidedPipeline(pipe).")
        call, before = _call(inside, state), copied(state.get("generator"))
        denoising, decode = _with_blocks(components, inside), _decoder(components, state)
        judge: list[Judge] = []

        def objective(latents: Tensor, rows: list[int], level) -> Tensor:
            images = decode(latents)
            if not judge:
                judge.append(_judge(components, state, len(images)))
            return judge[0](images, rows)

        sampled = guided_sample(denoising, call, objective, guidance, scale=float(scale), seeds=lambda size: noise_seeds(before, size))
        kinds = {output.name: output.kwargs_type for output in inside.intermediate_outputs}
        for name, value in sampled.output.values.items():
            state.set(name, value, kinds.get(name))
        state.set("guided_values", sampled.values)
        return components, state


class BestOfNStep(ModularPipelineBlocks):
    """Of all outputs of a prompt, keeps the one that a reward likes best: `num_images_per_prompt` is n. Without a `reward` it keeps all.

    It leaves `rewards` (P, n) and `chosen` (P,) in the state.
    """

    def around(self, blocks: ModularPipelineBlocks) -> SequentialPipelineBlocks:
        """Copies of a pipeline's blocks with this one behind them."""
        blocks = copy.deepcopy(blocks)
        blocks.sub_blocks.insert("best_of_n", type(self)(), len(blocks.sub_blocks))
        return blocks

    @property
    def description(self) -> str:
        return "Keeps the best of each prompt's outputs."

    @property
    def inputs(self) -> list[InputParam]:
        return [_REWARD, _COLUMNS]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        return [OutputParam("rewards", type_hint=Tensor, description="(P, n)"), OutputParam("chosen", type_hint=Tensor, description="(P,)")]

    def __call__(self, components: ModularPipeline, state: PipelineState) -> tuple[ModularPipeline, PipelineState]:
        name = next((name for name in _OUTPUTS if state.get(name) is not None), None)
        if not _rewarded(state):
            return components, state
        if state.get("output_type") == "latent":
            raise ValueError("Latents cannot be judged: leave output_type out, or the reward.")
        if name is None:
            raise ValueError(f"No block before this one has left {' or '.join(_OUTPUTS)}: put it behind the one that decodes.")
        found, number = state.get(name), len(_prompts(state))
        images = waveforms(torch.as_tensor(found)) if name in WAVES else images_of([_pixels(found)])
        rewards = _judge(components, state, len(found))(images, list(range(len(found)))).reshape(number, -1)
        chosen = best(rewards)
        rows = (chosen.cpu() + rewards.shape[1] * torch.arange(number)).tolist()
        for output in _OUTPUTS:
            values = state.get(output)
            if values is not None and len(values) == len(found):
                state.set(output, [values[row] for row in rows] if isinstance(values, list) else values[rows])
        state.set("rewards", rewards)
        state.set("chosen", chosen)
        return components, state


def _rewarded(state: PipelineState) -> bool:
    """Whether the call has a reward.

    Raises:
        ValueError: it has none, but columns for one.
    """
    if state.get("reward") is None and state.get("columns") is not None:
        raise ValueError("columns are a reward's other arguments, and the call has no reward: give it as well, or leave them out.")
    return state.get("reward") is not None


def _steps(block: ModularPipelineBlocks) -> bool:
    return any(hasattr(spec.type_hint, "step") and hasattr(spec.type_hint, "set_timesteps") for spec in block.expected_components)


def _with_blocks(components: ModularPipeline, blocks: ModularPipelineBlocks) -> ModularPipeline:
    """A pipeline of the same components that runs these blocks alone."""
    pipeline = copy.copy(components)
    pipeline._blocks = blocks
    return pipeline


def _call(blocks: ModularPipelineBlocks, state: PipelineState) -> dict[str, Any]:
    """What the blocks read of the state, as arguments of a call."""
    named = {p.name: state.get(p.name) for p in blocks.inputs if p.name}
    kinds = {p.kwargs_type: state.get_by_kwargs(p.kwargs_type) for p in blocks.inputs if p.kwargs_type and not p.name}
    return {name: value for name, value in {**named, **kinds}.items() if value is not None}


def _decoder(components: ModularPipeline, state: PipelineState):
    """From latents (B, *D) in the middle of a call to pictures or sounds, by the blocks that come after the last one that steps a scheduler."""
    given = {name: value for name, value in state.values.items() if value is not None}
    whole = components._blocks.get_execution_blocks(**given)
    parts = list(whole.sub_blocks.items())
    last = max(i for i, (_, part) in enumerate(parts) if _steps(part))
    tail = SequentialPipelineBlocks.from_blocks_dict({name: part for name, part in parts[last + 1 :] if not isinstance(part, BestOfNStep)})
    if not tail.sub_blocks:
        raise ValueError("No block decodes behind the guided one, so that the reward would see no images: give it to a pipeline that decodes.")
    calls = calls_of(_with_blocks(components, tail))

    def decode(latents: Tensor) -> Tensor:
        call = {name: value for name, value in {**_call(tail, state), "latents": latents, "output_type": "pt"}.items() if name in calls.parameters}
        output = calls.run(call)
        name = next(name for name in _OUTPUTS if output.get(name) is not None)  # the first output may be latents in another layout
        return waveforms(output[name]) if name in WAVES else images_of([output[name]])

    return decode


def _prompts(state: PipelineState) -> list[str]:
    prompt = state.get("prompt")
    if prompt is None:
        raise ValueError("Give prompt: rewards judge images against it.")
    return [prompt] if isinstance(prompt, str) else list(prompt)


def _judge(components: ModularPipeline, state: PipelineState, size: int) -> Judge:
    """Of `size` outputs, equally many of each prompt."""
    prompts = _prompts(state)
    if size % len(prompts):
        raise ValueError(f"{size} outputs do not go with {len(prompts)} prompts: each must have as many.")
    rows = [prompt for prompt in prompts for _ in range(size // len(prompts))]
    return Judge.of(load_reward(state.get("reward"), device=components.device), Condition(rows, {}), state.get("columns"), pipeline=components)


def _pixels(found: Any) -> Tensor:
    """(B, C, H, W) or (B, F, C, H, W) in [0, 1] of what a pipeline's blocks leave: tensors, arrays with channels last, or PIL."""
    if isinstance(found, Tensor):
        return found
    if isinstance(found, np.ndarray):
        return torch.from_numpy(found).movedim(-1, -3)
    if isinstance(found, (list, tuple)):
        return torch.stack([_pixels(one) for one in found])
    return torch.from_numpy(np.array(in_srgb(found))).movedim(-1, -3).float() / 255  # a picture of PIL
