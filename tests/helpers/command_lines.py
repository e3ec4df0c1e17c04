"""Command lines as TRL's documentation and others' have them, with local names for models and data.

Each is (where it stands, command, flags or YAML, what comes of it): "" where it runs, else what the answer says.
"""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """One of them; model, data and folder are put in by the test where it names none."""

    where: str
    command: str
    text: str
    answer: tuple[str, ...] = ()  # parts of the sentence; (): it runs

    @property
    def is_yaml(self) -> bool:
        return "\n" in self.text


LAUNCHED = ("num_processes", "accelerate launch")
LINES = (
    Line("TRL README, SFT", "sft", ""),
    Line("TRL README, DPO", "dpo", ""),
    Line("TRL README, KTO", "kto", ""),
    Line("TRL CLI, reward model", "reward", ""),
    Line("TRL CLI, GRPO", "grpo", "--reward_funcs accuracy_reward", ("trl.rewards:accuracy_reward",)),
    Line("TRL CLI, RLOO as YAML", "rloo", "reward_funcs:\n  - accuracy_reward\n", ("trl.rewards:accuracy_reward",)),
    Line("TRL CLI, several processes", "sft", "--num_processes 4", LAUNCHED),
    Line("TRL CLI, accelerate's file", "dpo", "--accelerate_config zero2", ("accelerate_config", "accelerate launch")),
    Line("TRL CLI, a mixture as YAML", "kto", "datasets:\n  - path: one\n  - path: two\n",
         ("datasets", "concatenate_datasets")),
    Line("TRL examples/cli_configs", "sft",
         "report_to:\n  none\nlearning_rate:\n  0.0001\nlr_scheduler_type:\n  cosine\n"),
    Line("TRL trl/scripts/sft.py", "sft",
         "--learning_rate 2.0e-5 --num_train_epochs 1 --packing --per_device_train_batch_size 2 "
         "--gradient_accumulation_steps 8 --eos_token <|im_end|> --eval_strategy steps --eval_steps 100 --push_to_hub",
         ("eos_token", "tokenizer_config.json")),
    Line("TRL trl/scripts/sft.py without the hub and the token", "sft",
         "--learning_rate 2.0e-5 --num_train_epochs 1 --packing --per_device_train_batch_size 2 "
         "--gradient_accumulation_steps 8 --eval_strategy steps --eval_steps 100"),
    Line("TRL trl/scripts/dpo.py", "dpo",
         "--learning_rate 5.0e-7 --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 "
         "--eval_strategy steps --eval_steps 50 --no_remove_unused_columns"),
    Line("TRL trl/scripts/dpo.py, LoRA", "dpo",
         "--learning_rate 5.0e-6 --num_train_epochs 1 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 "
         "--eval_strategy steps --eval_steps 50 --no_remove_unused_columns --use_peft --lora_r 32 --lora_alpha 16"),
    Line("TRL trl/scripts/kto.py", "kto",
         "--per_device_train_batch_size 16 --num_train_epochs 1 --learning_rate 5e-7 --lr_scheduler_type=cosine "
         "--gradient_accumulation_steps 1 --eval_steps 500 --warmup_steps 0.1 --logging_first_step",
         ("eval_steps = 500", "eval_strategy: steps")),
    Line("TRL trl/scripts/kto.py, 4 bits", "kto",
         "--per_device_train_batch_size 8 --num_train_epochs 1 --learning_rate 5e-7 --lr_scheduler_type=cosine "
         "--gradient_accumulation_steps 1 --eval_strategy steps --eval_steps 500 --warmup_steps 0.1 "
         "--logging_first_step --use_peft --load_in_4bit --lora_target_modules=all-linear --lora_r=16 --lora_alpha=16"),
    Line("TRL examples/scripts/reward_modeling.py", "reward",
         "--per_device_train_batch_size 8 --num_train_epochs 1 --learning_rate 1.0e-5 --eval_strategy steps "
         "--eval_steps 50 --max_length 60"),
    Line("TRL examples/scripts/reward_modeling.py, LoRA", "reward",
         "--per_device_train_batch_size 8 --num_train_epochs 1 --learning_rate 1.0e-4 --eval_strategy steps "
         "--eval_steps 50 --max_length 60 --use_peft --lora_task_type SEQ_CLS --lora_r 32 --lora_alpha 16"),
    Line("TRL examples/scripts/cpo.py, LoRA", "cpo",
         "--per_device_train_batch_size 4 --learning_rate 8e-5 --gradient_accumulation_steps 1 --eval_strategy steps "
         "--eval_steps 500 --optim rmsprop --warmup_steps 150 --logging_first_step --no_remove_unused_columns "
         "--use_peft --lora_r 16 --lora_alpha 16"),
    Line("TRL examples/scripts/orpo.py", "orpo",
         "--per_device_train_batch_size 4 --learning_rate 8e-6 --gradient_accumulation_steps 1 --warmup_steps 150 "
         "--logging_first_step --no_remove_unused_columns"),
    Line("TRL peft_integration, modules", "sft",
         "--use_peft --lora_r 32 --lora_alpha 16 --lora_dropout 0.05 --lora_target_modules q_proj v_proj"),
    Line("TRL peft_integration, 8 bits", "sft", "--load_in_8bit --use_peft --lora_r 32 --lora_alpha 16"),
    Line("TRL peft_integration, GRPO", "grpo",
         "--learning_rate 1.0e-5 --per_device_train_batch_size 2 --use_peft --lora_r 32 --lora_alpha 16",
         ("reward_funcs = [] is required",)),
    Line("TRL examples/scripts/gspo.py", "grpo",
         "--learning_rate 1e-5 --dtype bfloat16 --max_completion_length 8 --use_peft --lora_target_modules q_proj, "
         "v_proj --log_completions --per_device_train_batch_size 8 --num_generations 8 --importance_sampling_level "
         "sequence --epsilon 3e-4 --epsilon_high 4e-4 --beta 0.0 --loss_type grpo --gradient_accumulation_steps 2 "
         "--steps_per_generation 8 --reward_funcs tiny:word_reward"),
    Line("TRL examples/scripts/grpo_vlm.py", "grpo",
         "--learning_rate 1e-5 --dtype bfloat16 --max_completion_length 8 --use_vllm --vllm_mode colocate --use_peft "
         "--lora_target_modules q_proj, v_proj --log_completions",
         ("use_vllm", "vllm_mode", "--server_base_url")),
    Line("TRL examples/scripts/dpo_vlm.py", "dpo",
         "--dataset_streaming --per_device_train_batch_size 2 --max_steps 100 --gradient_accumulation_steps 32 "
         "--dataset_num_proc 32 --dtype bfloat16 --use_peft --lora_target_modules all-linear",
         ("dataset_streaming", ".jsonl")),
    Line("TRL examples/scripts/ppo.py", "ppo",
         "--learning_rate 3e-6 --num_ppo_epochs 1 --num_mini_batches 1 --per_device_train_batch_size 64 "
         "--gradient_accumulation_steps 1 --total_episodes 10000 --sft_model_path one --reward_model_path two "
         "--missing_eos_penalty 1.0",
         ("num_mini_batches", "total_episodes", "sft_model_path", "reward_model_path", "--reward_funcs")),
    Line("TRL lora_without_regret, GRPO", "grpo",
         "--learning_rate 1.0e-6 --lr_scheduler_type cosine --warmup_steps 0.0 --max_grad_norm 1.0 --beta 0.0 "
         "--max_completion_length 8 --num_generations 16 --generation_batch_size 16 --vllm_mode colocate",
         ("generation_batch_size", "--steps_per_generation", "vllm_mode")),
    Line("alignment-handbook, DPO", "dpo",
         "torch_dtype: null\ndataset_num_proc: 1\nbf16: true\nbeta: 0.01\ndo_eval: true\neval_strategy: steps\n"
         "eval_steps: 100\ngradient_accumulation_steps: 2\ngradient_checkpointing: true\n"
         "gradient_checkpointing_kwargs:\n  use_reentrant: False\nlearning_rate: 5.0e-7\nlog_level: info\n"
         "logging_steps: 10\nlr_scheduler_type: cosine\nmax_length: 60\nmax_prompt_length: 30\nnum_train_epochs: 1\n"
         "optim: adamw_torch\nsave_strategy: \"steps\"\nsave_steps: 100\nsave_total_limit: 1\nseed: 42\n"
         "warmup_ratio: 0.1\n"),
    Line("alignment-handbook, SFT in 4 bits", "sft",
         "model_revision: main\ntorch_dtype: bfloat16\nload_in_4bit: true\nuse_peft: true\nlora_r: 16\nlora_alpha: 16\n"
         "lora_dropout: 0.05\nlora_target_modules:\n- q_proj\n- k_proj\nbf16: true\ndo_eval: true\n"
         "eval_strategy: epoch\nlogging_strategy: steps\nlr_scheduler_type: cosine\nmax_seq_length: 60\nmax_steps: -1\n"
         "num_train_epochs: 1\nreport_to: []\nsave_strategy: \"steps\"\n"),
    Line("alignment-handbook, ORPO", "orpo",
         "model_revision: main\ntorch_dtype: bfloat16\nbeta: 0.05\ngradient_checkpointing_kwargs:\n"
         "  use_reentrant: true\nhub_model_id: mine\npush_to_hub: true\nsave_strategy: \"no\"\n",
         ("gradient_checkpointing_kwargs", "is none of selective=true")),
    Line("open-r1, SFT", "sft",
         "eval_strategy: 'no'\ngradient_checkpointing: true\ngradient_checkpointing_kwargs:\n  use_reentrant: false\n"
         "do_eval: false\nlearning_rate: 4.0e-05\nlog_level: info\nlogging_strategy: steps\n"
         "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr_rate: 0.1\npacking: false\n"
         "max_grad_norm: 0.2\nmax_length: 60\nmax_steps: -1\nnum_train_epochs: 1\nsave_strategy: epoch\n"
         "save_total_limit: 1\nwarmup_ratio: 0.03\n"),
    Line("open-r1, GRPO", "grpo",
         "system_prompt: \"Think first.\"\ndataset_prompt_column: problem\nuse_vllm: true\nlog_completions: true\n"
         "logging_first_step: true\nnum_generations: 16\nreward_funcs:\n- accuracy\n- format\n"
         "overwrite_output_dir: true\n",
         ("system_prompt", "dataset_prompt_column", "use_vllm", "overwrite_output_dir", "--overwrite")),
    Line("LLaMA-Factory, DPO", "dpo",
         "stage: dpo\ndo_train: true\nfinetuning_type: lora\nlora_target: all\npref_beta: 0.1\npref_loss: sigmoid\n"
         "dataset: mine\ntemplate: llama3\ncutoff_len: 2048\noverwrite_cache: true\nplot_loss: true\n",
         ("stage", "pref_beta", "--beta", "cutoff_len", "--max_length", "lora_target", "dataset:")),
    Line("OpenRLHF, DPO", "dpo",
         "--train_batch_size 128 --micro_train_batch_size 1 --pretrain one --bf16 --max_epochs 1 --max_len 8192 "
         "--zero_stage 3 --learning_rate 5e-7 --beta 0.1 --apply_chat_template --flash_attn --gradient_checkpointing",
         ("pretrain", "--model_name_or_path", "max_len", "zero_stage", "flash_attn")),
    Line("ms-swift, DPO", "dpo",
         "--rlhf_type dpo --model one --train_type lora --torch_dtype bfloat16 --lora_rank 8 --target_modules "
         "all-linear --max_length 2048 --warmup_ratio 0.05 --dataloader_num_workers 4",
         ("rlhf_type", "model:", "lora_rank", "target_modules")),
)  # fmt: skip


