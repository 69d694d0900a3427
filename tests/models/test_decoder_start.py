"""What a decoder is given before it writes, for every kind of tokenizer and checkpoint."""

import json

import pytest
import sentencepiece
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    BartTokenizer,
    MarianTokenizer,
    MBart50Tokenizer,
    MBartTokenizer,
    NllbTokenizer,
    PreTrainedModel,
    T5Tokenizer,
)
from transformers.models.mbart.tokenization_mbart import FAIRSEQ_LANGUAGE_CODES

from pipeline.models.config import ModelConfig
from pipeline.models.decoder_start import check_decoder, decoder_prefix
from pipeline.models.generation import Decoding, generate
from pipeline.models.loading import is_encoder_decoder, load_model, load_tokenizer
from pipeline.models.sequences import make_sequences
from pipeline.models.shared import SharedModel
from pipeline.models.text import decode, encode_completions, encode_prompts

PIECES = ["<s>", "<pad>", "</s>", "<unk>", "▁the", "▁cat", "▁die", "▁Katze"]
SIZES = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 32,
    "vocab_size": 260,
}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 60}


def model_of(kind: str, **settings) -> PreTrainedModel:
    sizes = {**(T5 if kind == "t5" else SIZES), **settings}
    torch.manual_seed(0)
    return AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


def unigrams(*more: str) -> list[tuple[str, float]]:
    return [(piece, 0.0) for piece in (*PIECES, *more)]


def tokenizer_of(kind: str):
    match kind:
        case "t5":
            return T5Tokenizer(vocab=[(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>", *PIECES[4:])], extra_ids=0)
        case "bart":
            pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "the", "Ġcat", "die", "ĠKatze"]
            return BartTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
        case "mbart":
            return MBartTokenizer(vocab=unigrams(*FAIRSEQ_LANGUAGE_CODES, "<mask>"))
        case "mbart50":
            return MBart50Tokenizer(vocab=unigrams())
        case "nllb":
            return NllbTokenizer(vocab={piece: i for i, piece in enumerate(PIECES)}, merges=[])


def saved(kind: str, directory, **settings):
    """A checkpoint of a kind: mBART-50 has the network of mBART, NLLB that of M2M100."""
    network = {"mbart50": "mbart", "nllb": "m2m_100"}.get(kind, kind)
    starts = {"mbart": None, "mbart50": 2, "nllb": 2}
    if kind in starts:
        settings = {"decoder_start_token_id": starts[kind], **settings}
    model_of(network, **settings).save_pretrained(directory)
    tokenizer = tokenizer_of(kind)
    tokenizer.save_pretrained(directory)
    return tokenizer


LANGUAGES = {"mbart": ("en_XX", "de_DE"), "mbart50": ("en_XX", "de_DE"), "nllb": ("eng_Latn", "deu_Latn")}


def config_of(kind: str, directory) -> ModelConfig:
    source, target = LANGUAGES.get(kind, (None, None))
    return ModelConfig(str(directory), src_lang=source, tgt_lang=target)


# T5 and BART begin with pad and EOS; BART then has <s>, which its tokenizer writes before every text.
EXPECTED = {
    "t5": lambda code: [0],
    "bart": lambda code: [2, 0],
    "mbart": lambda code: [code],
    "mbart50": lambda code: [2, code],
    "nllb": lambda code: [2, code],
}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_decoder_begins_as_the_family_does(kind, tmp_path):
    tokenizer = saved(kind, tmp_path / "base", **({"decoder_start_token_id": 0} if kind == "t5" else {}))
    config = config_of(kind, tmp_path / "base")
    code = tokenizer.convert_tokens_to_ids(config.tgt_lang) if config.tgt_lang else None
    model = load_model(tmp_path / "base", config)
    assert decoder_prefix(model) == EXPECTED[kind](code)
    model.save_pretrained(tmp_path / "sft")  # a plain user's generate begins the same way
    assert decoder_prefix(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "sft")) == decoder_prefix(model)
    assert is_encoder_decoder(config)


@pytest.mark.parametrize("kind", EXPECTED)
def test_prompts_keep_what_the_tokenizer_adds_and_completions_end_with_eos(kind, tmp_path):
    saved(kind, tmp_path, **({"decoder_start_token_id": 0} if kind == "t5" else {}))
    tokenizer = load_tokenizer(tmp_path, config_of(kind, tmp_path))
    assert tokenizer.padding_side == "right"
    source = tokenizer.convert_tokens_to_ids(LANGUAGES[kind][0]) if kind in LANGUAGES else None
    bare = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    whole = {"t5": [*bare, end], "bart": [0, *bare, end], "mbart": [*bare, end, source]}
    assert encode_prompts(tokenizer, ["the cat"], True) == [whole.get(kind, [source, *bare, end])]
    answer = encode_completions(tokenizer, ["the cat"], ["the cat"])[0]
    assert answer == [*bare, end]
    assert encode_prompts(tokenizer, ["the cat"], True)[0] == whole.get(kind, [source, *bare, end])  # still the source


def test_the_languages_of_a_recipe_go_before_those_of_a_checkpoint(tmp_path):
    tokenizer = saved("mbart", tmp_path, decoder_start_token_id=12)  # fine-tuned for another language
    assert decoder_prefix(load_model(tmp_path, ModelConfig(str(tmp_path)))) == [12]
    found = decoder_prefix(load_model(tmp_path, config_of("mbart", tmp_path)))
    assert found == [tokenizer.convert_tokens_to_ids("de_DE")]


def test_a_token_the_checkpoint_forces_is_kept(tmp_path):
    saved("nllb", tmp_path)
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, "forced_bos_token_id": 33}))
    assert decoder_prefix(load_model(tmp_path, ModelConfig(str(tmp_path)))) == [2, 33]


