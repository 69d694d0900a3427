"""Find out at the end of SFT whether the model ends its texts, and say what helps where it does not."""

from collections.abc import Sequence

from peft import PeftModel
from transformers import PreTrainedTokenizerBase, Trainer

from pipeline.evaluation.systems import Answering
from pipeline.models.generation import finished, generate
from pipeline.models.prompt_lengths import unfit_prompts
from pipeline.models.prompts import encode_rows
from pipeline.recipe import Recipe
from pipeline.runtime.distributed import gather_rows, launched_engine
from pipeline.runtime.memory import BatchSize
from pipeline.runtime.messages import say
from pipeline.tasks import Task

PROMPTS = 64  # of the validation split
BLOCK = 16  # prompts that one process answers at once
WARN_ABOVE = 0.2


def check_endings(
    recipe: Recipe, task: Task, trainer: Trainer, tokenizer: PreTrainedTokenizerBase
) -> dict[str, object]:
    """Answer the first validation prompts as the evaluation does; return the share that did not end for stage.json.

    A share above `WARN_ABOVE` is printed with what helps. Weights that an engine shards are not tried.
    """
    if launched_engine() is not None:
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    model = model.get_base_model() if isinstance(model, PeftModel) else model  # which has the adapter in it
    decoding, rows = Answering(recipe.eval).greedy(), task.validation.select(range(min(PROMPTS, len(task.validation))))
    prompts = encode_rows(tokenizer, rows, model.config.is_encoder_decoder)
    unfit = unfit_prompts(prompts, decoding.max_new_tokens, model.config, "eval.max_new_tokens")
    prompts = [prompt for row, prompt in enumerate(prompts) if row not in unfit]
    batches = BatchSize(min(BLOCK, recipe.eval.per_device_eval_batch_size))

    def have_ended(block: Sequence[int]) -> list[bool]:
        chosen = [prompts[row] for row in block]
        completions = batches.run(lambda size: generate(model, tokenizer, chosen, decoding, size))
        return finished(model, tokenizer, completions, decoding)

    blocks = [range(i, min(i + BLOCK, len(prompts))) for i in range(0, len(prompts), BLOCK)]
    with trainer.accelerator.autocast():  # one for all blocks: a CUDA graph of the first reads the casts it has made
        ended = gather_rows(blocks, have_ended)
    if not ended:
        return {}
    share = 1 - sum(ended) / len(ended)
    if share > WARN_ABOVE:
        say(
            f"warning: sft: {share:.0%} of {len(ended)} validation completions do not end within "
            f"{decoding.max_new_tokens} tokens (eval.max_new_tokens). More sft.num_train_epochs or a higher "
            "sft.learning_rate teaches the end; a larger ppo.response_length and eval.max_new_tokens leaves room for "
            "it; examples that sft.max_length cuts have no end to learn; eval.stop_strings and ppo.stop_strings end a "
            "text at words of yours"
        )
    return {"unfinished_share": share}
