"""What the aggregator's image installs, from pyproject.toml and constraints.txt.

`python tests/deploy/aggregator_requirements.py` writes deploy/aggregator-requirements.txt anew.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FILE = ROOT / "deploy" / "aggregator-requirements.txt"
LEFT_OUT = {"torch", "scikit-learn"}
HEAD = """\
# What the aggregator needs: the dependencies of pyproject.toml without torch and scikit-learn, and of what they
# bring whatever constraints.txt pins. Written by tests/deploy/aggregator_requirements.py; a test compares.
"""


def text() -> str:
    wanted = closure(direct())
    pins = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = [line for line in pins if "==" in line and normal(line.partition("==")[0]) in wanted]
    return HEAD + "".join(f"{line}\n" for line in sorted(pinned, key=str.lower))


def direct() -> set[str]:
    """The names in pyproject.toml that the aggregator gets."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {normal(Requirement(line).name) for line in project["dependencies"]} - LEFT_OUT


def closure(names: Iterable[str]) -> set[str]:
    """These distributions and all that they require, as they are installed here."""
    found: set[str] = set()
    ahead = list(names)
    while ahead:
        name = normal(ahead.pop())
        if name not in found:
            found.add(name)
            needed = map(Requirement, requires(name) or ())
            ahead += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
