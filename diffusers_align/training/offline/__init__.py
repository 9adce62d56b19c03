"""Learning from a data set: its rows as batches of noised latents, held-out pairs, fitted rewards."""
