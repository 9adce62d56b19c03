"""Rewards: callables that say how good images are. `load_reward` finds one by name, `score` calls it and checks the answer.

| name | judges | differentiable |
|---|---|---|
| `jpeg_compressibility`, `jpeg_incompressibility` | minus, plus the size of the JPEG file | no |
| `aesthetic` | LAION's aesthetic predictor | yes |
| `clip_score` | cosine of CLIP's image and text embeddings | yes |
| `pick_score` | PickScore, a CLIP trained on human choices | yes |
| `hps_v2` | HPS v2.1, another one (`pip install ".[hps]"` in a checkout) | yes |
| `image_reward` | ImageReward, a BLIP trained on human rankings | yes |
| `ocr` | is the text that the prompt quotes in the image? (`pip install ".[ocr]"` in a checkout) | no |
| `vlm_judge` | a vision-language model behind an OpenAI-style API, by a rubric | no |
| `background_color` | how near is the border to a wanted colour? (a column, or the prompt) | yes |
| `edit_direction` | does the picture change from the source as the caption does? (CLIP; columns `image`, `source_prompt`) | yes |
| `edit_preservation` | is the picture as the source outside the mask? (L1 or PSNR; columns `image`, `mask`) | yes |
| `scene_score` | do the named object, count, colour and position appear? (embedded scenes) | yes |
| `scene_judge` | the same by a network that took no part in training `scene_score`: for held-out evaluation | yes |
| `spectral_centroid` | how bright is the sound? (its mean frequency in kHz) | yes |

`http://host:port` is a reward on a server, such as `python -m diffusers_align.rewards.server --reward clip_score` starts.
"""

from .base import BUILT_INS, InvalidReward, Reward, RewardError, RewardTimeout, WeightedSum, load_reward, score

__all__ = ["BUILT_INS", "InvalidReward", "Reward", "RewardError", "RewardTimeout", "WeightedSum", "load_reward", "score"]
