"""Duels with peers: turns, counts, medians, and peers of a few lines in the place of the real ones."""

import io
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from benchmarks import iteration_profile, plan
from benchmarks.one_thread import Failed
from benchmarks.parts import BACKWARD, DENOISER, OPTIMIZER, Parts
from benchmarks.peers import __main__ as duels
from benchmarks.peers import ddpo_pytorch, diffusers_dpo, limit, ours, turns
from benchmarks.peers.tasks import PEERS, PROMPTS, SIZES, Task
from benchmarks.peers.worker import Worker, replaced
from diffusers_align import embedded
from diffusers_align.files.paths import find_recipe
from diffusers_align.plan import command

# A worker that says which epoch of which player it was, and notes it.
PLAYER = """
import json, sys
name, notes = sys.argv[1:]
print(json.dumps({"ready": True}), flush=True)
for number, line in enumerate(sys.stdin):
    with open(notes, "a") as file:
        file.write(name)
    print(json.dumps({"seconds": number, "name": name}), flush=True)
"""


def task(method, **changes):
    return Task(method, "model", "folder", **{**SIZES[method][1], **changes})


def epochs(*seconds, rows=64, trainable=10):
    return [{"seconds": s, "own": s / 10, "peak": 500, "calls": 4, "rows": rows, "steps": 2, "trainable": trainable} for s in seconds]


# parts


def test_what_is_measured_inside_is_not_counted_outside():
    ticks = iter([0.0, 1.0, 4.0, 10.0])
    parts = Parts(clock=lambda: next(ticks))
    with parts.timed("outer"), parts.timed("inner"):
        pass
    assert dict(parts.seconds) == {"inner": 3.0, "outer": 7.0}
    parts.clear()
    assert not parts.seconds and not parts.counts


def test_a_function_that_raises_is_measured():
    parts, owner = Parts(), SimpleNamespace(fail=lambda: 1 / 0)
    parts.wrap(owner, "fail", "failing")
    with pytest.raises(ZeroDivisionError):
        owner.fail()
    assert parts.seconds["failing"] >= 0


def test_denoisers_backward_passes_and_optimizers_are_watched(monkeypatch):
    import diffusers
    import transformers

    from benchmarks import parts as module

    for owner, names in ((diffusers.AutoencoderKL, ("encode", "decode")), (torch.autograd, ("backward", "grad")), (torch.optim.AdamW, ("step",))):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards
    for library, names in ((diffusers, module.DENOISERS), (transformers, module.ENCODERS)):
        for name in names:
            cls = getattr(library, name)
            monkeypatch.setattr(cls, "forward", cls.forward)
    parts = Parts()
    parts.watch()
    config = {"block_out_channels": (4, 4), "norm_num_groups": 2, "cross_attention_dim": 4, "attention_head_dim": 2, "sample_size": 4}
    blocks = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1}
    unet = diffusers.UNet2DConditionModel(**config, **blocks)
    optimizer = torch.optim.AdamW(unet.parameters())
    unet(torch.zeros(3, 4, 4, 4), torch.tensor(5), torch.zeros(3, 2, 4)).sample.mean().backward()
    optimizer.step()
    with torch.no_grad():
        unet(sample=torch.zeros(2, 4, 4, 4), timestep=5, encoder_hidden_states=torch.zeros(2, 2, 4))
    assert parts.counts == Counter(calls=2, rows=5, steps=1, trainable=sum(p.numel() for p in unet.parameters()))
    assert set(parts.seconds) == {DENOISER, BACKWARD, OPTIMIZER} and all(seconds > 0 for seconds in parts.seconds.values())


# workers


