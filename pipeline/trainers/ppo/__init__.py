"""PPO with one base model in every role.

TRL 1.12 was the last release with a PPOTrainer. What is different here, and why:

1. The loss is a sum over tokens, divided by the tokens of the mini-batch on all processes: micro-batches, accumulation
   and the number of processes do not change it. TRL averages the means of micro-batches.
2. The score is at the last token of a completion, EOS where there is one, and the value after it is 0.
3. Log-probs are computed by the forward pass of the update, not kept from generation: the first ratio is exactly 1.
4. Policy, reference, value function and learned reward are adapters and heads on one base, not four models.
5. Moments for whitening are those of all processes.
6. Any reward function with TRL's GRPO signature works; texts come in, not token ids.
7. It is not a `transformers.Trainer`: every setting of `PPOConfig` acts, and `PPOTrainer.train` is the whole loop.

Sources: Schulman et al. 2017 (arXiv:1707.06347); Ziegler et al. 2019 (arXiv:1909.08593); Huang et al. 2024, "The N+
Implementation Details of RLHF with PPO" (arXiv:2403.17031).
"""

from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
