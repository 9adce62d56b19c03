"""The classical toolbox of policy gradients, on tensors. Imports torch only.

What rewards are worth (`returns`), how much better than expected (`advantages`), by a learned baseline (`values`), correcting
for old samples (`importance`), how far to go (`trust_region`), what to watch (`diagnostics`). For learning from judged samples:
errors of the model's outputs (`matching`), losses of pairs (`preferences`).
"""

from .advantages import PromptStatistics, batch_advantages, group_advantages, leave_one_out_advantages, multi_reward_advantages
from .diagnostics import approximate_kl, clip_fractions, effective_sample_size, ratio_diagnostics
from .importance import clamped_surrogate, clip_bounds, clipped_surrogate, describe_clip, importance_ratio, true_ratio_bound
from .returns import discounted_returns, gae, n_step_targets, reward_to_go, td_errors, td_lambda_targets, terminal_rewards
from .trust_region import conjugate_gradient, exact_fisher_product, finite_difference_fisher_product, trust_region_step
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
    "discounted_returns",
    "effective_sample_size",
    "explained_variance",
    "exact_fisher_product",
    "finite_difference_fisher_product",
    "gae",
    "group_advantages",
    "importance_ratio",
    "leave_one_out_advantages",
    "multi_reward_advantages",
    "n_step_targets",
    "ratio_diagnostics",
    "reward_to_go",
    "td_errors",
    "td_lambda_targets",
    "terminal_rewards",
    "true_ratio_bound",
    "trust_region_step",
    "value_advantages",
]
