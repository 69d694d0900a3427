"""SFT and reward models on TRL's trainers: the only package that touches their private names.

transformers and TRL may rename these in any release. `tests/trainers/test_huggingface_perimeter.py` checks each of
them against the installed versions.

Methods of `transformers.Trainer` that are overridden:

- `_defer_fsdp_gradient_reduction`: each micro-batch adds to the slices of a sharded reward model's gradient.
- `_finalize_training`: the mean loss over all processes; the best checkpoint is verified and the others are kept.
- `_get_grad_norm`: called before each optimizer step; refuses a loss or gradient that is not finite.
- `_get_train_sampler`: groups by length over the batch of all processes.
- `_load_best_model`, `_load_from_checkpoint`, `_save`: a reward model is saved as its adapter and head.
- `_load_optimizer_and_scheduler`: reads tensors only, no other pickled objects.
- `_load_rng_state`: restores the random state once the examples already seen have been skipped.
- `_maybe_log_save_evaluate`: delays a save at the end of an epoch until the epoch's log lines are written.
- `_move_model_to_device`: a reward model that will be sharded stays on the CPU until then.
- `_run_epoch`: restores the random state from which an epoch draws the order of its examples.
- `_save_checkpoint`: writes a checkpoint completely or not at all.
- `_save_optimizer_and_scheduler`: of a sharded reward model every process gives its slice of the optimizer's state.
- `_set_signature_columns_if_needed`: adds the column `clip` of spoken prompts to the `_signature_columns` that stay.
- `_track_num_input_tokens`: counts the tokens of an encoder-decoder's completions too.

Methods that are called: `_save_optimizer_and_scheduler` and `_save_scaler`, which know DeepSpeed and FSDP.

The attribute `is_distributed_loading_by_transformers` tells the trainer to leave the model as it is: a sharded reward
model is sharded as PPO's is (`pipeline/models/sharding.py`).

Attributes that a checkpoint saves and a restart restores, because `trainer_state.json` lacks them:

- `_tr_loss`, `_total_loss_scalar`, `_globalstep_last_logged`, `_initial_global_step`: sums behind the logged losses.
- `_metrics`, `_total_train_tokens`: what TRL logs with them.

Undocumented imports: `LengthGroupedSampler` of `transformers.trainer_pt_utils`, and `unset_hf_deepspeed_config` of
`transformers.integrations.deepspeed`.
"""
