"""What `make test-quick` runs: some of every area, in under three minutes of two cores."""

ALL = ("",)
QUICK: dict[str, tuple[str, ...]] = {  # file under tests/ -> names of its tests, with [case] where one case is enough
    # kernels: log-probs, losses, schedules, compaction, compiled CPU code
    "kernels/test_logprobs.py": ("test_options", "test_clamp"),
    "kernels/test_from_logits.py": ("test_against_the_oracle",),
    "kernels/test_loss_formulas.py": ("test_value_gradients_and_metrics", "test_refuses"),
    "kernels/test_loss_trl.py": ("test_kto", "test_cpo", "test_reward"),
    "kernels/test_plan.py": ALL,
    "kernels/test_aliasing.py": ALL,
    "kernels/test_compaction.py": ("test_dropped_mass",),
    "kernels/test_cpu_extension.py": ALL,
    "kernels/test_product.py": ("test_layouts_and_edges", "test_schedules_on_it_give_the_same_gradients_and_flops"),
    "kernels/test_imports.py": ("test_imports_run_one_way", "test_kernels_never_import_the_engine"),
    # CUDA emulated, Triton interpreted
    "kernels/test_cuda_losses.py": ALL,
    "triton_interp/test_rows.py": ("test_options", "test_ties_take_the_first_column"),
    "triton_interp/test_operators.py": ("test_recomputed",),
    # engine: loops, data, references, resuming, rollouts
    "engine/test_recipe.py": ("test_names_are_unique_so_that_flags_need_no_prefix",
                              "test_all_that_is_wrong_is_said_at_once"),
    "engine/test_data.py": ALL,
    "engine/test_trees.py": ("test_architectures[pairs-Mistral]", "test_the_layout_of_a_small_row"),
    "engine/test_training.py": ("test_dpo_loss_rewards_and_gradient_norm_equal_the_formula", "test_references_agree",
                                "test_accumulation_equals_one_big_batch[dpo]"),
    "engine/test_preferences.py": ("test_a_mixture_is_its_parts",),
    "engine/test_kto.py": ("test_kto_loss_and_metrics_equal_the_formula",),
    "engine/test_heads.py": ("test_scores_and_values_by_the_mask",),
    "engine/test_loops.py": ("test_a_callback_object_stops_the_run",),
    "engine/test_resume.py": ("test_resume_with_dropout_and_lora", "test_a_finished_run_is_not_run_again"),
    "engine/test_advantages.py": ALL,
    "engine/test_rollout.py": ("test_log_probs_ends_and_cuts", "test_functions_are_weighted_and_unscorable_is_nan"),
    "engine/test_online.py": ("test_the_reward_rises",),
    "engine/test_samples.py": ("test_some_are_spread_over_all", "test_a_table_acts_on_no_terminal"),
    # assessment: advice, talk, pages
    "assessment/test_advise.py": ("test_the_method_that_the_source_names_comes_first",
                                  "test_every_entry_of_the_guide_has_a_source_and_known_words"),
    "assessment/test_chat.py": ("test_two_side_by_side_one_of_adapters",),
    "assessment/test_report.py": ("test_which_way_a_curve_goes", "test_every_metric_that_a_loss_returns_has_its_line",
                                  "test_the_docs_hold_the_legend"),
    # people who rate
    "assessment/test_rate_tasks.py": ALL,
    "assessment/test_rate_pages.py": ("test_forms_of_others_are_not_taken", "test_nothing_is_seen_without_a_link"),
    # command line, packaging, drop-ins
    "cli/test_cli.py": ("test_bad_input_is_one_message_and_exit_code_2", "test_sft_then_dpo_then_again"),
    "cli/test_packaging.py": ALL,
    "cli/test_documents.py": ("test_files_and_links_are_there", "test_commands_are_taken"),
    "cli/test_pages.py": ("test_rows_are_of_their_kind",
                          "test_a_methods_page_trains_on_its_own_rows[docs/methods/dpo.md]"),
    "cli/test_extending.py": ("test_the_loss_equals_its_eager_formula", "test_the_backend_equals_eager_logits",
                              "test_the_method_trains_from_the_command_line"),
    # diagnosis and evaluation
    "assessment/test_eval.py": ("test_scores_are_those_of_lm_evals_own_command", "test_a_verdict_is_read_or_it_is_none",
                                "test_length_control_equals_the_likelihood_that_it_states"),
    "integrations/test_hook.py": ALL,
    "integrations/test_trl_options.py": ("test_refusals",),
    "integrations/test_trl_trainers.py": ("test_fused_after[dpo]",),
    "integrations/test_examples.py": ("test_example[plain_torch]",),
}  # fmt: skip
