"""Peak memory of a training step, in a separate process.

    python -m benchmarks.memory ours|transformers MODEL --batch 4 --length 512

prints JSON: the peak bytes of the second step (the first creates the optimizer's moments), minus
the bytes of the process before it had a model, and minus those that model and optimizer keep
between steps. The kernel's high-water mark of resident memory is reset before the step, since
loading has peaks of its own.
"""

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import torch
from benchmarks.models import load_theirs, tokens_of
from benchmarks.workloads import optimizer_of, training
from torch import nn

from nemotron3.models.huggingface import read_config
from nemotron3.models.nemotron_h import LanguageModel


def can_measure() -> bool:
    """Whether this system reports a process's peak memory, and lets it reset the value."""
    return Path("/proc/self/clear_refs").exists()


def measure(program: str, folder: Path, *, batch: int, length: int, threads: int) -> dict:
    """Run this module as a command, and parse its output."""
    words = [program, folder, "--batch", batch, "--length", length, "--threads", threads]
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, words)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, check=True, cwd=root, stdout=subprocess.PIPE, text=True)
    return json.loads(run.stdout)


def _resident(field: str) -> int:
    """Resident bytes of this process: VmRSS is the current value, VmHWM the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(field))


def _settle() -> int:
    """Release freed memory, reset the high-water mark, and return the resident bytes."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("program", choices=["ours", "transformers"])
    parser.add_argument("model", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokens = tokens_of(read_config(arguments.model), arguments.batch, arguments.length)
    # Libraries allocate their buffers, and the first step of an optimizer loads a part of PyTorch.
    torch.ones(512, 512).mm(torch.ones(512, 512))
    one = nn.Linear(1, 1)
    optimizer = optimizer_of(one)
    one(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    empty = _settle()
    ours = arguments.program == "ours"
    model = LanguageModel.from_pretrained(arguments.model) if ours else load_theirs(arguments.model)
    step = training(model, tokens)
    step()
    model.zero_grad(set_to_none=True)
    kept = _settle()
    step()
    peak = _resident("VmHWM")
    print(json.dumps({"total": peak - empty, "step": peak - kept}))


if __name__ == "__main__":
    main()
