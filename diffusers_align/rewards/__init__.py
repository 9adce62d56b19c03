"""Rewards: callables that say how good images are. `load_reward` finds one by name, `score` calls it and checks the answer.

| name | judges | differentiable |
|---|---|---|
| `jpeg_compressibility`, `jpeg_incompressibility` | minus, plus the size of the JPEG file | no |
| `aesthetic` | LAION's aesthetic predictor | yes |
| `clip_score` | cosine of CLIP's image and text embeddings | yes |
| `pick_score` | PickScore, a CLIP trained on human choices | yes |
| `background_color` | how near is the border to a wanted colour? (a column, or the prompt) | yes |
| `scene_score` | do the named object, count, colour and position appear? (embedded scenes) | yes |
"""

from .base import BUILT_INS, InvalidReward, Reward, WeightedSum, load_reward, score

__all__ = ["BUILT_INS", "InvalidReward", "Reward", "WeightedSum", "load_reward", "score"]
