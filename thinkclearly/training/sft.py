"""`method: sft`: labels over the K codes and over words, as Janus-4o was trained.

Pictures from words, edits of one or several pictures, and answers about pictures stand in one file. It is the trainer
of `clear` with an empty vocabulary. Source: FreedomIntelligence/ShareGPT-4o-Image, train_janus.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from thinkclearly.data.collator import Collator
from thinkclearly.data.prepare import with_source_codes
from thinkclearly.data.splits import PreparedData, build_samples
from thinkclearly.models.load import Checkpoint
from thinkclearly.recipe import option
from thinkclearly.sequence import Dropout
from thinkclearly.training.callbacks import EpochOfDropout
from thinkclearly.training.options import Options
from thinkclearly.training.setup import build_model, new_config, stored_features
from thinkclearly.training.supervised import SupervisedTrainer


@dataclass
class SftArguments:
    """The objective."""

    drop_all: float = option(0.1, "Share of drawing rows that are told nothing (trains the uncond row).")
    drop_source: float = option(0.5, "Share of input pictures whose codes other rows do not see (trains no_source).")
    answer_weight: float = option(1.0, "Weight of a word of an answer, where a code has 1.")
    source_codes: bool = option(
        False, "In edits, what is unchanged (pixel_tolerance) is labelled with the source's codes, not the target's."
    )
    source_weight: float = option(
        1.0, "Weight of codes of an edit that are the source's own: most are, and drown what is asked for."
    )
    skip_padding: bool = option(False, "The gray bars beside a target that is not square carry no loss.")
    legacy_shift: bool = option(False, "Leave the first code untrained, as the original script does by accident.")

    def __post_init__(self):
        for name in ("drop_all", "drop_source"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}; expected a share between 0 and 1")
        for name in ("answer_weight", "source_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}; expected 0 (not trained) or more")


Arguments, Trainer = SftArguments, SupervisedTrainer


def instructions(options: Options) -> list[str]:
    """None: the image head keeps its K classes."""
    return []


def read_data(options: Options, checkpoint: Checkpoint) -> PreparedData:
    """Records in two parts that share no picture; there is no gate to calibrate."""
    data = build_samples(options.data, checkpoint)
    if options.method.source_codes:
        for part in ("train", "test"):
            if (records := getattr(data, part)) is not None:
                setattr(data, part, with_source_codes(records, options.data.pixel_tolerance))
    return data


def build(options: Options, checkpoint: Checkpoint, data: PreparedData, kind: type) -> SupervisedTrainer:
    """A trainer with the objective that the options describe."""
    sft = options.method
    model = build_model(options, checkpoint, new_config(checkpoint, options.settings, instructions=[]))
    collator = Collator(
        checkpoint.processor,
        model.vocabulary,
        Dropout(sft.drop_all, sft.drop_source, options.training.seed),
        stored_features(options, model, checkpoint.processor, data),
        source_weight=sft.source_weight,
        skip_padding=sft.skip_padding,
        legacy_shift=sft.legacy_shift,
    )
    return kind(
        model=model,
        processor=checkpoint.processor,
        data_collator=collator,
        answer_weight=sft.answer_weight,
        args=options.training,
        train_dataset=data.train,
        eval_dataset=data.test,
        callbacks=[EpochOfDropout(collator)],
    )


def finish(trainer: SupervisedTrainer, data: PreparedData) -> dict[str, float]:
    """Nothing is left to do."""
    return {}
