"""Students: small models that predict labels and rationales. Importing a card loads no torch."""
