"""Pictures and other inputs of the pipeline's call that belong to samples one by one, from columns to training."""

import json
from argparse import Namespace

import diffusers
import pytest
import torch
from PIL import Image
from script_tools import load_make_preferences, load_script, make_run, run_script
from script_tools import rows as metrics
from tiny_pipelines import LATENT_CHANNELS, SHORT, flux, quiet, seeded, stable_diffusion

from diffusers_align.data import LazyImage, Prompt, load_preferences, load_prompts
from diffusers_align.data.conversions import weight_by_prompt
from diffusers_align.data.inputs import Inputs
from diffusers_align.policy import Policy
from diffusers_align.training.online.sampling import evaluate
from diffusers_align.training.run.inputs import batches_by_size, check_moved_together, columns_of_the_call, inputs_of

REWARDS = """
from PIL import Image


def brightness(images, prompts, image=None, image_0=None, **columns):
    pictures = image if image is not None else image_0
    assert all(isinstance(picture, Image.Image) and picture.mode == "RGB" for picture in pictures), pictures
    return images.flatten(1).mean(1)
"""


def controlnet():
    base = stable_diffusion()
    control = seeded(diffusers.ControlNetModel, **{name: base.unet.config[name] for name in CONTROL}, conditioning_embedding_out_channels=(8, 8))
    parts = {name: component for name, component in base.components.items() if name not in ("safety_checker", "image_encoder")}
    return quiet(diffusers.StableDiffusionControlNetPipeline(**parts, controlnet=control, safety_checker=None, requires_safety_checker=False))


def inpaint():
    return stable_diffusion(diffusers.StableDiffusionInpaintPipeline, in_channels=2 * LATENT_CHANNELS + 1)


