"""Settings of TRL, transformers and others that a recipe does not have: what serves in their place.

A name that means the same here under another name is read as that (`RENAMED`); others have a sentence (`TABLE`).
Values with which a setting asks for what is done anyway are taken and change nothing. A test reads TRL's dataclasses:
none of their settings is without an answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container
from typing import Any, NamedTuple

from align_engine.errors import BadInput

RENAMED = {  # older spellings of TRL and transformers, with the same meaning
    "torch_dtype": "dtype",
    "evaluation_strategy": "eval_strategy",
    "dataset_config_name": "dataset_config",
    "max_seq_length": "max_length",
    "use_liger": "use_liger_kernel",
    "activation_checkpointing": "gradient_checkpointing",
    "use_transformers_paged": "use_transformers_continuous_batching",
}

OFF = "false none no 0 0.0"
ANY = "*"
LAUNCH = (
    "accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m align_engine METHOD ...; `align recipes` says "
    "where these files lie"
)
SAMPLER = (
    "completions are sampled in this process, or by a server that you start: --server_base_url http://HOST:PORT/v1"
)
REFERENCE = "--reference says where the reference comes from"
HUB = "`final` is uploaded once, when the run is finished: --push_to_hub, --hub_model_id, and HF_TOKEN"
SPREAD = "how processes share the model stands in a file of accelerate: " + LAUNCH
STREAM = "rows are tokenised once, cached and memory-mapped: write a stream to a .jsonl or .parquet file first"
SCALED = "the formula's own constants stay; grpo has --scale_rewards, rloo --normalize_advantages"
LATER = "entropy is steered by a constant --entropy_coef of grpo and ppo"
SEEN = "the run's report and metrics.jsonl show it"
LOADED = "models are loaded by --dtype, --attn_implementation and --trust_remote_code"
MIXED = "one data set is read: write the mixture to a folder or file (datasets.concatenate_datasets(...).save_to_disk)"
PADS = "batches are padded to their longest row, or with --packing on not at all"

# names; values that ask for what is done anyway ("*": all, it only steers another implementation); what serves instead
TABLE: tuple[tuple[str, str, str], ...] = (
    # model
    ("model_init_kwargs config_name tokenizer_name use_fast_tokenizer", "none", LOADED),
    ("lora_target_parameters lora_modules_to_save use_rslora use_dora lora_bias lora_init", "none false",
     "fresh adapters are plain LoRA of --lora_target_modules; adapters that peft has saved are trained further as they "
     "are: --use_peft --model_name_or_path ADAPTERS"),
    ("lora_task_type", ANY, "the method says it"),
    ("bnb_4bit_quant_type", "nf4", "--load_in_4bit is NF4"),
    ("use_bnb_nested_quant bnb_4bit_use_double_quant bnb_4bit_quant_storage bnb_4bit_compute_dtype", "false uint8 none",
     "--load_in_4bit is NF4 with single quantisation, or load weights that are saved quantised otherwise"),
    ("use_unsloth use_flash_attention_2", "false none", "--attn_implementation flash_attention_2, --use_liger_kernel"),
    # tokens
    ("chat_template chat_template_path", "none",
     "the template is the tokenizer's own: write yours as chat_template.jinja into the model's folder"),
    ("chat_template_kwargs", "none", "a column `chat_template_kwargs` of the data reaches the template"),
    ("eos_token pad_token padding_value label_pad_token_id padding_side", "none",
     "special tokens are the tokenizer's own: set them in the model's tokenizer_config.json"),
    ("truncation_mode", "none", "--overlong truncate cuts a prompt at its left and a completion at its end; or drop"),
    ("max_target_length max_completion_length", "none",
     "--max_length limits both, --max_prompt_length the prompt: what is left is the completion's"),
    # data
    ("dataset_streaming streaming", OFF, STREAM),
    ("datasets dataset_mixture dataset_mixer test_split_size", "none", MIXED),
    ("dataset_text_field", "text", "the column of whole texts is `text`: rename yours"),
    ("dataset_prompt_column", "prompt", "the column of prompts is `prompt`: rename yours"),
    ("system_prompt", "none", "write it as the first message of each row, with role system"),
    ("dataset_kwargs", ANY, "rows are recognised by their columns (docs/formats.md)"),
    ("dataset_batch_size num_of_sequences chars_per_token preprocessing_num_workers", ANY, "--dataset_num_proc"),
    ("shuffle_dataset", "true", "rows are shuffled in each epoch, in an order that depends on --seed alone"),
    ("data_seed", "none", "--seed orders the rows too"),
    ("packing_strategy eval_packing", "bfd true", "--packing on reads sequences as one row, none is cut: bfd"),
    ("padding_free", "false", "--packing on: rows without padding, that share their prompts besides"),
    ("pad_to_multiple_of", "none", PADS),
    ("completion_only_loss", "none true",
     "rows with a prompt are trained on the completion alone; rows of `text` or `messages` as wholes, or with "
     "--assistant_only_loss on the assistant's messages"),
    ("train_sampling_strategy group_by_length length_column_name", "false random sequential length none",
     "--packing on with --tokens_per_batch N puts sequences together by their tokens"),
    ("dataloader_drop_last", "false", "every row is seen once an epoch; the last step of one may be smaller"),
    ("dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
     "dataloader_multiprocessing_context dataloader_in_order remove_unused_columns label_names use_cache "
     "use_logits_to_keep ignore_bias_buffers", ANY, "rows are token ids before the first step: no workers are needed"),
    # precision, memory, speed
    ("fp16 fp16_full_eval half_precision_backend fp16_opt_level", OFF,
     "float16 loses small gradients: --bf16, or --dtype bfloat16"),
    ("bf16_full_eval", OFF, "--bf16 serves training and evaluation"),
    ("tf32", "none", "TF32 is as torch has it: export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1"),
    ("activation_checkpointing_kwargs", "none use_reentrant:false",
     "--gradient_checkpointing is torch's, not reentrant"),
    ("torch_compile torch_compile_backend torch_compile_mode jit_mode_eval", OFF,
     "models are not compiled; the head and the loss are fused kernels (align env)"),
    ("liger_kernel_config", "none", "--use_liger_kernel puts in Liger's norms, rotary embeddings and gated units"),
    ("torch_empty_cache_steps", "none", "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True; or --fit auto"),
    ("auto_find_batch_size", OFF, "--fit auto finds what fits before the first step"),
    ("use_cpu no_cuda use_mps_device", OFF, "hide the GPUs: CUDA_VISIBLE_DEVICES= align ..."),
    ("cast_lm_head_to_fp32", OFF, "log-probs are float32 for any dtype of the head"),
    ("optim_target_modules", "none", "GaLore and APOLLO are not there: --use_peft, or a smaller --optim"),
    ("neftune_noise_alpha", "none 0", "no noise is added to embeddings"),
    ("label_smoothing_factor", OFF, "--label_smoothing of dpo, cpo and simpo is that of preferences; sft has none"),
    ("average_tokens_across_devices", "true", "a loss is the mean over all that a step sees, on all devices"),
    # processes
    ("deepspeed fsdp fsdp_config fsdp_transformer_layer_cls_to_wrap fsdp_min_num_params parallelism_config "
     "accelerator_config accelerate_config config_file num_processes num_machines machine_rank main_process_ip "
     "main_process_port mixed_precision gpu_ids", "none false", SPREAD),
    ("ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
     "local_rank", ANY, SPREAD),
    ("ds3_gather_for_generation", ANY, "FSDP2's shards are gathered while a completion is sampled"),
    # log, evaluation, checkpoints
    ("log_on_each_node save_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm debug "
     "skip_memory_metrics include_num_input_tokens_seen include_tokens_per_second prediction_loss_only "
     "eval_do_concat_batches eval_use_gather_object eval_accumulation_steps batch_eval_metrics include_for_metrics "
     "enable_jit_checkpoint ignore_data_skip restore_callback_states_from_checkpoint logging_dir", ANY, SEEN),
    ("project trackio_space_id trackio_bucket_id trackio_static_space_id", "none huggingface",
     "trackers get the project `align`; --run_name names the run, and TRACKIO_SPACE_ID, WANDB_PROJECT are theirs"),
    ("do_train", "true", "the command trains"),
    ("do_eval", ANY, "--eval_dataset_name, --dataset_test_split or --eval_strategy asks for an evaluation"),
    ("do_predict", OFF, "align eval, or --eval_dataset_name, judges a model"),
    ("eval_on_start eval_delay", OFF, "the first evaluation is that after --eval_steps"),
    ("save_only_model save_safetensors", "false true",
     "checkpoints hold what an exact resume needs; `final` is the model alone, with --save_strategy no all there is"),
    ("overwrite_output_dir", OFF,
     "the same command goes on with the run of its output_dir; --overwrite deletes that run and starts afresh"),
    ("hub_token hub_strategy hub_always_push hub_revision push_to_hub_revision hub_user", "false none every_save end",
     HUB),
    ("full_determinism", OFF, "the same command ends in the same bits on a CPU; a GPU's kernels are torch's"),
    ("env", "none", "set environment variables in front of the command: NAME=VALUE align ..."),
    ("wandb_entity wandb_project wandb_run_group", "none", "export WANDB_ENTITY, WANDB_PROJECT, WANDB_RUN_GROUP"),
    # preferences
    ("disable_dropout", "true",
     "preference and online methods run without dropout, sft as the model's config.json says"),
    ("precompute_ref_log_probs", "none",
     "--reference precomputed: one pass, kept on disk (the default where nothing is adapted)"),
    ("precompute_ref_batch_size", "none", "--per_device_eval_batch_size"),
    ("sync_ref_model", OFF, "--reference ema of dpo and kto, with ref_model_mixup_alpha and ref_model_sync_steps"),
    ("ref_model_mixup_alpha ref_model_sync_steps", "0.6 512",
     "grpo and rloo keep their reference; dpo and kto can have --reference ema, iterate a new one each round"),
    ("reference_free", OFF, "--reference none, or align simpo, cpo, orpo"),
    ("ref_model_init_kwargs force_use_ref_model model_adapter_name ref_adapter_name", "none false", REFERENCE),
    ("ld_alpha rpo_alpha", "none",
     "--loss_type sigmoid,sft with --loss_weights is RPO; the length's share is not there"),
    ("generate_during_eval", OFF, "generate afterwards: align generate --models name=mine,tier=best,path=RUN/final"),
    ("is_encoder_decoder tools base_model_attribute_name", "none false",
     "causal models; tools are a column of the data"),
    # rollouts
    ("use_vllm vllm_mode vllm_model_impl vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout "
     "vllm_group_port vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_max_model_length "
     "vllm_tensor_parallel_size vllm_device vllm_dtype vllm_max_model_len vllm_guided_decoding_regex "
     "vllm_structured_outputs_regex", "false none", SAMPLER),
    ("vllm_importance_sampling_cap", "none", "--vllm_importance_sampling_clip_max"),
    ("generation_batch_size", "none",
     "--steps_per_generation: a rollout has per_device_train_batch_size x steps_per_generation completions a process"),
    ("num_generations_eval", "none", "an evaluation samples --num_generations too"),
    ("min_p repetition_penalty generation_kwargs", "none 1.0 1",
     "sampling has --temperature, --top_p and --top_k: the loss sees the distribution that was sampled from"),
    ("cache_implementation transformers_continuous_batching_config", "none",
     "the cache is transformers' dynamic one, or with --use_transformers_continuous_batching a paged one"),
    ("log_multimodal log_unique_prompts wandb_log_unique_prompts", ANY, SEEN),
    ("log_completions_hub_repo", "none", HUB),
    ("reward_model_name_or_path reward_model_path", "none",
     "--reward_funcs takes the folder of a reward model as well"),
    ("sft_model_path", "none", "--model_name_or_path is the model that training starts from; --ref_model_name_or_path"),
    ("multi_objective_aggregation reward_clip_range", "none sum_then_normalize", SCALED),
    ("use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target", ANY, LATER),
    ("max_tool_calling_iterations", "none",
     "completions are single answers: no tools are called while they are sampled"),
    ("total_episodes num_mini_batches", "none",
     "--max_steps x per_device_train_batch_size x gradient_accumulation_steps completions are learnt from"),
    ("response_length", "none", "--max_completion_length"),
    ("local_rollout_forward_batch_size", "none", "--per_device_generation_batch_size"),
    ("stop_token stop_token_id", "none eos", "completions end at the EOS of the tokenizer, and at --stop_strings"),
    ("num_sample_generations exp_name", ANY, "--eval_steps with an evaluation set; --run_name"),
    ("rloo_k", "none", "--num_generations"),
    ("token_level_kl", OFF, "rloo's KL term is one of whole completions, ppo's one of each token"),
    # LLaMA-Factory, axolotl, OpenRLHF
    ("stage finetuning_type template", "none",
     "the command is the stage: align sft, dpo, kto, rm, ppo; --use_peft is LoRA; the template is the tokenizer's"),
    ("rlhf_type train_type tuner_type", "none", "the command is the method: align dpo, kto, ...; --use_peft is LoRA"),
    ("cutoff_len sequence_len max_len", "none", "--max_length"),
    ("prompt_max_len generate_max_len", "none", "--max_prompt_length, --max_completion_length"),
    ("dataset dataset_dir prompt_data input_key chosen_key rejected_key", "none",
     "--dataset_name: a file, a folder or a hub name, with the columns prompt, completion, chosen, rejected"),
    ("max_samples split_dataset_ratio", "none", "write the rows that you want to a file of their own"),
    ("overwrite_cache plot_loss apply_chat_template load_checkpoint", ANY, "always so"),
    ("lora_target lora_rank target_modules", "none", "--lora_target_modules, --lora_r"),
    ("pref_beta pref_loss pref_ftx init_kl_coef", "none", "--beta, --loss_type; ppo has --kl_coef"),
    ("model base_model pretrain reward_pretrain", "none", "--model_name_or_path; a reward model in --reward_funcs"),
    ("micro_batch_size micro_train_batch_size train_batch_size rollout_batch_size micro_rollout_batch_size", "none",
     "--per_device_train_batch_size x --gradient_accumulation_steps, and --steps_per_generation"),
    ("num_epochs max_epochs", "none", "--num_train_epochs"),
    ("actor_learning_rate critic_learning_rate", "none", "--learning_rate, and ppo's --value_learning_rate"),
    ("save_path", "none", "--output_dir"),
    ("flash_attn", OFF, "--attn_implementation flash_attention_2"),
    ("packing_samples", OFF, "--packing on"),
    ("adam_offload ref_offload", OFF, "--reference cpu-offload, --optim paged_adamw_8bit, --activation_offloading"),
    ("use_wandb wandb_run_name", OFF, "--report_to wandb, --run_name"),
    ("zero_stage", "none", SPREAD),
)  # fmt: skip


class Foreign(NamedTuple):
    """A setting of others."""

    same: frozenset[str]  # values that ask for what is done anyway
    sentence: str  # what serves instead


FOREIGN = {
    name: Foreign(frozenset(same.split()), sentence) for names, same, sentence in TABLE for name in names.split()
}


def is_needless(name: str, value: Any) -> bool:
    """Whether a setting of others asks, with this value (text, a list or a dict of texts), for what is done anyway."""
    same = FOREIGN[name].same
    return ANY in same or re.sub(r"[\s{}\"'\[\]]", "", str(value)).lower() in same


def settle(given: dict[str, Any], known: Container[str], where: str, note: Callable[[str], None]) -> dict[str, Any]:
    """What of `given` the recipe has, under its own names; `note` is told of what changes nothing.

    Args:
        given: name -> value, of names that are no settings of the recipe.
        known: the settings that it has.
        where: they stand, e.g. "recipe r.yaml".
    Returns:
        values by the recipe's names, and those that nobody knows by theirs.
    Raises:
        BadInput: with the answer to each setting that asks for something else.
    """
    found, answers, needless = {}, [], []
    for name, value in given.items():
        if RENAMED.get(name, "") in known:
            found[RENAMED[name]] = value
        elif name not in FOREIGN:
            found[name] = value
        elif is_needless(name, value):
            needless.append(name)
        else:
            answers.append(f"{name}: {FOREIGN[name].sentence}")
    if answers:
        many = len(answers) > 1
        raise BadInput(f"{where}: {'these are' if many else 'this is'} said otherwise here\n  " + "\n  ".join(answers))
    if needless:
        note(f"{where}: {', '.join(needless)} {'change' if len(needless) > 1 else 'changes'} nothing here")
    return found
