"""Fine-tune by a method: prepare, train (going on from the last checkpoint), evaluate, save."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> None:
    from thinkclearly.training.methods import METHODS, parse_options

    lines = "\n".join(f"  {name:6} {line}" for name, line in METHODS.items())
    options, method = parse_options(argv, "thinkclearly train", f"{__doc__}\n\nMethods (--method NAME):\n{lines}")
    if options.training.dry_run:
        from thinkclearly.training.memory import estimate_memory

        sys.stdout.write(estimate_memory(options, method))
    else:
        from thinkclearly.training.run import train

        train(options, method)
