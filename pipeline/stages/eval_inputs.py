"""What the eval stage makes of a recipe: the systems, how their texts are scored, and the settings it reports."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

from accelerate import PartialState
from datasets import Dataset

from pipeline.evaluation.assemble import decoding_name
from pipeline.evaluation.clusters import cluster_by
from pipeline.evaluation.config import CONTROL
from pipeline.evaluation.scoring import Scoring
from pipeline.evaluation.system_predictions import KeptPredictions, SystemPredictions
from pipeline.evaluation.systems import Answering, Source, predict_systems
from pipeline.metrics import load_metric
from pipeline.models.loading import load_model, load_tokenizer, plain_model_directory
from pipeline.models.reward_model import RewardNetwork, check_base
from pipeline.models.sharding import Sharding
from pipeline.models.speech import CLIP
from pipeline.recipe import Recipe
from pipeline.rewards import Handling, Reward, RewardFunction, build_rewards
from pipeline.rewards.learned import AdapterReward
from pipeline.stages.control import control_kind, control_policy, control_run
from pipeline.stages.digests import model_state
from pipeline.stages.directory import RunDirectory, versions
from pipeline.stages.inputs import learned_reward, sft_model_path
from pipeline.stages.task import base_model_path
from pipeline.tasks import Task
from pipeline.trainers.huggingface.sft import DEFAULTS
from pipeline.trainers.ppo.config import PPOConfig
from pipeline.trainers.precision import native_bf16

# Keys of the section eval by which the systems write.
WRITES = ("num_beams", "beam_sizes", "samples_per_prompt", "sample_prompts", "sample_temperature", "max_new_tokens")
WRITES += ("min_new_tokens", "stop_strings", "suppress_tokens", "per_device_eval_batch_size")


def sft_source(recipe: Recipe, run: RunDirectory) -> Source | None:
    """Return where the SFT model is, which all systems are compared with; None for finished models alone."""
    return Source("sft", sft_model_path(recipe, run), recipe.model) if recipe.evaluation_reads_sft else None


def system_sources(recipe: Recipe, run: RunDirectory) -> list[Source]:
    """Return where each system is, in the report's order; baselines and a control stand last."""
    sft_path, config = sft_model_path(recipe, run), recipe.model
    stages = {"sft": Source("sft", sft_path, config), "ppo": Source("ppo", run.ppo, config, sft_path)}
    others = config.in_own_template()
    sources = []
    for system in recipe.eval.systems:
        if system == "base":
            sources.append(Source("base", base_model_path(recipe, run), config))
        else:
            sources.append(stages[system] if isinstance(system, str) else Source(system.name, system.path, others))
    sources += [Source(name, run.stage(name), config) for name in recipe.eval.baselines]
    control = control_policy(recipe)
    return sources if control is None else [*sources, Source(CONTROL, control, config, sft_path)]


def report_answering(recipe: Recipe, task: Task) -> Answering:
    """Return how the systems answer: samples at PPO's temperature, passes in PPO's precision."""
    bf16 = _computes_in_bf16(recipe)
    return Answering(recipe.eval, recipe.seed, _final_temperature(recipe), bf16, task.strip_thoughts)


def report_predictions(
    recipe: Recipe, run: RunDirectory, task: Task
) -> tuple[list[Source], dict[str, SystemPredictions]]:
    """Let the systems of the report write what no earlier evaluation of this run wrote; on every process."""
    sources, sft, answering = system_sources(recipe, run), sft_source(recipe, run), report_answering(recipe, task)
    kept = KeptPredictions(run.path, prediction_keys(recipe, sources, sft, task.test, answering))
    return sources, predict_systems(sources, sft, task.test, answering, kept)


def prediction_keys(
    recipe: Recipe, sources: Sequence[Source], sft: Source | None, rows: Dataset, answering: Answering
) -> dict[str, str]:
    """Return, by system, a SHA-256 over all that its predictions depend on: models, rows, decodings, versions.

    Metrics and rewards are not among it, nor are other systems. A clip names a file that is called after its sound. A
    model on the Hub of which nothing is in the local cache has no key.
    """
    columns = [name for name in ("prompt", "references", CLIP) if name in rows.column_names]
    shared = [
        {name: getattr(answering.settings, name) for name in WRITES},
        [answering.seed, answering.temperature, answering.bf16, answering.strip_thoughts],
        [rows[name][:] for name in columns],
        PartialState().device.type,
        versions(),
    ]
    keys = {}
    for source in sources:
        read = (source.path, source.base, None if sft is None else sft.path)
        states = ["" if path is None else model_state(str(path), recipe.model.revision_of(path)) for path in read]
        content = [source.name, asdict(source.config), states, shared]
        if None not in states:
            keys[source.name] = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return keys


