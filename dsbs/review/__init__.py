"""Review: people look at annotations and decide."""
