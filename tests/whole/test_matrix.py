"""One pipeline of each kind through all columns of the table of pipelines; `make families` looks at every one."""

from __future__ import annotations

import warnings
from importlib.metadata import version

import diffusers
import pytest
import torch
from packaging.version import Version

from tests.families import expected
from tests.families.cases import CASES
from tests.families.column import look
from tests.families.columns import COLUMNS
from tests.families.results import Result
from tests.families.subject import Subject

# What a class is here for.
KINDS = {
    "StableDiffusionPipeline": "a noise table",
    "StableDiffusionInpaintPipeline": "a mask, and more channels in than out",
    "StableDiffusionControlNetPipeline": "a second network inside the loop",
    "StableDiffusionXLPipeline": "two text encoders, a solver of another kind",
    "PixArtSigmaPipeline": "a learned variance beside the noise",
    "AnimateDiffPipeline": "video of an image model",
    "StableDiffusion3Pipeline": "flow matching, three text encoders",
    "FluxPipeline": "packed latents, guidance as an input",
    "FluxKontextPipeline": "a picture beside the latents",
    "QwenImagePipeline": "true guidance",
    "ZImagePipeline": "a caller's list that is written to",
    "SanaPipeline": "an autoencoder without a distribution",
    "WanPipeline": "video",
    "WanImageToVideoPipeline": "a first frame that is given",
    "StableAudioPipeline": "sound",
    "DDPMPipeline": "no prompt, pixels",
    "StableDiffusion3ModularPipeline": "modular",
    "StableDiffusionXLModularPipeline": "modular, a noise table",
    "WanModularPipeline": "modular, video",
}
BEFORE, NEWEST = expected.read()
# Pipelines of an older diffusers can do less: what they cannot is refused there, and nothing else is worse.
OLDER = Version(version("diffusers")) < Version(NEWEST["diffusers"])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS, ids=[f"{name}: {kind}" for name, kind in KINDS.items()])
def test_a_pipeline_of_each_kind_keeps_its_promises(name):
    if OLDER and not hasattr(diffusers, name):
        pytest.skip("this diffusers lacks it")
    case = CASES[name][0]
    result = Result(f"{name}/{case.variant}" if case.variant else name, "float32", {}, "", dict(look(Subject(case), COLUMNS)))
    worse = {column: f"was {was}: {result.cells[column].reason}" for _, column, was in expected.regressions([result], BEFORE)}
    if OLDER:
        worse = {column: reason for column, reason in worse.items() if not result.cells[column].green}
    assert worse == {}
    known = BEFORE.get((result.row, "float32"), {})
    assert {column: cell.reason for column, cell in result.faults.items() if known.get(column) != "no"} == {}
    assert result.cells["stock"].status == "yes" and (result.cells["rollout"].status == "yes" or result.cells["policy"].status == "refused")


def test_half_precision_keeps_the_same_promises():
    columns = tuple(column for column in COLUMNS if column.half)
    cells = dict(look(Subject(CASES["StableDiffusionPipeline"][0], torch.bfloat16), columns))
    assert {name: cell.status for name, cell in cells.items()} == dict.fromkeys(("stock", "policy", "rollout", "replay", "gradient", "grpo"), "yes")


def test_a_fault_turns_its_column_red(monkeypatch):
    """The columns can fail: a policy whose noise no seed fixes, and one that forgets its LoRA."""
    subject = Subject(CASES["StableDiffusionPipeline"][0])
    make = subject.policy.rollout
    monkeypatch.setattr(subject.policy, "rollout", lambda *args, **options: make(*args, **{**options, "seeds": None}))
    cells = dict(look(subject, COLUMNS, {"seeds"}))
    assert cells["rollout"].status == "yes" and cells["seeds"].status == "no" and "Equal seeds" in cells["seeds"].reason
    subject = Subject(CASES["StableDiffusionPipeline"][0])
    monkeypatch.setattr(subject.policy, "save_lora", lambda folder: None)
    monkeypatch.setattr(subject.policy, "reference", torch.no_grad)
    cells = dict(look(subject, COLUMNS, {"reference", "lora", "own"}))
    assert {cells[name].status for name in ("reference", "lora", "own")} == {"no"}
