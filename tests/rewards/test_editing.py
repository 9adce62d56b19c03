"""Rewards of edits, against their formulas and on scenes whose right edit is known."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from reward_models import photo_like
from torch.nn import functional as F

from diffusers_align import embedded
from diffusers_align.data.augment import to_tensor
from diffusers_align.data.images import LazyImage
from diffusers_align.embedded import scenes
from diffusers_align.embedded.scenes import Scene
from diffusers_align.rewards import load_reward, score
from diffusers_align.rewards.clip_embedder import CLIPEmbedder
from diffusers_align.rewards.editing import EditDirection, _sources, edit_preservation

BOXES = [(8, 8, 16)]


def picture(object, color):
    return scenes.render(Scene(object, 1, color, "top", ()), random.Random(3), boxes=BOXES)


def as_image(value):
    return to_tensor(value, 32, 32)


@pytest.fixture(scope="module")
def direction():
    return load_reward("edit_direction", model=embedded.path("mini-clip"))


def test_the_direction_is_the_cosine_of_both_changes(clip_folder):
    sources, images = photo_like(2, 3, 32, 32, seed=1), photo_like(2, 3, 32, 32, seed=2)
    columns = {"image": list(sources), "source_prompt": ["a cat", "two dogs"], "target_prompt": [None, "a fox"]}
    clip = CLIPEmbedder(clip_folder)
    pictures = clip.images(images) - clip.images(sources)
    texts = clip.texts(["a lion", "a fox"]) - clip.texts(["a cat", "two dogs"])
    found = score(EditDirection(clip_folder), images, ["a lion", "make them one fox"], **columns)["reward"]
    torch.testing.assert_close(found, F.cosine_similarity(pictures, texts), atol=1e-5, rtol=0)


def test_the_right_edit_points_where_the_words_do(direction):
    source = picture("fox", "red")
    edits = [picture("fox", "blue"), picture("fox", "yellow"), picture("cat", "red"), source]
    columns = {"image": [source] * 4, "source_prompt": ["a fox on a red background"] * 4}
    scores = score(direction, torch.stack([as_image(edit) for edit in edits]), ["a fox on a blue background"] * 4, **columns)["reward"]
    right, other_colour, other_object, nothing = scores
    assert right > 0.5 and right > other_colour + 0.2 and right > other_object + 0.2
    assert nothing == 0


def test_words_that_change_nothing_have_no_direction(direction):
    columns = {"image": [picture("fox", "red")], "source_prompt": ["a fox"]}
    assert direction(as_image(picture("fox", "blue"))[None], ["a fox"], **columns).isnan().all()
    columns = {"image": [None], "source_prompt": ["a cat"]}
    assert direction(as_image(picture("fox", "blue"))[None], ["a fox"], **columns).isnan().all()


def test_the_directions_gradient_is_finite_and_raises_it(direction):
    source = as_image(picture("fox", "red"))
    columns = {"image": [source] * 2, "source_prompt": ["a fox on a red background"] * 2}
    images = torch.stack([source, 0.8 * source]).requires_grad_()
    before = direction(images, ["a fox on a blue background"] * 2, **columns)
    (gradient,) = torch.autograd.grad(before.sum(), images)
    assert gradient.isfinite().all()
    moved = images + 0.02 * gradient.sign()
    assert (direction(moved, ["a fox on a blue background"] * 2, **columns) > before).all()


@pytest.mark.parametrize("measure, expected", [("l1", [0.0, -0.25, -0.125]), ("psnr", [100.0, 12.0412, 15.0515])])
def test_preservation_counts_what_lies_outside_the_mask(measure, expected):
    """The third sample changes by 1/4 in its left half; the second there too, and has the right half masked."""
    source = torch.full((3, 8, 8), 0.5)
    changed = source.clone()
    changed[..., :4] += 0.25
    right = torch.zeros(1, 8, 8)
    right[..., 4:] = 1
    reward = load_reward("edit_preservation", measure=measure)
    columns = {"image": [source] * 3, "mask": [None, right, None]}
    found = score(reward, torch.stack([source, changed, changed]), ["x"] * 3, **columns)["reward"]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)


def test_what_is_masked_has_no_gradient_and_a_mask_of_everything_no_score():
    source, mask = Image.new("RGB", (8, 8), (128, 128, 128)), Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 4, 8))
    images = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    edit_preservation(images, ["x"], image=[source], mask=[mask]).sum().backward()
    assert images.grad[..., :4].abs().max() == 0 and (images.grad[..., 4:] != 0).all()
    assert edit_preservation(images, ["x"], image=[source], mask=[Image.new("L", (8, 8), 255)]).isnan().all()
    assert edit_preservation(images, ["x"], image=[None]).isnan().all()


def test_a_video_has_one_source_or_one_a_frame():
    first, second = torch.zeros(3, 8, 8), torch.ones(3, 8, 8)
    video = torch.stack([first, second])[None]
    assert float(edit_preservation(video, ["x"], image=[first])) == -0.5
    assert float(edit_preservation(video, ["x"], image=[[first, second]])) == 0
    with pytest.raises(ValueError, match="has 3 pictures, and the sample 2"):
        edit_preservation(video, ["x"], image=[[first] * 3])


def test_what_cannot_be_measured_is_refused():
    image = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="no measure 'ssim'"):
        edit_preservation(image, ["x"], image=[image[0]], measure="ssim")
    with pytest.raises(ValueError, match="tensors are not resized"):
        edit_preservation(image, ["x"], image=[torch.zeros(3, 16, 16)])
    with pytest.raises(ValueError, match="missing a required argument: 'image'"):
        score(edit_preservation, image, ["x"])


def test_a_path_is_read(tmp_path):
    picture("fox", "red").save(tmp_path / "source.png")
    images = as_image(picture("fox", "red"))[None]
    assert float(edit_preservation(images, ["x"], image=[str(tmp_path / "source.png")])) == 0
    with pytest.raises(ValueError, match="There is no picture .*source.jpg"):
        edit_preservation(images, ["x"], image=[str(tmp_path / "source.jpg")])


@pytest.mark.parametrize("given", [str, Image.open])
@pytest.mark.parametrize("kind", ["turned", "transparent", "16 bits"])
def test_a_picture_that_equals_its_source_has_changed_nothing_however_it_lies_in_the_file(tmp_path, kind, given):
    file, whole = tmp_path / "source.png", picture("fox", "red")
    if kind == "turned":
        exif = Image.Exif()
        exif[0x0112] = 6  # shown a quarter turned
        whole.save(file, exif=exif)
    elif kind == "transparent":
        whole.putalpha(Image.new("L", whole.size, 0))
        whole.save(file)
    else:
        Image.fromarray((np.arange(32 * 32).reshape(32, 32) * 60).astype(np.uint16)).save(file)
    shown = as_image(LazyImage(file).open())
    for reward, wanted in ((edit_preservation, 0.0), (edit_direction_of_nothing, 0.0)):
        assert float(reward(shown[None], ["x"], image=[given(file)])) == pytest.approx(wanted, abs=1e-6)


def edit_direction_of_nothing(images, prompts, image):
    """How far the source that `EditDirection` sees lies from the images."""
    return (_sources(image, images) - images).abs().mean()
