"""Which engines may shard the models of a stage over the processes, and why others may not."""

from pipeline.evaluation.config import SFT_BY_METRIC
from pipeline.runtime.distributed import other_fsdp_settings
from pipeline.stages.directory import script_of

# Which engines shard the models of a stage, by its script.
SHARDS: dict[str, tuple[str, ...]] = {
    "sft_by_metric": (),
    "sft": ("FSDP", "FSDP1", "DeepSpeed"),
    "reward": ("FSDP",),
    "ppo": ("FSDP",),
    "eval": ("FSDP",),
}
# Why others do not.
REASONS = {
    "sft": "this stage knows FSDP and DeepSpeed alone",
    "reward": "a reward model is an adapter over a whole model on each, or one whose layers PyTorch gathers",
    "ppo": "PPO looks at a gradient before it takes a step, and gathers a layer for every role that computes with it",
    "eval": "each answers its share of the prompts with a whole model, or one whose layers PyTorch gathers",
    "sft_by_metric": "each answers its share of the prompts with whole models of SFT's checkpoints",
}


def engine_problem(stage: str, engine: str | None, in_4_bits: bool = False) -> str | None:
    """Return why a stage cannot run under an engine that shards the model, and what to use; None if it can.

    `in_4_bits`: its frozen weights are held in 4 bits.
    """
    script = "sft_by_metric" if stage == SFT_BY_METRIC else script_of(stage)
    if engine is None or (engine in SHARDS[script] and not (in_4_bits and script != "sft")):
        return None
    if engine in SHARDS[script]:
        return (
            f"{stage}: model.load_in_4bit: {engine} shards the model over the processes, and weights in 4 bits are "
            "not sharded; launch it with accelerate_configs/multi_gpu.yaml or multi_node.yaml, or remove the key"
        )
    version = "; FSDP shards it with fsdp_version: 2" if engine == "FSDP1" and "FSDP" in SHARDS[script] else ""
    stages = " and ".join(name for name, engines in SHARDS.items() if engine in engines) or "no stage"
    return (
        f"{stage}: {engine} shards the model over the processes, and {REASONS[script]}; launch it with "
        f"accelerate_configs/multi_gpu.yaml or multi_node.yaml{version}; {engine} is for {stages} alone"
    )


def fsdp_problem(stage: str, engine: str | None) -> str | None:
    """Return which setting of FSDP a stage does not do, in a process that accelerate launch has made; None if none."""
    settings = other_fsdp_settings() if engine == "FSDP" and script_of(stage) != "sft" else []
    if not settings:
        return None
    return (
        f"{stage}: fsdp_config: this stage gathers layers itself, and needs {', '.join(settings)}; set that in the "
        "file that accelerate launch is given, as accelerate_configs/fsdp2.yaml does"
    )
