"""Evaluation: every system's predictions in files, one scorer that reads them all, comparisons with their uncertainty."""
