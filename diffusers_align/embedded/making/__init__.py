"""How the embedded models were made: the stages of `diffusers_align.embedded.train`, and what they share."""
