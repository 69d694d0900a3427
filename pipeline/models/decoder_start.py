"""What a decoder is given before it writes: the start token, and a first token that is forced (a language code)."""

import inspect

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.runtime.messages import did_you_mean

# As good as impossible, and finite: a probability of 0 times minus infinity would make an entropy NaN.
IMPOSSIBLE = -1e4
DECODER_ARGUMENTS = ("input_ids", "encoder_hidden_states", "encoder_attention_mask", "use_cache")


def decoder_prefix(model: PreTrainedModel) -> list[int]:
    """The tokens an encoder-decoder's decoder reads before the completion; none for a causal model.

    They are given, never sampled, so they have no log-probability in any loss.

    Raises:
        ValueError: an encoder-decoder whose generation config names no start token.
    """
    if not model.config.is_encoder_decoder:
        return []
    settings = model.generation_config
    if settings.decoder_start_token_id is None:
        raise ValueError(
            f"model: the generation config of this {model.config.model_type} names no decoder_start_token_id, so its "
            "decoder cannot begin; set it (multilingual models: model.src_lang and model.tgt_lang)"
        )
    forced = settings.forced_bos_token_id
    return [settings.decoder_start_token_id] + ([] if forced is None else [forced])


def check_decoder(model: PreTrainedModel) -> None:
    """Refuse an encoder-decoder whose decoder cannot be called as those of the library are, before it is trained.

    Raises:
        ValueError: naming the model's type.
    """
    given = inspect.signature(model.get_decoder().forward).parameters
    missing = [name for name in DECODER_ARGUMENTS if name not in given]
    if missing:
        raise ValueError(
            f"model: the decoder of {model.config.model_type!r} takes no {missing[0]}, so it cannot be trained here; "
            "choose another model"
        )


def set_decoder_start(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write into the generation config what the decoder begins with, so that saved models begin as they were trained.

    mBART begins with the target language's code, which its tokenizer writes behind EOS. Others begin with their start
    token, after which comes whatever single token their tokenizer puts before a target: BART's <s>, or the language
    code of mBART-50, NLLB and M2M100. Without languages in the recipe, what the checkpoint forces stays.

    Raises:
        ValueError: a tokenizer with language codes, no languages in the recipe, and none in the checkpoint.
    """
    settings = model.generation_config
    if settings.decoder_start_token_id is None:
        settings.decoder_start_token_id = model.config.decoder_start_token_id
    multilingual = "tgt_lang" in tokenizer.init_kwargs
    if multilingual and tokenizer.tgt_lang is None:
        if settings.forced_bos_token_id is None and settings.decoder_start_token_id in (None, settings.eos_token_id):
            raise ValueError(
                f"model.tgt_lang: the tokenizer of {tokenizer.name_or_path!r} writes language codes, and the "
                "checkpoint does not say which; set src_lang and tgt_lang"
            )
    else:
        ids, end = tokenizer(text_target="")["input_ids"], tokenizer.eos_token_id
        before = ids[: ids.index(end)] if end in ids else ids
        behind = ids[len(before) + 1 :]
        if behind and model.config.model_type == "mbart":
            settings.decoder_start_token_id, settings.forced_bos_token_id = behind[0], None
        elif (before or behind) and [*before, *behind] != [settings.decoder_start_token_id]:
            settings.forced_bos_token_id = [*before, *behind][0]
    model.config.decoder_start_token_id = settings.decoder_start_token_id
    _forbid_tokens(model)


def check_languages(tokenizer: PreTrainedTokenizerBase, languages: dict[str, str]) -> None:
    """Refuse language codes that the tokenizer does not have; `languages` by recipe key.

    Raises:
        ValueError: naming the key and a code that is close.
    """
    for key, code in languages.items():
        if "tgt_lang" not in tokenizer.init_kwargs:
            raise ValueError(
                f"model.{key}: the tokenizer of {tokenizer.name_or_path!r} has no language codes; remove it"
            )
        if code not in tokenizer.all_special_tokens:
            hint = did_you_mean(code, tokenizer.all_special_tokens, cutoff=0.3)
            raise ValueError(f"model.{key}: {code!r} is no language code of {tokenizer.name_or_path!r}{hint}")


def _forbid_tokens(model: PreTrainedModel) -> None:
    """Make single tokens that the checkpoint forbids (Marian: its pad, whose logit means nothing) never likely.

    In the logits themselves, so that sampling, losses and log-probabilities all leave them out alike.
    """
    bias = dict(model.named_buffers()).get("final_logits_bias")
    for words in model.generation_config.bad_words_ids or []:
        if bias is not None and len(words) == 1:
            with torch.no_grad():
                bias[:, words[0]] = IMPOSSIBLE
