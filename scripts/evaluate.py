"""`python scripts/evaluate.py`: the same job as `thinkclearly evaluate`."""

from thinkclearly.cli import evaluate, start

if __name__ == "__main__":
    start(evaluate)