CONTROL = ("block_out_channels", "layers_per_block", "norm_num_groups", "attention_head_dim", "down_block_types", "cross_attention_dim", "in_channels")
# How to build a pipeline that takes pictures, its columns, and other arguments of its call.
PIPELINES = {
    "img2img": (lambda: stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline), ["image"], {"strength": 0.8}),
    "inpaint": (inpaint, ["image", "mask_image=mask"], {"height": 16, "width": 16}),
    "controlnet": (controlnet, ["image", "negative_prompt"], {}),
    "edit": (lambda: flux(diffusers.FluxKontextPipeline), ["image"], {"max_area": 256, "_auto_resize": False, "height": 16, "width": 16, **SHORT}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i, colour in enumerate([(200, 30, 30), (30, 200, 30), (30, 30, 200)]):
        noise = (torch.rand(16, 16, 3, generator=generator) * 50).byte().numpy()
        Image.blend(Image.new("RGB", (16, 16), colour), Image.fromarray(noise), 0.5).save(folder / f"{i}.png")
        mask = Image.new("L", (16, 16))
        mask.paste(255, (0, 0, 8 + 2 * i, 16))
        mask.save(folder / f"mask{i}.png")
        rows.append({"prompt": "make it red", "image": f"{i}.png", "mask": f"mask{i}.png", "negative_prompt": ["", "dull", "grey"][i]})
    write(folder / "prompts.jsonl", rows)
    pairs = [{**row, "image_0": f"{i}.png", "image_1": f"{(i + 1) % 3}.png", "label_0": 1} for i, row in enumerate(rows)]
    write(folder / "pairs.jsonl", pairs)
    (folder / "rewards.py").write_text(REWARDS)
    for name, (build, _, _) in PIPELINES.items():
        build().save_pretrained(folder / name)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def flags(folder, name):
    _, columns, call = PIPELINES[name]
    size = {side: call.get(side) for side in ("height", "width") if side in call}
    call = {key: value for key, value in call.items() if key not in size}
    return size | {"pretrained_model_name_or_path": folder / name, "input_columns": tuple(columns), "call_kwargs": json.dumps(call), "num_inference_steps": 3}


def trained(out):
    from safetensors.torch import load_file

    return max(float(value.abs().max()) for key, value in load_file(out / "pytorch_lora_weights.safetensors").items() if "lora_B" in key or ".up." in key)


# scripts


@pytest.mark.parametrize("name", PIPELINES)
def test_online_training_sees_each_samples_own_picture(folder, tmp_path, name):
    script = "flow_grpo" if name == "edit" else "ddpo"
    own = {"num_prompts_per_epoch": 2, "group_size": 2} if name == "edit" else {"num_samples_per_epoch": 4, "per_prompt_stat_min_count": 2}
    out = run_script(script, tmp_path, folder, **flags(folder, name), **own, num_eval_samples=2, num_validation_images=2)
    (row,) = metrics(out)
    assert row["ratio_error"] == 0 and row["grad_norm"] > 0 and trained(out) > 0


@pytest.mark.parametrize("name", PIPELINES)
def test_offline_training_sees_each_samples_own_picture(folder, tmp_path, name):
    data = {
        "dataset_name": folder / "pairs.jsonl",
        "num_samples_per_epoch": 2,
        "prompts": folder / "prompts.jsonl",
        "eval_dataset_name": folder / "pairs.jsonl",
    }
    out = run_script("dpo", tmp_path, folder, **flags(folder, name), **data, num_eval_samples=2, num_validation_images=2)
    assert metrics(out)[0]["loss"] == pytest.approx(0.693, abs=0.01) and trained(out) > 0


@pytest.mark.parametrize("flag", ["random_flip", "random_crop"])
def test_images_are_not_moved_away_from_the_pictures_that_belong_to_them(folder, tmp_path, flag):
    own = flags(folder, "img2img") | {"num_samples_per_epoch": 2, "prompts": folder / "prompts.jsonl", "num_eval_samples": 2, "num_validation_images": 2}
    with pytest.raises(ValueError, match=f"--{flag} would move the images of .*pairs.jsonl, and not the pictures of --input_columns"):
        run_script("dpo", tmp_path, folder, **own, dataset_name=folder / "pairs.jsonl", **{flag: True})
    with pytest.raises(ValueError, match=f"--{flag} would move the images of .*prompts.jsonl"):
        run_script("refl", tmp_path, folder, **own, pretrain_weight=0.1, pretrain_dataset_name=folder / "prompts.jsonl", **{flag: True})


def test_texts_beside_the_prompt_do_not_keep_images_from_being_moved():
    check_moved_together(Namespace(random_flip=True), [{"inputs": {"negative_prompt": "dull", "strength": 0.5}}], "data")
    with pytest.raises(ValueError, match="--random_flip"):
        check_moved_together(Namespace(random_flip=True), [{"inputs": {"frames": [LazyImage(Image.new("RGB", (2, 2)))]}}], "data")


def test_rows_of_one_instruction_and_different_pictures_are_different_tasks(folder):
    first, second = (LazyImage(folder / f"{i}.png") for i in range(2))
    rows = [{"prompt": "make it red", "inputs": {"image": image}, "weight": 1.0, "reward": reward} for image, reward in [(first, 0), (first, 1), (second, -9)]]
    assert [row["weight"] for row in weight_by_prompt(rows)] == [0.5, 0.5, 1.0]
    args = Namespace(weights="top_k", top_k=1, scope="prompt", temperature=1.0, top_q=0.2, max_weight=None, force=True)
    kept, _, _ = load_script("rwr").weighted(Namespace(args=args, print=print), rows)
    assert [row["reward"] for row in kept] == [1, -9], "the best of each picture, and not of both"


@pytest.mark.parametrize("name", PIPELINES)
def test_reward_gradients_see_each_samples_own_picture(folder, tmp_path, name):
    out = run_script("draft", tmp_path, folder, **flags(folder, name), num_samples_per_epoch=2, num_eval_samples=2, num_validation_images=2)
    assert metrics(out)[0]["grad_norm"] > 0 and trained(out) > 0


def test_preferences_are_made_of_each_prompts_own_picture(folder, tmp_path):
    module = load_make_preferences()
    argv = ["--prompts", str(folder / "prompts.jsonl"), "--reward", f"{folder / 'rewards.py'}:brightness", "--num_images_per_prompt", "2"]
    for key, value in flags(folder, "img2img").items():
        argv += [f"--{key}", *map(str, value if isinstance(value, tuple) else [value])]
    module.main([*argv, "--output_dir", str(tmp_path), "--batch_size", "4"])
    inputs = Inputs({"image": "image"})
    rows, _ = load_preferences(str(tmp_path / "pairs"), "pair", bad_rows="error", inputs=inputs)
    assert len(rows) == 3 and [row["inputs"]["image"].content_hash() for row in rows] == [p.inputs["image"].content_hash() for p in loaded(folder)]
    # a kind with a column `image` of its own keeps the picture beside it
    scored, _ = load_preferences(str(tmp_path / "scored"), "scored", bad_rows="error", inputs=Inputs({"image": "input_image"}))
    assert scored[0]["inputs"]["image"].content_hash() == rows[0]["inputs"]["image"].content_hash() != scored[0]["image"].content_hash()


# columns


def loaded(folder, name="prompts.jsonl", **options):
    return load_prompts(str(folder / name), inputs=Inputs({"image": "image"}, **options), say=[].append)


def test_arguments_and_columns_that_are_not_there_are_told_before_the_model_is_loaded(folder, tmp_path):
    model = flags(folder, "img2img")
    with pytest.raises(ValueError, match=r"--input_columns: the call of .*img2img has no mask_image; it takes prompt, image, strength"):
        run_script("draft", tmp_path, folder, **{**model, "input_columns": ("image", "mask_image")})
    with pytest.raises(ValueError, match="prompts.jsonl has no column 'picture' for --input_columns. It has 'prompt', 'image'"):
        run_script("draft", tmp_path, folder, **{**model, "input_columns": ("image=picture",)})
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match=r"p.txt has no columns, so none for --input_columns"):
        run_script("draft", tmp_path, folder, **{**model, "prompts": tmp_path / "p.txt"})


