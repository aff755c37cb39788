"""Models in the formats of other programs."""

from nemotron3.export.gguf import DTYPES, GGUFSummary, export_gguf

__all__ = ["DTYPES", "GGUFSummary", "export_gguf"]
