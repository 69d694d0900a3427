"""The learned reward as PPO calls it: from token ids, calibrated, and refused in a sentence where it cannot be."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from pipeline.models.config import ModelConfig
from pipeline.models.reward_model import RewardRecord
from pipeline.models.text import encode_completions, encode_prompts
from pipeline.rewards import Reward, RewardError, compute_rewards
from pipeline.rewards.classifier import ClassifierReader, ClassifierReward, check_classifier, token_limit
from pipeline.rewards.learned import (
    AdapterReward,
    calibration,
    check_accuracy,
    check_learned_options,
    load_learned_reward,
    reward_on_references,
)

RECORD = RewardRecord("adapter", "runs/x/sft", 10.0, 2.0, 0.7, 100)
CONFIG = ModelConfig(model_name_or_path="unused")
PROMPTS = ["say north", "say east west", "say north"]
TEXTS = ["north red", "west blue one", "north red"]


@pytest.fixture
def adapter(tokenizer, taught, tmp_path):
    """A reward whose network gives each completion the sum of its token ids; and what it was shown."""
    shown = []

    def sum_of_ids(sequences):
        shown.append(sequences)
        return (sequences.completion_ids * sequences.completion_mask).sum(1)

    reward = AdapterReward(tokenizer, RECORD, tmp_path)
    reward.attach(sum_of_ids, taught())
    return reward, shown


def test_completions_are_scored_from_the_ids_that_were_written(adapter, tokenizer):
    reward, shown = adapter
    ids = encode_completions(tokenizer, PROMPTS, TEXTS)
    ids[1] = ids[1][:-1]  # it did not end: no EOS is added
    assert reward(PROMPTS, TEXTS, completion_ids=ids) == [(sum(row) - 10) / 2 for row in ids]
    (sequences,) = shown
    assert len(sequences) == 2  # equal texts once, so that they score alike
    prompts = [list(row[mask]) for row, mask in zip(sequences.prompt_ids, sequences.prompt_mask, strict=True)]
    assert sorted(map(len, prompts)) == sorted(map(len, encode_prompts(tokenizer, PROMPTS[:2])))


@pytest.mark.parametrize("ids", [[[0]], [[100_000]], [[5, 6]]])
def test_ids_of_another_tokenizer_are_not_used(adapter, tokenizer, ids):
    reward, _ = adapter
    expected = encode_completions(tokenizer, PROMPTS[:1], TEXTS[:1])
    assert reward(PROMPTS[:1], TEXTS[:1], completion_ids=ids) == [(sum(expected[0]) - 10) / 2]


def test_only_texts_that_are_needed_are_rendered(adapter, tokenizer):
    """Some chat templates refuse an empty answer, which a policy may well write."""
    reward, _ = adapter
    end = tokenizer.eos_token_id
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' and not m.content %}{{ raise_exception('empty') }}"
        "{% endif %}{{ m.content }}{% endfor %}"
    )
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS[:2]]
    assert reward(chats, ["", TEXTS[1]], completion_ids=[[end], [100_000]])[0] == (end - 10) / 2


def test_what_is_left_of_a_text_that_was_cut_off_has_no_end(adapter, tokenizer):
    reward, _ = adapter
    whole, rest = encode_completions(tokenizer, PROMPTS[:1], ["west blue north red"])[0], "north red"
    expected = encode_completions(tokenizer, PROMPTS[:1], [rest])[0]
    assert reward(PROMPTS[:1], [rest], completion_ids=[whole]) == [(sum(expected) - 10) / 2]
    assert reward(PROMPTS[:1], [rest], completion_ids=[whole[:-1]]) == [(sum(expected[:-1]) - 10) / 2]


def test_a_score_that_is_not_finite_stops_naming_reward_and_text(tokenizer, taught, tmp_path):
    reward = AdapterReward(tokenizer, RECORD, tmp_path)
    reward.attach(lambda sequences: torch.full((len(sequences),), torch.nan), taught())
    with pytest.raises(RewardError, match="reward 'learned' returned nan for completion 0 \\('north red'\\)"):
        compute_rewards([Reward("learned", reward)], PROMPTS[:1], TEXTS[:1], {"completion_ids": [[5]]})


def test_calibration_by_hand():
    shift, scale = calibration(torch.tensor([1.0, 3.0]), torch.tensor([4.0, 6.0]))
    assert (shift, scale) == (5.0, 1.0)
    with pytest.raises(ValueError, match=r"the score of text 1 is nan \(1 in all\); lower reward\.learning_rate"):
        calibration(torch.tensor([1.0, torch.nan]), torch.tensor([4.0]))
    with pytest.raises(ValueError, match="the score of reference 0 is inf"):
        calibration(torch.tensor([1.0, 2.0]), torch.tensor([torch.inf]))
    with pytest.raises(ValueError, match="every text scores the same, so the reward model has learnt nothing"):
        calibration(torch.tensor([1.0, 1.0]), torch.tensor([1.0]))


def test_a_weak_reward_is_refused_saying_how_to_override():
    check_accuracy(RECORD, 0.7, "runs/x/reward")
    message = r"prefers the better text in 70\.0% of 100 held-out pairs, below 71\.0%: .*set reward\.min_accuracy"
    with pytest.raises(ValueError, match=message):
        check_accuracy(RECORD, 0.71, "runs/x/reward")
    known = replace(RECORD, accuracy_low=0.6)
    check_accuracy(known, 0.6, "runs/x/reward")
    with pytest.raises(ValueError, match=r"its 95 % interval begins at 60\.0%, below 61\.0%"):
        check_accuracy(known, 0.61, "runs/x/reward")


@pytest.mark.parametrize(
    ("options", "is_adapter", "message"),
    [
        ({"tempalte": "x"}, False, "has the options batch_size"),
        ({"batch_size": "x"}, False, "has the options batch_size"),
        ({"batch_size": 0}, False, "the batch_size of 'learned' must be at least 1, found 0"),
        ({"batch_size": -1}, True, "must be at least 1, found -1"),
        ({"batch_size": True}, True, "must be at least 1, found true"),
        ({"template": "{prompt}{completion}"}, True, "reads token ids here, so its option template would do nothing"),
        ({"template": "{prompt}"}, False, "the template needs {prompt} and {completion} in it"),
        (
            {"template": '{"q": "{prompt}", "a": "{completion}"}'},
            False,
            "no other fields than {prompt} and {completion}",
        ),
        ({"template": "{system}{prompt}{completion}"}, False, "braces that stay are doubled"),
        ({"template": "{prompt}{completion} }"}, False, "braces that stay are doubled"),
    ],
)
def test_options_that_do_nothing(options, is_adapter, message):
    with pytest.raises(ValueError, match=message):
        check_learned_options(options, is_adapter)


@pytest.fixture
def classifier(tokenizer, tmp_path):
    """Each call saves a tiny classifier with a tokenizer; the folder."""

    def save(num_labels: int = 1, chat: bool = False, positions: int = 64) -> str:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, num_labels=num_labels, max_position_embeddings=positions,
                             pad_token_id=0)  # fmt: skip
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
        tokenizer.chat_template = CHAT if chat else None
        tokenizer.save_pretrained(tmp_path / "classifier")
        return str(tmp_path / "classifier")

    return save


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("chat", "template", "expected"),
    [
        (False, None, "say north\nnorth red"),
        (True, None, "<user>say north\n<assistant>north red"),
        (True, "Q {prompt} A {completion}", "Q say north\n A north red"),
    ],
)
def test_a_classifier_reads_texts_by_its_own_tokenizer_and_template(classifier, chat, template, expected):
    reward = ClassifierReward(classifier(chat=chat), CONFIG, template)
    ids = reward.reader("say north\n", "north red")["input_ids"]
    assert ids == reward.tokenizer(expected)["input_ids"]
    raw = [
        float(reward.model(input_ids=torch.tensor([reward.reader(p, t)["input_ids"]])).logits)
        for p, t in zip(PROMPTS, TEXTS, strict=True)
    ]
    assert reward(PROMPTS, TEXTS, completion_ids=[[1]] * 3) == pytest.approx(raw, abs=1e-5)  # padding changes nothing
    reward.calibrate(1.0, 0.5)
    assert reward(PROMPTS, TEXTS) == pytest.approx([(value - 1) / 0.5 for value in raw], abs=1e-5)


def test_a_classifier_that_tells_two_texts_apart_is_told_which_is_which(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "say", "north", "red"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(str(tmp_path / "vocab.txt"))
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                        num_labels=1, initializer_range=0.5)  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    reward = ClassifierReward(str(tmp_path), CONFIG)
    pairs = [("say north", "north"), ("say red", "red north red")]
    expected = [float(model(**tokenizer(*pair, return_tensors="pt")).logits) for pair in pairs]
    assert reward([p for p, _ in pairs], [t for _, t in pairs]) == pytest.approx(expected, abs=1e-5)
    alone = [float(model(tokenizer(*pair, return_tensors="pt")["input_ids"]).logits) for pair in pairs]
    assert alone != pytest.approx(expected, abs=1e-2)  # one text after the other is something else


def test_an_end_is_no_padding(tokenizer, tmp_path):
    """Scores are read at the last token that is no padding: not before an EOS that ends the text."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_labels=1, initializer_range=0.5)  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.pad_token = None
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}" + tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    reward = ClassifierReward(str(tmp_path), CONFIG)
    assert reward.tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = [reward.reader(*row)["input_ids"] for row in zip(PROMPTS[:2], TEXTS[:2], strict=True)]
    assert [row[-1] for row in rows] == [tokenizer.eos_token_id] * 2
    expected = [float(model(torch.tensor([row])).logits[0, 0].detach()) for row in rows]  # alone: no padding
    assert reward(PROMPTS[:2], TEXTS[:2]) == pytest.approx(expected, abs=1e-5)


