"""A reference policy that follows the policy from time to time (Gorbatovski et al. 2024, TR-DPO, arXiv:2404.09656)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

REFERENCE = "moving_reference."  # begins the names of its weights in a checkpoint


class MovingReference:
    """A copy of what is trained of the policy; the rest of the model is shared, as with the policy."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.weights = [parameter.detach().clone() for parameter in self.parameters]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Make the policy the reference until the block ends; nothing in it may need gradients."""
        policy = [parameter.detach().clone() for parameter in self.parameters]
        self._put(self.weights)
        try:
            yield
        finally:
            self._put(policy)

    @torch.no_grad()
    def mix(self, alpha: float) -> None:
        """Move the reference towards the policy: `alpha` times the policy's weights, and the rest its own."""
        for weight, parameter in zip(self.weights, self.parameters, strict=True):
            weight.mul_(1.0 - alpha).add_(parameter, alpha=alpha)

    def named_weights(self) -> dict[str, Tensor]:
        """Return the weights by name, as this process holds them."""
        return {f"{REFERENCE}{i}": weight for i, weight in enumerate(self.weights)}

    @torch.no_grad()
    def _put(self, weights: Sequence[Tensor]) -> None:
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.copy_(weight)
        torch.clear_autocast_cache()  # which knows a weight by its place in memory, and not by what is there