@pytest.mark.parametrize("kind", LANGUAGES)
def test_languages_that_nobody_names_are_asked_for(kind, tmp_path):
    saved(kind, tmp_path)
    with pytest.raises(ValueError, match=r"model\.tgt_lang: the tokenizer of .* set src_lang and tgt_lang"):
        load_model(tmp_path, ModelConfig(str(tmp_path)))


def test_languages_that_do_not_exist_are_refused(tmp_path):
    saved("nllb", tmp_path)
    with pytest.raises(ValueError, match=r"model\.tgt_lang: 'deu_Lat' is no language .* did you mean 'deu_Latn'\?"):
        load_tokenizer(tmp_path, ModelConfig(str(tmp_path), src_lang="eng_Latn", tgt_lang="deu_Lat"))
    saved("t5", tmp_path / "t5", decoder_start_token_id=0)
    with pytest.raises(ValueError, match=r"model\.src_lang: the tokenizer of .* has no language codes; remove it"):
        load_tokenizer(tmp_path / "t5", ModelConfig(str(tmp_path), src_lang="en_XX", tgt_lang="de_DE"))
    with pytest.raises(ValueError, match=r"model\.tgt_lang: missing: src_lang and tgt_lang go together"):
        ModelConfig("x", src_lang="en_XX")


def test_a_decoder_without_a_start_is_refused():
    model = model_of("mbart")
    with pytest.raises(ValueError, match="names no decoder_start_token_id"):
        decoder_prefix(model)


@pytest.fixture(scope="module")
def marian_directory(tmp_path_factory):
    """A Marian checkpoint, whose two sides have pieces of their own and whose pad is forbidden, as on the Hub."""
    directory = tmp_path_factory.mktemp("marian")
    pieces: list[str] = []
    for side, text in (("source", "the cat sat on the mat"), ("target", "die Katze saß auf der Matte")):
        (directory / f"{side}.txt").write_text(f"{text}\n" * 20)
        sentencepiece.SentencePieceTrainer.train(
            input=str(directory / f"{side}.txt"),
            model_prefix=str(directory / side),
            vocab_size=30,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        model = sentencepiece.SentencePieceProcessor(model_file=str(directory / f"{side}.model"))
        pieces += [model.id_to_piece(i) for i in range(model.get_piece_size())]
    names = [p for p in dict.fromkeys(["</s>", "<unk>", *pieces]) if p != "<s>"]
    vocabulary = {piece: i for i, piece in enumerate([*names, "<pad>"])}
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    files = {"source_spm": str(directory / "source.model"), "target_spm": str(directory / "target.model")}
    tokenizer = MarianTokenizer(vocab=str(directory / "vocab.json"), **files)
    pad = tokenizer.pad_token_id
    special = {"vocab_size": len(vocabulary), "pad_token_id": pad, "eos_token_id": 0, "decoder_start_token_id": pad}
    model = model_of("marian", **special)
    model.final_logits_bias[:, pad] = 50.0
    model.generation_config.bad_words_ids = [[pad]]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def test_a_decoder_of_another_kind_is_refused():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "src_vocab_size": 50, "tgt_vocab_size": 50}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model("fsmt", langs=["en", "de"], **sizes, **heads))
    with pytest.raises(ValueError, match="model: the decoder of 'fsmt' takes no encoder_attention_mask, so it cannot"):
        check_decoder(model)


def test_marian_reads_each_side_with_its_own_pieces(marian_directory):
    tokenizer = load_tokenizer(marian_directory, ModelConfig(str(marian_directory)))
    completion = encode_completions(tokenizer, ["the cat"], ["die Katze"])[0]
    assert completion == [*tokenizer(text_target="die Katze", add_special_tokens=False)["input_ids"], 0]
    assert completion != [*tokenizer("die Katze", add_special_tokens=False)["input_ids"], 0]
    assert decode(tokenizer, [completion]) == ["die Katze"]
    assert encode_prompts(tokenizer, ["the cat"], True)[0][-1] == 0


def test_what_a_checkpoint_forbids_is_never_likely(marian_directory):
    config = ModelConfig(str(marian_directory))
    model, tokenizer = load_model(marian_directory, config).eval(), load_tokenizer(marian_directory, config)
    pad = tokenizer.pad_token_id
    assert decoder_prefix(model) == [pad]
    prompts = encode_prompts(tokenizer, ["the cat", "the mat"], True)
    torch.manual_seed(0)
    written = generate(model, tokenizer, prompts * 8, Decoding(8, temperature=1.0), 16)
    assert not any(pad in ids for ids in written)
    outputs = SharedModel(model, None)(make_sequences(prompts, written[:2], pad))
    assert outputs.entropies.isfinite().all() and outputs.entropies.max() > 1
