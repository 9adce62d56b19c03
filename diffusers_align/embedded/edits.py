"""An editing task that the embedded models can learn: give a scene another background, and leave its object alone.

    python -m diffusers_align.embedded.edits --output_dir edits

writes `train.jsonl` and `heldout.jsonl`, a row for each source picture, the pictures in `sources/` and `masks/`, and `img2img/`: mini-sd3 as
diffusers' image-to-image pipeline. Prompts are captions of what the edited picture should show. (An instruction that does not name the object
would not do: where there is noise enough for another background, mini-sd3 no longer sees what the source shows. Its inpainting pipeline wants
latents of 16 channels, and it has 4.)
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageOps

from . import path
from .scenes import COLORS, OBJECTS, Scene, place, render, silhouette

SIZE = 32
Key = tuple[str, str, str]  # object, colour before, colour after


@dataclass(frozen=True)
class Edit:
    """A scene, and the colour that its background is to have.

    Attributes:
        boxes: the object's place, as `scenes.place` gives it.
        seed: of what else is drawn: shade, mirroring, tilt.
    """

    scene: Scene
    color: str
    boxes: list[tuple[int, int, int]]
    seed: str

    @property
    def wanted(self) -> Scene:
        """The scene as it should be."""
        return replace(self.scene, color=self.color)

    @property
    def source(self) -> Image.Image:
        """The scene as it is, RGB."""
        return render(self.scene, random.Random(self.seed), SIZE, self.boxes)

    @property
    def mask(self) -> Image.Image:
        """White where the background shows, black where the object hides more than half of it."""
        return ImageOps.invert(silhouette(self.scene, random.Random(self.seed), SIZE, self.boxes)).point(lambda value: 255 * (value > 127))

    def row(self, name: str) -> dict[str, str]:
        """Of a prompt file beside the folders `sources` and `masks`: the prompt, the pictures, and what rewards read."""
        pictures = {"image": f"sources/{name}.png", "mask": f"masks/{name}.png"}
        return {"prompt": self.wanted.caption(), **pictures, "source_prompt": self.scene.caption(), "background": self.color}


def edits(seed: int, taken: set[Key]) -> Iterator[Edit]:
    """Edits without end, of one object each. Each has an object and colours of its own, none of `taken`, which they join."""
    rng = random.Random(seed)
    while True:
        key = (rng.choice(list(OBJECTS)), *rng.sample(list(COLORS), 2))
        scene = Scene(key[0], 1, key[1], None, frozenset({"color"}))
        boxes, own = place(scene, SIZE, rng), f"{seed}/{rng.random()}"
        if key not in taken:
            taken.add(key)
            yield Edit(scene, key[2], boxes, own)


def write(folder: Path, numbers: dict[str, int], seed: int = 0) -> None:
    """The prompt files with so many rows each, by name, and their pictures; no file has an object with both colours of another's row."""
    found = edits(seed, set())
    for kind in ("sources", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, number in numbers.items():
        rows = []
        for i in range(number):
            edit, picture = next(found), f"{name}-{i:03d}"
            edit.source.save(folder / "sources" / f"{picture}.png")
            edit.mask.save(folder / "masks" / f"{picture}.png")
            rows.append(json.dumps(edit.row(picture)) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(rows))


def write_editor(folder: Path) -> None:
    """mini-sd3, saved as the pipeline whose call takes a picture: what `--pretrained_model_name_or_path` has to name."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    StableDiffusion3Img2ImgPipeline.from_pretrained(path("mini-sd3")).save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    """Write it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train", type=int, default=96, help="rows of train.jsonl")
    parser.add_argument("--num_heldout", type=int, default=48, help="rows of heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not 0 < args.num_train + args.num_heldout <= 2000 or min(args.num_train, args.num_heldout) < 0:
        parser.error(f"--num_train {args.num_train} and --num_heldout {args.num_heldout}: together 1 to 2000, of 2880 edits that differ")
    write(args.output_dir, {"train": args.num_train, "heldout": args.num_heldout}, args.seed)
    write_editor(args.output_dir / "img2img")
    print(f"{args.output_dir}: train.jsonl ({args.num_train} rows), heldout.jsonl ({args.num_heldout} rows), sources, masks, img2img")


if __name__ == "__main__":
    main()
