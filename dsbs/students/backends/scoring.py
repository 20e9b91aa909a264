"""Log-probabilities: of given answers, in blocks that fit into memory, and of decoded tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from dsbs.students.backends import GeneratedText

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


class GreedyLogProbabilities:
    """Logits processor that records the log-probability of each greedy token.

    Keeping all scores would take batch × tokens × vocabulary floats; scoring afterwards, a second
    forward pass.
    """

    def __init__(self) -> None:
        self._steps: list[Any] = []

    def __call__(self, _ids: Any, scores: Any) -> Any:
        """``scores`` (B, V) in nats up to a constant, returned unchanged; records (B,) values."""
        self._steps.append(scores.amax(-1) - scores.logsumexp(-1))
        return scores

    def add_to(
        self, generated: Sequence[GeneratedText], token_ids: Any, is_output: Any
    ) -> list[GeneratedText]:
        """The outputs with their tokens and the joint probability of these, in [0, 1].

        ``is_output`` (B, T) marks each row's ``token_ids`` (B, T), its end token included.
        """
        import torch

        # On some devices decoding takes one step too many.
        # On the CPU, since Apple GPUs have no float64.
        log_probabilities = torch.stack(self._steps[: is_output.shape[1]], 1).cpu().double()
        is_output = is_output.cpu()
        total = torch.where(is_output, log_probabilities, 0.0).sum(1).clamp(max=0.0)
        rows = zip(token_ids.cpu(), log_probabilities, is_output, strict=True)
        tokens = [
            tuple(zip(ids[keep].tolist(), values[keep].tolist(), strict=True))
            for ids, values, keep in rows
        ]
        return [
            output._replace(probability=probability, tokens=of_row)
            for output, probability, of_row in zip(
                generated, total.exp().tolist(), tokens, strict=True
            )
        ]
