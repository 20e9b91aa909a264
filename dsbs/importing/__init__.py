"""Logs of calls to large models as rows: formats, prompts, replies, redaction."""
