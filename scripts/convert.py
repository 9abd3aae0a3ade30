"""`python scripts/convert.py`: the same job as `thinkclearly convert`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("convert")
