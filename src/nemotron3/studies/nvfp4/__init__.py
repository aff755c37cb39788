"""The study of training in NVFP4: what each ingredient is worth, and what goes beyond them."""

from nemotron3.studies.nvfp4.config import NVFP4Study
from nemotron3.studies.nvfp4.run import nvfp4

__all__ = ["NVFP4Study", "nvfp4"]
