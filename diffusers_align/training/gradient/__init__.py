"""Learning from a differentiable reward: the updates of an epoch, adjoints, samples noised anew, the pre-training loss."""
