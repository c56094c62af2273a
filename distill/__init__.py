"""Self-distillation from a selection manifest, and its evaluation."""
