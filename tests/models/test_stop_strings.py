"""The last tokens of a text say whether its last token completed a stop string."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.models.sampling import Decoding
from pipeline.models.stop_strings import StopStrings

TEXTS = ["the end of a line\n\nUser: naïve café", "日本語 の 終わり", "stop here </answer> or there"] * 3
ENDS = ("\n\n", "User:", "é", "終わり", "</answer>", "e e")
SPECIAL = ["<pad>", "</s>"]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=[*SPECIAL, "<unk>"], unk_token="<unk>")
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=[*SPECIAL, "<unk>"]))
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, metaspace, word_pieces])
@pytest.mark.parametrize("shortest", [0, 5])
def test_the_last_tokens_find_what_the_whole_text_finds(make, shortest):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=make(), pad_token="<pad>", eos_token="</s>")
    pieces = [tokenizer.encode(end, add_special_tokens=False) for end in ENDS]
    decoding, draw, ended = Decoding(60, stop_strings=ENDS, min_new_tokens=shortest), random.Random(0), 0
    for _ in range(150):
        ids: list[int] = []
        while len(ids) < 50:  # noise, special tokens, and now and then the tokens of a stop string
            ids += draw.choice(pieces) if draw.random() < 0.02 else [draw.randrange(len(tokenizer))]
        stops = StopStrings(tokenizer, decoding)
        whole = next((n for n in range(1, len(ids)) if stops.in_text(ids[:n])), None)
        assert next((n for n in range(1, len(ids)) if stops.in_new_text(ids[:n])), None) == whole
        ended += whole is not None
    assert ended > 20


def test_few_tokens_are_decoded_of_a_long_text(monkeypatch):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level(), pad_token="<pad>", eos_token="</s>")
    stops, decoded = StopStrings(tokenizer, Decoding(600, stop_strings=("\n\n",))), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options))
    assert not stops.in_new_text(tokenizer.encode("the end of a line " * 50))
    assert len(decoded) == 1 and decoded[0] <= 10