def _final_temperature(recipe: Recipe) -> float:
    """Return the temperature at which PPO's last rollouts are written; 1 without PPO."""
    return 1.0 if recipe.ppo is None else recipe.ppo.sampling_at(recipe.ppo.total_episodes).temperature


def _computes_in_bf16(recipe: Recipe) -> bool:
    """Tell whether passes are in bfloat16, as PPO's are; not where the machine is slow at it or cannot do it."""
    return native_bf16() and (recipe.ppo is None or recipe.ppo.bf16 is not False)


def report_scoring(recipe: Recipe, run: RunDirectory, task: Task) -> Scoring:
    """Load the metrics and the rewards, a learned one included."""
    rewards, handling, sharding = [], Handling(), Sharding()
    if recipe.ppo is not None:
        rewards, handling = report_rewards(recipe, run, task, sharding), report_handling(recipe.ppo)
    metrics = [load_metric(metric.name, task.language, **metric.options) for metric in recipe.eval.metrics]
    clusters = None if task.cluster is None else cluster_by(task.test[task.cluster])
    return Scoring(metrics, rewards, handling, recipe.eval, recipe.seed, clusters, sharding.gathered)


def report_rewards(recipe: Recipe, run: RunDirectory, task: Task, sharding: Sharding | None = None) -> list[Reward]:
    """Build PPO's rewards outside of PPO: a learned one has a network of its own, which may be sharded."""
    return build_rewards(recipe.ppo.rewards, task.language, _attached_reward(recipe, run, task, sharding))


def report_handling(ppo: PPOConfig) -> Handling:
    """Return what a failing reward costs in the report, where every text has a score: 0 where PPO would skip it."""
    return Handling("stop" if ppo.on_reward_error == "stop" else "zero", ppo.reward_timeout)


def _attached_reward(
    recipe: Recipe, run: RunDirectory, task: Task, sharding: Sharding | None
) -> RewardFunction | None:
    """Load the learned reward, with a network of its own; None if the recipe has none."""
    if recipe.ppo.learned_reward is None:
        return None
    base = plain_model_directory(sft_model_path(recipe, run), recipe.model, run.eval / "base")
    tokenizer = load_tokenizer(base, recipe.model)
    reward = learned_reward(recipe, run, task, tokenizer)
    if isinstance(reward, AdapterReward):
        model = load_model(base, recipe.model, frozen=True)
        check_base(reward.record, model, tokenizer, base)
        network = RewardNetwork.load(model, reward.directory).eval()
        if sharding is None:
            network.to(PartialState().device)
        else:
            sharding.place(network, ("scores",))
        reward.attach(network.scores, network.language_model)
    return reward


def report_settings(recipe: Recipe, task: Task) -> dict[str, object]:
    """Return the settings that the figures depend on."""
    control, other = control_policy(recipe), control_run(recipe)
    return {
        "name": recipe.name,
        "seed": recipe.seed,
        "test_examples": len(task.test),
        **({"rows_left_out": len(task.left_out)} if task.left_out else {}),
        **({} if task.cluster is None else _cluster_settings(task.cluster, task.test[task.cluster])),
        "decoding": decoding_name(recipe.eval.num_beams),
        "max_new_tokens": recipe.eval.max_new_tokens,
        "kl_temperature": _final_temperature(recipe),
        "precision": "bfloat16 (autocast)" if _computes_in_bf16(recipe) else recipe.model.dtype or "float32",
        "n_bootstrap": recipe.eval.n_bootstrap,
        "confidence": recipe.eval.confidence,
        "metrics": [{"name": m.name, "options": dict(m.options)} for m in recipe.eval.metrics],
        "language": task.language,
        "rewards": [f"{r.name} x {r.last_weight:g}" for r in recipe.ppo.rewards] if recipe.ppo else [],
        "control": CONTROL if recipe.control and control else other and other.name,
        "control_kind": None if control is None else control_kind(control),
        "checkpoints": checkpoint_rules(recipe),
        "hyperparameters": recipe.eval.hyperparameters,
        "versions": versions(),
    }


def checkpoint_rules(recipe: Recipe) -> dict[str, str | None]:
    """Return the metric of the validation split that chose the checkpoint of SFT and of PPO; None for the last one."""
    rules: dict[str, str | None] = {}
    if recipe.sft.needed and not recipe.sft_is_external:
        keys = {**DEFAULTS, **recipe.sft.arguments}
        chosen = keys["load_best_model_at_end"] and keys["eval_strategy"] != "no"
        rules["sft"] = keys["metric_for_best_model"] if chosen else None
    if recipe.ppo is not None:
        rules["ppo"] = recipe.ppo.metric_for_best_model if recipe.ppo.load_best_model_at_end else None
    return rules


def _cluster_settings(column: str, labels: Sequence[object]) -> dict[str, object]:
    return {"cluster": column, "clusters": cluster_by(labels).count}
