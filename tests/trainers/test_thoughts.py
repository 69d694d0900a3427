"""Rewards, metrics and reports see answers as a user means them: without the thoughts at their start."""

from dataclasses import replace

import pytest

from pipeline.evaluation.decodings import DecodedText
from pipeline.evaluation.predictions import Prediction
from pipeline.evaluation.system_predictions import SystemPredictions
from pipeline.metrics import load_metric
from pipeline.models.generation import Decoding
from pipeline.models.text import encode_completions
from pipeline.rewards.config import RewardConfig
from pipeline.rewards.pairs import collect
from pipeline.rewards.pairs.settings import SampledPairs
from pipeline.runtime.memory import BatchSize
from pipeline.trainers.ppo import PPOConfig, PPOTrainer


@pytest.mark.parametrize("strips", [False, True])
def test_rewards_and_metrics_of_ppo_see_no_thoughts(
    taught, tokenizer, examples, tmp_path, fresh_accelerate, monkeypatch, strips
):
    """What the policy writes is made to hold a thought; the same texts go to the rewards and to every prefix."""
    seen = []

    def reward(prompts, completions, **columns):
        seen.extend(completions)
        return [float(len(text)) for text in completions]

    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "total_episodes": 2}
    args = PPOConfig(rewards=(RewardConfig("bleu"),), response_length=30, use_peft=False, **sizes)
    trainer = PPOTrainer(taught(), args, tokenizer, reward, examples, output_dir=tmp_path, strip_thoughts=strips)
    seen.clear()
    ids = tokenizer("<think> hm </think> north", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(trainer.writer, "generate", lambda prompts, decoding: [ids for _ in prompts])
    written = trainer.writer.write([[1], [1]], Decoding(30))
    assert written.texts == ["north" if strips else "<think> hm </think> north"] * 2 and written.ids == [ids] * 2
    trainer.collect_rollout([0, 1])
    assert set(seen) == set(written.texts)


def test_a_reward_model_learns_the_tokens_that_ppo_shows_it(taught, tokenizer, examples, monkeypatch):
    ids = tokenizer("<think> hm </think> north", add_special_tokens=False)["input_ids"]
    settings = replace(
        SampledPairs(), samples=2, max_new_tokens=30, min_new_tokens=0, stop_strings=(), suppress_tokens=()
    )
    monkeypatch.setattr(
        collect, "generate", lambda model, tokenizer, prompts, *given: [ids, [5, 6]] * (len(prompts) // 2)
    )
    given = (taught(), tokenizer, examples.select(range(2)), settings, load_metric("bleu"))
    for thought, other in collect._draw_samples(*given, strip_thoughts=True, batches=BatchSize(4), seed=0):
        prompt = examples[0]["prompt"]
        assert thought.text == "north" and thought.ids == encode_completions(tokenizer, [prompt], ["north"])[0]
        assert other.ids == [5, 6]
    assert collect._draw_samples(*given, strip_thoughts=False, batches=BatchSize(4), seed=0)[0][0].ids == ids


def test_the_report_sees_no_thoughts():
    text = "<think>hm</think> north"
    prediction = Prediction(0, text, [1, 2], True, 1.0, 2)
    system = SystemPredictions([prediction], {2: [DecodedText(0, text, [1])]}, [DecodedText(0, text, [1])])
    bare = system.without_thoughts()
    texts = [bare.predictions[0], bare.beams[2][0], bare.samples[0]]
    assert [each.completion for each in texts] == ["north"] * 3 and bare.predictions[0].completion_ids == [1, 2]
