"""One module an algorithm; each opens with the algorithm's page. Imports torch only.

Route C, online reinforcement learning: `reinforce` (DDPO-SF), `ddpo` (DDPO-IS), `flow_grpo`.
"""
