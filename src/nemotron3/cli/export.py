"""`nemotron3 export`: a model in the format of another program."""

import argparse

from nemotron3.export import export_gguf
from nemotron3.recipes.input_files import check_model_directory


def export_command(known: argparse.Namespace) -> int:
    """Write the file, and say what to do with it."""
    check_model_directory(known.path)
    ending = f"-{known.dtype}" if known.dtype else ""
    out = known.out or known.path.with_name(f"{known.path.name}{ending}.gguf")
    written = export_gguf(known.path, out, dtype=known.dtype)
    left_out = f", without {' and '.join(written.left_out)}" if written.left_out else ""
    print(
        f"{written.num_tensors} tensors, matrices in {written.dtype}, "
        f"{written.num_bytes / 1e6:,.1f} MB{left_out}"
    )
    print(f"written to {written.file}; llama-server -m {written.file}")
    return 0
