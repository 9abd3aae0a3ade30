"""Trains the tiny Chameleon that ships in thinkclearly/tiny_chameleon, from nothing.

docs/tiny_chameleon.md tells what it reached.

    python scripts/make_tiny_chameleon vq     # encoder and codebook by statistics, decoder by training
    python scripts/make_tiny_chameleon lm     # drawings, critiques, sub-goals and captions; goes on where it stopped
    python scripts/make_tiny_chameleon check  # held-out prompts drawn right by the result
"""

import argparse
from pathlib import Path

from autoencoder import train_vq
from check import check
from language_model import train_language_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vq", "lm", "check"], help="run them in this order")
    parser.add_argument(
        "--output_dir", default="outputs/tiny_chameleon", type=Path, help="model/ and what it is made from go here"
    )
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "vq":
        train_vq(arguments.output_dir)
    elif arguments.stage == "lm":
        train_language_model(arguments.output_dir)
    else:
        check(arguments.output_dir / "model")
