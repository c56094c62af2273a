"""The stages of an export: what is known before any context, and what the context does to the teacher."""
