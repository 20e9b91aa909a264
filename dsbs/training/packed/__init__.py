"""Packed batches: forward passes over the tokens of a batch without padding."""