def tables() -> dict[str, str]:
    """The tables of docs/from-trl.md by the marks that they stand between, as Markdown."""
    from align_engine.recipe.foreign import RENAMED, TABLE

    def table(header: str, rows: list[tuple[str, ...]]) -> str:
        cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
        return "\n".join([header, "|---" * header.count(" | ") + "|---|", *(f"| {' | '.join(row)} |" for row in cells)])

    lines = [
        (line.where, f"`align {line.command}`, {'YAML' if line.is_yaml else 'flags'}",
         f"answered: {', '.join(f'`{part}`' for part in line.answer)}" if line.answer else "runs")
        for line in LINES
    ]  # fmt: skip
    names = [(", ".join(f"`{name}`" for name in names.split()), text) for names, _, text in TABLE]
    renamed = [(f"`{old}`", f"`{new}`") for old, new in RENAMED.items()]
    return {
        "lines": table("| where it stands | read as | what comes of it |", lines),
        "renamed": table("| name | read as |", renamed),
        "answers": table("| setting of TRL, transformers or others | what serves instead |", names),
    }


def between(text: str, mark: str, content: str) -> str:
    """`text` with other content between `<!-- mark -->` and `<!-- /mark -->`."""
    before, start, rest = text.partition(f"<!-- {mark} -->\n")
    _, end, after = rest.partition(f"<!-- /{mark} -->")
    if not start or not end:
        raise ValueError(f"no <!-- {mark} --> ... <!-- /{mark} -->")
    return f"{before}{start}\n{content}\n\n{end}{after}"


if __name__ == "__main__":  # python tests/helpers/command_lines.py: writes them
    from pathlib import Path

    page = Path(__file__).parents[2] / "docs" / "from-trl.md"
    text = page.read_text()
    for mark, content in tables().items():
        text = between(text, mark, content)
    page.write_text(text)
