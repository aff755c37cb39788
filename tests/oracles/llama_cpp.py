"""llama.cpp as a second, independent oracle: the same log-probabilities from a GGUF of our model.

Not collected by pytest, because it needs llama.cpp's sources and a compiler. One command does it
all (docs/guides/llama-cpp-oracle.md):

    python -m tests.oracles.llama_cpp path/to/llama.cpp --model runs/tiny-rl/model

It builds the library, writes tiny checkpoints, converts them with llama.cpp's own converter and
with `export_gguf`, and compares the log-probabilities of every position and token, once for the
whole sequence in a single batch and once token by token. llama.cpp shares no code with
transformers, has no floor under dt, and keeps its own recurrence in both cases. Of each `--model`
the file that `export_gguf` makes is compared, on a text that llama.cpp splits into tokens itself.
"""

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from nemotron3.export import export_gguf
from nemotron3.models.config import ModelConfig
from nemotron3.models.nemotron_h import LanguageModel
from nemotron3.text import Tokenizer as FamilyTokenizer
from tests.tiny import tiny_config, tiny_model, tokens_for

TOLERANCE = 1e-4
"""Largest difference of a log-probability: two float32 computations in a different order."""
VOCAB = 320
TEXT = (
    """<|im_start|>user
What is 12 * 34 + 5? Say "forty-two", or l'été: naïve CamelCase  words...
\t- a list,  3.14159/2\n\n<|im_end|>
<|im_start|>assistant
<think></think>It's 413.<|im_end|>
"""
    + "To be, or not to be, that is the question. " * 8
)
"""What is read of a model that is given: every rule by which text is split."""
# The converter wants an inner width that is a multiple of 64, and takes dense layers for Mamba's
# where transformers 5 reads the config for it, so there are none here.
MAMBA = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 32}
CONFIGS = {
    name: tiny_config(pattern, vocab_size=VOCAB, mamba=MAMBA, **parts)
    for name, pattern, parts in [
        ("Nano's form", "MEMEM*EME", {"moe": {"moe_latent_size": None}}),
        ("Super's form, with MTP", "MEMEM*EMEM*E/*E", {}),
        ("one expert of a token", "ME*E", {"moe": {"num_experts_per_tok": 1}}),
    ]
}


def build(sources: Path, folder: Path) -> Path:
    """Compile the library and the small program that prints logits; returns the program."""
    options = ["COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP"]
    flags = [f"-DLLAMA_BUILD_{option}=OFF" for option in options]
    flags += ["-DLLAMA_OPENSSL=OFF", "-DGGML_OPENMP=OFF", "-DGGML_LLAMAFILE=OFF"]
    flags += ["-DCMAKE_BUILD_TYPE=Release", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG"]
    subprocess.run(["cmake", "-S", sources, "-B", folder, *flags], check=True, stdout=sys.stderr)
    subprocess.run(["cmake", "--build", folder, "--target", "llama"], check=True, stdout=sys.stderr)
    program = folder / "llama_logits"
    code = Path(__file__).with_name("llama_logits.cpp")
    includes = [f"-I{sources / 'include'}", f"-I{sources / 'ggml' / 'include'}"]
    libraries = [f"-L{folder / 'bin'}", f"-Wl,-rpath,{folder / 'bin'}"]
    libraries += ["-lllama", "-lggml", "-lggml-base", "-lggml-cpu"]
    command = ["c++", "-std=c++17", "-O1", code, *includes, *libraries, "-o", program]
    subprocess.run(command, check=True)
    return program


def write_tokenizer(directory: Path) -> None:
    """A byte-level vocabulary of the right size: the converter insists on one.

    Without the bytes of longer characters: llama.cpp's server sends no token that ends half a
    character, and any of these may be written where a model's own vocabulary has a word.
    """
    alphabet = sorted(c for c in pre_tokenizers.ByteLevel.alphabet() if _is_ascii(c))
    tokens = ["<unk>", "<s>", "</s>", *alphabet, "ab"]
    tokens += [f"<{index}>" for index in range(VOCAB - len(tokens))]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | names)
    )


def _is_ascii(char: str) -> bool:
    """Whether a byte-level vocabulary's character stands for a byte below 128."""
    return ord(char) < 128 or 0x100 <= ord(char) <= 0x121  # those that are not printed


