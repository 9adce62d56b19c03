"""Learning from a differentiable reward: `loop` is the scripts' loop, with what is looked at before (`reward_check`), descended (`losses`,
`adjoints`, `renoised`, `pretraining`) and kept (`epoch_log`); `bound_rewards` are rewards as functions of images."""
