"""One base model in every role of PPO: policy, reference (adapters off), value and a learned reward."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.models.adapters import adapter_config, check_adapter, fuse_adapter
from pipeline.models.dropout import remove_dropout
from pipeline.models.kernels.lm_head import suppression, token_logprobs
from pipeline.models.kernels.packing import disable_packing, enable_packing, pack, packed_states
from pipeline.models.loading import position_limit, sliding_window
from pipeline.models.reward_model import apply_head, load_head
from pipeline.models.roles import (
    REWARD,
    VALUE,
    load_frozen,
    load_role,
    train_own_adapters,
    using,
    without_adapters,
)
from pipeline.models.sequences import Sequences, at_first_and_later, probe_sequences
from pipeline.models.slices import like, whole_on_main
from pipeline.models.speech import forbidden_tokens
from pipeline.models.states import ROUNDING, completion_states, final_states, head_parts, lm_head, with_encoder_states

# In bf16 on a CPU oneDNN compiles a kernel for each shape of a product: so many tokens more are less than that costs.
ROUNDED_UP_TO = 32
PASSES = ("encoded", "reference_logprobs", "reward_scores")  # methods that compute with weights, besides `forward`


@dataclass(frozen=True)
class PolicyOutputs:
    """What the policy computes for each completion token: `logprobs, entropies, values [B, C]`, 0 where masked."""

    logprobs: Tensor
    entropies: Tensor
    values: Tensor


class SharedModel(nn.Module):
    """Policy, reference policy, value function and learned reward over one language model, without dropout.

    Called on `Sequences`, it returns the policy's `PolicyOutputs`, with gradients. A learned reward is one more
    adapter with a head, both frozen: on the base if that is frozen, else on the reference's copy.

    Args:
        model: The SFT model, causal or encoder-decoder, with plain weights. It is changed.
        lora: The policy's adapter over the frozen base, which is then the reference. None: the whole model is trained,
            and a frozen copy of it is the reference.
        temperature: Divides the logits of policy and reference alike.
        value_adapter: The value head reads the states of a second adapter instead of the policy's: one more pass, and
            the value loss does not move the policy. Needs `lora`.
        entropy_gradient: Entropies carry gradients, for an entropy bonus.
        padding_free: A pass sees real tokens only, and each prompt once, wherever the model's attention allows it.
        suppress_tokens: Tokens that have probability 0 under policy and reference alike.

    Raises:
        ValueError: an adapter on weights that the model uses twice.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lora: LoraConfig | None,
        temperature: float = 1.0,
        value_adapter: bool = False,
        entropy_gradient: bool = False,
        padding_free: bool = True,
        suppress_tokens: Iterable[int] = (),
    ) -> None:
        super().__init__()
        self.temperature, self.entropy_gradient, forbidden = temperature, entropy_gradient, forbidden_tokens(model)
        self.suppressed = {*suppress_tokens, *forbidden.always}
        self.suppressed_first = {*self.suppressed, *forbidden.first}
        self.padding_free = padding_free and enable_packing(model)
        # Packed attention reads everything before a token: longer rows of a model with a window are padded instead.
        self._window = sliding_window(model.config)
        self.frozen_copy: PreTrainedModel | PeftModel | None = None
        self.reward_head: nn.Linear | None = None
        self.network: PreTrainedModel | PeftModel = model
        self.has_value_adapter = value_adapter
        if lora is None:
            self.frozen_copy = copy.deepcopy(model).requires_grad_(False)
        else:
            lora = adapter_config(model, lora)
            self.network = get_peft_model(model, lora)
            check_adapter(self.network)
            fuse_adapter(self.network)
        if value_adapter:
            self.network.add_adapter(VALUE, lora)
            train_own_adapters(self.network)
        head = model.get_output_embeddings().weight  # its width is not always hidden_size: OPT may project
        self.value_head = nn.Linear(head.shape[1], 1, dtype=torch.promote_types(head.dtype, torch.float32))
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.register_buffer("logit_offset", suppression(len(head), self.suppressed), persistent=False)
        self.register_buffer("first_logit_offset", suppression(len(head), self.suppressed_first), persistent=False)
        policy = [] if lora is None else self._named_policy()
        self._initial = {name: weight.detach().to("cpu", copy=True) for name, weight in policy}
        remove_dropout(self)
        if self.padding_free and not self._packing_agrees():
            self.padding_free = False
            for language_model in filter(None, (self.language_model, self.frozen_copy)):
                disable_packing(language_model)

    @property
    def language_model(self) -> PreTrainedModel:
        """The language model itself, with the adapter's layers inside it."""
        return self.network.get_base_model() if isinstance(self.network, PeftModel) else self.network

    def forward(self, sequences: Sequences) -> PolicyOutputs:
        """Compute log-prob, entropy (both in nats) and value of each completion token under the policy: [B, C]."""
        states = self._states(self.language_model, sequences)
        logprobs, entropies = self._token_logprobs(self.language_model, states, sequences)
        if self.has_value_adapter:
            with using(self.network, VALUE):
                states = self._states(self.language_model, sequences)
        # The head computes in its own precision, whatever autocast does to the trunk.
        with torch.autocast(states.device.type, enabled=False):
            values = self.value_head(states.to(self.value_head.weight.dtype)).squeeze(-1)
        return PolicyOutputs(*(sequences.scatter(numbers) for numbers in (logprobs, entropies, values)))

    @property
    def encoder_is_frozen(self) -> bool:
        """Whether nothing in an encoder trains, so that what it makes of a prompt stays the same for every role."""
        model = self.language_model
        return model.config.is_encoder_decoder and not any(p.requires_grad for p in model.get_encoder().parameters())

    @torch.no_grad()
    def encoded(self, sequences: Sequences, size: int) -> Sequences:
        """Add the encoder's states to the sequences where they never change; `size` prompts are read at a time."""
        if not self.encoder_is_frozen:
            return sequences
        return with_encoder_states(self.language_model, sequences, size)

    @torch.no_grad()
    def reference_logprobs(self, *batches: Sequences) -> list[Tensor]:
        """Compute the log-prob [B, C] of each completion token under the reference policy, for every batch.

        All batches in one call, because peft looks at every module to switch its adapters off and on.
        """
        results = []
        with self.reference() as model:
            for sequences in batches:
                states = self._states(model, sequences)
                results.append(sequences.scatter(self._token_logprobs(model, states, sequences)[0]))
        return results

    @contextmanager
    def reference(self) -> Iterator[PreTrainedModel]:
        """Give the reference policy as a language model, until the block ends."""
        network = self.network if self.frozen_copy is None else self.frozen_copy
        with without_adapters(network) if isinstance(network, PeftModel) else nullcontext(network) as model:
            yield model

    def add_reward(self, directory: Path) -> None:
        """Add the reward adapter and head that are saved in `directory`: a few weights, no second model."""
        if self.frozen_copy:
            self.frozen_copy = load_frozen(self.frozen_copy, directory)
        else:
            load_role(self.network, directory, REWARD)
        self.reward_head = load_head(directory).to(self.language_model.device)

    @torch.no_grad()
    def start_value_as_reward(self, directory: Path, scale: float, offset: float) -> None:
        """Make the value function `scale * raw score + offset` of the reward model that is saved in `directory`.

        The value adapter and the value head become copies of the reward's, whatever its LoRA shape, and are trained.
        """
        self.network.delete_adapter(VALUE)
        load_role(self.network, directory, VALUE)
        self.value_head.weight.copy_(scale * load_head(directory).weight)
        self.value_head.bias.fill_(offset)

    @torch.no_grad()
    def reward_scores(self, sequences: Sequences) -> Tensor:
        """Compute the raw scores [B] of the learned reward."""
        if self.frozen_copy:
            states = final_states(self.frozen_copy.get_base_model(), sequences)
        else:
            with using(self.network, REWARD):
                states = final_states(self.language_model, sequences)
        return apply_head(self.reward_head, states)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute layers in the backward pass, each under the adapter that was active in its forward pass."""
        self.language_model.gradient_checkpointing_enable(
            {"use_reentrant": False, "context_fn": self._checkpoint_contexts}
        )

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        active = self.has_value_adapter and self.network.active_adapter == VALUE
        return nullcontext(), using(self.network, VALUE) if active else nullcontext()

    def value_parameters(self) -> list[nn.Parameter]:
        """Return what only the value function uses: its head, and its adapter where it has one."""
        adapter = [p for name, p in self.network.named_parameters() if p.requires_grad and f".{VALUE}." in name]
        return [*self.value_head.parameters(), *(adapter if self.has_value_adapter else [])]

    def policy_parameters(self) -> list[nn.Parameter]:
        """Return everything else that is trained."""
        return [parameter for _, parameter in self._named_policy()]

    def _named_policy(self) -> list[tuple[str, nn.Parameter]]:
        value = {id(p) for p in self.value_parameters()}
        return [(n, p) for n, p in self.named_parameters() if p.requires_grad and id(p) not in value]

    @torch.no_grad()
    def restart_policy(self) -> None:
        """Make the policy again what it was before its first update, which is the reference."""
        initial = self._initial
        if not initial:
            copied = self.frozen_copy
            frozen = copied.get_base_model() if isinstance(copied, PeftModel) else copied
            names = {id(p): n for n, p in self.network.named_parameters()}
            before = {n.replace(".base_layer", ""): p for n, p in frozen.named_parameters()}
            initial = {n: before[names[id(p)]] for n, p in self._named_policy()}
        for name, parameter in self._named_policy():
            parameter.copy_(like(initial[name], parameter))

    def trained_weights(self) -> dict[str, Tensor]:
        """Return everything that is trained, by name, as this process holds it."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def trainable_state(self) -> dict[str, Tensor]:
        """Copy everything that is trained to the CPU, by name; the main process alone gets what is sharded."""
        return {name: whole_on_main(weight) for name, weight in self.trained_weights().items()}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Put back what `trainable_state` gave.

        Raises:
            ValueError: names that are missing or unknown.
        """
        trained = self.trained_weights()
        if trained.keys() != state.keys():
            raise ValueError(f"the saved weights differ from the model in {sorted(trained.keys() ^ state.keys())[:3]}")
        for name, weight in trained.items():
            weight.copy_(like(state[name], weight))

    def _states(self, model: PreTrainedModel, sequences: Sequences) -> Tensor:
        """[M, H] for the M completion tokens in row order: the state of token t has read the prompt and t tokens."""
        if self.padding_free and (self._window is None or int(sequences.lengths.max()) <= self._window):
            device = sequences.prompt_ids.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
            compiled = device == "cpu" and dtype == torch.bfloat16
            return packed_states(model, pack(sequences, ROUNDED_UP_TO if compiled else 1))
        return completion_states(model, sequences).flatten(0, 1).index_select(0, sequences.completion_at)

    @torch.no_grad()
    def _packing_agrees(self) -> bool:
        """Whether packed and padded passes agree: a model may do more between tokens than attend."""
        model = self.language_model
        vocabulary, limit = model.get_input_embeddings().weight.shape[0], position_limit(model.config)
        sequences = probe_sequences(vocabulary, limit, model.device)
        try:
            packed = lm_head(model)(self._states(model, sequences)).log_softmax(-1)
        except TypeError:  # a forward method without room for one more argument
            return False
        self.padding_free = False
        padded = lm_head(model)(self._states(model, sequences)).log_softmax(-1)
        self.padding_free = True
        targets = sequences.targets.unsqueeze(1)
        # Broken weights give NaN either way, and are reported by the checks at the start of a run.
        return not bool((packed - padded).gather(1, targets).abs().max() > ROUNDING[model.dtype])

    def _token_logprobs(self, model: PreTrainedModel, hidden: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies of completion tokens, [M] each from [M, H], without keeping [M, V]."""
        vocabulary = model.config.get_text_config().vocab_size
        head, scale, transform = head_parts(model)
        hidden = hidden if scale == 1 else hidden * scale
        targets = sequences.targets

        def score(states: Tensor, ids: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
            changed = replace(transform, suppressed=offset)
            return token_logprobs(head, states, ids, vocabulary, self.temperature, self.entropy_gradient, changed)

        def score_tokens(tokens: Tensor, is_first: bool) -> tuple[Tensor, Tensor]:
            offset = self.first_logit_offset if is_first else self.logit_offset
            return score(hidden.index_select(0, tokens), targets.index_select(0, tokens), offset)

        if self.suppressed_first == self.suppressed:
            return score(hidden, targets, self.logit_offset)
        return at_first_and_later(sequences.completion_mask, score_tokens)
