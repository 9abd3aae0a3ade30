"""Trains the tiny Janus that ships in thinkclearly/tiny_janus, from nothing. docs/tiny_janus.md tells what it reached.

    python scripts/make_tiny_janus vq      # autoencoder on unit latents, k-means codebook, quantized
    python scripts/make_tiny_janus lm      # edits and text-to-image on the finished tokens
    python scripts/make_tiny_janus shapes  # the same, with more weight on what the SigLIP tower sees
    python scripts/make_tiny_janus anneal  # the same, learning rate to zero
    python scripts/make_tiny_janus check   # edits done by the result, and by its autoencoder

The result has no CLEAR head: it is a base model in the manner of Janus-4o, which the demo fine-tunes.
"""

import argparse
from pathlib import Path

from autoencoder import train_vq, vq_config
from check import check
from language_model import HIDDEN, STAGES, train_language_model

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["vq", *STAGES, "check"], help="run them in this order")
    parser.add_argument(
        "--output_dir", default="outputs/tiny_base", type=Path, help="model/ and vq.pt are written here"
    )
    arguments = parser.parse_args()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.stage == "vq":
        train_vq(arguments.output_dir, HIDDEN)
    elif arguments.stage == "check":
        check(arguments.output_dir / "model")
    else:
        stage = STAGES[arguments.stage]
        train_language_model(stage, vq_config(HIDDEN), arguments.output_dir, continued=arguments.stage != "lm")
