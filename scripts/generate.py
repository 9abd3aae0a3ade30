"""`python scripts/generate.py`: the same job as `thinkclearly generate`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("generate")
