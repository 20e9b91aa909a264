"""A smaller student out of a trained one: quantised, pruned, factorised; healed, measured, kept beside it."""