def test_a_model_that_is_not_there_is_told_in_the_same_words(tmp_path):
    def asked(name):
        return inputs_of(Namespace(input_columns=["image"], pretrained_model_name_or_path=str(name), revision=None, height=None, width=None))

    with pytest.raises(FileNotFoundError, match="No model './nowhere': it is no embedded model"):
        asked("./nowhere")
    with pytest.raises(ValueError, match="holds no model_index.json, so it is no pipeline"):
        asked(tmp_path)
    (tmp_path / "whole.safetensors").write_bytes(b"weights")
    assert asked(tmp_path / "whole.safetensors").columns == {"image": "image"}  # its pipeline is not known before it is loaded


# sizes


def test_training_takes_one_size_and_resizes_to_it(folder, tmp_path):
    Image.new("RGB", (24, 32)).save(folder / "tall.png")
    file = write(folder / "sizes.jsonl", [{"prompt": "x", "image": "0.png"}, {"prompt": "y", "image": "tall.png"}, {"prompt": "z", "image": "1.png"}])
    own = flags(folder, "img2img") | {"prompts": file, "num_samples_per_epoch": 2, "num_eval_samples": 2, "num_validation_images": 2}
    with pytest.raises(ValueError, match=r"have 2 sizes: image 16x16 \(2 rows\); image 24x32 \(1 rows\). Training takes one: give --height and --width"):
        run_script("draft", tmp_path, folder, **own)
    # its call has no height and width
    assert metrics(run_script("draft", tmp_path, folder, **own, height=16, width=16))[0]["grad_norm"] > 0


def test_an_evaluation_samples_size_by_size(tmp_path):
    for i, size in enumerate([(16, 16), (24, 16), (16, 16)]):
        Image.effect_noise(size, 50).convert("RGB").save(tmp_path / f"{i}.png")
    prompts = loaded(tmp_path, write(tmp_path / "p.jsonl", [{"prompt": "x", "image": f"{i}.png"} for i in range(3)]))
    run = make_run(tmp_path / "run")
    policy = Policy(PIPELINES["img2img"][0](), num_inference_steps=3, guidance_scale=1.0, strength=0.8)
    found = evaluate(run, policy, {"reward": lambda images, prompts, image: images.flatten(1).mean(1)}, prompts, 3, 3)
    assert [image.shape[1:] for image in found.images] == [(16, 16), (16, 24), (16, 16)]
    again = evaluate(run, policy, {"reward": lambda images, prompts, image: images.flatten(1).mean(1)}, prompts, 2, 2)
    assert torch.allclose(found.rewards["reward"][:2], again.rewards["reward"], atol=1e-6), "no sample depends on its neighbours' sizes"


def test_batches_hold_one_size():
    same = [Prompt(str(i)) for i in range(7)]
    assert batches_by_size(same, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert [batches_by_size(same, 2, rank, 2) for rank in (0, 1)] == [[[0, 2], [4, 6]], [[1, 3], [5, 0]]]
    assert [batches_by_size(same, 2, rank, 2, even=False) for rank in (0, 1)] == [[[0, 2], [4, 6]], [[1, 3], [5]]]
    pictures = [Image.new("RGB", size) for size in ((8, 8), (8, 16))]
    mixed = [Prompt("x", {}, {"image": LazyImage(pictures[i % 2])}) for i in range(7)]
    assert batches_by_size(mixed, 3) == [[0, 2, 4], [6], [1, 3, 5]]
    dealt = [batches_by_size(mixed, 3, rank, 2) for rank in (0, 1)]
    assert dealt == [[[0, 2, 4], [1, 3, 5]], [[6], [0, 2, 4]]]
    assert sorted(i for rank in (0, 1) for batch in batches_by_size(mixed, 3, rank, 2, even=False) for i in batch) == list(range(7))


def test_columns_that_the_call_would_take_are_said_where_rewards_alone_get_them():
    policy = Policy(stable_diffusion(), height=16)
    prompts = [Prompt("x", {"negative_prompt": "y", "mask": 1, "height": 8}), Prompt("x", {"clip_skip": 1, "eta": 1}, {"eta": 1})]
    (said,) = columns_of_the_call(prompts, policy)
    assert "has the columns negative_prompt, clip_skip, and the call of StableDiffusionPipeline takes" in said
    assert said.endswith("--input_columns negative_prompt clip_skip hands them to the pipeline as well.")
    assert columns_of_the_call([Prompt("x", {"mask": 1})], policy) == []
