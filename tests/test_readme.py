"""What the README says of the code is so."""

import ast
import re
from pathlib import Path

from pipeline.said import COMMANDS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_test_that_a_promise_names_is_there():
    section = README.split("### What is promised, and by which test")[1].split("\n## ")[0]
    named = 0
    for row in [line for line in section.splitlines() if line.startswith("| ") and "`test_" in line]:
        file = ""
        for word in re.findall(r"`([^`]*test_[^`]*)`", row.rsplit("|", 2)[1]):
            name = re.search(r"(?:::|…)(test_\w+)", word)
            file = word.split("::")[0] if word.startswith("test_") else file
            tree = ast.parse((ROOT / "tests" / file).read_text())
            there = [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
            assert name is None or any(test.startswith(name[1]) for test in there), (file, word)
            named += 1
    assert named > 25


def test_every_file_of_the_house_has_its_line_and_every_line_its_file():
    house = README.split("## The house")[1]
    listed = set(re.findall(r"^((?:pipeline|stages|store)/[\w/]+\.py)[ ,]", house, re.M))
    there = {str(path.relative_to(ROOT)) for layer in ("pipeline", "stages", "store") for path in (ROOT / layer).rglob("*.py")}
    short = {f"pipeline/commands/{name}.py" for name in ("du", "explain", "pin", "unpin", "push", "pull")}
    inside = {path for path in there if path.startswith("pipeline/benches/") or path.endswith("__init__.py")}
    assert listed == there - short - inside


def test_every_command_has_its_target_and_its_document():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    documents = README.split("| verb | document |")[1].split("\n\n")[0]
    for verb in COMMANDS:
        assert verb in targets and f"`{verb}`" in documents, verb
