"""Scores, the rows of the ablation table, tables and figures."""
