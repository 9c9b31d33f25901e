"""The few house rules that a machine can judge: first lines, leftovers, the README's tree, fresh stubs."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("orchestrator", "workers", "bench")
FOLDERS = (*PACKAGES, "tests")
GENERATED = re.compile(r"_pb2(_grpc)?\.pyi?$")
LEFTOVER = re.compile(r"\b(TODO|FIXME|XXX|HACK)\b|breakpoint\(\)|\bpdb\b")
#: Reads this file's own rules, so it is not judged by them.
SELF = Path(__file__)


def sources() -> list[Path]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if not GENERATED.search(path.name) and "__pycache__" not in path.parts]


def leftovers(text: str) -> list[str]:
    return [line for line in text.splitlines() if LEFTOVER.search(line)]


def first_line(text: str) -> str:
    return (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_says_what_it_is_for_and_leaves_nothing_lying_about(path: Path) -> None:
    text = path.read_text()
    assert first_line(text), "the first line must be a docstring that says what the file is for"
    assert path == SELF or leftovers(text) == []


def test_canary_the_rules_notice_a_leftover_and_a_missing_first_line() -> None:
    assert leftovers("x = 1  # TODO: later") == ["x = 1  # TODO: later"]
    assert first_line("import os\n") == ""


def tree_of(readme: str) -> list[tuple[str, str]]:
    """Return the files that a README's tree names, and its words on each: a folder ends in a slash, its files stand below it."""
    folder, files = "", []
    for line in readme.split("## The tree", 1)[1].split("\n## ", 1)[0].splitlines():
        name, _, words = line.strip().partition(" ")
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py") and line.startswith("      "):
            files.append((folder + name, words.strip()))
    return files


@pytest.mark.parametrize("package", PACKAGES)
def test_a_readme_names_every_source_file_of_its_package_once_by_its_first_line(package: str) -> None:
    files = [path for path in sources() if path.name != "__init__.py" and path.is_relative_to(ROOT / package)]
    named = tree_of((ROOT / package / "README.md").read_text())
    assert sorted(named) == sorted((str(path.relative_to(ROOT)), first_line(path.read_text())) for path in files)


def test_canary_a_name_within_another_name_is_not_in_the_tree() -> None:
    assert tree_of("## The tree\n\n    a/  all\n      gateway.py  one thing\n    a/b/\n      x.py  two\n") == [
        ("a/gateway.py", "one thing"),
        ("a/b/x.py", "two"),
    ]


def vacuous(text: str) -> list[str]:
    """Return the assertions that also hold of nothing: `all(...)` or `not any(...)` over what may be empty."""
    found: list[str] = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case (
                ast.Assert(test=ast.Call(func=ast.Name("all"), args=[ast.GeneratorExp(generators=[first, *_])]))
                | ast.Assert(
                    test=ast.UnaryOp(ast.Not(), ast.Call(func=ast.Name("any"), args=[ast.GeneratorExp(generators=[first, *_])]))
                )
            ):
                if not is_filled(first.iter):
                    found.append(ast.unparse(node))
            case _:
                pass
    return found


def is_filled(source: ast.expr) -> bool:
    """Tell whether what is gone through is there by construction, or seen to be by `some`."""
    match source:
        case ast.Tuple(elts=[_, *_]) | ast.List(elts=[_, *_]) | ast.Call(func=ast.Name("some" | "range")):
            return True
        case _:
            return False


@pytest.mark.parametrize(
    "path", [path for path in sources() if "tests" in path.parts], ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_test_is_content_with_nothing(path: Path) -> None:
    assert vacuous(path.read_text()) == []


def test_canary_an_assertion_about_nothing_is_noticed() -> None:
    assert vacuous("assert all(x for x in xs)\nassert not any(x for x in xs)\nassert all(x for x in some(xs))") == [
        "assert all((x for x in xs))",
        "assert not any((x for x in xs))",
    ]


def test_proto_holds_no_python() -> None:
    assert [path.name for path in (ROOT / "proto").rglob("*") if path.is_file() and path.suffix != ".proto"] == []


def test_the_committed_stubs_are_what_the_proto_files_give(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "proto", tmp_path / "proto")
    protos = sorted(str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto"))
    outputs = [f"--{kind}=." for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", "-Iproto", *outputs, *protos], cwd=tmp_path, check=True)
    made = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*_pb2*") if path.is_file()}
    assert made
    assert {name: (ROOT / name).read_text() for name in made} == made, "run `make proto`"


def dead_links(readme: Path, text: str) -> list[str]:
    """Return the relative links of a page that lead nowhere."""
    found = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [link for link in found if "://" not in link and not (readme.parent / link).exists()]


@pytest.mark.parametrize(
    "readme", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("*/README.md")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_links_lead_somewhere(readme: Path) -> None:
    assert dead_links(readme, readme.read_text()) == []


#: A Python file as docstrings and pages name it.
NAMED = re.compile(r"`([\w/]+\.py)`")
KNOWN = frozenset(str(path.relative_to(ROOT)) for path in sources())


def pages() -> list[Path]:
    return sorted(ROOT.glob("*.md")) + [page for folder in (*FOLDERS, "deploy") for page in sorted((ROOT / folder).rglob("*.md"))]


def stale_names(text: str, known: frozenset[str]) -> list[str]:
    """Return the Python files that a text names and that are not there: a name alone may stand anywhere, a path ends a file's."""
    return [name for name in NAMED.findall(text) if not any(f"/{one}".endswith(f"/{name}") for one in known)]


@pytest.mark.parametrize("page", [*sources(), *pages()], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_are_named_are_there(page: Path) -> None:
    assert page == SELF or stale_names(page.read_text(), KNOWN) == []


def test_canary_a_file_that_is_not_there_is_noticed() -> None:
    assert stale_names("`gone.py` `b.py` `a/b.py` `c/b.py`", frozenset({"x/a/b.py"})) == ["gone.py", "c/b.py"]


def test_canary_a_dead_link_is_noticed() -> None:
    assert dead_links(ROOT / "README.md", "[a](gone.md) [b](README.md#part) [c](https://example.org)") == ["gone.md"]
