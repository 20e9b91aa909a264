"""``python -m dsbs``."""

from dsbs.cli import main

main()
