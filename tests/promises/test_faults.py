"""The 61 faults that the project answers for, each with the tests that hold its behaviour."""

from __future__ import annotations

import ast
from collections.abc import Mapping

from tests.support.paths import TESTS

EVIDENCE: Mapping[int, tuple[str, ...]] = {
    1: (
        "neurosig/questions/test_load.py::test_missing_file_and_unknown_suffix",
        "neurosig/questions/test_load.py::test_folder_without_files",
    ),
    2: ("neurosig/questions/test_load.py::test_empty_file_has_0_questions",),
    3: ("neurosig/test_export.py::test_a_single_question_has_no_context",),
    4: ("neurosig/questions/test_load.py::test_invalid_json_names_line_and_column",),
    5: ("neurosig/questions/test_load.py::test_torn_last_line_is_an_error_even_if_a_limit_leaves_it_out",),
    6: (
        "neurosig/questions/test_load.py::test_invalid_utf8_names_line_and_byte",
        "neurosig/questions/test_load.py::test_byte_order_mark_is_accepted_with_a_note",
        "neurosig/questions/test_load.py::test_utf16_is_named",
    ),
    7: ("neurosig/questions/test_load.py::test_crlf_blank_lines_and_no_final_newline",),
    8: ("neurosig/questions/test_load.py::test_duplicate_id_names_both_lines",),
    9: (
        "neurosig/questions/test_load.py::test_same_text_under_two_ids_warns_with_the_count",
        "neurosig/selection/test_choose.py::test_a_question_its_twin_and_the_unclean_are_never_context",
    ),
    10: ("neurosig/questions/test_load.py::test_malformed_field_is_named_with_its_line",),
    11: ("neurosig/questions/test_load.py::test_malformed_field_is_named_with_its_line",),
    12: (
        "neurosig/questions/test_load.py::test_text_hash_is_of_nfc_question_and_choices",
        "neurosig/questions/test_load.py::test_unicode_line_separators_and_emoji_stay_in_the_text",
        "promises/test_faults_whole_runs.py::test_odd_texts_pass_through_every_step",
    ),
    13: ("neurosig/questions/test_prompts.py::test_special_tokens_inside_a_question_stay_text",),
    14: ("neurosig/test_export.py::test_a_question_that_does_not_fit_is_left_out_and_counted",),
    15: (
        "neurosig/questions/test_load.py::test_line_limit_is_named",
        "neurosig/questions/test_load.py::test_line_that_is_no_record_is_named",
    ),
    16: ("neurosig/questions/test_load.py::test_other_format_under_a_jsonl_name_is_named",),
    17: ("neurosig/test_manifest.py::test_a_malformed_row_names_line_and_field",),
    18: ("neurosig/test_manifest.py::test_a_malformed_row_names_line_and_field",),
    19: ("neurosig/test_manifest.py::test_an_export_that_was_killed_is_incomplete",),
    20: ("neurosig/test_manifest.py::test_files_changed_after_export_are_noticed",),
    21: ("neurosig/test_manifest.py::test_a_malformed_header_is_refused",),
    22: ("neurosig/test_manifest.py::test_a_malformed_header_is_refused",),
    23: (
        "neurosig/test_manifest.py::test_a_path_outside_the_folder_is_never_opened",
        "neurosig/test_manifest.py::test_symbolic_links_out_of_the_folder_are_not_followed",
    ),
    24: (
        "neurosig/test_manifest.py::test_a_malformed_row_names_line_and_field",
        "neurosig/test_manifest.py::test_a_context_with_the_same_text_under_another_id_is_refused",
    ),
    25: ("neurosig/intervene/test_interventions.py::test_bad_neurons_are_named",),
    26: ("distill/test_train.py::test_the_manifest_of_another_model_is_refused",),
    27: ("promises/test_faults_input.py::test_wrong_input_is_one_sentence",),
    28: (
        "neurosig/report/test_report.py::test_gold_is_joined_by_id_and_text",
        "promises/test_faults_input.py::test_wrong_input_is_one_sentence",
    ),
    29: ("neurosig/test_export.py::test_nothing_selected_is_told_and_not_trained_on",),
    30: ("promises/test_faults_whole_runs.py::test_rollouts_that_say_nothing",),
    31: ("promises/test_faults_whole_runs.py::test_rollouts_that_all_say_the_same",),
    32: ("neurosig/models/test_load.py::test_files_that_are_no_weights_are_named",),
    33: (
        "distill/test_train.py::test_the_manifest_of_another_model_is_refused",
        "neurosig/verify/test_verify.py::test_tampering_is_named",
    ),
    34: ("neurosig/models/test_load.py::test_missing_weights_are_never_random",),
    35: (
        "neurosig/models/test_load.py::test_a_tied_head_may_be_missing",
        "neurosig/models/test_load.py::test_a_folder_loads_as_it_was_saved",
    ),
    36: ("neurosig/models/test_load.py::test_pickles_and_remote_code_are_refused",),
    37: ("neurosig/models/test_load.py::test_pickles_and_remote_code_are_refused",),
    38: (
        "neurosig/questions/test_prompts.py::test_a_template_that_does_not_work_is_refused",
        "neurosig/questions/test_prompts.py::test_a_template_that_loops_or_explodes_is_stopped",
    ),
    39: ("neurosig/questions/test_prompts.py::test_a_tokenizer_without_template_is_refused",),
    40: ("neurosig/models/test_load.py::test_a_model_without_an_end_token_is_named",),
    41: (
        "neurosig/neurons/test_sites.py::test_an_unsupported_type_names_the_supported_ones",
        "neurosig/neurons/test_sites.py::test_a_mixture_of_experts_says_that_its_experts_have_no_module",
    ),
    42: (
        "neurosig/test_export.py::test_killed_while_sampling",
        "trust/test_kills.py::test_killed_runs_resume_to_the_same_bytes",
    ),
    43: (
        "neurosig/test_export.py::test_killed_while_tracing",
        "trust/test_kills.py::test_killed_runs_resume_to_the_same_bytes",
    ),
    44: (
        "distill/test_checkpoints.py::test_a_resumed_run_equals_an_uninterrupted_one",
        "trust/test_kills.py::test_killed_runs_resume_to_the_same_bytes",
    ),
    45: ("distill/test_checkpoints.py::test_killed_inside_the_write",),
    46: (
        "distill/test_checkpoints.py::test_a_damaged_checkpoint_is_set_aside",
        "distill/test_checkpoints.py::test_a_corrupt_checkpoint_is_set_aside_and_the_one_before_used",
    ),
    47: (
        "neurosig/test_export.py::test_killed_while_sampling",
        "distill/test_checkpoints.py::test_resuming_with_other_options_names_them",
    ),
    48: (
        "neurosig/test_export.py::test_a_complete_export_is_left_alone",
        "distill/test_train.py::test_a_finished_run_is_left_alone_and_never_overwritten_by_accident",
    ),
    49: ("neurosig/runtime/test_folder.py::test_earlier_runs_are_kept_unless_told_otherwise",),
    50: (
        "neurosig/runtime/test_folder.py::test_a_second_run_in_the_folder_is_refused_while_the_first_goes_on",
        "neurosig/test_export.py::test_two_exports_into_one_folder",
    ),
    51: (
        "promises/test_faults_disk.py::test_a_full_disk_costs_nothing_that_was_done",
        "promises/test_faults_disk.py::test_weights_that_do_not_fit_leave_the_last_good_ones",
        "promises/test_faults_disk.py::test_a_first_checkpoint_that_does_not_fit_is_removed",
    ),
    52: (
        "promises/test_faults_disk.py::test_a_read_only_folder_is_named_before_the_model_loads",
        "promises/test_faults_disk.py::test_a_read_only_cache_is_named_before_the_model_loads",
    ),
    53: ("trust/test_kills.py::test_ctrl_c_saves_and_says_how_to_go_on",),
    54: (
        "distill/test_train.py::test_a_loss_that_is_not_finite_stops_the_run",
        "distill/test_train.py::test_the_last_good_checkpoint_survives_a_loss_that_is_not_finite",
    ),
    55: ("neurosig/sampling/test_sampler.py::test_logits_that_are_not_finite_name_the_question_and_the_layer",),
    56: ("promises/test_faults_disk.py::test_out_of_memory_is_one_sentence_and_keeps_the_state",),
    57: ("promises/test_faults_disk.py::test_a_closed_pipe_and_a_terminal_without_unicode",),
    58: ("neurosig/report/test_report.py::test_hostile_text_is_shown_and_does_nothing",),
    59: (
        "neurosig/runtime/test_cli.py::test_model_text_is_shown_harmlessly",
        "promises/test_faults_whole_runs.py::test_dollar_signs_in_figures_are_no_formula",
    ),
    60: ("promises/test_determinism.py::test_batches_and_threads_change_no_vote",),
    61: ("promises/test_faults_disk.py::test_odd_names_and_a_clock_that_moves_back",),
}


def test_every_fault_has_a_test_that_exists() -> None:
    assert sorted(EVIDENCE) == list(range(1, 62))
    functions: dict[str, set[str]] = {}
    for node in {node for nodes in EVIDENCE.values() for node in nodes}:
        file, name = node.split("::")
        if file not in functions:
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            functions[file] = {item.name for item in ast.walk(tree) if isinstance(item, ast.FunctionDef)}
        assert name in functions[file], node
