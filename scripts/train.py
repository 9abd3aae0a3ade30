"""`python scripts/train.py`: the same job as `thinkclearly train`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("train")
