"""A captioner as users write them."""

CAPTIONER = """
def by_brightness(prompt, images):
    assert images.shape[1:] == (3, 32, 32) and 0 <= images.min() and images.max() <= 1
    return [f"{prompt} {len(images)} {images.mean():.3f}", f"{prompt} at the top"]


def rewritten(prompt, images):
    assert images is None
    return [f"{prompt} on the left", f"{prompt} on the right", f"{prompt} at the top"]


def silent_on_dogs(prompt, images):
    return [] if "dog" in prompt else ["a", "b", "c"]
"""
