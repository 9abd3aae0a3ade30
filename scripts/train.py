"""`python scripts/train.py`: the same job as `thinkclearly train`."""

from thinkclearly.cli import start, train

if __name__ == "__main__":
    start(train)
