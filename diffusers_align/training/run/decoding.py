"""`--vae_slicing` and `--vae_tiling`: the autoencoder decodes in parts, so that less is held at a time."""

from __future__ import annotations

import dis
import inspect
import logging
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

# By flag: diffusers' method, what it sets, and the same for tiles in time, which have no method.
PARTS = {
    "vae_slicing": ("enable_slicing", "use_slicing", None),
    "vae_tiling": ("enable_tiling", "use_tiling", "use_framewise_decoding"),
}
# What autoencoders have whose frames are decoded in tiles that overlap. Where frames go one after the other through caches, the result is another one.
OVERLAPPING = "tile_sample_stride_num_frames"


def decode_in_parts(pipeline: Any, *flags: str) -> None:
    """Switch on what diffusers has for it in each autoencoder of the pipeline: slices (`vae_slicing`) are the samples of a batch one after the other,
    tiles (`vae_tiling`) parts of a picture or of a sound, and of a long video also some frames at a time. Some classes have the switch and never look at
    it; those are said not to have it.

    Raises:
        ValueError: none of the pipeline's autoencoders can.
    """
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module) and hasattr(part, "decode")}
    for flag in flags:
        method, setting, further = PARTS[flag]
        can = {name for name, part in parts.items() if _obeys(part, setting) and hasattr(part, method)}
        cannot = [f"{name} ({type(part).__name__})" for name, part in parts.items() if name not in can]
        in_frames = {name for name, part in parts.items() if further and hasattr(part, OVERLAPPING) and _obeys(part, further)}
        if not can | in_frames:
            raise ValueError(
                f"--{flag}: {' and '.join(cannot) or 'this pipeline has no autoencoder, and'} of this {type(pipeline).__name__} "
                f"cannot decode in {'slices' if flag == 'vae_slicing' else 'tiles'} in this diffusers: leave the flag out, and lower --train_batch_size "
                "or the size of what is made."
            )
        for name in can:
            getattr(parts[name], method)()
        for name in in_frames:
            setattr(parts[name], further, True)
        if left := [text for text in cannot if text.split()[0] not in in_frames]:
            logger.warning("--%s is for %s; %s decodes as before.", flag, ", ".join(sorted(can | in_frames)), " and ".join(left))


def _obeys(part: nn.Module, setting: str) -> bool:
    """Whether the part has the setting, and anything of its class reads it."""
    functions = [inspect.unwrap(f) for cls in type(part).__mro__ for f in vars(cls).values() if inspect.isfunction(f)]
    return hasattr(part, setting) and any(i.opname == "LOAD_ATTR" and i.argval == setting for f in functions for i in dis.get_instructions(f))
