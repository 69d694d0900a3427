"""Keys of TRL's configs, and former ones of Relay, that a recipe may not set, each with the reason: data, no code."""

_DIRECTORY = "Relay sets it: every stage has its own directory in the run directory"
_SEED = "write seed at the top of the recipe, where it holds for every stage"
_HARDWARE = "hardware is chosen by accelerate launch and accelerate_configs/, not by a recipe"
_TEXT = "Relay turns text into tokens itself, the same way for every stage"
_MODEL = "use the keys of the model section"
_RESTART = "a restart goes on exactly where the stage was interrupted"
_ALWAYS = "a stage always trains, and eval_strategy says when it evaluates"
_NO_PREDICTIONS = "it does nothing here: sft evaluates the loss alone, the eval stage scores predictions"
_IN_TRAINING = "it does nothing here: a stage evaluates while it trains, in the precision of the training"
_DEPRECATED = "TRL has deprecated it"
_NO_LABELS = "it does nothing here: the loss compares two scores, and there are no labelled tokens"
# Also for every key that starts with hub_ or push_to_hub.
UPLOADS = "no run uploads anything; relay push uploads a finished model"

REFUSED_SFT_KEYS: dict[str, str] = {
    "output_dir": _DIRECTORY,
    "overwrite_output_dir": _DIRECTORY,
    "logging_dir": _DIRECTORY,
    "seed": _SEED,
    "data_seed": _SEED,
    "use_cpu": _HARDWARE,
    "no_cuda": _HARDWARE,
    "use_mps_device": _HARDWARE,
    "local_rank": _HARDWARE,
    "ddp_backend": _HARDWARE,
    "deepspeed": _HARDWARE,
    "fsdp": _HARDWARE,
    "fsdp_config": _HARDWARE,
    "fsdp_min_num_params": _HARDWARE,
    "fsdp_transformer_layer_cls_to_wrap": _HARDWARE,
    "accelerator_config": _HARDWARE,
    "parallelism_config": _HARDWARE,
    "tpu_num_cores": _HARDWARE,
    "tpu_metrics_debug": _HARDWARE,
    "dataset_text_field": _TEXT,
    "dataset_kwargs": _TEXT,
    "remove_unused_columns": _TEXT,
    "label_names": _TEXT,
    "length_column_name": _TEXT,
    "eos_token": _TEXT,
    "pad_token": _TEXT,
    "chat_template_path": _TEXT,
    "formatting_func": _TEXT,
    "assistant_only_loss": _TEXT,
    "model_init_kwargs": _MODEL,
    "trust_remote_code": _MODEL,
    "resume_from_checkpoint": "an interrupted stage resumes by itself when it is run again",
    "enable_jit_checkpoint": "every stage saves a checkpoint when it gets SIGTERM; this key would replace that",
    "ignore_data_skip": _RESTART,
    "save_only_model": _RESTART,
    "logging_nan_inf_filter": "it does nothing here: a loss that is not finite stops the run",
    "do_train": _ALWAYS,
    "do_eval": _ALWAYS,
    "do_predict": _ALWAYS,
    "prediction_loss_only": _NO_PREDICTIONS,
    "eval_accumulation_steps": _NO_PREDICTIONS,
    "eval_do_concat_batches": _NO_PREDICTIONS,
    "eval_use_gather_object": _NO_PREDICTIONS,
    "include_for_metrics": _NO_PREDICTIONS,
    "include_inputs_for_metrics": _NO_PREDICTIONS,
    "batch_eval_metrics": _NO_PREDICTIONS,
    "bf16_full_eval": _IN_TRAINING,
    "fp16_full_eval": _IN_TRAINING,
    "save_on_each_node": "all machines share the run directory, so one process writes a checkpoint",
    "ddp_timeout": "RELAY_TIMEOUT_MINUTES says how long the processes of every stage wait for each other",
    "restore_callback_states_from_checkpoint": "it does nothing here: no callback of Relay keeps a state",
    "truncation_mode": _DEPRECATED,
    "use_liger_kernel": _DEPRECATED,
    "liger_kernel_config": _DEPRECATED,
    "use_cache": "it does nothing here: training never reads a key-value cache",
    "auto_find_batch_size": (
        "it makes the effective batch smaller; lower per_device_train_batch_size and raise gradient_accumulation_steps"
    ),
    "push_to_hub": UPLOADS,
    "trackio_space_id": UPLOADS,
    "trackio_bucket_id": UPLOADS,
    "trackio_static_space_id": UPLOADS,
}
REFUSED_REWARD_KEYS: dict[str, str] = REFUSED_SFT_KEYS | {
    "dataset_num_proc": _TEXT,
    "max_length": "pairs longer than the model's context are dropped and counted",
    "pad_to_multiple_of": "Relay's own collator pads to the longest text",
    "label_smoothing_factor": _NO_LABELS,
    "average_tokens_across_devices": _NO_LABELS,
    "include_num_input_tokens_seen": "it does nothing here: num_tokens is always logged",
    "neftune_noise_alpha": "a reward model has an adapter and a head, and no embeddings of its own to add noise to",
}
REFUSED_PPO_KEYS: dict[str, str] = {
    "whiten_advantages": "it is now scale_rewards: batch for true, none for false",
}
DEPRECATED_VALUES: dict[str, str] = {"loss_type": "chunked_nll"}

# A key that acts only where another key has a certain value; otherwise it would be accepted and ignored.
ACTS_ONLY_WITH: dict[str, tuple[str, str | bool]] = {
    "eval_steps": ("eval_strategy", "steps"),
    "save_steps": ("save_strategy", "steps"),
    "logging_steps": ("logging_strategy", "steps"),
    "packing_strategy": ("packing", True),
    "label_smoothing_factor": ("loss_type", "nll"),
}
# A key that does nothing where another key has a certain value.
IDLE_WITH: dict[str, tuple[str, str | int]] = {
    "eval_delay": ("eval_strategy", "no"),
    "eval_on_start": ("eval_strategy", "no"),
    "eval_packing": ("eval_strategy", "no"),
    "dataloader_in_order": ("dataloader_num_workers", 0),
    "dataloader_multiprocessing_context": ("dataloader_num_workers", 0),
    "dataloader_persistent_workers": ("dataloader_num_workers", 0),
    "dataloader_prefetch_factor": ("dataloader_num_workers", 0),
}
# `optim_args` changes nothing for these optimizers; `optim_target_modules` acts only for GaLore and APOLLO.
OPTIMIZERS_WITHOUT_ARGS = (
    "adamw_torch",
    "adamw_torch_fused",
    "adamw_torch_xla",
    "adamw_torch_npu_fused",
    "adamw_bnb_8bit",
    "adamw_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "adafactor",
    "lomo",
    "adalomo",
)
LOW_RANK_OPTIMIZERS = ("galore", "apollo")
# What the names of optimizers begin with that read no key of Adam; Lion reads the betas alone.
OPTIMIZERS_WITHOUT_ADAM = (
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "galore",
    "lomo",
    "adalomo",
    "grokadamw",
    "schedule_free_sgd",
)

_JOINS = "it joins texts into one row, and an encoder reads one prompt"
# Keys of SFT that do nothing, or not what they say, where an encoder reads the prompt.
REFUSED_FOR_ENCODER_DECODERS: dict[str, str] = {
    "packing": _JOINS,
    "eval_packing": _JOINS,
    "padding_free": _JOINS,
    "pad_to_multiple_of": "its two sides are padded to the longest of a batch",
    "router_aux_loss_coef": "the loss of a router is not computed for it",
    "neftune_noise_alpha": "its two sides have embeddings of their own, which would get no noise",
}
