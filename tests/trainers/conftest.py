"""What the tests of trainers share beside the toys of all tests."""

import pytest
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm


@pytest.fixture
def float64_norms(monkeypatch) -> None:
    """Norms in the precision of the model: transformers' own take float64 through float32, there and back."""

    def forward(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
