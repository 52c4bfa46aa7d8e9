"""What the documents say is true: code blocks run, links lead somewhere, docstring examples give what they show."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import pytest

import distprop
from distprop import functional
from distprop.nn import init
from test_imports import modules

ROOT = Path(__file__).parent.parent
BACKPROP = ROOT / "docs" / "backprop.md"
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [ROOT / "README.md", BACKPROP], ids=lambda page: page.name)
def test_python_blocks_run_one_after_the_other(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if "    ...\n" not in block]
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


def test_backprop_names_every_operation_and_initialisation() -> None:
    prose = re.sub(r"```.*?```", "", BACKPROP.read_text(), flags=re.S)
    named = {re.sub(r"^functional\.", "", span) for span in re.findall(r"`([^`\n]+)`", prose)}
    initialisers = {name for name in vars(init) if name.endswith("_") and not name.startswith("_")}
    assert "kaiming_normal_" in initialisers
    assert {*functional.__all__, *initialisers} - named == set()


def test_code_that_backprop_quotes_in_part_stands_so_in_the_source() -> None:
    quoted = [block for block in re.findall(r"```python\n(.*?)```", BACKPROP.read_text(), re.S) if "    ...\n" in block]
    assert quoted
    for block in quoted:
        function = getattr(functional, re.match(r"def (\w+)", block)[1])
        lines = iter(code_of(inspect.getsource(function)))  # used up as they are found, so the order counts
        for line in code_of(block):
            assert line.strip() == "..." or line in lines, line


def code_of(text: str) -> list[str]:
    """Its lines without comments."""
    return [line.split("  # ")[0] for line in text.splitlines()]


@pytest.mark.parametrize("module", [name for name in modules() if name not in ("__init__", "__main__")])
def test_examples_in_docstrings(module: str) -> None:
    name = f"distprop.{module}".removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name), extraglobs={"dp": distprop})
    assert result.failed == 0
