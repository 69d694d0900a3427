"""What the later stages would refuse, found before the hours of SFT: prompts, models and rewards that cannot work."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.metrics import Metric, load_metric
from pipeline.metrics.sacrebleu_metric import short_references
from pipeline.models.prompt_lengths import check_token_ids
from pipeline.models.prompts import encode_prompts_of
from pipeline.models.states import check_causal, check_repeatable, check_trunk_and_head
from pipeline.models.text import plain_text
from pipeline.recipe import Recipe
from pipeline.rewards import RewardError, build_rewards, check_rewards
from pipeline.rewards.classifier import ClassifierReader
from pipeline.rewards.constant import constant_reward
from pipeline.runtime.distributed import launched_engine, on_main
from pipeline.runtime.messages import one_line, say
from pipeline.stages.reward_inputs import check_data_pairs, reward_classifier
from pipeline.tasks import Task, preferences

LONGEST = 32  # prompts that a classifier reads before SFT


def check_later_stages(recipe: Recipe, task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Try on the model that SFT starts from what PPO and the evaluation need.

    Raises:
        ValueError: prompts with unknown tokens, a model that PPO or the evaluation cannot take, a metric that fails,
            or pairs of a data set that no reward model can learn from.
        RewardError: a reward that fails on the first rows of the data.
    """
    check_prompts(task, model, tokenizer)
    say(*on_main(lambda: metric_warnings(recipe, task)))
    if launched_engine() is None:  # no weights are whole under one
        check_causal(model)
        if recipe.ppo is not None:
            check_repeatable(model)
            check_trunk_and_head(model)
    if recipe.ppo is not None:
        on_main(lambda: try_rewards(recipe, task))
        say(*on_main(lambda: classifier_warnings(recipe, task)))
    if recipe.reward is not None and isinstance(recipe.reward.pairs, preferences.Config):
        on_main(lambda: check_data_pairs(recipe, task, tokenizer, model.config))


def metric_warnings(recipe: Recipe, task: Task) -> list[str]:
    """Try each metric on references of the first test rows; say which do not fit the references of the test split.

    Raises:
        ValueError: naming a metric that fails there.
    """
    metrics = [load_metric(metric.name, task.language, **metric.options) for metric in recipe.eval.metrics]
    references = task.test["references"][:]
    for metric in metrics:
        _try_metric(metric, references[:2])
    return [f"warning: {text}" for metric in metrics if (text := short_references(metric, references))]


def _try_metric(metric: Metric, references: list[list[str]]) -> None:
    try:
        scores = [float(score) for score in metric.sample_scores([texts[0] for texts in references], references)]
    except Exception as error:  # a metric may be a script of anyone
        problem = f"fails on references of the first test rows ({type(error).__name__}: {one_line(error)})"
        raise ValueError(f"eval.metrics: {metric.name}: {problem}") from error
    if len(scores) != len(references):
        raise ValueError(f"eval.metrics: {metric.name}: sample_scores gave {len(scores)} for {len(references)} texts")


def check_prompts(task: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse prompts with tokens that the model has no embedding for.

    Raises:
        ValueError: as `check_token_ids`.
    """
    embeddings = model.get_input_embeddings().num_embeddings
    for split in ("test", "prompts", "validation"):
        rows = encode_prompts_of(tokenizer, getattr(task, split), model.config.is_encoder_decoder)
        check_token_ids(rows, embeddings, f"prompts of {split}")


def classifier_warnings(recipe: Recipe, task: Task) -> list[str]:
    """Let the classifier that rewards PPO read the longest prompts; say where a completion may not fit any more.

    Raises:
        ValueError: its chat template cannot render them.
    """
    classifier = reward_classifier(recipe)
    if classifier is None:
        return []
    key, path, template = classifier
    reader = ClassifierReader.of(path, recipe.model, template)
    prompts = sorted(task.prompts["prompt"][:], key=lambda prompt: len(plain_text(prompt)))[-LONGEST:]
    try:
        longest = max(len(reader(prompt, "a")["input_ids"]) for prompt in prompts)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
    if reader.limit is None or longest + recipe.ppo.response_length <= reader.limit:
        return []
    return [
        f"warning: {key}: the classifier {path!r} reads {reader.limit} tokens, and the longest prompt has {longest}: "
        f"with ppo.response_length {recipe.ppo.response_length} a completion may not fit, which ends PPO"
    ]


def try_rewards(recipe: Recipe, task: Task) -> None:
    """Call each reward on references of the first rows; a constant stands for a learned one, which may not be there.

    Raises:
        RewardError: naming the reward; one that scores single tokens where scores are to be shuffled.
    """
    rows = task.prompts[: min(2, len(task.prompts))]
    examples = {**rows, "completion": [references[0] for references in rows["references"]]}
    rewards = build_rewards(recipe.ppo.rewards, task.language, constant_reward())
    outputs = check_rewards(rewards, examples, recipe.ppo.reward_handling)
    if outputs.by_token and (recipe.control or recipe.ppo.shuffle_scores):
        key = "control: true" if recipe.control else "ppo.shuffle_scores"
        raise RewardError(
            f"reward {next(iter(outputs.by_token))!r} scores single tokens, and {key} needs scores of whole "
            "completions; return one number for each completion"
        )
