"""`python scripts/think.py`: the same job as `thinkclearly think`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("think")
