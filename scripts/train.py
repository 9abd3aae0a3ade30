"""`python scripts/train.py`: the same job as `thinkclearly train`."""

from thinkclearly.cli import train, start

if __name__ == "__main__":
    start(train)
