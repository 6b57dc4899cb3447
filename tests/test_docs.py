"""The code in the README, the docs and the docstrings runs and prints what it says."""

import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.rst", *sorted((ROOT / "docs").glob("*.rst"))]
CODE = re.compile(r"^\.\. code-block:: python\n\n((?:    .*\n|\n)+)", re.MULTILINE)


def code_blocks(page):
    blocks = CODE.findall(page.read_text() + "\n")
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_of_a_page_run_in_a_fresh_interpreter(page):
    blocks = code_blocks(page)
    if not blocks:
        pytest.skip("no code on this page")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "False" not in done.stdout  # examples print what they claim


def test_the_readme_shows_what_its_first_example_prints():
    readme = (ROOT / "README.rst").read_text()
    assert re.search(r"clusterer\.labels_\) > 0\.94\)\n\nprints[^\n]*::\n\n    True\n", readme)


@pytest.mark.parametrize("module", ["_clusterer", "_export", "_sinkhorn", "evaluation", "metrics"])
def test_docstring_examples_print_what_they_show(module):
    results = doctest.testmod(importlib.import_module(f"sklearn_sela.{module}"))
    assert results.attempted
    assert not results.failed
