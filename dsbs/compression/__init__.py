"""Compression: smaller students, made from a trained one step by step."""
