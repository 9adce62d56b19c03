"""How a reward's gradient comes through a pipeline's sampling: a differentiable roll-out, its decoding, a check of the whole chain."""
