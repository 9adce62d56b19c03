import math

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch.distributions import Independent, Normal, kl_divergence

from diffusers_align import GaussianTransition
from diffusers_align.transition import standard_normal, sum_per_sample

torch.set_num_threads(1)
SHAPE = (3, 2, 4, 4)


def gaussian(seed: int, shape=SHAPE, std_shape=(1, 1, 1, 1), dtype=torch.float64) -> GaussianTransition:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=dtype)
    std = 0.2 + torch.rand(std_shape, generator=generator, dtype=dtype)
    return GaussianTransition(mean, std)


def normal(transition: GaussianTransition) -> Independent:
    return Independent(Normal(transition.mean, transition.std.expand_as(transition.mean)), transition.mean.ndim - 1)


@pytest.mark.parametrize("std_shape", [(1, 1, 1, 1), (3, 1, 1, 1), (3, 2, 4, 4)])
def test_log_prob_is_the_sum_of_torch_normals(std_shape):
    transition = gaussian(0, std_shape=std_shape)
    x = gaussian(1).mean
    expected = Normal(transition.mean, transition.std).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(transition.log_prob(x), expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(transition.log_prob(x), normal(transition).log_prob(x), rtol=1e-13, atol=0)


@pytest.mark.parametrize("std_shape", [(1, 1, 1, 1), (3, 1, 1, 1)])
def test_kl_is_torch_kl_divergence(std_shape):
    p, q = gaussian(0, std_shape=std_shape), gaussian(1, std_shape=std_shape)
    torch.testing.assert_close(p.kl(q), kl_divergence(normal(p), normal(q)), rtol=1e-13, atol=0)
    assert (p.kl(q) > 0).all()
    assert not torch.allclose(p.kl(q), q.kl(p))
    torch.testing.assert_close(p.kl(p), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_kl_is_the_expected_log_ratio():
    mean, std = torch.full((200_000, 1), 0.3, dtype=torch.float64), torch.full((1, 1), 0.8, dtype=torch.float64)
    p, q = GaussianTransition(mean, std), GaussianTransition(mean - 0.5, std * 1.4)
    x = p.sample(torch.Generator().manual_seed(0))
    ratio = p.log_prob(x) - q.log_prob(x)
    assert abs(ratio.mean() - p.kl(q)[0]) < 4 * ratio.std() / math.sqrt(len(ratio))


def test_sums_are_reduced_in_float64():
    transition = gaussian(0, (2, 4, 256, 256), dtype=torch.float32)
    x = transition.sample(torch.Generator().manual_seed(1))
    elements = Normal(transition.mean, transition.std).log_prob(x)
    exact = elements.double().sum((1, 2, 3))
    assert transition.log_prob(x).dtype == torch.float64
    assert transition.kl(transition).dtype == torch.float64
    torch.testing.assert_close(transition.log_prob(x), exact, rtol=1e-7, atol=0)
    torch.testing.assert_close(sum_per_sample(elements), exact, rtol=1e-14, atol=0)
    # One large and many small terms: a float32 accumulator swallows the small ones.
    row = torch.full((1, 1001), 1e-4)
    row[0, 0] = 1e4
    assert sum_per_sample(row).item() == pytest.approx(1e4 + 0.1, abs=1e-6)


def test_log_prob_accepts_a_lower_precision_action_and_scores_it_as_stored():
    transition = gaussian(0, dtype=torch.float32)
    x = transition.sample(torch.Generator().manual_seed(1))
    stored = x.to(torch.bfloat16)
    assert torch.equal(transition.log_prob(stored), transition.log_prob(stored.float()))
    assert not torch.equal(transition.log_prob(stored), transition.log_prob(x))


def test_deterministic_step_has_no_density_and_the_error_says_what_to_do():
    noisy, still = gaussian(0), GaussianTransition(gaussian(0).mean, torch.zeros(1, 1, 1, 1))
    half = GaussianTransition(noisy.mean, torch.tensor([0.5, 0.0, 0.5]).reshape(3, 1, 1, 1))
    for call in (lambda: still.log_prob(noisy.mean), lambda: half.log_prob(noisy.mean), lambda: noisy.kl(still), lambda: still.kl(noisy)):
        with pytest.raises(ValueError, match="deterministic.*stochastic_steps.*eta.*noise_level"):
            call()
    assert torch.equal(still.sample(torch.Generator().manual_seed(0)).double(), still.mean)


def test_elements_that_stand_still_contribute_nothing():
    whole, other = gaussian(0), gaussian(1)
    held = torch.zeros(whole.mean.shape, dtype=torch.bool)
    held[:, 0] = True
    p, q = (GaussianTransition(g.mean, g.std.expand_as(g.mean).masked_fill(held, 0.0)) for g in (whole, other))
    part_p, part_q = (GaussianTransition(g.mean[:, 1:], g.std.expand_as(g.mean)[:, 1:]) for g in (whole, other))
    action = other.mean
    torch.testing.assert_close(p.log_prob(action), part_p.log_prob(action[:, 1:]))
    torch.testing.assert_close(p.kl(q), part_p.kl(part_q))
    assert torch.equal(p.sample(torch.Generator().manual_seed(0))[:, 0], p.mean[:, 0])
    with pytest.raises(ValueError, match="noise in elements that stand still in the other"):
        p.kl(whole)


def test_elements_that_stand_still_pass_no_nan_to_gradients():
    mean = torch.zeros(2, 3, requires_grad=True)
    kernel = GaussianTransition(mean, torch.tensor([[0.0, 1.0, 2.0]]))
    (gradient,) = torch.autograd.grad(kernel.log_prob(torch.ones(2, 3)).sum(), mean)
    torch.testing.assert_close(gradient, torch.tensor([[0.0, 1.0, 0.25]]).expand(2, 3))


@pytest.mark.parametrize("std_shape", [(1, 1, 1, 1), (3, 1, 1, 1)])
def test_some_of_the_samples_and_all_again(std_shape):
    whole = gaussian(0, std_shape=std_shape)
    parts = [whole.select([0]), whole.select([1, 2])]
    assert all(len(part.mean) == n and len(part.std) == (n if std_shape[0] > 1 else 1) for part, n in zip(parts, (1, 2)))
    again = GaussianTransition.cat(parts)
    assert torch.equal(again.mean, whole.mean) and torch.equal(again.std.expand_as(whole.mean), whole.std.expand_as(whole.mean))


def test_sample_with_a_generator_a_sample_does_not_depend_on_the_batch():
    transition = gaussian(0, std_shape=(3, 1, 1, 1))
    together = transition.sample([torch.Generator().manual_seed(i) for i in range(3)])
    for i in range(3):
        alone = GaussianTransition(transition.mean[i : i + 1], transition.std[i : i + 1])
        assert torch.equal(alone.sample(torch.Generator().manual_seed(i))[0], together[i])
        assert torch.equal(alone.sample([torch.Generator().manual_seed(i)])[0], together[i])
    assert not torch.equal(together[0] - transition.mean[0], together[1] - transition.mean[1])


def test_sample_has_the_mean_and_the_std_it_claims():
    transition = GaussianTransition(torch.full((100_000, 1), 1.5), torch.full((1, 1), 0.3))
    x = transition.sample(torch.Generator().manual_seed(0))
    assert abs(x.mean() - 1.5) < 4 * 0.3 / math.sqrt(len(x))
    assert abs(x.std() - 0.3) < 4 * 0.3 / math.sqrt(2 * len(x))


def test_sample_draws_noise_in_the_given_dtype():
    transition = gaussian(0, dtype=torch.float32)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.bfloat16)
    assert torch.equal(transition.sample(torch.Generator().manual_seed(5), torch.bfloat16), transition.mean + transition.std * noise)


def test_gradient_of_log_prob_is_the_gaussian_score():
    transition = gaussian(0, std_shape=(3, 1, 1, 1))
    x, mean = gaussian(1).mean, transition.mean.requires_grad_()
    (gradient,) = torch.autograd.grad(GaussianTransition(mean, transition.std).log_prob(x).sum(), mean)
    torch.testing.assert_close(gradient, ((x - mean) / transition.std.square()).detach(), rtol=1e-12, atol=1e-12)


def test_log_prob_and_kl_pass_gradcheck():
    x = gaussian(1, (2, 3), (1, 1)).mean
    mean, other = (gaussian(seed, (2, 3), (1, 1)).mean.requires_grad_() for seed in (2, 3))
    std = torch.tensor([[0.7]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m, s: GaussianTransition(m, s).log_prob(x), (mean, std))
    assert torch.autograd.gradcheck(lambda m, o, s: GaussianTransition(m, s).kl(GaussianTransition(o, 2 * s)), (mean, other, std))


def test_expected_score_is_zero():
    std = 0.3
    mean = torch.full((100_000, 1), 0.7, dtype=torch.float64, requires_grad=True)
    transition = GaussianTransition(mean, torch.full((1, 1), std, dtype=torch.float64))
    x = transition.sample(torch.Generator().manual_seed(0)).detach()
    (score,) = torch.autograd.grad(transition.log_prob(x).sum(), mean)
    assert abs(score.mean()) < 4 / (std * math.sqrt(len(score)))
    assert score.square().mean() == pytest.approx(1 / std**2, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", [0, 1, 3, 4], ids=["global", "one in a list", "a generator each", "more than samples"])
def test_noise_is_drawn_as_diffusers_draws_it(number, dtype):
    def made():
        torch.manual_seed(7)
        return [torch.Generator().manual_seed(seed) for seed in range(number)] or None

    for shape in (SHAPE, (1, 5)):
        expected = randn_tensor(shape, made(), torch.device("cpu"), dtype)
        assert torch.equal(standard_normal(shape, made(), torch.device("cpu"), dtype), expected)
    assert torch.equal(standard_normal(SHAPE, torch.Generator().manual_seed(1), torch.device("cpu"), dtype), draw_of(1, dtype))


def draw_of(seed: int, dtype: torch.dtype) -> torch.Tensor:
    return randn_tensor(SHAPE, torch.Generator().manual_seed(seed), torch.device("cpu"), dtype)


def test_noise_needs_a_generator_for_each_sample():
    with pytest.raises(ValueError, match="3 samples need as many generators, got 2"):
        standard_normal(SHAPE, [torch.Generator(), torch.Generator()], torch.device("cpu"), torch.float32)
