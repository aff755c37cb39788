"""What holds for every source file: small, explained, named after what it holds, free of CUDA."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "nemotron3"
FILES = sorted(PACKAGE.rglob("*.py"))
MAX_LINES = 500
DUMPING_GROUNDS = {"utils", "util", "common", "helpers", "misc", "base", "core"}
NARRATION = re.compile(
    r"#.*\b(previously|no longer|refactor\w*|legacy|now uses?|as before|changed to|we first)\b",
    re.IGNORECASE,
)


def name(file):
    return str(file.relative_to(PACKAGE))


def lines(file):
    return file.read_text(encoding="utf-8").splitlines()


def tree(file):
    return ast.parse(file.read_text(encoding="utf-8"))


def nodes(kind):
    """Every node of a kind, with where it stands."""
    for file in FILES:
        for node in ast.walk(tree(file)):
            if isinstance(node, kind):
                yield file, f"{name(file)}:{node.lineno}", node


def test_the_files_are_found():
    assert len(FILES) > 80


def test_a_file_can_be_read_as_a_whole():
    assert not {name(file): len(lines(file)) for file in FILES if len(lines(file)) > MAX_LINES}


def test_a_file_begins_with_what_it_is():
    docstrings = {name(file): ast.get_docstring(tree(file)) or "" for file in FILES}
    wrong = {
        file: text.splitlines()[:1]
        for file, text in docstrings.items()
        if not text or not text.splitlines()[0].rstrip().endswith((".", ":"))
    }
    assert not wrong


def test_no_module_is_a_dumping_ground():
    parts = {name(file): {*file.relative_to(PACKAGE).parts[:-1], file.stem} for file in FILES}
    assert not {file: found for file, of in parts.items() if (found := of & DUMPING_GROUNDS)}


def test_only_kernels_and_the_devices_name_cuda():
    # Kernels are for one kind of device, and the entry points' one decision is whether they are
    # on it.
    named = [
        where
        for file, where, node in nodes((ast.Constant, ast.Attribute))
        if (getattr(node, "value", None) == "cuda" or getattr(node, "attr", None) == "cuda")
        and file.name not in ("triton.py", "backends.py")
        and not file.is_relative_to(PACKAGE / "parallel")
    ]
    assert not named, f"{named}: a device is an argument, and parallel/devices.py finds it"


def test_only_the_command_line_prints():
    calls = [
        where
        for file, where, node in nodes(ast.Call)
        if getattr(node.func, "id", None) == "print" and not file.is_relative_to(PACKAGE / "cli")
    ]
    assert not calls, f"{calls}: a library logs, and the command line prints"


def test_a_package_s_init_has_no_logic():
    """A docstring, imports and `__all__`; the root's own loads names on first use."""
    logic = []
    for file in FILES:
        if file.name != "__init__.py" or file.parent == PACKAGE:
            continue
        for node in tree(file).body[1:]:
            is_all = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if not is_all and not isinstance(node, ast.Import | ast.ImportFrom):
                logic.append(f"{name(file)}: {ast.unparse(node)}")
    assert not logic


def test_comments_do_not_narrate_the_past():
    assert not [
        f"{name(file)}:{number}: {line.strip()}"
        for file in FILES
        for number, line in enumerate(lines(file), start=1)
        if NARRATION.search(line)
    ]
