"""Compression: smaller students, made of a trained one step by step."""
