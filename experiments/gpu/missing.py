"""Print the required packages that are not installed here, one a line with its version."""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TEXT = (Path(__file__).parents[2] / "pyproject.toml").read_text()


def main() -> None:
    needed = re.search(r"^dependencies = \[(.*?)^\]", TEXT, re.DOTALL | re.MULTILINE)
    assert needed is not None
    for requirement in re.findall(r'"([^"]+)"', needed[1]):
        name = re.split(r"[<>=!]", requirement)[0]
        try:
            version(name)
        except PackageNotFoundError:
            print(requirement)


if __name__ == "__main__":
    main()
