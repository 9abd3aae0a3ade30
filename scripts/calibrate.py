"""`python scripts/calibrate.py`: the same job as `thinkclearly calibrate`."""

from thinkclearly.cli import start

if __name__ == "__main__":
    start("calibrate")
