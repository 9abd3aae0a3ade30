"""Nothing knows the sizes of the reference checkpoint: the golden tests pass on another set of the same layout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from make_golden import main

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_the_golden_tests_pass_on_a_set_of_other_sizes(tmp_path):
    main(tmp_path)
    files = [str(path) for path in TESTS.glob("test_*.py") if "mark.golden" in path.read_text(encoding="utf-8")]
    no_sizes = "not large_photograph and not two_threads"  # slow, and nothing in them depends on the checkpoint's
    command = [sys.executable, "-m", "pytest", "-m", "golden", "-k", no_sizes, "-p", "no:cacheprovider", *files]
    run = subprocess.run(
        command, cwd=TESTS.parent, env=os.environ | {"GOLDEN_ROOT": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