def convert(sources: Path, checkpoint: Path, gguf: Path) -> None:
    """Run llama.cpp's converter, which knows tokenizers by hash and has not met ours."""
    for folder in (sources / "gguf-py", sources):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    from conversion.base import TextModel  # noqa: PLC0415 - on the path from here on

    TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
    sys.argv = [
        "convert_hf_to_gguf.py",
        str(checkpoint),
        "--outtype",
        "f32",
        "--outfile",
        str(gguf),
    ]
    runpy.run_path(str(sources / sys.argv[0]), run_name="__main__")


def log_probabilities(program: Path, gguf: Path, tokens: Tensor, step: int) -> Tensor:
    """What llama.cpp says of every position, decoding `step` tokens at a time."""
    ids, output = gguf.with_suffix(".ids"), gguf.with_suffix(".logits")
    ids.write_text(" ".join(map(str, tokens.tolist())))
    command = [program, gguf, ids, output, str(step)]
    run = subprocess.run(command, check=False, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"llama.cpp refused the model:\n{run.stderr}")
    logits = np.fromfile(output, dtype=np.float32).reshape(len(tokens), -1)
    return torch.from_numpy(logits).log_softmax(-1)


def compare(program: Path, sources: Path, config: ModelConfig, folder: Path) -> dict[str, float]:
    """Largest difference of a log-probability: by converter, whole and token by token."""
    model = tiny_model(config)
    model.save_pretrained(folder)
    tokens = tokens_for(config, 150)
    theirs, ours = folder / "theirs.gguf", folder / "ours.gguf"
    write_tokenizer(folder)
    convert(sources, folder, theirs)
    FamilyTokenizer.train([TEXT] * 4, vocab_size=VOCAB).save(folder)
    export_gguf(folder, ours)
    found = differences(program, theirs, model, tokens)
    exported = differences(program, ours, model, tokens)
    return found | {f"exported {how}": value for how, value in exported.items()}


def compare_model(program: Path, path: Path, folder: Path) -> dict[str, float]:
    """The same of the file that is exported of a model directory; ids must be alike."""
    gguf, written, ids = folder / "model.gguf", folder / "text", folder / "ids"
    export_gguf(path, gguf, dtype="f32")
    tokenizer = FamilyTokenizer.from_directory(path)
    written.write_text(TEXT, encoding="utf-8")
    subprocess.run([program, gguf, written, ids, "0"], check=True, capture_output=True)
    wanted = tokenizer.encode(TEXT)
    read = [int(number) for number in ids.read_text().split()]
    if read != wanted:
        sys.exit(f"{path}: llama.cpp reads other tokens, {read} and not {wanted}")
    model = LanguageModel.from_pretrained(path).float().eval()
    return differences(program, gguf, model, torch.tensor(wanted))


def differences(
    program: Path, gguf: Path, model: LanguageModel, tokens: Tensor
) -> dict[str, float]:
    """Largest difference of a log-probability, whole and token by token."""
    with torch.no_grad():
        ours = model(tokens[None])[0].log_softmax(-1)
    steps = {"whole": len(tokens), "token by token": 1}
    return {
        name: (log_probabilities(program, gguf, tokens, step) - ours).abs().max().item()
        for name, step in steps.items()
    }


def main() -> None:
    """Build, convert, compare, and fail where the difference is too large."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", type=Path, help="llama.cpp's source folder")
    parser.add_argument("--build", type=Path, help="where to build (default: SOURCES/build-oracle)")
    parser.add_argument(
        "--model", type=Path, action="append", default=[], help="a model directory, to export too"
    )
    arguments = parser.parse_args()
    sources = arguments.sources.resolve()
    program = build(sources, (arguments.build or sources / "build-oracle").resolve())
    found: dict[str, dict[str, float]] = {}
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory() as folder:
            found[name] = compare(program, sources, config, Path(folder))
    for path in arguments.model:
        with tempfile.TemporaryDirectory() as folder:
            found[str(path)] = compare_model(program, path, Path(folder))
    for name, values in found.items():
        cells = "   ".join(f"{how} {value:.1e}" for how, value in values.items())
        print(f"{name:24}{cells}")  # noqa: T201 - a command
    worst = max(value for values in found.values() for value in values.values())
    if not worst < TOLERANCE:
        sys.exit(f"log-probabilities differ by {worst:.1e}, allowed {TOLERANCE:.0e}")


if __name__ == "__main__":
    main()
