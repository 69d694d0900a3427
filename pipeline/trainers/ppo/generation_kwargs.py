"""The setting `generation_kwargs`: names of transformers' `GenerationConfig` for PPO's settings of sampling."""

from collections.abc import Mapping

# GenerationConfig's name -> the key of the ppo section.
KEYS = {
    "max_new_tokens": "response_length",
    "min_new_tokens": "min_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "suppress_tokens": "suppress_tokens",
    "stop_strings": "stop_strings",
}
# The values with which a name changes nothing here.
AS_HERE = {"do_sample": True, "num_beams": 1, "num_return_sequences": 1, "use_cache": True}
INSTEAD = {
    "do_sample": "rollouts are samples; lower ppo.temperature",
    "num_beams": "rollouts are samples, and eval.num_beams is for the test completions",
    "num_return_sequences": "use ppo.num_generations",
    "max_length": "use max_new_tokens",
    "min_length": "use min_new_tokens",
    "eos_token_id": "every EOS token of model and tokenizer ends a completion; other ends are stop_strings",
    "pad_token_id": "set tokenizer.pad_token",
    "stop": "use stop_strings",
}
# What None stands for.
OFF = {
    "min_new_tokens": 0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "suppress_tokens": (),
    "stop_strings": (),
}


def sampling_keys(generation_kwargs: Mapping[str, object]) -> dict[str, object]:
    """Return the keys of the ppo section that `generation_kwargs` stands for, with their values.

    Raises:
        ValueError: a name that the decode loop does not know, or a value that it cannot do.
    """
    keys: dict[str, object] = {}
    for name, value in generation_kwargs.items():
        if name in KEYS:
            keys[KEYS[name]] = _plain(name, value)
        elif name not in AS_HERE or value != AS_HERE[name]:
            instead = INSTEAD.get(name, f"the decode loop knows {', '.join(KEYS)}")
            raise ValueError(f"ppo.generation_kwargs: {name} cannot be {value!r} here; {instead}")
    return keys


def _plain(name: str, value: object) -> object:
    """Return a value as the key of the ppo section has it: tuples, and what switches it off for None."""
    lists = {"suppress_tokens": int, "stop_strings": str}
    if value is None and name in OFF:
        return OFF[name]
    if name in lists:
        values = (value,) if isinstance(value, str) else value
        if isinstance(values, list | tuple) and all(isinstance(item, lists[name]) for item in values):
            return tuple(values)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return value
    expected = "a list" if name in lists else "a number"
    raise ValueError(f"ppo.generation_kwargs: {name} must be {expected}, found {value!r}")
