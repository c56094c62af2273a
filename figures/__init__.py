"""Figures and tables: ``python -m figures [NAME ...] --results DIR``."""
