"""Learning from a model's own samples and any reward: sampling, scoring, advantages, updates."""
