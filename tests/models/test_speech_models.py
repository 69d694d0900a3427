"""A tiny Whisper through generation and log-probs: what is given, what is forbidden, and the encoder once per clip."""

from dataclasses import replace

import pytest
import torch
from transformers import GenerationMixin, WhisperConfig

from pipeline.models.from_scratch import build_from_scratch
from pipeline.models.generation import generate, seed_samples
from pipeline.models.likelihood import completion_logprobs, entropy_and_divergence
from pipeline.models.loading import load_model, load_tokenizer, lora_config, position_limit
from pipeline.models.prompts import encode_rows
from pipeline.models.sampling import Decoding
from pipeline.models.sequences import Sequences, at_first_and_later, make_sequences
from pipeline.models.shared import SharedModel
from pipeline.models.speech import SpokenPrompt, forbidden_tokens, given_tokens, is_multilingual
from pipeline.models.states import check_causal, check_repeatable, check_trunk_and_head, completion_states
from pipeline.models.text import decode, encode_completions


@pytest.fixture
def prompts(whisper_tokenizer, spoken):
    return encode_rows(whisper_tokenizer, spoken)


@pytest.fixture
def sequences(prompts, spoken, whisper_tokenizer) -> Sequences:
    """Eight rows of four clips, each with two completions."""
    asked = [prompts[row // 2] for row in range(8)]
    texts = [spoken["completion"][row // 2 + row % 2] for row in range(8)]
    answers = encode_completions(whisper_tokenizer, texts, texts)
    return make_sequences(asked, answers, whisper_tokenizer.pad_token_id)


def features(prompts) -> torch.Tensor:
    return torch.stack([prompt.clip.features() for prompt in prompts])


def test_the_tokenizer_has_given_tokens_and_reads_any_text(whisper_tokenizer):
    vocabulary = whisper_tokenizer.get_vocab()
    given = [vocabulary[name] for name in ("<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>")]
    assert given_tokens(whisper_tokenizer, "en") == given
    assert given_tokens(whisper_tokenizer, "de")[1] == vocabulary["<|de|>"] != given[1]
    assert given_tokens(whisper_tokenizer, None) == [given[0], given[3]]
    with pytest.raises(ValueError, match=r"no token <\|xx\|>"):
        given_tokens(whisper_tokenizer, "xx")
    text = "three Größe 猫"
    ids = whisper_tokenizer(text, add_special_tokens=False)["input_ids"]
    assert decode(whisper_tokenizer, [[*given, *ids, whisper_tokenizer.eos_token_id]]) == [text]


def test_a_model_of_one_language_is_not_told_it(whisper_config, whisper_tokenizer, tmp_path):
    directory = build_from_scratch(whisper_config.from_scratch, ["one"], 0, tmp_path / "one")
    model, tokenizer = load_model(directory, whisper_config), load_tokenizer(directory, whisper_config)
    assert not is_multilingual(model.config, tokenizer) and not model.generation_config.is_multilingual
    assert given_tokens(tokenizer, None) == tokenizer("")["input_ids"][:2]
    assert is_multilingual(model.config, whisper_tokenizer)
    assert not is_multilingual(WhisperConfig(vocab_size=51864), whisper_tokenizer)  # OpenAI's models for English


def test_the_configuration_is_that_of_the_recipe(taught_whisper, whisper_config):
    config, scratch = taught_whisper().config, whisper_config.from_scratch
    assert (config.d_model, config.num_mel_bins, config.max_source_positions) == (scratch.hidden_size, 16, 50)
    assert position_limit(config) == scratch.max_position_embeddings
    assert (config.encoder_layers, config.decoder_layers) == (1, 1)


def test_a_spoken_prompt_is_its_given_tokens(prompts):
    prompt = prompts[0]
    assert isinstance(prompt, SpokenPrompt) and len(prompt) == 4 and list(prompt) == list(prompt.ids)
    assert prompt[-64:] == prompt and prompt[0] == prompt.ids[0] and max(prompt) == max(prompt.ids)
    assert prompt == prompts[0] != prompts[1]


def test_rows_share_the_features_of_a_clip(sequences, prompts):
    assert sequences.sound.features.shape == (4, 16, 100)
    assert sequences.sound.index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert torch.equal(sequences.sound.features, features(prompts[:4]))
    assert sequences.prompt_numbers().unique().numel() == 4
    rows = sequences.rows(torch.tensor([5, 0]))
    assert rows.sound.index.tolist() == [2, 0] and rows.sound.features is sequences.sound.features


@torch.no_grad()
def test_log_probs_are_the_models_own(taught_whisper, sequences, prompts):
    model = taught_whisper().eval()
    asked = features([prompts[row // 2] for row in range(8)])
    read = torch.cat([sequences.prompt_ids, sequences.completion_ids[:, :-1]], dim=1)
    logits = model(input_features=asked, decoder_input_ids=read).logits[:, 3:]
    expected = logits.log_softmax(-1).gather(-1, sequences.completion_ids.unsqueeze(-1)).squeeze(-1)
    expected = expected * sequences.completion_mask
    torch.testing.assert_close(completion_logprobs(model, sequences), expected, rtol=1e-4, atol=1e-5)


def test_the_model_passes_the_checks_of_ppo(taught_whisper):
    model = taught_whisper()
    for check in (check_causal, check_repeatable, check_trunk_and_head):
        check(model)


@torch.no_grad()
def test_the_encoder_reads_each_clip_once(taught_whisper, sequences):
    model, read = taught_whisper().eval(), []
    model.get_encoder().register_forward_pre_hook(lambda module, inputs: read.append(len(inputs[0])))
    completion_states(model, sequences)
    assert read == [4]
    kept = sequences.sound.encoded(model, 3)
    assert read == [4, 3, 1]
    states = completion_states(model, replace(sequences, sound=kept))
    assert read == [4, 3, 1]
    torch.testing.assert_close(states, completion_states(model, sequences), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_log_probs_do_not_depend_on_other_rows(taught_whisper, sequences):
    model = taught_whisper().eval()
    whole = completion_logprobs(model, sequences)
    for size in (1, 3):
        for index in sequences.chunks(size):
            rows = sequences.rows(index)
            alone = completion_logprobs(model, rows)
            torch.testing.assert_close(alone, whole[index, : alone.shape[1]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_completions_do_not_depend_on_the_batch(taught_whisper, whisper_tokenizer, prompts, temperature):
    model, decoding, written = taught_whisper().eval(), Decoding(8, temperature), []
    for size in (24, 5):
        seed_samples(model, decoding, 0, 0, len(prompts))
        written.append(generate(model, whisper_tokenizer, prompts, decoding, size))
    assert written[0] == written[1]
    assert len({tuple(ids) for ids in written[0]}) > 1


@torch.no_grad()
def test_greedy_text_is_that_of_transformers(taught_whisper, whisper_tokenizer, prompts):
    model = taught_whisper().eval()
    ids = generate(model, whisper_tokenizer, prompts[:6], Decoding(8), 6)
    given = torch.tensor([list(prompt) for prompt in prompts[:6]])
    output = GenerationMixin.generate(
        model, input_features=features(prompts[:6]), decoder_input_ids=given, max_new_tokens=8, do_sample=False
    )
    assert decode(whisper_tokenizer, ids) == decode(whisper_tokenizer, output[:, 4:].tolist())


def test_beams_read_the_clip_and_obey_what_is_forbidden(taught_whisper, whisper_tokenizer, prompts, spoken):
    model = taught_whisper().eval()
    greedy, beams = (generate(model, whisper_tokenizer, prompts, Decoding(8, num_beams=n), 8) for n in (1, 3))
    likelihood = [
        completion_logprobs(model, make_sequences(prompts, ids, whisper_tokenizer.pad_token_id)).sum(1)
        for ids in (greedy, beams)
    ]
    assert (likelihood[1] - likelihood[0]).mean() >= -1e-4
    model.generation_config.suppress_tokens = sorted({ids[0] for ids in beams})
    others = generate(model, whisper_tokenizer, prompts, Decoding(8, num_beams=3), 8)
    assert not set(model.generation_config.suppress_tokens) & {token for ids in others for token in ids}


def test_forbidden_tokens_are_never_sampled_and_have_no_probability(
    taught_whisper, whisper_tokenizer, prompts, whisper_config, spoken
):
    model = taught_whisper().eval()
    with torch.no_grad():  # random text, in which every token comes up
        model.proj_out.weight.mul_(0.01)
    forbidden, end = forbidden_tokens(model), whisper_tokenizer.eos_token_id
    assert set(forbidden.always) == set(whisper_tokenizer.all_special_ids) - {end} and end in forbidden.first
    model.generation_config.suppress_tokens = always = list(range(150))[1:]
    model.generation_config.begin_suppress_tokens = first = [end, *range(150, 200)]
    decoding = Decoding(6, temperature=1.0)
    seed_samples(model, decoding, 0, 0, 240)
    ids = generate(model, whisper_tokenizer, prompts * 10, decoding, 240)
    assert not set(always) & {token for row in ids for token in row}
    assert not set(first) & {row[0] for row in ids} and set(range(150, 200)) & {t for row in ids for t in row[1:]}
    # The probabilities of all that is allowed sum to 1, at the first position and at a later one, for both policies.
    shared = SharedModel(model, lora_config(whisper_config)).eval()
    vocabulary = shared.language_model.config.vocab_size
    for position in (0, 1):
        answers = [[*([201] * position), token] for token in range(vocabulary)]
        batch = make_sequences([prompts[0]] * vocabulary, answers, end)
        with torch.no_grad():
            policy, [reference] = shared(batch).logprobs[:, position], shared.reference_logprobs(batch)
        never = {*always, *first} if position == 0 else set(always)
        for logprobs in (policy, reference[:, position]):
            assert abs(float(logprobs.exp().sum()) - 1) < 1e-4
            assert {t for t in range(vocabulary) if logprobs[t].exp() == 0} == never


def test_entropy_and_kl_leave_out_what_is_forbidden(taught_whisper, sequences):
    model, other = taught_whisper().eval(), taught_whisper().eval()
    with torch.no_grad():
        other.proj_out.weight.mul_(1.5)
    always, first = [5, 6], [7]
    entropies, divergences = entropy_and_divergence(model, sequences, 2.0, other, always, first)
    logits = []
    for network in (model, other):
        with torch.no_grad():
            values = network.proj_out(completion_states(network, sequences)) / 2.0
        values[..., always] = -torch.inf
        values[:, 0, first] = -torch.inf
        logits.append(values.log_softmax(-1))
    own, theirs = logits
    weights, mask = own.exp(), sequences.completion_mask
    entropy = -(weights * own.nan_to_num(neginf=0)).sum(-1) * mask
    divergence = (weights * (own - theirs).nan_to_num(0)).sum(-1) * mask
    torch.testing.assert_close(entropies, entropy, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(divergences, divergence, rtol=1e-4, atol=1e-4)


def test_numbers_at_first_and_later_tokens_stand_in_row_order_with_their_gradients():
    mask = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])
    numbers = torch.arange(1.0, 7.0, requires_grad=True)

    def compute(tokens, is_first):
        chosen = numbers.index_select(0, tokens)
        return chosen * (10 if is_first else 1), chosen

    values, same = at_first_and_later(mask, compute)
    assert values.tolist() == [10, 2, 30, 40, 5, 6] and same.tolist() == [1, 2, 3, 4, 5, 6]
    (values * torch.tensor([1.0, 2, 3, 4, 5, 6])).sum().backward()
    assert numbers.grad.tolist() == [10, 2, 30, 40, 5, 6]


def test_the_encoders_gradient_counts_every_row_of_a_clip(taught_whisper, sequences):
    model, weight = taught_whisper().train(), None
    for distinct in (True, False):
        model.zero_grad()
        batch = sequences
        if not distinct:  # every row its own clip
            sound = batch.sound
            copied = type(sound)(sound.features[sound.index], torch.arange(8))
            batch = replace(batch, sound=copied)
        states = completion_states(model, batch)
        (states * torch.linspace(0, 1, states.numel()).view_as(states)).sum().backward()
        gradient = model.get_encoder().conv1.weight.grad.clone()
        if weight is not None:
            torch.testing.assert_close(gradient, weight, rtol=1e-3, atol=1e-4)
        weight = gradient
    assert weight.abs().max() > 0
