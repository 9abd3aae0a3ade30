"""Resolves every extra under constraints.txt, installs nothing, and says what each would add to this environment.

Fails where an extra conflicts with the constraints, or would bring a package that has no exact version there: that is
how a release of years ago gets in unseen. Asks the package index, so it is no part of the tests: `make check-extras`.
"""

import json
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESOLVE = ("--dry-run", "--quiet", "--report", "-", "--no-build-isolation", "--constraint", "constraints.txt")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def check(extra: str, pinned: set[str]) -> str:
    """One line about `extra`; exits where it cannot be installed as pinned."""
    command = [sys.executable, "-m", "pip", "install", *RESOLVE, f".[{extra}]"]
    pip = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if pip.returncode:
        sys.exit(f"[{extra}] cannot be installed under constraints.txt; pip's reason is above.")
    wanted = [item["metadata"] for item in json.loads(pip.stdout)["install"]]
    found = {normal(item["name"]): item["version"] for item in wanted if item["name"] != "thinkclearly"}
    if loose := sorted(found.keys() - pinned):
        sys.exit(f"[{extra}] needs {', '.join(loose)}, which constraints.txt does not name. Add the exact versions.")
    added = ", ".join(f"{name} {version}" for name, version in sorted(found.items()))
    return f"[{extra}] {f'adds {added}' if added else 'is installed'}"


if __name__ == "__main__":
    pinned = {normal(name) for name in re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.M)}
    for extra in metadata("thinkclearly").get_all("Provides-Extra"):
        sys.stdout.write(check(extra, pinned) + "\n")
