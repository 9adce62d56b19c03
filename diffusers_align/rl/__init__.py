"""The classical toolbox of policy gradients, on tensors. Imports torch only.

How much better than expected an outcome was (`advantages`), or a step (`returns`) by a learned baseline (`values`), correcting
for old samples (`importance`), how far to go (`trust_region`), what to watch (`diagnostics`). For learning from judged samples:
errors of the model's outputs (`matching`), losses of pairs (`pair_losses`).

The ground under it, exact and small: a finite Markov decision process (`mdp`), what is learned of one from experience (`episodes`, `prediction`, `control`,
`off_policy`), and a denoising chain that is one (`chain`), against which the algorithms are held: `python -m benchmarks.oracle`.
"""

from .advantages import PromptStatistics, batch_advantages, group_advantages, leave_one_out_advantages, multi_reward_advantages
from .diagnostics import approximate_kl, clip_fractions, effective_sample_size, ratio_diagnostics
from .importance import clamped_surrogate, clip_bounds, clipped_surrogate, describe_clip, importance_ratio, true_ratio_bound
from .returns import gae, lambda_returns, td_errors, terminal_rewards
from .trust_region import conjugate_gradient, finite_difference_fisher_product, trust_region_step
from .values import ValueBaseline, ValueNetwork, explained_variance, value_advantages

__all__ = [
    "PromptStatistics",
    "ValueBaseline",
    "ValueNetwork",
    "approximate_kl",
    "batch_advantages",
    "clamped_surrogate",
    "clip_bounds",
    "clip_fractions",
    "clipped_surrogate",
    "conjugate_gradient",
    "describe_clip",
    "effective_sample_size",
    "explained_variance",
    "finite_difference_fisher_product",
    "gae",
    "group_advantages",
    "importance_ratio",
    "lambda_returns",
    "leave_one_out_advantages",
    "multi_reward_advantages",
    "ratio_diagnostics",
    "td_errors",
    "terminal_rewards",
    "true_ratio_bound",
    "trust_region_step",
    "value_advantages",
]