def test_the_positions_of_roberta_begin_after_that_of_padding():
    config = RobertaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, max_position_embeddings=10)  # fmt: skip
    model = RobertaForSequenceClassification(config)
    assert token_limit(model) == 8
    model(torch.full((1, 8), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 9), 5))
    bert = BertConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                      num_attention_heads=2, max_position_embeddings=10)  # fmt: skip
    assert token_limit(BertForSequenceClassification(bert)) == 10


def test_what_a_classifier_can_read_is_known_before_it_is_loaded(classifier):
    reader = ClassifierReader.of(classifier(positions=8), CONFIG, None)
    assert reader.limit == 8 and reader.fits("say", "north")
    assert not reader.fits("say north east south west", "west blue north red")


def test_a_classifier_reads_chats(classifier):
    reward = ClassifierReward(classifier(chat=True), CONFIG)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    expected = reward.tokenizer("<system>s<user>u<assistant>t")["input_ids"]
    assert reward.reader(chat, "t")["input_ids"] == expected
    assert reward([chat], [[{"role": "assistant", "content": "t"}]]) == reward([chat], ["t"])


def test_what_is_no_reward_model_is_refused(classifier, base_directory, taught_directory, tmp_path):
    with pytest.raises(ValueError, match=r"has 2 labels \(LABEL_0, LABEL_1\), and a reward is one number"):
        check_classifier(classifier(num_labels=2), CONFIG)
    with pytest.raises(ValueError, match=r"is no sequence classifier \(LlamaForCausalLM\)"):
        check_classifier(str(base_directory), CONFIG)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is an adapter without reward_model\.json, so no reward stage has finished"):
        check_classifier(str(tmp_path), CONFIG)


def test_texts_longer_than_the_classifier_reads_are_named(classifier):
    reward = ClassifierReward(classifier(positions=8), CONFIG)
    with pytest.raises(ValueError, match=r"are \d+ tokens for the classifier .*, which reads 8; shorten the prompts"):
        reward(["say north east south west north east south"], ["north"])


def test_a_stage_that_judged_a_classifier_brings_its_calibration(classifier, tokenizer, tmp_path):
    path = classifier()
    replace(RECORD, kind="classifier", path=path).save(tmp_path)
    reward = load_learned_reward(tmp_path, CONFIG, tokenizer, 0.55, {})
    assert isinstance(reward, ClassifierReward) and (reward.shift, reward.scale) == (10.0, 2.0)
    direct = load_learned_reward(path, CONFIG, tokenizer, 0.55, {"batch_size": 2})
    assert direct.batch_size == 2
    reward_on_references(direct, PROMPTS, TEXTS)
    scores = torch.tensor(direct(PROMPTS, TEXTS))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-5) and float(scores.std(correction=0)) == pytest.approx(1)
