"""Model cards: front matter that parses, lines that load what was pushed, and nothing of the machine."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from modular_pipelines import build
from PIL import Image
from tiny_pipelines import FAMILIES

from diffusers_align import Policy, embedded
from diffusers_align.files.paths import folder
from diffusers_align.training.report import hub
from diffusers_align.training.report.comparison import as_text, table
from diffusers_align.training.report.model_card import front_matter, pipeline_tag, public, public_command


@pytest.mark.parametrize(
    "given, shown",
    [
        ("/home/me/data/prompts.jsonl", "prompts.jsonl"),
        ("~/my runs/a", "a"),
        ("C:\\Users\\me\\a", "a"),
        ("runs/a", "runs/a"),
        ("/home/me/reward.py:blue", "reward.py:blue"),
        ("clip_score*1+/home/me/reward.py:blue*0.5", "clip_score*1+reward.py:blue*0.5"),
        ("/home/John Doe/r/reward.py:blue*1+/home/me/x.py:f", "reward.py:blue*1+x.py:f"),
        ("file:///home/me/a b/set.jsonl", "set.jsonl"),
        ("http://me:secret@host:8000/score?token=x", "http://host:8000/score"),
        ("http://host:8000", "http://host:8000"),
        ("owner/name", "owner/name"),
        ('{"max_sequence_length": 1}', '{"max_sequence_length": 1}'),
        (3e-4, 3e-4),
        (["/a/b", {"x": "/c/d"}], ["b", {"x": "d"}]),
    ],
)
def test_what_is_published_names_no_folder_of_the_machine_and_no_password(given, shown):
    assert public(given) == shown


def test_a_command_can_be_pasted_elsewhere(monkeypatch, tmp_path):
    script = folder("training_scripts") / "train_ddpo.py"
    command = f"accelerate launch {script} --prompts '/home/me/a b.txt' --reward=http://u:p@h:1 --config recipes/x.yaml"
    assert public_command(command) == "accelerate launch training_scripts/train_ddpo.py --prompts 'a b.txt' --reward=http://h:1 --config recipes/x.yaml"
    bundled = tmp_path / "shipped" / "training_scripts"
    monkeypatch.setattr("diffusers_align.training.report.model_card.shipped", lambda kind: bundled)
    assert public_command(f"accelerate launch {bundled / 'train_ddpo.py'}") == "accelerate launch $(diffusers-align path train_ddpo)"


def test_the_front_matter_says_what_the_hub_asks_for(tmp_path):
    found = ModelCard(front_matter("owner/base", ["lora"], "text-to-image", [{"text": "a cat: 1", "output": {"url": "x.png"}}], "owner/pairs")).data
    assert (found.base_model, found.license, found.license_name, found.datasets) == ("owner/base", "other", "of-the-base-model", ["owner/pairs"])
    assert found.pipeline_tag == "text-to-image" and found.tags[-1] == "lora" and found.widget[0]["text"] == "a cat: 1"
    assert ModelCard(front_matter("mini-sd", [], "text-to-image")).data.license == "apache-2.0"
    local = ModelCard(front_matter(str(tmp_path), [], "text-to-image", data=str(tmp_path))).data
    assert local.base_model is None and local.datasets is None and str(tmp_path) not in str(local)


def test_a_sum_of_rewards_is_shown_with_its_weights():
    assert as_text("scene_score*1+a|b*0.1") == r"scene_score\*1+a\|b\*0.1"
    found = {"rewards": {"scene_score*1+x*0.1": {"mean": 0.5, "se": 0.1, "left_out": 0, "values": [0.5]}}, "diversity": {}, "kl": {}}
    assert r"| **scene_score\*1+x\*0.1** | 0.5 ± 0.1 |" in table({"base": found}, ["scene_score*1+x*0.1"])


def test_other_runs_below_a_run_are_not_uploaded(tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    for name in ("README.md", "transformer_2/x.safetensors", "other [1]/metrics.jsonl", "other [1]/checkpoint-1/optimizer.safetensors", "logs/a/b", ".lock"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    found = {}
    monkeypatch.setattr(hub, "upload_folder", lambda **given: found.update(given))
    hub.push(run_of(tmp_path, None, hub_model_id="me/it"))
    files = [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert list(filter_repo_objects(files, ignore_patterns=found["ignore_patterns"])) == ["README.md", "transformer_2/x.safetensors"]


@pytest.mark.parametrize("name, tag", [("sd3", "text-to-image"), ("sd15_img2img", "image-to-image"), ("wan", "text-to-video")])
def test_pipeline_tags(name, tag):
    assert pipeline_tag(FAMILIES[name].build()) == tag


@pytest.mark.parametrize("name, given, tag", [("sd3", [], "text-to-image"), ("sd3", ["image"], "image-to-image"), ("wan", [], "text-to-video")])
def test_the_tag_of_a_modular_pipeline_goes_by_what_its_call_is_given(name, given, tag):
    assert pipeline_tag(build(name)[0], given) == tag


def run_of(folder, policy, **flags):
    given = {
        "pretrained_model_name_or_path": "mini-sd3", "push_to_hub": False, "hub_model_id": None, "hub_token": "hf_secret", "output_dir": str(folder),
        "reward": "http://me:secret@host:8000", "num_eval_samples": 4, "command": f"accelerate launch x.py --output_dir {folder}", "config": None,
    }  # fmt: skip
    made_by = {"commands": [{"epoch": 0, "command": given["command"]}]}
    health = Namespace(for_card=lambda: "")
    return Namespace(args=Namespace(**{**given, **flags}), policy=policy, output_dir=Path(folder), algorithm="Flow-GRPO", made_by=made_by, health=health)


@pytest.mark.parametrize(
    "family, flags, line",
    [
        ("sd3", {"revision": "refs/pr/3", "variant": "fp16"}, 'DiffusionPipeline.from_pretrained("owner/base", revision="refs/pr/3", variant="fp16")'),
        ("sd3", {}, 'DiffusionPipeline.from_pretrained("owner/base")'),
        (
            "sd15",
            {"pretrained_model_name_or_path": "/home/me/x.safetensors", "single_file_config": "/home/me/like it"},
            'StableDiffusionPipeline.from_single_file("x.safetensors", config="like it")',
        ),
    ],
)
def test_the_lines_of_a_card_load_the_files_that_were_trained_on(family, flags, line, tmp_path):
    policy = Policy(FAMILIES[family].build())
    policy.add_lora(2)
    run = run_of(tmp_path, policy, **{"pretrained_model_name_or_path": "owner/base", **flags})
    assert f"pipe = {line}\n" in python_of(hub.write_model_card(run, {}, []).read_text())


def test_the_lines_of_a_modular_card_load_the_files_that_were_trained_on(tmp_path):
    policy = Policy(build("sd3")[0])
    policy.add_lora(2)
    run = run_of(tmp_path, policy, pretrained_model_name_or_path="owner/base", revision="v2", variant="fp16")
    lines = python_of(hub.write_model_card(run, {}, []).read_text())
    assert 'pipe = ModularPipeline.from_pretrained("owner/base", revision="v2")\npipe.load_components(variant="fp16")\n' in lines


def python_of(card):
    return card.split("```python\n")[1].split("```")[0]


def test_the_lines_of_a_card_load_what_lies_beside_it(tmp_path, monkeypatch):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(embedded.path("mini-sd3"))
    policy = Policy(pipeline)
    for parameter in policy.add_lora(2):
        parameter.data.normal_()
    policy.save_lora(tmp_path / "run")
    samples = [(f"a {i}", torch.rand(3, 8, 8)) for i in range(6)]
    run = run_of(tmp_path / "run", policy)
    path = hub.write_model_card(run, {"reward, after": "1.0000 ± 0.1000"}, ["before_after.png"], samples=samples)
    card = ModelCard.load(path)
    assert [entry["text"] for entry in card.data.widget] == ["a 0", "a 1", "a 2", "a 3"]
    assert all(Image.open(tmp_path / "run" / entry["output"]["url"]).size == (8, 8) for entry in card.data.widget)
    text = path.read_text()
    assert str(tmp_path) not in text and "secret" not in text and "template:sd-lora" in card.data.tags and "flow-grpo" in card.data.tags
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(python_of(text), names)
    assert names["pipe"].get_active_adapters() == ["default_0"]

    run = run_of(tmp_path / "run", policy, push_to_hub=True, hub_model_id="me/it", pretrained_model_name_or_path="owner/base")
    text = hub.write_model_card(run, {}, []).read_text()
    assert 'pipe.load_lora_weights("me/it", weight_name="pytorch_lora_weights.safetensors")' in text and "base_model: owner/base" in text

    run = run_of(tmp_path / "run", policy, dataset_name="owner/pairs", reward="pick_score")
    text = hub.write_model_card(run, {"reward, after": "without a score"}, []).read_text()
    assert "the preferences of `owner/pairs`" in text and "4 images; the reward, which only measures, is `pick_score`):" in text
    assert "| reward, after | without a score |" in text