def test_a_worker_does_an_epoch_when_told_and_says_what_it_took():
    class Left(Exception):
        pass

    def leave():
        raise Left

    answers, waits = io.StringIO(), []
    worker = Worker(io.StringIO("epoch\nepoch\n"), answers, leave)
    worker.waited = waits.append
    done = []
    with pytest.raises(Left):
        for number in worker.epochs():
            done.append(number)
            with worker.parts.timed("denoiser, forward"):
                sum(range(200_000))
            worker.parts.counts["rows"] += 3
    told = [json.loads(line) for line in answers.getvalue().splitlines()]
    assert done == [0, 1] and told[0] == {"ready": True} and len(told) == 3 and len(waits) == 2
    for epoch in told[1:]:
        assert epoch["rows"] == 3 and epoch["peak"] > 0
        assert epoch["own"] == pytest.approx(epoch["seconds"] - epoch["parts"]["denoiser, forward"])


def test_a_peers_source_of_another_version_is_refused():
    assert replaced("one two", ("one", "1"), ("two", "2")) == "1 2"
    for text in ("two", "one one"):
        with pytest.raises(ValueError, match="'one' is . times in the peer's source"):
            replaced(text, ("one", "1"))


# turns


def test_epochs_go_in_turns_and_back_and_the_first_round_is_thrown_away(tmp_path):
    script, notes = tmp_path / "player.py", tmp_path / "notes"
    script.write_text(PLAYER)
    players = [turns.Player(name, [sys.executable, str(script), name, str(notes)], tmp_path / f"{name}.log") for name in "ABC"]
    found = turns.play(players, 3)
    for player in players:
        player.end()
    assert notes.read_text() == "ABCCBAABCCBA"
    assert {name: [epoch["seconds"] for epoch in epochs] for name, epochs in found.items()} == dict.fromkeys("ABC", [1, 2, 3])
    assert all(epoch["name"] == name for name, epochs in found.items() for epoch in epochs)


def test_a_worker_that_ends_is_told_with_its_last_words(tmp_path):
    player = turns.Player("broken", [sys.executable, "-c", "raise SystemExit('no such peer')"], tmp_path / "log")
    with pytest.raises(Failed, match=r"(?s)broken ended with status 1.*no such peer"):
        turns.play([player], 1)


def test_unequal_work_is_no_duel():
    done = {"limit": epochs(1, 1), "ours": epochs(2, 2)}
    turns.check(done, task("dpo"))
    with pytest.raises(ValueError, match="ours: 63 rows in an epoch, where the task has 64"):
        turns.check({**done, "ours": epochs(1, rows=63)}, task("dpo"))
    with pytest.raises(ValueError, match="different numbers of weights"):
        turns.check({**done, "ours": epochs(1, trainable=11)}, task("dpo"))


def test_the_table_has_medians_and_ratios_of_each_round():
    found = {"limit": epochs(1, 2, 4), "ours": epochs(2, 2, 5), "peer": epochs(4, 1, 5)}
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in turns.table(found).splitlines()[2:]}
    assert rows["ours"][1] == "2.000" and rows["limit"][1] == "2.000" and rows["peer"][1] == "4.000"
    assert rows["ours"][2] == f"{statistics.median([2, 1, 1.25]):.3f} [1.00, 2.00]"
    assert rows["peer"][3] == f"{statistics.median([0.5, 2, 1]):.3f} [0.50, 2.00]"
    assert rows["ours"][4:6] == ["64", "0.200"] and rows["limit"][2] == rows["ours"][3] == ""


def test_what_an_epoch_is():
    assert task("ddpo").work == {"calls": 24, "rows": 384, "steps": 2}
    assert task("flow_grpo").work == {"calls": 32, "rows": 512, "steps": 2}
    assert task("dpo").work == {"calls": 4, "rows": 64, "steps": 2}
    assert task("alignprop", batches=1, batch=2, steps=4).work == {"calls": 6, "rows": 24, "steps": 1}
    for method in SIZES:
        given = ours.flags(task(method))
        assert ours.command.module_of(f"train_{method}").parse_args(ours.words(given)).train_batch_size == task(method).batch


# peers


