"""The study of the claim that learning from all environments at once beats learning in stages."""

from nemotron3.studies.simultaneous_rl.config import SimultaneousRL
from nemotron3.studies.simultaneous_rl.run import simultaneous_rl

__all__ = ["SimultaneousRL", "simultaneous_rl"]
