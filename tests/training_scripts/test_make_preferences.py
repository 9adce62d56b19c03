"""`make_preferences.py`: data sets that load, that say what the reward says, and that an interrupted run completes."""

import contextlib
import json
import re
import threading
import types

import pytest
import torch
from script_tools import load_make_preferences, write_task

from diffusers_align.data import Prompt, load_preferences
from diffusers_align.training.offline.made_preferences import equal_images
from diffusers_align.trajectory import Trajectory

torch.set_num_threads(1)
NAMES = {f"{prompt:05d}_{sample:02d}.png" for prompt in range(3) for sample in range(3)}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


def make(folder, task, *more, reward="brightness", module=None):
    (module or load_make_preferences()).main([
        "--pretrained_model_name_or_path", "mini-sd3", "--call_kwargs", '{"max_sequence_length": 1}', "--prompts", str(task / "prompts.jsonl"),
        "--reward", f"{task / 'rewards.py'}:{reward}", "--num_images_per_prompt", "3", "--batch_size", "4", "--num_inference_steps", "2",
        "--guidance_scale", "1.0", "--output_dir", str(folder), *more,
    ])  # fmt: skip
    return folder


def rows_of(folder, kind, **options):
    """Read as a user would; not one row may be bad."""
    rows, _ = load_preferences(str(folder), kind, bad_rows="error", **options)
    return rows


@pytest.fixture(scope="module")
def made(task, tmp_path_factory):
    return make(tmp_path_factory.mktemp("made"), task, "--pairs", "all", "--binary_quantile", "0.7")


def test_each_kind_loads_and_says_what_the_reward_says(made, task):
    module = load_make_preferences()
    scored = rows_of(made / "scored", "scored")
    assert {path.name for path in (made / "images").iterdir()} == NAMES and len(scored) == 9
    weights = {json.loads(line)["prompt"]: json.loads(line)["weight"] for line in (task / "prompts.jsonl").read_text().splitlines()}
    rewards = {}
    for row in scored:
        pixels = module.to_tensor(row["image"].open(), 32, 32)
        assert row["reward"] == pytest.approx(pixels.mean().item() * weights[row["prompt"]], rel=1e-5)
        rewards[row["image"].content_hash()] = row["reward"]
    pairs = rows_of(made / "pairs", "pair")
    assert len(pairs) == 9 and sum(row["weight"] for row in pairs) == pytest.approx(3)
    assert all(rewards[row["image_0"].content_hash()] > rewards[row["image_1"].content_hash()] and row["label_0"] == 1 for row in pairs)
    binary = rows_of(made / "binary", "binary")
    limit = torch.tensor(list(rewards.values()), dtype=torch.float64).quantile(0.7).item()
    assert [row["label"] for row in binary] == [rewards[row["image"].content_hash()] >= limit for row in binary]
    for row in rows_of(made / "ranked", "ranked"):
        found = [rewards[image.content_hash()] for image in row["images"]]
        assert [sum(other > own for other in found) + 1 for own in found] == row["ranks"]


def test_the_prompts_columns_stay(made):
    for kind in ("pairs", "binary", "scored", "ranked"):
        rows = [json.loads(line) for line in (made / kind / "metadata.jsonl").read_text().splitlines()]
        column = {row["prompt"]: row["weight"] for row in rows}
        # the pairs' own weight goes first
        assert set(column.values()) == ({1 / 3} if kind == "pairs" else {0.5, 1.0, 2.0})


def test_columns_that_the_call_would_take_are_said(tmp_path, capsys):
    (write_task(tmp_path) / "prompts.jsonl").write_text('{"prompt": "a cat", "negative_prompt": "red"}\n')
    make(tmp_path / "made", tmp_path)
    assert capsys.readouterr().out.count("--input_columns negative_prompt hands it to the pipeline as well") == 1


def test_the_contact_sheet_has_a_row_a_prompt(made):
    from PIL import Image

    with Image.open(made / "contact_sheet.png") as sheet:
        cells = json.loads(sheet.info["cells"])
        assert len(cells) == 9 and [box[0] for box in cells] == [0, 128, 256] * 3 and len({sheet.crop(box).tobytes() for box in cells}) == 9


def test_an_interrupted_run_goes_on_and_another_reward_draws_nothing(made, task, tmp_path):
    import shutil

    folder = shutil.copytree(made, tmp_path / "made")
    lost, kept = folder / "images" / "00001_02.png", folder / "images" / "00001_01.png"
    before, stamp = load_make_preferences().read(lost), kept.stat().st_mtime_ns
    lost.unlink()
    make(folder, task, "--pairs", "all", reward="redness")
    assert (load_make_preferences().read(lost) - before).abs().max() <= 1.5 / 255  # another batch size rounds differently
    assert kept.stat().st_mtime_ns == stamp
    assert rows_of(folder / "scored", "scored")[0]["reward"] == pytest.approx(
        load_make_preferences().read(folder / "images" / "00000_00.png")[0].mean().item(), rel=1e-5
    )
    for flags, changed in ((("--seed", "7"), "seed was 42, now 7"), (("--vae_tiling",), "vae_tiling was False, now True")):
        with pytest.raises(ValueError, match=f"images of other settings: {changed}"):
            make(folder, task, *flags)
    sampling = json.loads((folder / "sampling.json").read_text())
    (folder / "sampling.json").write_text(json.dumps({name: value for name, value in sampling.items() if name != "vae_tiling"}))
    make(folder, task)  # of a time when there was no such flag


