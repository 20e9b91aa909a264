"""Review: what people are shown of annotations, in which order, and what they say of them."""
