"""A tokenizer and a model from nothing but text, built once."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer

from pipeline.models.decoder_start import decoder_prefix
from pipeline.models.from_scratch import build_from_scratch, train_tokenizer
from pipeline.models.loading import load_model

TEXTS = ["the cat sat", "die Katze saß", "Übermut tut selten gut", "the cat sat on the mat"]


@pytest.fixture
def build(scratch_config, tmp_path):
    def build(directory="base", texts=TEXTS, seed=0, **changes):
        return build_from_scratch(replace(scratch_config, **changes), texts, seed, tmp_path / directory)

    return build


def weights(directory, model_config) -> dict[str, torch.Tensor]:
    return load_model(directory, model_config).state_dict()


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first | second)


def test_a_directory_is_built_once(build):
    directory = build()
    before = {path.name: path.stat().st_mtime_ns for path in directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "stage.json"} <= set(before)
    build()
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == before
    assert not directory.with_name("base.tmp").exists()


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(build, model_config):
    state = torch.random.get_rng_state()
    first = weights(build("first"), model_config)
    torch.manual_seed(123)  # what happened before does not matter
    assert equal(first, weights(build("second"), model_config))
    assert not equal(first, weights(build("third", seed=1), model_config))
    torch.random.set_rng_state(state)
    build("fourth")
    assert torch.equal(torch.random.get_rng_state(), state)  # and what comes after is left alone


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"texts": [*TEXTS, "another word"]}, {"hidden_size": 64}, {"num_hidden_layers": 2}],
    ids=lambda change: next(iter(change)),
)
def test_a_change_of_what_it_depends_on_builds_it_again(build, model_config, change):
    directory = build()
    fingerprint = json.loads((directory / "stage.json").read_text())["fingerprint"]
    old = weights(directory, model_config)
    (directory / "leftover.txt").write_text("of the old model")
    build(**change)
    assert json.loads((directory / "stage.json").read_text())["fingerprint"] != fingerprint
    assert not (directory / "leftover.txt").exists()
    new = weights(directory, model_config)
    assert {n: t.shape for n, t in old.items()} != {n: t.shape for n, t in new.items()} or not equal(old, new)


def test_a_half_built_directory_is_built_again(build):
    directory = build()
    (directory / "stage.json").unlink()
    (directory / "model.safetensors").write_bytes(b"half")
    build()
    assert (directory / "model.safetensors").stat().st_size > 1000


def test_the_model_is_what_the_configuration_says(build, model_config):
    directory = build(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=48)
    config = load_model(directory, model_config).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (64, 1, 4)
    assert config.max_position_embeddings == 48
    assert config.intermediate_size == 192  # 8/3 of 64 is 170.7, rounded up to a multiple of 32
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert config.vocab_size == len(tokenizer)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
    )
    assert tokenizer.model_max_length == 48
    for tied in (True, False):
        model = load_model(build(f"tied-{tied}", tie_word_embeddings=tied), model_config)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("text", ["the cat", "Größe ≠ 3 — “ja” 猫 🐈", "tabs\tand\nnewlines", "  two spaces  inside"])
def test_any_text_is_written_and_read_back(text):
    tokenizer = train_tokenizer(TEXTS, 300)
    assert len(tokenizer) <= 300
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids).strip() == text.strip()
    assert not set(ids) & set(tokenizer.all_special_ids)


def test_special_tokens_are_three_and_a_word_is_the_same_anywhere():
    tokenizer = train_tokenizer(TEXTS, 300)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer("cat")["input_ids"] == tokenizer("the cat")["input_ids"][len(tokenizer("the")["input_ids"]) :]


def test_gpt_neox_has_dropout_in_training_only(build, model_config):
    directory = build(architecture="gpt_neox", dropout=0.5)
    model = load_model(directory, model_config)
    ids = torch.arange(1, 9).unsqueeze(0)
    assert model.config.model_type == "gpt_neox"
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
    assert not torch.equal(model.train()(ids).logits, model(ids).logits)
    assert model.config.intermediate_size == 4 * model.config.hidden_size


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_an_encoder_decoder_has_the_sizes_and_dropout_of_its_configuration(build, model_config, architecture):
    directory = build(architecture=architecture, num_hidden_layers=1, num_decoder_layers=2, dropout=0.5)
    model, tokenizer = load_model(directory, model_config), AutoTokenizer.from_pretrained(directory)
    count = len([n for n, _ in model.named_modules() if n.endswith((".encoder_attn", ".EncDecAttention"))])
    assert (model.config.num_hidden_layers, count) == (1, 2)
    assert (model.config.d_model, model.config.vocab_size) == (32, len(tokenizer))
    widths = {p.shape[0] for n, p in model.named_parameters() if n.endswith(("wi.weight", "fc1.weight"))}
    assert widths == {4 * 32}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert decoder_prefix(model) == [tokenizer.bos_token_id]
    if architecture == "t5":  # a scale that Adam can move, and that saving keeps
        assert model.get_input_embeddings().weight.std().item() == pytest.approx(32**-0.5, rel=0.05)
        assert not model.config.scale_decoder_outputs
    assert model.generation_config.forced_eos_token_id is None
    ids = tokenizer("the cat")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id and tokenizer("the")["input_ids"][:-1] == ids[: ids.index(ids[-1]) - 1]
    inputs = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[1, 5, 6]])}
    assert torch.equal(model.eval()(**inputs).logits, model(**inputs).logits)
    assert not torch.equal(model.train()(**inputs).logits, model(**inputs).logits)


def test_untied_embeddings_and_decoder_layers_where_there_are_none(build, scratch_config, model_config):
    model = load_model(build(architecture="bart", tie_word_embeddings=False), model_config)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    with pytest.raises(ValueError, match="tie_word_embeddings: a t5 always shares them, found false; use bart"):
        replace(scratch_config, architecture="t5", tie_word_embeddings=False)
    with pytest.raises(
        ValueError, match=r"num_decoder_layers: .* for encoder-decoders \(t5, bart, whisper\) alone, found 2 with"
    ):
        replace(scratch_config, num_decoder_layers=2)


def test_dropout_needs_an_architecture_that_has_it(scratch_config):
    with pytest.raises(ValueError, match=r"model.from_scratch.dropout: llama has no dropout, found 0.1; use archi"):
        replace(scratch_config, dropout=0.1)
    with pytest.raises(ValueError, match=r"model.from_scratch.dropout: must be in \[0, 1\), found 1"):
        replace(scratch_config, architecture="gpt_neox", dropout=1.0)
