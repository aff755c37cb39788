"""Parity of decoding on this device, checked before any comparison of speed.

The kernels of decoding steps are compared with float64, and captured steps with the model's forward
pass: the fixed memory of a graph can only be tested on a device.
"""

from functools import partial

import torch
from benchmarks.gpu.record import Figure
from benchmarks.gpu.section import Part, Section
from benchmarks.gpu.sections import parity
from benchmarks.gpu.setting import Setting
from benchmarks.models import configs

from nemotron3.inference.model_runner import ModelRunner
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel


def parts(setting: Setting) -> dict[str, Part]:
    (_, config), *_ = setting.models().items()
    known = parity.operations(config, setting)
    names = [name for name in known if "steps" in name]
    found: dict[str, Part] = {name: partial(parity.check, known[name], setting) for name in names}
    return found | {"steps of a model": lambda: steps_of_a_model(setting)}


@torch.inference_mode()
def steps_of_a_model(setting: Setting) -> Figure:
    """Batches of changing size, with partly rejected drafts, compared with full passes."""
    config = configs()["toy"] if setting.is_toy else ModelConfig.preset("tiny")
    model = LanguageModel.from_config(config, device=setting.device)
    cache, tokens = model.new_state(3), torch.randint(config.vocab_size, (3, 40))
    ours: list[list[int]] = [row[: 4 + 3 * i].tolist() for i, row in enumerate(tokens)]
    flat = torch.tensor([t for row in ours for t in row], device=setting.device)
    model(flat, layout=cache.layout([len(row) for row in ours]), state=cache)
    runner, worst = ModelRunner(model, cache), 0.0
    for seed, slots in enumerate([[0, 1, 2], [2], [1, 2], [2, 0, 1], [0], [1, 0]]):
        length = 1 + 2 * (seed % 2)
        new = [tokens[slot, seed : seed + length].tolist() for slot in slots]
        out = runner.decode(new, slots, is_verification=length > 1)
        for row, slot in enumerate(slots):
            whole = torch.tensor([[*ours[slot], *new[row]]], device=setting.device)
            expected = model(whole)[0, -length:]
            worst = max(worst, parity.difference(out.logits[row], expected))
            ours[slot] += new[row] if length == 1 else new[row][:2]
        if length > 1:
            cache.accept(out.layout, [2] * len(slots))
    red = [] if worst <= 10 * parity.FLOAT32 else [f"steps differ by {worst:.1e} from whole passes"]
    check = {"case": "3 sequences, 6 steps", "differences": [worst], "repeats": True}
    return {"checks": [check], "red": red, "worst": worst}


SECTION = Section(
    name="parity",
    title="Parity of decoding, against float64 and whole passes",
    order=10,
    budget_s=40,
    parts=parts,
    table=parity.table,
)
