"""DenseGRPO: credit and calibration."""

import torch

from diffusers_align.algorithms.dense_grpo import calibrate, gain_metrics, step_gains
from diffusers_align.algorithms.flow_grpo import flow_grpo_loss
from diffusers_align.rl import group_advantages

NAN = float("nan")


def double(rows) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# --- credit ------------------------------------------------------------------------------------------------------------


def test_gains_are_the_differences_of_neighbouring_rewards():
    assert torch.equal(step_gains(double([[0, 1, 3], [0.5, 0, 1]])), double([[1, 2], [-0.5, 1]]))


def test_the_loss_at_the_papers_defaults():
    rewards = double([[0, 1, 3], [0, 0, 1], [0, 2, 2], [5, 5, 5], [5, 5, 6], [5, 5, 4]])
    advantages = group_advantages(step_gains(rewards), torch.tensor([0, 0, 0, 1, 1, 1]), global_std=False)
    a = 1.2245948897605  # 1 / (sqrt(2 / 3) + 1e-4): gains of 0, 1, 2 or -1, 0, 1
    expected = double([[0, a], [-a, 0], [a, -a], [0, 0], [0, a], [0, -a]])
    torch.testing.assert_close(advantages, expected, rtol=1e-9, atol=1e-12)

    log_ratio = 1024 * double([2e-4, 2e-4, 2e-4, 0, -2e-4, -2e-4])
    loss = flow_grpo_loss(log_ratio, torch.zeros(6, dtype=torch.float64), advantages[:, 1], per_dim=1024)
    # exp(+-2e-4) = 1.00020002, 0.99980002: clipped to 1 +- 1e-4 where that is the worse of the two
    expected = double([-1.2247173492494883, 0, 1.2248398332319952, 0, -1.2243499952728254, 1.2244724302715364])
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def test_a_missing_reward_masks_the_steps_on_either_side_and_no_others():
    rewards = double([[0, NAN, 3, 4], [0, 1, 2, 2], [0, 2, 2, 5]])
    gains = step_gains(rewards)
    assert gains.isnan().tolist() == [[True, True, False], [False] * 3, [False] * 3]
    advantages = group_advantages(gains, torch.zeros(3, dtype=torch.long), global_std=False)
    assert advantages[0].tolist()[:2] == [0, 0] and advantages.isfinite().all()
    assert advantages[1, 0] == -advantages[2, 0] != 0, "the others are compared with each other"
    assert (advantages[:, 2] != 0).all()


def test_metrics_name_the_steps_that_have_gains():
    metrics = gain_metrics(torch.tensor([[1.0, NAN, -1.0], [2.0, NAN, NAN]]))
    assert metrics == {"gain/0": 1.5, "gained/0": 1.0, "gain/2": -1.0, "gained/2": 0.0}


# --- calibration -------------------------------------------------------------------------------------------------------


def test_one_round_by_hand():
    #                 even  +3 -1  all NaN  +1, three ties  +2 -1  -1 (NaN elsewhere)
    gains = double([[+1, +1, NAN, +1, +1, -1], [+1, +1, NAN, 0, +1, NAN], [-1, +1, NAN, 0, -1, NAN], [-1, -1, NAN, 0, NAN, NAN]])
    psi = calibrate(torch.full((6,), 0.3, dtype=torch.float64), gains)
    torch.testing.assert_close(psi, double([0.31, 0.29, 0.3, 0.31, 0.31, 0.31]), rtol=0, atol=1e-12)


def test_psi_stays_above_zero():
    gains = -torch.ones(5, 2)
    psi = torch.tensor([0.015, 0.01])
    assert torch.equal(calibrate(psi, gains), torch.tensor([0.01, 0.01]))
    torch.testing.assert_close(calibrate(psi + 1, gains, increment=0.25), torch.tensor([0.765, 0.76]))


def test_rounds_settle_where_gains_and_losses_just_balance():
    # A step's noise gains psi z and costs c psi^2 (z normal), so fewer than half gain; each c has its own psi that 100 samples
    # still call even: 45 of them gain while c psi is below the normal's quantile at 0.555.
    z = torch.distributions.Normal(0.0, 1.0).icdf((torch.arange(100, dtype=torch.float64) + 0.5) / 100)[:, None]
    cost = double([0.2, 0.4, 0.8])
    balanced = 0.13830420796 / cost
    for start in (0.1, 1.0):
        psi = torch.full((3,), start, dtype=torch.float64)
        for _ in range(120):
            psi = calibrate(psi, psi * z - cost * psi**2, tolerance=11)
        assert ((psi - balanced).abs() <= 0.011).all(), (start, psi)
