"""Which adapter of a network computes: the policy's, that of the value function, that of a learned reward, or none."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from pipeline.models.dropout import remove_dropout

POLICY, VALUE, REWARD = "default", "value", "reward"  # peft's adapter names; it calls the first one default


def load_frozen(model: PreTrainedModel, directory: Path) -> PeftModel:
    """Put the reward adapter that is saved in `directory` on a model that nothing trains."""
    network = PeftModel.from_pretrained(model, str(directory), adapter_name=REWARD)
    remove_dropout(network)
    return network


def load_role(network: PeftModel, directory: Path, name: str) -> None:
    """Add the adapter that is saved in `directory` under the name of its role; the policy's computes as before."""
    network.load_adapter(str(directory), name, torch_device="cpu")  # read there, then copied to where its base is
    remove_dropout(network)
    switch_to(network, POLICY)


@contextmanager
def using(network: PeftModel, name: str) -> Iterator[None]:
    """Use another adapter instead of the policy's until the block ends."""
    switch_to(network, name)
    try:
        yield
    finally:
        switch_to(network, POLICY)


@contextmanager
def without_adapters(network: PeftModel) -> Iterator[PreTrainedModel]:
    """Give the base without any adapter, until the block ends."""
    try:
        with network.disable_adapter():
            yield network.get_base_model()
    finally:
        train_own_adapters(network)


def switch_to(network: PeftModel, name: str) -> None:
    """Make the adapter of a role compute from now on."""
    network.set_adapter(name)
    train_own_adapters(network)


def train_own_adapters(network: PeftModel) -> None:
    """Make the adapters of policy and value trainable again, and the reward's not.

    peft freezes an adapter that it switches off and frees the one that it switches on: a backward pass would leave
    the policy without gradients, and the reward would be trained.
    """
    network.set_requires_grad([POLICY, VALUE], True)
    network.set_requires_grad(REWARD, False)
