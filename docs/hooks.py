"""What the documentation's build adds: reference pages from the source tree, and links into it.

Pages link to source files by their path in the repository, so that they also work where the
repository itself is read. In the built site such a link leads to the module's entry in the
reference; links to other files of the repository become plain text.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).parents[1]
_PACKAGE = _ROOT / "src" / "nemotron3"
_PACKAGES = (
    *(
        "models",
        "ops",
        "inference",
        "server",
        "training",
        "rl",
        "evaluation",
        "environments",
        "data",
        "checkpoint",
    ),
    *("text", "config", "observe", "runtime", "recipes", "studies", "cli"),
)
_SOURCE_LINK = re.compile(r"\]\((?:\.\./)+src/nemotron3/([\w/]+?)(?:/__init__)?\.py\)")
_OTHER_LINK = re.compile(
    r"(?<!\!)\[([^\]]*)\]\((?:\.\./)+"
    r"((?:src|tests|examples|benchmarks)\b[^)]*|[A-Z]\w*(?:\.md)?|\w+\.(?:toml|txt|yml))\)"
)


def on_files(files: Files, *, config: Any) -> Files:
    """Add a reference page for each package."""
    for package in _PACKAGES:
        content = "\n\n".join([f"# {package}", *(f"::: {name}" for name in _modules(package))])
        files.append(File.generated(config, f"reference/{package}.md", content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links at source files to the reference, and unlink other files of the repository."""
    markdown = _SOURCE_LINK.sub(
        lambda match: f"][nemotron3.{match[1].replace('/', '.')}]", markdown
    )
    return _OTHER_LINK.sub(r"\1", markdown)


def _modules(package: str) -> list[str]:
    """The modules of a package, its `__init__` first."""
    names: list[str] = []
    for file in sorted((_PACKAGE / package).rglob("*.py")):
        parts = file.relative_to(_PACKAGE).with_suffix("").parts
        if parts[-1].startswith("_") and parts[-1] != "__init__":
            continue
        names.append(".".join(("nemotron3", *(p for p in parts if p != "__init__"))))
    return sorted(names, key=lambda name: (name.count(".") > 1, name))
