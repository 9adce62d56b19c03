"""Scenes and the captions that name them."""

import random

import numpy as np

from diffusers_align.data.prompts import load_prompts
from diffusers_align.embedded import scenes
from diffusers_align.embedded.scenes import adjacent_captions, parse


def test_captions_say_what_scenes_show():
    rng = random.Random(0)
    for _ in range(300):
        scene = scenes.sample_scene(rng)
        asked = scenes.parse(scene.caption())
        shown = {"object": scene.object, "count": scene.count, "color": scene.color, "position": scene.position}
        assert all(shown[name] == value for name, value in asked.items()) and {"object", "count"} <= set(asked)
    assert scenes.parse("a mountain at dawn") == {}


def test_a_silhouette_is_where_the_picture_is_no_background():
    for i in range(20):
        scene = scenes.sample_scene(random.Random(i))
        picture, shape = np.asarray(scenes.render(scene, random.Random(i))), np.asarray(scenes.silhouette(scene, random.Random(i)))
        (background,) = np.unique(picture[shape == 0], axis=0)
        assert (shape == 255).any() and (shape[(picture != background).any(-1)] > 0).all()


def test_adjacent_captions_keep_the_object_and_the_colour():
    assert adjacent_captions("a cat") == ["a cat on the left", "a cat on the right", "a cat at the top", "a cat at the bottom"]
    assert adjacent_captions("two cacti on a red background") == ["a cactus on a red background", "three cacti on a red background"]
    assert adjacent_captions("a quiet morning") == []
    for prompt in load_prompts("likes_blue_train"):
        captions = adjacent_captions(prompt.text)
        assert len(captions) >= 2 and prompt.text not in captions
        assert {parse(caption)["object"] for caption in captions} == {parse(prompt.text)["object"]}
