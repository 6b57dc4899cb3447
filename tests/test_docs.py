"""The code in the README, the docs and the docstrings runs and prints what it says."""

import doctest
import html
import importlib
import inspect
import re
import runpy
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest

import sklearn_sela
from sklearn_sela import SelfLabelClusterer

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


def test_the_page_that_notebooks_link_to_is_that_of_the_docstrings():
    made = runpy.run_path(str(ROOT / "docs" / "make_page.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), "make page"


def test_a_notebook_shows_the_documentation_of_each_parameter():
    estimator = SelfLabelClusterer(n_clusters=3)
    shown = estimator._repr_mimebundle_()["text/html"]
    link = re.search(r'sk-estimator-doc-link[^>]*href="([^"]+)"', shown)[1]
    page = Path(url2pathname(urlparse(link).path)).read_text(encoding="utf-8")
    assert '<h2 id="SelfLabelClusterer">' in page
    for name in estimator.get_params():
        entry = re.search(rf"^{name} : (.+)$", inspect.getdoc(SelfLabelClusterer), re.MULTILINE)
        assert html.escape(f"{name} : {entry[1]}") in page
        assert f"{name}: {html.escape(entry[1])}<br>" in shown


def test_files_import_only_from_files_below_them():
    order = re.findall(r"``(\w+)\.py``", (ROOT / "docs" / "code.rst").read_text())
    order = list(dict.fromkeys(order))
    files = {path.stem for path in (ROOT / "sklearn_sela").glob("*.py")} - {"__init__"}
    assert set(order) == files
    for name in order:
        source = (ROOT / "sklearn_sela" / f"{name}.py").read_text()
        imported = re.findall(r"^ *from sklearn_sela\.(\w+) import", source, re.MULTILINE)
        imported += re.findall(r"^from sklearn_sela import (_\w+)$", source, re.MULTILINE)
        above = [other for other in imported if order.index(other) < order.index(name)]
        assert not above, f"{name} imports {above}"


def test_the_labeller_alone_imports_no_scikit_learn():
    code = """
import sys
import sklearn_sela
assert set(sklearn_sela.__all__) <= set(dir(sklearn_sela))
labels = sklearn_sela.sinkhorn_labels([[1.0, 0.0], [0.0, 1.0]]).labels
assert labels.tolist() == [0, 1] and "sklearn" not in sys.modules
assert sklearn_sela.metrics.clustering_accuracy([0, 1], [1, 0]) == 1
from sklearn_sela import *
assert SelfLabelClusterer is sklearn_sela.SelfLabelClusterer
assert len(set(dir(sklearn_sela))) == len(dir(sklearn_sela))
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_misspelt_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'SelfLabelCluster'"):
        sklearn_sela.SelfLabelCluster  # noqa: B018
