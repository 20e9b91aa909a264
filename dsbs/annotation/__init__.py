"""Annotation: a teacher gives every row a rationale and a label. Start reading at run.py."""