def test_peers_that_are_not_there_are_left_out_with_a_word(tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(duels, "Player", lambda name, command, log: made.append((name, command)) or name)
    flags = SimpleNamespace(trl_python=None, ddpo_pytorch=tmp_path, diffusers_dpo=None, peer_python=None)
    assert duels.players(task("ddpo"), flags) == ["limit", "ours", "ddpo_pytorch"]
    assert capsys.readouterr().out == "trl is left out: no flag says where it is\n"
    assert made[-1][1][-1] == str(tmp_path) and json.loads(made[0][1][-1])["method"] == "ddpo"
    assert {name for names in PEERS.values() for name in names} == {"ddpo_pytorch", "trl", "diffusers_dpo"}


def test_a_ddpo_pytorch_of_a_few_lines(tmp_path, monkeypatch):
    for name in ("absl", "absl.flags", "ml_collections", "wandb", "ddpo_pytorch", "ddpo_pytorch.prompts", "ddpo_pytorch.rewards"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("diffusers.utils.randn_tensor", None, raising=False)
    for folder in ("config", "scripts", "ddpo_pytorch"):
        (tmp_path / folder).mkdir()
    (tmp_path / "ddpo_pytorch" / "__init__.py").touch()
    sections = "pretrained=C(), sample=C(), train=C()"
    (tmp_path / "config" / "base.py").write_text(f"from ml_collections import ConfigDict as C\ndef get_config():\n    return C({sections})\n")
    (tmp_path / "scripts" / "train.py").write_text(
        "from diffusers.models.attention_processor import LoRAAttnProcessor\n"
        "from absl import flags\nimport ddpo_pytorch.prompts, ddpo_pytorch.rewards\nfrom diffusers.utils import randn_tensor\n"
        "def main(_):\n"
        "    config, pipeline = flags.FLAGS.config, SEEN['pipeline']\n"
        '    SEEN["trackers"] = dict(log_with="wandb")\n'
        "    if True:\n"
        "        lora_attn_procs = {}\n        raise AssertionError('its own LoRA')\n        unet = _Wrapper(pipeline.unet.attn_processors)\n"
        "    reward = ddpo_pytorch.rewards.brightness()\n    prompt, _ = getattr(ddpo_pytorch.prompts, config.prompt_fn)()\n"
        "    first_epoch = 0\n"
        "    for epoch in range(first_epoch, config.num_epochs):\n"
        "        SEEN['epochs'] += [(epoch, prompt, config.sample.batch_size, config.train.batch_size, config.sample.num_steps)]\n"
    )
    loras, seen = [], {"epochs": [], "pipeline": SimpleNamespace(unet=SimpleNamespace(add_adapter=lambda config: loras.append(config)))}
    monkeypatch.setattr("builtins.SEEN", seen, raising=False)
    ddpo_pytorch.train(SimpleNamespace(epochs=lambda: iter([0, 1])), task("ddpo"), tmp_path)
    assert [row[0] for row in seen["epochs"]] == [0, 1] and seen["epochs"][0][2:] == (8, 8, 6) and seen["epochs"][0][1] in PROMPTS
    assert seen["trackers"] == {"log_with": None} and loras[0].r == 4


def test_a_diffusers_script_of_a_few_lines(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", None)
    for name in ("wandb", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers_dpo.importlib.util, "find_spec", lambda name: None)
    from PIL import Image

    for i in range(2):
        Image.new("RGB", (32, 32), (255 * i, 0, 0)).save(f"{i}.png")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a fox", "chosen": "1.png", "rejected": "0.png"}) + "\n")
    (tmp_path / "script.py").write_text(
        "import io\nfrom types import SimpleNamespace\nfrom PIL import Image\nfrom datasets import load_dataset\nfrom torchvision import transforms as t\n"
        "def parse_args(words):\n    return SimpleNamespace(**dict(word[2:].split('=') for word in words))\n"
        "def main(args):\n"
        "    to = t.Compose([t.Resize(32, interpolation=t.InterpolationMode.BILINEAR), t.CenterCrop(32), t.RandomHorizontalFlip(), t.ToTensor(),"
        " t.Normalize([0.5], [0.5])])\n"
        "    row, first_epoch = load_dataset(args.dataset_name)[0], 0\n"
        "    for epoch in range(first_epoch, args.num_train_epochs):\n"
        "        SEEN.append((epoch, to(Image.open(io.BytesIO(row['jpg_0']))), row['label_0'], row['caption'], args.report_to, args.train_batch_size))\n"
    )
    seen = []
    monkeypatch.setattr("builtins.SEEN", seen, raising=False)
    diffusers_dpo.train(SimpleNamespace(epochs=lambda: iter([0, 1])), task("dpo"), tmp_path / "script.py")
    assert [row[0] for row in seen] == [0, 1] and seen[0][2:] == (1, "a fox", None, "8")
    red = seen[0][1]
    assert red.shape == (3, 32, 32) and red[0].eq(1).all() and red[1:].eq(-1).all()


@pytest.mark.parametrize("method", ["ddpo", "alignprop", "dpo"])
def test_the_limit_does_the_work_of_its_task(method):
    done: Counter[str] = Counter()

    class Counting(limit.Bare):
        def __call__(self, x=None):
            done.update(calls=1, rows=self.rows)
            return super().__call__(x)

        def step(self):
            super().step()
            done.update(steps=1)

    own = Task(method, str(embedded.path("mini-sd")), "", batches=1, batch=2, steps=3 if method != "dpo" else 0)
    bare = Counting(own)
    before = [p.detach().clone() for p in bare.denoiser.parameters() if p.requires_grad]
    {"ddpo": limit.online, "alignprop": limit.alignprop, "dpo": limit.dpo}[method](bare, own)
    assert done == Counter(own.work)
    assert any(not torch.equal(a, b) for a, b in zip(before, [p for p in bare.denoiser.parameters() if p.requires_grad]))


# the table of every script


def test_every_mini_recipe_has_a_row():
    names = iteration_profile.recipes()
    assert {"ddpo_mini_sd", "dpo_mini_sd3", "pfm_likes_blue_mini_sd", "vader_mini_sd3"} <= set(names)
    for name in names:
        script, given = iteration_profile.settings(name)
        assert (find_recipe("ddpo_mini_sd").parents[1] / f"{script}.py").is_file() and "pretrained_model_name_or_path" in given


@pytest.mark.parametrize(("recipe", "prompts", "group"), [("flow_grpo_mini_sd3", 4, 4), ("adjoint_matching_mini_sd", 16, None), ("ddpo_mini_sd", None, None)])
def test_small_recipes_have_two_batches_of_eight(recipe, prompts, group):
    given = iteration_profile.small(iteration_profile.settings(recipe)[1], 16, 8)
    assert (given.get("num_prompts_per_epoch"), given.get("group_size"), given["train_batch_size"]) == (prompts, group, 8)
    assert given.get("num_samples_per_epoch", 16) == 16


@pytest.mark.parametrize(("samples", "batch"), [(16, 8), (4, 4)])
@pytest.mark.parametrize("recipe", iteration_profile.recipes())
def test_made_small_they_are_still_runs(recipe, samples, batch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the paths of a recipe are made
    script, given = iteration_profile.settings(recipe)
    path = tmp_path / "recipe.yaml"
    given = iteration_profile.small(given, samples, batch)
    path.write_text(yaml.safe_dump(iteration_profile.short(given) if samples == 4 else given))
    args = command.module_of(script).parse_args(["--config", str(path)])
    assert getattr(args, "train_batch_size", batch) == batch and getattr(args, "best_of_n", None) in (None, min(4, samples // 2))


@pytest.mark.parametrize(("name", "part"), [("mini-sd", "unet"), ("mini-sd3", "transformer")])
def test_the_larger_denoisers_have_40_to_65_million_weights(name, part):
    config = json.loads((Path(embedded.path(name)) / part / "config.json").read_text())
    with torch.device("meta"):
        made = plan.wider(part, config)
    assert 40e6 < sum(weight.numel() for weight in made.parameters()) < 65e6


def test_own_time_is_what_no_part_has():
    found = iteration_profile.medians([{"a": 1.0, "total": 2.0}, {"a": 3.0, "b": 1.0, "total": 4.5}, {"a": 2.0, "total": 2.25}])
    assert found["a"] == 2.0 and found["b"] == 0.0 and found["total"] == 2.25 and found["everything else"] == 0.5
