"""Evaluation: prediction files, scoring, metrics, and comparisons with their uncertainty."""
