"""The model card of a trained model: what it is, how it was made, what the report measured, how to load it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from pipeline.evaluation.pages.page import environment, visible
from pipeline.evaluation.power import p_cell

REPOSITORY_TAGS = ("relay", "trl")
PIPELINE_TAGS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSpeechSeq2Seq": "automatic-speech-recognition",
}
KINDS = {"sft": "supervised fine-tuning", "ppo": "PPO", "control": "PPO with shuffled scores"}


@dataclass(frozen=True)
class CardFacts:
    """What a card says of a model without any figures.

    `stage` is sft, ppo or control, `base` the model that training began with, `start` says in words what PPO began
    with, `hub_base` its id where it is on the
    Hub, `data` where the examples are, `path` the folder of model and tokenizer, and `recipe` the text of the run's
    recipe.yaml.
    """

    name: str
    stage: str
    seed: int
    base: str
    start: str
    hub_base: str | None
    data: str
    data_name: str
    language: str | None
    rewards: Sequence[str]
    is_adapter: bool
    auto_class: str
    path: str
    recipe: str
    versions: Mapping[str, str]


def model_card(facts: CardFacts, report: Mapping[str, Any] | None) -> str:
    """Render README.md of a model; `report` is report.json of the evaluation, None before there is one."""
    system = report["systems"].get(facts.stage) if report else None
    text = (
        environment()
        .get_template("model_card.md")
        .render(
            facts=facts,
            kind=KINDS[facts.stage],
            report=report,
            scores=score_rows(report) if system else [],
            comparisons=comparison_rows(facts.stage, report) if system else [],
        )
    )
    return f"---\n{card_data(facts, system, report).to_yaml()}\n---\n\n{visible(text.strip())}\n"


def card_data(facts: CardFacts, system: Mapping[str, Any] | None, report: Mapping[str, Any] | None) -> ModelCardData:
    """Make the metadata that the Hub reads, with the scores of the test split as results."""
    relation = "adapter" if facts.is_adapter else "finetune"
    data = ModelCardData(
        model_name=f"{facts.name}-{facts.stage}",
        library_name="peft" if facts.is_adapter else "transformers",
        pipeline_tag=PIPELINE_TAGS.get(facts.auto_class),
        language=facts.language,
        tags=[*REPOSITORY_TAGS, facts.stage],
        base_model=facts.hub_base,
        base_model_relation=None if facts.hub_base is None else relation,
    )
    if system and report:
        data.eval_results = [
            EvalResult(
                task_type="text-generation",
                dataset_type=facts.data_name,
                dataset_name=facts.data_name,
                dataset_split="test",
                metric_type=metric,
                metric_name=metric,
                metric_value=round(score["value"], 4),
            )
            for metric, score in system["metrics"].items()
        ]
    return data


def score_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Make a row for each metric: its name, and score and interval of each system."""
    systems = report["systems"].values()
    rows = []
    for metric in next(iter(systems))["metrics"]:
        scores = [system["metrics"][metric] for system in systems]
        rows.append([metric, *(f"{s['value']:.2f} [{s['low']:.2f}, {s['high']:.2f}]" for s in scores)])
    return rows


def comparison_rows(system: str, report: Mapping[str, Any]) -> list[list[str]]:
    """Make a row for each comparison of a system: which, metric, difference, interval, p, and p after Holm."""
    return [
        [
            f"{c['b']} - {c['a']}",
            c["metric"],
            f"{c['delta']:+.3f}",
            f"{c['low']:+.3f} to {c['high']:+.3f}",
            p_cell(c["p_value"]),
            p_cell(c["p_holm"]),
        ]
        for c in report["comparisons"]
        if system in (c["a"], c["b"])
    ]
