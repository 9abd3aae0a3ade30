"""`thinkclearly JOB [recipe.yaml] --key value …`: one function per job, shared by the command and by scripts/*.py."""

from __future__ import annotations

import atexit
import inspect
import logging
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from thinkclearly import jobs
from thinkclearly.arguments import (
    CalibrateArguments,
    ConvertArguments,
    DescribeArguments,
    EditArguments,
    GenerateArguments,
    LoadArguments,
    PrepareArguments,
    PushArguments,
)
from thinkclearly.config import DataArguments, ModelArguments, RecipeParser
from thinkclearly.data.inspect import inspect_dataset
from thinkclearly.data.jsonl import write_jsonl
from thinkclearly.data.sources import read_example, write_folder
from thinkclearly.editing.batch import edit_items, read_items
from thinkclearly.editing.editor import Editor
from thinkclearly.evaluation.benchmark import BenchmarkArguments, run_benchmark
from thinkclearly.evaluation.calibration import calibrate as fit_editor
from thinkclearly.evaluation.folder import evaluate_folder
from thinkclearly.hub import publish
from thinkclearly.models.backbone import Backbone, load_backbone
from thinkclearly.models.checkpoint import export_deepseek, resolve
from thinkclearly.models.clear_head import CONFIG_FILE, write_clear_config
from thinkclearly.models.original_finetune import is_original_finetune
from thinkclearly.models.quantization import quantization
from thinkclearly.splits import build_data, read_rows
from thinkclearly.training.adapters import load_base, load_clear_model

logger = logging.getLogger("thinkclearly")


def prepare(argv: list[str] | None = None) -> None:
    """Tokenize and label photo pairs; statistics, plots and a look at examples."""
    options = [ModelArguments, DataArguments, PrepareArguments]
    parser = RecipeParser(options, skipped=jobs.TRAIN_OPTIONS, prog="thinkclearly prepare")
    model, data, output = parser.parse(argv)
    if output.export_folder and data.source in ("jsonl", "prepared"):
        raise ValueError(f"export_folder={output.export_folder!r} needs pictures, and {data.path} holds tokens only")
    backbone = jobs.build_backbone(model)
    prepared = build_data(data, backbone)
    if not PartialState().is_main_process:
        return
    if output.export_folder:
        rows, _ = read_rows(data)
        count = write_folder((read_example(row) for row in rows), output.export_folder)
        logger.info("%d samples in %s", count, output.export_folder)
    if output.jsonl:
        write_jsonl(prepared.train, output.jsonl, backbone.model.config.vq_config.num_embeddings)
    inspect_dataset(prepared.train, backbone, output.output_dir, pixel_tolerance=data.pixel_tolerance)


def train(argv: list[str] | None = None) -> None:
    """Fine-tune with CLEAR: prepare, train (going on from the last checkpoint), evaluate, save."""
    options = RecipeParser(jobs.TRAIN_OPTIONS, prog="thinkclearly train").parse(argv)
    model, lora, _, clear, training, _ = options
    if training.dry_run:
        sys.stdout.write(jobs.estimate_memory(model, lora, clear, training))
    else:
        jobs.train(*options)


def edit(argv: list[str] | None = None) -> None:
    """Edit a picture, or folders and data sets of them, by instructions; CLEAR patches stay byte-identical."""
    arguments, overrides = RecipeParser([EditArguments, jobs.SettingOverrides], prog="thinkclearly edit").parse(argv)
    if arguments.input is not None:
        return _edit_many(arguments, jobs.given(overrides))
    editor = _load(arguments, _load_finetune)
    with _Bar("decode") as bar:
        results = editor.edit(
            arguments.image,
            arguments.instruction,
            num_images=arguments.num_images,
            seed=arguments.seed,
            progress=bar,
            **jobs.given(overrides),
        )
    for k, result in enumerate(results if arguments.num_images > 1 else [results]):
        directory = Path(arguments.output_dir) / (f"{k:04d}" if arguments.num_images > 1 else "")
        result.save(directory, trace=arguments.trace)
        logger.info("%s: %.0f%% of the patches are the source, byte for byte", directory, 100 * result.clear_fraction)


