"""Scenes and the captions that name them."""

import random

from diffusers_align.embedded import scenes


def test_captions_say_what_scenes_show():
    rng = random.Random(0)
    for _ in range(300):
        scene = scenes.sample_scene(rng)
        asked = scenes.parse(scene.caption())
        shown = {"object": scene.object, "count": scene.count, "color": scene.color, "position": scene.position}
        assert all(shown[name] == value for name, value in asked.items()) and {"object", "count"} <= set(asked)
    assert scenes.parse("a mountain at dawn") == {}
