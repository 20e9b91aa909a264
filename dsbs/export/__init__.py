"""Students in formats that run without dsbs: ``export`` writes one and compares it with the student."""

from dsbs.export.exported import Equivalence, Exported, read_exported
from dsbs.export.formats import FORMATS
from dsbs.export.run import export

__all__ = ["FORMATS", "Equivalence", "Exported", "export", "read_exported"]
