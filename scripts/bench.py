"""`python scripts/bench.py`: the same job as `thinkclearly bench`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("bench")
