"""`python scripts/describe.py`: the same job as `thinkclearly describe`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("describe")