def _edit_many(arguments: EditArguments, settings: dict) -> None:
    with PartialState().main_process_first():
        items, skipped = read_items(arguments.input, arguments.instruction, arguments.split, arguments.on_bad_record)
    names = ("input", "split", "seed", "num_images")
    report = edit_items(
        _load(arguments, _load_finetune),
        items,
        arguments.output_dir,
        run=_weights(arguments) | {name: getattr(arguments, name) for name in names} | settings,
        skipped=skipped,
        batch_size=arguments.batch_size,
        num_images=arguments.num_images,
        seed=arguments.seed,
        on_bad_record=arguments.on_bad_record,
        **settings,
    )
    if PartialState().is_main_process:
        folder, left_out = arguments.output_dir, len(report.skipped)
        logger.info("%s: %d items, %d edited now, %d left out", folder, report.items, report.edited, left_out)


def generate(argv: list[str] | None = None) -> None:
    """Draw pictures from words."""
    parser = RecipeParser([GenerateArguments, jobs.SettingOverrides], prog="thinkclearly generate")
    arguments, overrides = parser.parse(argv)
    editor = _load(arguments, _load_any)
    with _Bar("decode") as bar:
        pictures = editor.generate(
            arguments.prompt,
            num_images=arguments.num_images,
            seed=arguments.seed,
            progress=bar,
            **jobs.given(overrides),
        )
    directory = Path(arguments.output_dir)
    directory.mkdir(parents=True, exist_ok=True)
    for k, picture in enumerate(pictures):
        picture.save(directory / f"{k:04d}.png")
    logger.info("%d pictures in %s", len(pictures), directory)


def describe(argv: list[str] | None = None) -> None:
    """Answer a question about a picture."""
    (arguments,) = RecipeParser(DescribeArguments, prog="thinkclearly describe").parse(argv)
    names = ("num_answers", "max_new_tokens", "temperature", "top_k", "top_p", "seed")
    options = {name: getattr(arguments, name) for name in names}
    for answer in _load(arguments, _load_any).describe(arguments.image, arguments.question, **options):
        sys.stdout.write(answer + "\n")


def evaluate(argv: list[str] | None = None) -> None:
    """Measure saved edits, `thinkclearly evaluate DIR`, or run a benchmark, `evaluate --benchmark magicbrush …`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if any(word.split("=")[0] == "--benchmark" for word in argv) or argv[:1] and argv[0].endswith((".yaml", ".yml")):
        options = [LoadArguments, BenchmarkArguments, jobs.SettingOverrides]
        model, arguments, overrides = RecipeParser(options, prog="thinkclearly evaluate").parse(argv)
        run_benchmark(_load(model, _load_finetune), arguments, _weights(model), jobs.given(overrides))
        return
    if len(argv) != 1 or argv[0].startswith("-"):
        usage = (
            "usage: thinkclearly evaluate DIR\n       thinkclearly evaluate --benchmark NAME [--help] [--key value …]"
        )
        sys.stdout.write(usage + "\n\n" + inspect.getdoc(evaluate_folder) + "\n")
        raise SystemExit(0 if argv in (["-h"], ["--help"]) else 2)
    evaluate_folder(argv[0])


def calibrate(argv: list[str] | None = None) -> None:
    """Fit the gate of a fine-tune to the recipe's held-out records; stored in its folder (train does it by itself)."""
    parser = RecipeParser(
        [CalibrateArguments, DataArguments], skipped=jobs.TRAIN_OPTIONS, prog="thinkclearly calibrate"
    )
    arguments, data = parser.parse(argv)
    if not (Path(arguments.model) / CONFIG_FILE).is_file():
        raise ValueError(f"model={arguments.model!r} is no folder with a {CONFIG_FILE}; calibrate where you can write")
    editor = _load(arguments, _load_finetune)
    rows = build_data(data, Backbone(editor.model.base, editor.processor), train=False).test
    if rows is None or "source" not in rows.column_names:
        raise ValueError(f"eval_samples={data.eval_samples}, source={data.source}: no held-out records with pictures")
    if not PartialState().is_main_process:
        return
    found = fit_editor(editor, rows, arguments.batch_size)
    write_clear_config(editor.model.clear_config, arguments.model)
    sys.stdout.write("".join(f"{name} {value:.4g}\n" for name, value in found.items() if value is not None))


def convert(argv: list[str] | None = None) -> None:
    """Rewrite a checkpoint in the other layout: DeepSeek's or transformers'."""
    (arguments,) = RecipeParser(ConvertArguments, prog="thinkclearly convert").parse(argv)
    directory = Path(arguments.output_dir)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} exists and is not an empty folder; give another one or remove it.")
    backbone = load_backbone(arguments.model, dtype=getattr(torch, arguments.dtype))
    if arguments.to == "deepseek":
        # The tokenizer files as they are: transformers 5 would write a class that DeepSeek's code does not find.
        export_deepseek(backbone.model, directory, processor_source=backbone.model.name_or_path)
    else:
        backbone.model.save_pretrained(directory)
        backbone.processor.save_pretrained(directory)


