"""Pages for people, made from a run's files alone: no model, no teacher, no network."""
