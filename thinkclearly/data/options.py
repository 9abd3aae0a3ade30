"""Where a job's records come from: the options of every job that reads data. Light: imports no room."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

from thinkclearly.recipe import check_choice, option

SOURCES = ("shapes", "magicbrush", "folder", "sharegpt4o", "captions", "pairs", "thoughts", "jsonl", "prepared")
# Data options that not every source can use: given to another one, they would be ignored.
_USED_BY = {
    **dict.fromkeys(("shapes_size", "pair_shapes", "photos_folder"), ("shapes",)),
    **dict.fromkeys(("turn_index", "streaming"), ("magicbrush",)),
    "thought_mode": ("shapes", "thoughts"),
    "wrong_share": ("shapes",),
    "split": ("magicbrush", "pairs"),
    **dict.fromkeys(("path", "shuffle", "include", "exclude", "match"), SOURCES[1:]),
    **dict.fromkeys(
        ("clear_label", "pixel_tolerance", "cache_features"),
        tuple(name for name in SOURCES if name not in ("jsonl", "pairs")),
    ),
}


@dataclass
class DataArguments:
    """Where the photo pairs come from and how they are labelled."""

    source: str = option(
        "shapes",
        "shapes (built in), magicbrush, folder (sample_XXXX), sharegpt4o (JSON), captions, pairs (of prompts, JSON), "
        "thoughts (JSON lines), jsonl, or prepared.",
    )
    path: str | None = option(None, "Folder, file or Hub id of the data; not needed for shapes.")
    split: str = option("train", "Split of a Hub data set.")
    limit: int | None = option(None, "Use at most this many records.")
    shuffle: bool = option(False, "Shuffle the records before the limit is taken.")
    include: list[str] = option([], "Keep records whose instruction holds these words.")
    exclude: list[str] = option([], "Leave out records whose instruction holds these words.")
    match: str = option("any", "Whether any or all of the words above must be there.")
    turn_index: int | None = option(None, "MagicBrush: keep this turn only.")
    streaming: bool = option(False, "MagicBrush: read the data set as a stream, without downloading it whole.")
    shapes_size: int = option(64, "shapes: side of the rendered pictures, pixels.")
    pair_shapes: int | None = option(
        None, "shapes: how many stand on a prompt pair's first scene; 1 to 3 if not given."
    )
    thought_mode: list[str] = option(
        [],
        "thoughts: critique or subgoals puts prompts into the original's words; as they are if not given. shapes: the "
        "kinds of thoughts that are made: critique if not given, subgoals, general (the picture at once).",
    )
    wrong_share: float = option(0.5, "shapes: share of critiques whose first picture has a mistake.")
    max_stream: int = option(5120, "Thoughts of this many tokens or more are left out.")
    photos_folder: str | None = option(
        None, "shapes: draw on the photographs of this folder instead of the packaged ones."
    )
    eval_samples: int = option(50, "Records held out for evaluation; 0 for none.")
    calibration_edits: int = option(
        64, "Records held out to calibrate the gate; neither trained on nor reported. 0 for none."
    )
    clear_label: str = option("pixels", "Where CLEAR is the label: equal tokens, pixels, or outside the human mask.")
    pixel_tolerance: int = option(16, "clear_label=pixels: largest difference of an unchanged patch, of 255.")
    on_bad_record: str = option("error", "error stops at a bad record, skip leaves it out and lists it.")
    prepared_dir: str = option("outputs/prepared", "Where tokenized data is kept and found again.")
    cache_features: bool = option(
        False, "Keep what the frozen vision tower makes of each source picture, in prepared_dir: needs disk space."
    )
    prepare_batch_size: int = option(16, "Pairs that are tokenized at once.")
    prepare_workers: int | None = option(
        None, "Processes that read pictures beside the encoder; if not given, 4 for a GPU and none for a CPU."
    )
    split_seed: int = option(42, "Seed of shuffling, of the held-out split and of the built-in shapes.")

    def __post_init__(self):
        check_choice("source", self.source, SOURCES)
        check_choice("match", self.match, ("any", "all"))
        check_choice("clear_label", self.clear_label, ("tokens", "pixels", "mask"))
        check_choice("on_bad_record", self.on_bad_record, ("error", "skip"))
        for mode in self.thought_mode:
            check_choice("thought_mode", mode, ("general", "critique", "subgoals"))
        if self.source == "thoughts" and len(self.thought_mode) > 1:
            raise ValueError(f"thought_mode={self.thought_mode}: source: thoughts takes one, for all of its prompts")
        if not 0 <= self.wrong_share <= 1:
            raise ValueError(f"wrong_share={self.wrong_share}; expected a share between 0 and 1")
        if self.source != "shapes" and not self.path and self.source != "magicbrush":
            raise ValueError(f"source: {self.source} needs path: the folder or file to read")
        for name, least in (("limit", 1), ("eval_samples", 0), ("calibration_edits", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value}; expected {least} or more")
        defaults = {f.name: f.default if f.default is not MISSING else f.default_factory() for f in fields(self)}
        for name, known in _USED_BY.items():
            if self.source not in known and (value := getattr(self, name)) != defaults[name]:
                raise ValueError(
                    f"{name}={value!r} means nothing for source: {self.source}; it is for {', '.join(known)}"
                )
        if self.split != "train" and (self.path or "").endswith(".parquet"):
            raise ValueError(f"split={self.split!r}: {self.path} is a single file and has no splits; leave it out")
