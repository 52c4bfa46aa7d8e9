"""What the documents say is true: code blocks run, links lead somewhere, docstring examples give what they show."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import distprop
from test_imports import modules

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs" / "backprop.md"], ids=lambda page: page.name)
def test_python_blocks_run_one_after_the_other(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S) if "    ...\n" not in block]
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("module", [name for name in modules() if name not in ("__init__", "__main__")])
def test_examples_in_docstrings(module: str) -> None:
    name = f"distprop.{module}".removesuffix(".__init__")
    result = doctest.testmod(importlib.import_module(name), extraglobs={"dp": distprop})
    assert result.failed == 0
