"""`python scripts/prepare.py`: the same job as `thinkclearly prepare`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("prepare")
