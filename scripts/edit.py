"""`python scripts/edit.py`: the same job as `thinkclearly edit`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("edit")
