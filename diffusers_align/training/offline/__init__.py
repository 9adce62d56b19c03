"""Learning from a data set: `loop` is the scripts' loop, `rows` reads, `pairs_and_batches` makes batches of noised latents (`data_latents` encodes,
`noised_latents` noises), `descent` has the reference and the gradient; `held_out_pairs` measures, and three modules are of one script each."""

from ...moved import as_before

__getattr__ = as_before(__name__)
