"""Seeds of noise."""

from diffusers_align import noise_seed


def test_noise_seeds_differ_and_stay():
    keys = [(s, e, p, i) for s in range(3) for e in range(3) for p in range(3) for i in range(3)]
    assert len({noise_seed(*key) for key in keys}) == len(keys)
    assert noise_seed(42, 0, 1, 2) == noise_seed(42, 0, 1, 2) and 0 <= noise_seed("x") < 2**63