@pytest.mark.parametrize("what", ["images", "contact_sheet"])
def test_a_full_disk_says_that_the_same_command_goes_on(what, task, tmp_path, monkeypatch):
    def full(self, path, *args, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    def sheet_is_full(sheet, path):
        full(sheet, path)

    module = load_make_preferences()
    monkeypatch.setattr(*((module.Image.Image, "save", full) if what == "images" else (module, "save", sheet_is_full)))
    with pytest.raises(OSError, match="could not be written: .*No space left.* are free.*the same command goes on"):
        make(tmp_path, task, module=module)
    assert not list(tmp_path.rglob(".*")), "no half files stay"


def test_images_belong_to_their_prompts_and_to_the_loras_weights(tmp_path):
    def check(*texts):
        script.check_settings(args, [Prompt(text) for text in texts], tmp_path / "lora.safetensors", tmp_path)

    script = load_make_preferences()
    args = script.parse_args(["--pretrained_model_name_or_path=m", "--prompts=p", "--reward=r", "--lora=lora.safetensors", f"--output_dir={tmp_path}"])
    (tmp_path / "lora.safetensors").write_bytes(b"one")
    for texts in (["a", "b"], ["a", "b", "c"], ["a"], ["a", "b", "c", "d"]):
        check(*texts)
    with pytest.raises(ValueError, match="prompt 3 was 'c', now 'x'"):
        check("a", "b", "x")
    (tmp_path / "lora.safetensors").write_bytes(b"two")
    with pytest.raises(ValueError, match="lora_weights was '"):
        check("a", "b")


def test_images_belong_to_the_weights_of_a_models_folder(tmp_path):
    """A model that was trained on and saved in its place drew none of them; a folder of before there was such an entry is taken over."""
    script, weights = load_make_preferences(), tmp_path / "model" / "unet" / "x.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(bytes(10**6))
    (tmp_path / "out").mkdir()
    args = script.parse_args([f"--pretrained_model_name_or_path={tmp_path / 'model'}", "--prompts=p", "--reward=r", f"--output_dir={tmp_path / 'out'}"])
    for _ in range(2):
        script.check_settings(args, [Prompt("a")], None, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "sampling.json").read_text())
    (tmp_path / "out" / "sampling.json").write_text(json.dumps({name: value for name, value in settings.items() if name != "model_weights"}))
    script.check_settings(args, [Prompt("a")], None, tmp_path / "out")
    weights.write_bytes(bytes(5 * 10**5) + bytes(range(1, 251)) * 2000)
    with pytest.raises(ValueError, match="images of other settings: the weights in .*model were others"):
        script.check_settings(args, [Prompt("a")], None, tmp_path / "out")


def test_processes_share_out_one_list_of_images(tmp_path):
    """The second process starts when the first waits for it: by then it must not have drawn."""
    script, barrier, waiting = load_make_preferences(), threading.Barrier(2, timeout=60), threading.Event()
    policy = types.SimpleNamespace(
        condition=lambda prompts, **_: prompts,
        rollout=lambda prompts: types.SimpleNamespace(final=torch.zeros(len(prompts), 3, 4, 4), condition=None),
        outcome=lambda trajectory: types.SimpleNamespace(images=trajectory.final),
    )

    class Process:
        num_processes, is_main_process, autocast = 2, False, contextlib.nullcontext

        def __init__(self, index):
            self.process_index = index

        def wait_for_everyone(self):
            waiting.set()
            barrier.wait()

    def work(index):
        if index == 1:
            waiting.wait(60)
        script.sample(args, policy, Process(index), [Prompt("a")], jobs, tmp_path)

    args, jobs = types.SimpleNamespace(batch_size=1, seed=0, same_latent=False, deterministic=False, save_trajectories=False), [(0, i) for i in range(6)]
    (tmp_path / "images").mkdir()
    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list((tmp_path / "images").glob("*.png"))) == 6


