"""`python scripts/push.py`: the same job as `thinkclearly push`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("push")
