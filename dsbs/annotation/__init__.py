"""Annotation: ask a teacher for a rationale and a label of every row, keep what it said, read it."""
