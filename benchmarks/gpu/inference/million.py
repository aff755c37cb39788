"""A million tokens of context on one device: a prompt prefilled in parts, then decoding steps.

Each part continues the last one and is timed once, so its result is saved even if time runs out
later. An H100 has just enough memory for it together with Nano's weights.
"""

from functools import partial

from benchmarks.gpu.inference import answers
from benchmarks.gpu.section import Part, Section
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.whole_models import LongPrompt

_ENDS = (131_072, 262_144, 524_288, 786_432, 1_048_576)


def parts(setting: Setting) -> dict[str, Part]:
    ends = (16, 40) if setting.is_toy else _ENDS
    prompt = LongPrompt("nano", ends[-1], setting)
    found: dict[str, Part] = {f"read to {end:,}": partial(prompt.read_to, end) for end in ends}
    return found | {f"step behind {ends[-1]:,}": prompt.decode}


SECTION = Section(
    name="million",
    title="nano: a prompt of 1,048,576 tokens",
    order=40,
    budget_s=230,
    parts=parts,
    table=partial(answers.table, name="million"),
)
