"""`python scripts/calibrate.py`: the same job as `thinkclearly calibrate`."""

from thinkclearly.cli import calibrate, start

if __name__ == "__main__":
    start(calibrate)
