"""``low-rank=SHARE`` or ``low-rank=energy:SHARE``: attention and feed-forward matrices as products of two thinner ones.

By truncated singular value decomposition, the best approximation of its rank (Eckart and Young, 1936): W (m, n) of rank r
becomes (m, r)·(r, n), with fewer weights only where r·(m + n) < m·n. Other matrices stay as they are.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsbs.compression.base import Examples, attentions, feed_forwards, rewritten, share
from dsbs.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_ENERGY = "energy:"


class TruncatedSvd:
    heals, sparse, learns_from_rows = True, False, False

    def __init__(self, value: str) -> None:
        self.by_energy = value.startswith(_ENERGY)
        self.share = share("low-rank", value.removeprefix(_ENERGY))
        self.value = f"{_ENERGY if self.by_energy else ''}{self.share:g}"

    def rank(self, singular: Tensor) -> int:
        """singular (R,), the largest first -> the rank to keep: a share of R, or the least that has the share of Σσ²."""
        if not self.by_energy:
            return max(1, round(self.share * len(singular)))
        kept = singular.square().cumsum(0) / singular.square().sum()
        return int((kept < self.share).sum().item()) + 1

    def make(self, source: Path, into: Path, examples: Examples) -> None:
        del examples

        def change(model: Any, tokenizer: Any) -> Any:
            del tokenizer
            changed = factored(model, self)
            if changed is None:
                raise UserError(
                    f"low-rank={self.value} makes no matrix smaller: two factors of that rank have more weights than it",
                    hint="a smaller share; of a square matrix less than 0.5 of its rank saves anything",
                )
            return changed

        rewritten(source, into, change)


def factor(decomposed: tuple[Tensor, Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """U (m, R), σ (R,), V (R, n) -> down (r, n) and up (m, r): up·down is the best approximation of rank r of U·σ·V.

    Each factor has the root of σ, so that both learn at one pace.
    """
    left, singular, right = decomposed
    root = singular[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def factored(model: Any, step: TruncatedSvd) -> Any | None:
    """The model with pairs in the place of the matrices that this makes smaller; None where it makes none so."""
    import torch

    from dsbs.students.low_rank import KEY, LowRank, with_low_rank

    weights = dict(model.state_dict())
    ranks: dict[str, int] = dict(getattr(model.config, KEY, None) or {})
    changed = False
    for layer, module in (*attentions(model), *feed_forwards(model)):
        for part, there in module.named_children():
            if not isinstance(there, torch.nn.Linear | LowRank):
                continue
            name = f"{layer}.{part}"
            whole = (
                there.up.weight @ there.down.weight if isinstance(there, LowRank) else there.weight
            ).detach()
            decomposed = torch.linalg.svd(whole.double(), full_matrices=False)
            rank = step.rank(decomposed[1])
            if rank * sum(whole.shape) >= sum(
                parameter.numel() for parameter in there.parameters()
            ):
                continue
            for old in [key for key in weights if key.startswith(f"{name}.")]:
                del weights[old]
            down, up = factor(decomposed, rank)
            weights |= {
                f"{name}.down.weight": down.to(whole.dtype),
                f"{name}.up.weight": up.to(whole.dtype),
            }
            ranks[name], changed = rank, True
    if not changed:
        return None
    config = copy.deepcopy(model.config)
    setattr(config, KEY, ranks)
    plain = type(model) if getattr(model.config, KEY, None) else with_low_rank(type(model))
    made = plain(config).to(model.dtype)
    made.load_state_dict(weights, strict=True)
    made.generation_config = model.generation_config
    return made.eval()