def push(argv: list[str] | None = None) -> None:
    """Upload to the Hub: `thinkclearly push DIR --repo_id you/name`; given again it sends what is missing."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-") and not argv[0].endswith((".yaml", ".yml")):
        argv.insert(0, "--model")
    (arguments,) = RecipeParser(PushArguments, prog="thinkclearly push").parse(argv)
    options = vars(arguments)
    options |= {"private": arguments.private or None, "dtype": getattr(torch, arguments.dtype)}
    commit = publish.push(options.pop("model"), **options)
    logger.info("%s", commit.pr_url or commit.commit_url)


def demo(argv: list[str] | None = None) -> None:
    """Everything at once on the tiny model: data, fine-tune, edits, report."""
    from thinkclearly.demo import main

    main(argv)


def bench(argv: list[str] | None = None) -> None:
    """Time the decoder against the seeds' loop and transformers' own; JSON and Markdown."""
    from thinkclearly.bench.run import main

    main(argv)


JOBS = {
    job.__name__: job
    for job in (prepare, train, calibrate, edit, generate, describe, evaluate, convert, push, bench, demo)
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `thinkclearly` command."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in JOBS:
        asked = argv[:1] in (["-h"], ["--help"])
        out = sys.stdout if asked else sys.stderr
        lines = [f"  {name:10}{job.__doc__.splitlines()[0]}" for name, job in JOBS.items()]
        out.write("usage: thinkclearly JOB [recipe.yaml] [--key value …]\n\n" + "\n".join(lines) + "\n")
        out.write("\nthinkclearly JOB --help lists a job's options.\n")
        if argv and not asked:
            out.write(f"\nthinkclearly: error: unknown job {argv[0]!r}\n")
        raise SystemExit(0 if asked else 2)
    start(JOBS[argv[0]], argv[1:])


def start(job, argv: list[str] | None = None) -> None:
    """Runs a job with logging set up; what a user can mend is a message and exit status 1, not a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "httpx2", "datasets", "filelock"):
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.set_verbosity_warning()
    try:
        # Without a GPU the processes of a launch would not know of each other.
        state = PartialState(cpu=not torch.accelerator.is_available())
        # The group's threads would now and then abort the process that they outlive.
        atexit.register(state.destroy_process_group)
        job(argv)
    except (OSError, ValueError, ImportError) as error:  # ImportError: an optional package, as bitsandbytes
        logger.debug("", exc_info=True)
        logger.error("%s: %s", type(error).__name__, error)
        raise SystemExit(1) from error


def _load(arguments: LoadArguments, load) -> Editor:
    device = arguments.device or PartialState().device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    options = {"dtype": getattr(torch, arguments.dtype), "device": device}
    if arguments.load_in_8bit or arguments.load_in_4bit:
        bits = 8 if arguments.load_in_8bit else 4
        options["quantization_config"] = quantization(bits, options["dtype"])
    if arguments.base:
        options["base"] = arguments.base
    editor = Editor(*load(arguments.model, **options))
    if arguments.compile:
        # Prompts, blocks and what the cache holds have other lengths in every pass.
        editor.model.base.model.language_model.compile(dynamic=True)
    return editor


def _weights(arguments: LoadArguments) -> dict:
    """What a folder of results has to say of the weights that it came from."""
    names = ("model", "base", "dtype")
    bits = {name: True for name in ("load_in_8bit", "load_in_4bit") if getattr(arguments, name)}
    return {name: getattr(arguments, name) for name in names} | bits


_load_finetune = partial(load_clear_model, merge=True)


def _load_any(name_or_path: str, **options):
    """A base model where there are only its own files, else a fine-tune."""
    directory = None if name_or_path == "tiny" else resolve(name_or_path)
    finetuned = directory and ((directory / CONFIG_FILE).is_file() or is_original_finetune(directory))
    if finetuned or (directory and not (directory / "config.json").is_file()):
        return _load_finetune(name_or_path, **options)
    if "base" in options:
        raise ValueError(f"{name_or_path} is a base model, not a fine-tune; leave out base={options['base']}")
    return load_base(name_or_path, **options)


class _Bar:
    """A progress bar with the editor's callback signature."""

    def __init__(self, title: str):
        self.bar = tqdm(desc=title, unit="token")

    def __call__(self, done: int, total: int) -> None:
        self.bar.total = total
        self.bar.update(done - self.bar.n)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
