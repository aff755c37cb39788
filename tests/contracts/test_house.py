"""What holds for every source file: small, explained, named after what it holds, free of CUDA."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "nemotron3"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500
DUMPING_GROUNDS = {"utils", "util", "common", "helpers", "misc", "base", "core"}
NARRATION = re.compile(
    r"#.*\b(previously|no longer|refactor\w*|legacy|now uses?|as before|changed to|we first)\b",
    re.IGNORECASE,
)

every_file = pytest.mark.parametrize(
    "file", FILES, ids=[str(file.relative_to(PACKAGE)) for file in FILES]
)


def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def test_the_files_are_found():
    assert len(FILES) > 80


@every_file
def test_a_file_holds_one_idea_and_says_which(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_LINES
    docstring = ast.get_docstring(tree(file))
    assert docstring
    assert docstring.splitlines()[0].rstrip().endswith((".", ":"))


@every_file
def test_no_room_is_a_dumping_ground(file):
    relative = file.relative_to(PACKAGE)
    assert not {*relative.parts[:-1], file.stem} & DUMPING_GROUNDS


@every_file
def test_only_parallel_and_kernels_name_cuda(file):
    # Kernels are for one kind of device, and the doors' one decision is whether they are on it.
    if file.is_relative_to(PACKAGE / "parallel") or file.name in ("triton.py", "backends.py"):
        return
    named = [
        node.lineno
        for node in ast.walk(tree(file))
        if (isinstance(node, ast.Constant) and node.value == "cuda")
        or (isinstance(node, ast.Attribute) and node.attr == "cuda")
    ]
    assert not named, f"lines {named}: a device is an argument, and parallel/devices.py finds it"


@every_file
def test_only_the_command_line_prints(file):
    if file.is_relative_to(PACKAGE / "cli"):
        return
    calls = [
        node.lineno
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not calls, f"lines {calls}: a library logs, and the command line prints"


@pytest.mark.parametrize(
    "file",
    [file for file in FILES if file.name == "__init__.py" and file.parent != PACKAGE],
    ids=lambda file: str(file.relative_to(PACKAGE)),
)
def test_the_face_of_a_room_has_no_logic(file):
    """A docstring, imports and `__all__`; the package's own face loads names on first use."""
    for node in tree(file).body[1:]:
        is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        assert is_all or isinstance(node, ast.Import | ast.ImportFrom), ast.unparse(node)


@every_file
def test_comments_do_not_narrate_the_past(file):
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        assert not NARRATION.search(line), f"line {number}: {line.strip()}"