def test_trajectories_belong_to_their_images(task, tmp_path):
    folder = make(tmp_path, task, "--save_trajectories", "--same_latent", "--noise_level", "0.3", "--num_prompts", "1", "--no-deterministic")
    first, second = (Trajectory.load(folder / "trajectories" / f"00000_0{i}.safetensors") for i in (0, 1))
    assert torch.equal(first.states[:, 0], second.states[:, 0]) and not torch.equal(first.final, second.final)
    assert first.stochastic[0] and first.log_probs[0, 0].isfinite() and first.states.dtype == torch.float32
    assert first.condition.kwargs["guidance_scale"] == 1.0 and first.condition.prompts == ["a cat on a red background"]
    assert (
        load_make_preferences().read(folder / "images" / "00000_00.png") - load_make_preferences().read(folder / "images" / "00000_01.png")
    ).abs().max() > 1 / 255


def test_images_without_a_score_are_in_no_set(task, tmp_path):
    folder = make(tmp_path, task, "--invalid_rewards", "mask", reward="no_dogs")
    scored = rows_of(folder / "scored", "scored")
    assert len(scored) == 6 and not any("dog" in row["prompt"] for row in scored)
    assert len(rows_of(folder / "pairs", "pair")) == len(rows_of(folder / "ranked", "ranked")) == 2
    files = {path: path.read_text() for path in folder.rglob("metadata.jsonl")}
    (task / "unsure.py").write_text("def unsure(images, prompts, **columns):\n    return images.mean((1, 2, 3)) * float('nan')\n")
    with pytest.raises(ValueError, match="'unsure' has no score for 9 of 9 samples"):
        make(folder, task, "--invalid_rewards", "mask", "--reward", f"{task / 'unsure.py'}:unsure")
    assert {path: path.read_text() for path in folder.rglob("metadata.jsonl")} == files, "nothing was written"


def test_no_pair_is_an_error_that_says_why(made, task, tmp_path, capsys):
    import shutil

    (task / "flat.py").write_text("def flat(images, prompts, **columns):\n    return images.new_zeros(len(images))\n")
    flat = ("--reward", f"{task / 'flat.py'}:flat")
    for flags, message in (
        (("--min_margin", "1e9"), r"3 of 3 prompts have rewards that differ by less than --min_margin 1e\+09 \(by 0\.\d+ at most"),
        (flat, "3 of 3 prompts have equal rewards for all images"),
    ):
        folder = shutil.copytree(made, tmp_path / message[-5:])
        with pytest.raises(SystemExit) as stop:
            make(folder, task, *flags)
        assert re.search(f"No pair: {message}", str(stop.value.code)) and "--allow_no_signal" in stop.value.code
        assert (folder / "pairs" / "metadata.jsonl").read_text() == "" and len(rows_of(folder / "scored", "scored")) == 9
        make(folder, task, *flags, "--allow_no_signal")
        assert "pairs: 0 rows" in capsys.readouterr().out


def test_images_that_are_the_same_are_counted(tmp_path):
    for name, content in (("00000_00", b"a"), ("00000_01", b"a"), ("00000_02", b"b"), ("00001_00", b"a")):
        (tmp_path / f"{name}.png").write_bytes(content)
    assert equal_images(tmp_path, [(0, 0), (0, 1), (0, 2), (1, 0)]) == 1


def test_settings_that_are_not_a_number_are_equal_to_themselves(tmp_path):
    script = load_make_preferences()
    base = ["--pretrained_model_name_or_path=m", "--prompts=p", "--reward=r", f"--output_dir={tmp_path}"]
    args = script.parse_args(base)
    args.noise_level = float("nan")
    script.check_settings(args, [Prompt("a")], None, tmp_path)
    script.check_settings(args, [Prompt("a")], None, tmp_path)
    args.noise_level = 0.5
    with pytest.raises(ValueError, match="noise_level was nan, now 0.5"):
        script.check_settings(args, [Prompt("a")], None, tmp_path)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_images_per_prompt", "1"], "must be a whole number from 2 to 1e6, got 1"),
        (["--save_trajectories", "--deterministic"], "--no-deterministic"),
        (["--same_latent"], "--no-deterministic"),
        (["--binary_quantile", "1.5"], "--binary_quantile must be a number from 0 to 1, got 1.5"),
    ],
)
def test_flags_that_make_no_sense(flags, message, capsys):
    base = ["--pretrained_model_name_or_path", "mini-sd3", "--prompts", "p", "--reward", "r", "--output_dir", "o"]
    with pytest.raises(SystemExit):
        load_make_preferences().parse_args([*base, *flags])
    assert message in capsys.readouterr().err


def test_settings_that_cannot_be_read_and_damaged_images_are_named(tmp_path):
    script = load_make_preferences()
    (tmp_path / "sampling.json").write_text("")
    with pytest.raises(ValueError, match="sampling.json cannot be read .* delete the file, if they are of these settings"):
        script.settings_of(tmp_path / "sampling.json")
    (tmp_path / "0.png").write_bytes(b"")
    with pytest.raises(OSError, match="0.png is damaged .*: delete it, and the same command draws it again"):
        script.read(tmp_path / "0.png")
