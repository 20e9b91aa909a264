"""What replies cost: the recipe's own price, else the public price list of genai-prices for the endpoint and model."""

from __future__ import annotations

from dataclasses import dataclass

from dsbs.recipe import TeacherSection


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars for a million prompt and a million completion tokens."""

    input: float
    output: float

    def usd(self, prompt_tokens: int | None, completion_tokens: int | None) -> float:
        """Cost of one reply; tokens that the endpoint did not count cost nothing here."""
        return ((prompt_tokens or 0) * self.input + (completion_tokens or 0) * self.output) / 1e6


def price_of(teacher: TeacherSection) -> Price | None:
    """The teacher's price. None: unknown, which is not the same as free (a teacher on this machine or on disk is)."""
    if teacher.price is not None:
        return Price(teacher.price.input, teacher.price.output)
    if teacher.kind != "openai":
        return Price(0.0, 0.0)
    from genai_prices import Usage, calc_price

    def million(**tokens: int) -> float:
        found = calc_price(Usage(**tokens), model_ref=str(teacher.model), provider_api_url=teacher.base_url)
        return float(found.total_price)

    try:  # the list has steps for long contexts; a small request has the base price
        return Price(1000 * million(input_tokens=1000), 1000 * million(output_tokens=1000))
    except LookupError:
        return None
