"""The README's code runs, its commands exist, its links lead somewhere."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert blocks
    names = {"__name__": "readme"}  # a later block goes on where an earlier one ended
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_modules_and_targets_exist():
    modules = set(re.findall(r"python -m (experiments[\w.]*)", README))
    assert "experiments.quickstart" in modules
    for module in modules:
        assert (ROOT / (module.replace(".", "/") + ".py")).exists(), module
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^\s*make ([\w-]+)", README, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_two_commands_come_first():
    first = README.index("make demo")
    assert first < README.index("make test") < README.index("```python")


@pytest.mark.parametrize("path", sorted(ROOT.glob("notebooks/*.ipynb")), ids=lambda p: p.name)
def test_notebooks_are_committed_without_output(path):
    import json

    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert all(not c["outputs"] for c in cells if c["cell_type"] == "code")
