"""`python scripts/bench.py`: the same job as `thinkclearly bench`."""

from thinkclearly.cli import bench, start

if __name__ == "__main__":
    start(bench)
