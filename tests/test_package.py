"""The wheel holds all that an edit needs, and the metadata names all that the library imports."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PathDistribution, packages_distributions
from pathlib import Path

import pytest
from PIL import Image
from setuptools import build_meta

from thinkclearly.data.shapes import PACKAGED_PHOTOS

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "thinkclearly"
CLUTTER = (".*", "build", "dist", "outputs", "tests", "docs", "*.egg-info", "__pycache__")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Source archive, the wheel that pip builds from it, and what that installs: each has less than the one before."""
    folder = tmp_path_factory.mktemp("package")
    # In a copy, since what an earlier build left behind would be packed as well.
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=shutil.ignore_patterns(*CLUTTER))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        archive = folder / build_meta.build_sdist(str(folder))
    pip("wheel", "--no-build-isolation", "--wheel-dir", folder, archive)
    pip("install", "--no-compile", "--target", folder / "site", next(folder.glob("*.whl")))
    return folder / "site"


@pytest.fixture(scope="module")
def metadata(installed):
    return PathDistribution(next(installed.glob("*.dist-info"))).metadata


def pip(command, *arguments):
    options = ("--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    subprocess.run([sys.executable, "-m", "pip", command, *options, *map(str, arguments)], check=True)


def outside(installed, folder, *arguments):
    """Output of Python in `folder`, which finds the installed package and its dependencies, but no checkout."""
    paths = os.pathsep.join((str(installed), sysconfig.get_path("purelib")))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-S", *map(str, arguments)]  # -S: no .pth file leads back to the checkout
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_whole_library(installed):
    """Tests run from the checkout, where nothing can be missing."""
    files = (path for path in LIBRARY.rglob("*") if path.is_file() and path.suffix != ".pyc")
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert expected == {path.relative_to(installed).as_posix() for path in installed.glob("thinkclearly/**/*.*")}


def test_the_wheel_has_the_command(installed, tmp_path):
    printed = outside(installed, tmp_path, installed / "bin" / "thinkclearly", "--help")
    assert "edit" in printed and "train" in printed


def test_the_wheel_edits_a_photo_with_the_shipped_model(installed, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S)
    shutil.copy(installed / "thinkclearly" / "photographs" / "flower.jpg", tmp_path / "photo.jpg")
    printed = outside(installed, tmp_path, "-c", f"{code}\nprint(thinkclearly.__file__)")
    assert Path(printed.strip()).is_relative_to(installed)
    assert Image.open(tmp_path / "edited.png").size == Image.open(tmp_path / "photo.jpg").size


def test_the_metadata_says_licence_and_python(installed, metadata):
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-2.0"
    assert metadata["Requires-Python"] == ">=3.11" and metadata["Author"] == "The ThinkClearly authors"
    for name in metadata.get_all("License-File"):
        assert next(installed.glob(f"*.dist-info/licenses/{name}")).stat().st_size


def test_the_library_requires_what_it_imports_and_nothing_else(metadata):
    required = {normal(line) for line in metadata.get_all("Requires-Dist") if "extra ==" not in line}
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in LIBRARY.rglob("*.py"))
    modules = {module.split(".")[0] for tree in trees for node in ast.walk(tree) for module in imports(node)}
    projects = packages_distributions()
    assert required == {normal(projects[m][0]) for m in modules - sys.stdlib_module_names - {"thinkclearly"}}


def imports(node):
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []


def normal(requirement):
    """The project's name in a requirement, as indexes compare names."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def test_every_photograph_is_credited():
    """CC BY asks for author, licence and source wherever a picture is passed on."""
    table = (ROOT / "docs" / "credits.md").read_text(encoding="utf-8")
    assert all(f"`{Path(name).name}`" in table for photos in PACKAGED_PHOTOS.values() for _, name in photos)
    credits = (LIBRARY / "photographs" / "CREDITS.txt").read_text(encoding="utf-8")
    assert all(path.name in credits for path in (LIBRARY / "photographs").glob("*.jpg"))
