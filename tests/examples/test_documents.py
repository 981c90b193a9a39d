"""What the documents name is there: files, headings, options of commands, environment variables, places for tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks" / "README.md"])
LINK = re.compile(r"\]\(([^)\s]+)\)")
QUOTED = re.compile(r"`([^`\n]+)`")
# Folders of the repository; results are named with or without the folder that they lie in.
PATH = re.compile(r"(?:benchmarks|csrc|docs|examples|python|results|taco_kernels|tests|\.ci)/[\w./*<>-]+")
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


@pytest.fixture(params=DOCUMENTS, ids=NAMES)
def document(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


@pytest.fixture(scope="module")
def variables() -> set[str]:
    """Names of environment variables that the project's code and tests mention."""
    sources = [*ROOT.glob("*.py"), ROOT / "Makefile"]
    for folder in ("taco_kernels", "python", "tests", "csrc"):
        sources += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu")]
    sources.remove(Path(__file__).resolve())
    return {name for path in sources for name in re.findall(r"\bTACO_[A-Z_]+\b", path.read_text(encoding="utf-8"))}


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives a document's headings."""
    found = re.findall(r"^#+ (.+)$", without_code(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in found}


def commands(text: str) -> Iterator[str]:
    """What may be a use of `taco-svd` in a document: lines of code blocks (continued ones joined), inline code."""
    for block in re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.partition("#")[0]
    yield from QUOTED.findall(re.sub(r"\n\s*", " ", without_code(text)))


def options_of_commands() -> dict[str, set[str]]:
    from taco_svd.cli import app

    group = typer.main.get_command(app)
    return {
        name: {"--help", *(option for one in command.params for option in (*one.opts, *one.secondary_opts))}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(without_code(document.read_text(encoding="utf-8"))):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(path), f"{target}: no such heading"


def test_files_that_are_named_exist(document: Path) -> None:
    """Files that a run would write are named in benchmarks/README.md, so results count as named everywhere else."""
    for quoted in QUOTED.findall(document.read_text(encoding="utf-8")):
        for name in PATH.findall(quoted):
            pattern = name.rstrip("/.")
            if pattern.startswith("results/"):
                if document.parent.name == "benchmarks":
                    continue
                pattern = f"benchmarks/{pattern}"
            if "<" not in pattern:
                assert any(ROOT.glob(pattern)), f"{name}: no such file"


def test_options_of_commands_exist(document: Path) -> None:
    known = options_of_commands()
    for line in commands(document.read_text(encoding="utf-8")):
        for name, rest in re.findall(r"(?:taco-svd|-m taco_svd) ([a-z]+)\b([^`]*)", line):
            assert name in known, f"taco-svd {name}: no such command"
            for option in re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", rest):
                assert option in known[name], f"taco-svd {name} has no {option}: {line.strip()}"


def test_variables_exist(document: Path, variables: set[str]) -> None:
    wanted = set(re.findall(r"\bTACO_[A-Z_]+\b", document.read_text(encoding="utf-8")))
    assert wanted <= variables


def test_places_of_generated_tables_are_whole(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    begins, ends = (re.findall(rf"<!-- ([\w-]+):{mark} -->", text) for mark in ("begin", "end"))
    assert begins == ends and len(set(begins)) == len(begins)


def test_every_document_is_read() -> None:
    """The checks above look at the documents that a reader finds from the README."""
    assert {"README.md", "CHANGELOG.md", "docs/deployment.md", "docs/vllm.md", "benchmarks/README.md"} <= set(NAMES)
    reached, left = set(), [ROOT / "README.md"]
    while left:
        path = left.pop()
        if path in reached or path.suffix != ".md" or not path.exists():
            continue
        reached.add(path)
        links = LINK.findall(path.read_text(encoding="utf-8"))
        left += [(path.parent / link.partition("#")[0]).resolve() for link in links if not link.startswith("http")]
    assert set(DOCUMENTS) <= reached
