"""Interactive views of an export, for notebooks and terminals."""
