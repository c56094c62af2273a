"""Questions: bundled sets and files, prompts, answers and their vote."""
