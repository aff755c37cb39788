"""What the documentation says can be typed, followed and run.

Commands are parsed, not run: verb and options must exist. Links are resolved in the working tree,
headings included. Python blocks of the README run; those of the pages compile, and their imports
of this package must exist. Examples run, with fewer steps where they train.
"""

import ast
import doctest
import re
import runpy
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from nemotron3.cli import main as command_line
from nemotron3.cli.overrides import override
from nemotron3.cli.pretrain import _with_own_text
from nemotron3.environments.registry import has_environment
from nemotron3.recipes.load import RECIPES, load_recipe
from nemotron3.recipes.pretrain import PretrainRun, tiny

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    + list((ROOT / "docs").rglob("*.md"))
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
INLINE = re.compile(r"`(nemotron3 [a-z][^`]*)`")
TARGET = re.compile(r"^([\w-]+):.*##", re.MULTILINE)
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z_.]+\b|…|PATH_TO_IT")


def name_of(value):
    return str(value.relative_to(ROOT)) if isinstance(value, Path) else str(value)[:60]


def blocks(page, *languages):
    text = page.read_text(encoding="utf-8")
    return [match[2] for match in FENCE.finditer(text) if match[1] in languages]


def anchors(page):
    """Heading ids, as the site and the forges make them from ASCII headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", t.lower()).strip()) for t in titles}


LINKS = [
    (page, target)
    for page in PAGES
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8")))
    if not target.startswith(("https:", "mailto:"))
]
COMMANDS = sorted(
    {
        line.strip()
        for page in PAGES
        for line in [
            *(
                line
                for block in blocks(page, "bash")
                for line in block.replace("\\\n", " ").splitlines()
            ),
            *INLINE.findall(FENCE.sub("", page.read_text(encoding="utf-8"))),
        ]
        if line.strip().startswith(("nemotron3 ", "make "))
    }
)
PYTHON = [(page, block) for page in PAGES for block in blocks(page, "python")]


@pytest.mark.parametrize(("page", "target"), LINKS, ids=name_of)
def test_links_lead_somewhere(page, target):
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    # The reference's pages of packages are made by the build, from folders of the package.
    if file.parent == ROOT / "docs" / "reference" and file.name != "index.md":
        assert (ROOT / "src" / "nemotron3" / file.stem).is_dir()
        return
    assert file.exists(), f"{name_of(page)} links to {target}"
    if anchor and file.suffix == ".md":
        assert anchor in anchors(file), f"{name_of(page)} links to {target}"


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_can_be_typed(line):
    program, *arguments = shlex.split(line, comments=True)
    if program == "make":
        targets = TARGET.findall((ROOT / "Makefile").read_text(encoding="utf-8"))
        assert {a for a in arguments if "=" not in a} <= set(targets)
        return
    if len(arguments) == 1:  # a verb named in a sentence
        assert arguments[0] in command_line._parser().format_help().split()
        return
    known, rest = command_line._parser().parse_known_args(arguments)
    assert known.verb is not None
    if known.verb in ("sft", "rl"):  # their values depend on a model's directory
        assert rest
        assert not rest[0].startswith("-"), "a model or a recipe comes first"
        if rest[0] in RECIPES:
            run = load_recipe(rest.pop(0))
            assert override(run, rest, prog=line, other_options=[]) != run or not rest
        elif known.verb == "rl" and rest[0].endswith(".py"):
            assert rest[0] == "my_env.py" or has_environment(str(ROOT / rest[0]))
        else:
            assert known.data if known.verb == "sft" else known.environment
        return
    if known.verb != "pretrain":
        assert not rest, f"unknown: {rest}"
        return
    recipe = rest.pop(0) if rest and not rest[0].startswith("-") else None
    assert recipe or known.replay or known.help
    run = _recipe(recipe)
    if known.data:
        run = _with_own_text(run, known.data)
    if "=" not in line and "--option" not in line:
        assert isinstance(override(run, rest, prog=line, other_options=[]), PretrainRun)


def _recipe(name):
    if name is None or PLACEHOLDER.search(name):
        return tiny()
    return load_recipe(name if name in RECIPES else str(ROOT / name))


def test_readme_python_runs():
    namespace = {}
    for block in blocks(ROOT / "README.md", "python"):
        exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["logits"].shape == (8, 1024)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "pycon")], ids=name_of)
def test_sessions_print_what_the_page_shows(page):
    found = doctest.testfile(str(page), module_relative=False)
    assert found.attempted
    assert not found.failed


@pytest.mark.parametrize(("page", "block"), PYTHON, ids=name_of)
def test_python_blocks_compile_and_their_names_exist(page, block):
    del page
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemotron3"):
            module = import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


def test_the_memory_of_nano_is_what_its_commands_print(capsys):
    page = (ROOT / "docs" / "post-training.md").read_text(encoding="utf-8")
    section = page.partition("<!-- nano-80gb -->")[2].partition("<!-- /nano-80gb -->")[0]
    (commands,), (shown,) = (
        [match[2] for match in FENCE.finditer(section) if match[1] == language]
        for language in ("bash", "text")
    )
    printed: list[str] = []
    for line in commands.splitlines():
        assert command_line.main(shlex.split(line)[1:]) == 0
        printed.append(capsys.readouterr().out)
    assert "\n".join(printed) == shown


def test_every_metric_is_explained():
    history = runpy.run_path(str(ROOT / "examples" / "train_by_hand.py"))["train"](steps=6)[1]
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    for name in history[0]:
        general = re.sub(r"_\d\d$", "_NN", name)
        general = re.sub(r"(mtp|mtp_accuracy)_\d$", r"\1_k", general)
        assert f"`{general}`" in page, f"{name} is not in the glossary of docs/training.md"


def test_every_decision_and_guide_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation
