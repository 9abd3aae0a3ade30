"""`python scripts/evaluate.py`: the same job as `thinkclearly evaluate`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("evaluate")
