"""Scoring: log-probabilities of answers that are given, in blocks that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

SCORED_TOGETHER = 256  # answers in one pass, so that a thousand labels need little memory


def padded(rows: Sequence[Sequence[int]], device: Any, pad: int = 0) -> tuple[Any, Any]:
    """Token ids (rows, T), padded on the right, and which of them are not padding."""
    import torch

    length = max(map(len, rows))
    token_ids = [[*row, *[pad] * (length - len(row))] for row in rows]
    is_token = [[True] * len(row) + [False] * (length - len(row)) for row in rows]
    return torch.tensor(token_ids, device=device), torch.tensor(is_token, device=device)


def score_blocks(
    num_texts: int, answers: tuple[Any, Any], log_probabilities: Callable[[slice, Any, Any], Any]
) -> list[list[float]]:
    """(texts, answers): scores block by block, of rows and answers that fit into one pass.

    ``log_probabilities`` maps a slice of n texts and n times the ids of k answers, (n * k, T), to
    (n * k,).
    """
    import torch

    token_ids, is_token = answers
    num_rows = max(1, SCORED_TOGETHER // len(token_ids))
    scores: list[list[float]] = []
    for start in range(0, num_texts, num_rows):
        rows = slice(start, min(start + num_rows, num_texts))
        size = rows.stop - rows.start
        blocks = [
            log_probabilities(rows, ids.repeat(size, 1), mask.repeat(size, 1)).view(size, -1)
            for ids, mask in zip(
                token_ids.split(SCORED_TOGETHER), is_token.split(SCORED_TOGETHER), strict=True
            )
        ]
        scores += torch.cat(blocks, 1).tolist()
    return scores


def joint_log_probability(logits: Any, token_ids: Any, is_token: Any) -> Any:
    """Log-probability (rows,) of each row's tokens, in nats, as float64 on the CPU.

    ``logits`` (rows, T, V) are those of ``token_ids`` (rows, T).
    """
    import torch

    of_tokens = logits.float().log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]
    return torch.where(is_token.cpu(), of_tokens.cpu().double(), 0.0).sum(1)
