"""Reporting: HTML pages made from a run's files alone, without model, teacher or network."""
