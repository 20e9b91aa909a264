"""What replies cost: the recipe's own price, else the public price list of genai-prices for the endpoint and model."""

from __future__ import annotations

from dataclasses import dataclass

from dsbs.annotation.backends.base import Lane, Reply
from dsbs.config import TeacherSection


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars for a million prompt, completion and cached prompt tokens; ``batch`` is the batch lane's share of that."""

    input: float
    output: float
    cached: float
    batch: float = 1.0

    def usd(self, reply: Reply) -> float:
        """Cost of one reply; tokens that the endpoint did not count cost nothing here."""
        return self.of(
            reply.prompt_tokens or 0,
            reply.completion_tokens or 0,
            reply.cached_tokens or 0,
            reply.lane,
        )

    def of(
        self,
        prompt_tokens: int,
        completion_tokens: int,
        cached_tokens: int = 0,
        lane: Lane = "online",
    ) -> float:
        """Cost of so many tokens; the cached ones are part of the prompt's."""
        fresh = max(0, prompt_tokens - cached_tokens)
        usd = (
            fresh * self.input + cached_tokens * self.cached + completion_tokens * self.output
        ) / 1e6
        return usd * (self.batch if lane == "batch" else 1.0)


def price_of(teacher: TeacherSection, batch: float) -> Price | None:
    """The teacher's price. None: unknown, which is not the same as free (a teacher on this machine or on disk is)."""
    if teacher.price is not None:
        cached = (
            teacher.price.input
            if teacher.price.cached_input is None
            else teacher.price.cached_input
        )
        return Price(teacher.price.input, teacher.price.output, cached, batch)
    if teacher.kind != "openai":
        return Price(0.0, 0.0, 0.0, batch)
    from genai_prices import Usage, calc_price

    def thousand(**tokens: int) -> float:
        found = calc_price(
            Usage(**tokens),
            model_ref=str(teacher.model),
            provider_api_url=teacher.served_by[0].base_url,
        )
        return float(found.total_price)

    try:  # the list has steps for long contexts; a small request has the base price
        return Price(
            1000 * thousand(input_tokens=1000),
            1000 * thousand(output_tokens=1000),
            1000 * thousand(input_tokens=1000, cache_read_tokens=1000),
            batch,
        )
    except LookupError:
        return None
