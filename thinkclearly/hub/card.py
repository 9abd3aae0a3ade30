"""Model and data set cards: what a repository's page says, made from what training left in the folder.

Knows the files of a fine-tune directory. Does not know how anything is uploaded.
"""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from thinkclearly.data.encode import Preparation
from thinkclearly.evaluation.benchmarks.report import eval_results
from thinkclearly.evaluation.benchmarks.results import SHARED_FOLDER
from thinkclearly.files import BUILT_IN, is_local
from thinkclearly.instructions import CLEAR
from thinkclearly.models.instruction_head import (
    ADAPTER_FILE,
    CONFIG_FILE,
    HEAD_FILE,
    head_digest,
    read_base_name,
    read_clear_config,
)
from thinkclearly.models.weight_files import read_tensors
from thinkclearly.recipe import LEFT_OUT

logger = logging.getLogger(__name__)

CARD_FILE, RECIPE_FILE = "README.md", "recipe.yaml"
TASK = "image-to-image"
TAGS = ["clear-edit", "thinkclearly", "image-editing"]
SHAPES = "built-in shapes"
MARK = "<!-- Written by thinkclearly, anew by each training and push. Delete this line, and the text is yours. -->"
# The second is PEFT's form with nothing filled in, which it leaves beside every adapter.
_NOT_THE_USERS = (MARK, "# Model Card for Model ID")
_COMPARED = {
    "psnr_pooled_outside": "PSNR outside the true mask, dB",
    "exact_outside": "bit-identical pixels outside the true mask",
    "mse_inside": "MSE to the target inside the true mask",
}


def model_card(
    directory: Path,
    repo_id: str | None,
    base_model: str | None,
    samples: list[str],
    license: dict[str, str] | None = None,
    is_adapter: bool = True,
) -> ModelCard:
    """The card of a fine-tune. A README.md that a user wrote keeps its text, and gets the metadata.

    Args:
        directory: the folder that training wrote, or a checkpoint in it. A checkpoint has its run's recipe and README,
            but metrics of its own: the run's are those of its last step.
        repo_id: the name to load it by; None where it is not known yet.
        base_model: Hub id; None where the base has no page there.
        samples: pictures of the gallery, as paths inside the repository.
        license: `license`, and `license_name` and `license_link` where there are any.
        is_adapter: whether the repository holds PEFT's adapter rather than whole weights.
    """
    recipe = read_recipe(directory)
    data = data_name(recipe)
    title = repo_id.split("/")[-1] if repo_id else run_of(directory).name
    metrics = read_metrics(directory)
    benchmarks = [result for found in read_benchmarks(directory) for result in eval_results(found)]
    family = _read(directory / "config.json", json.loads).get("model_type", "janus")
    tags = [*TAGS, family]
    metadata = ModelCardData(
        model_name=title if metrics or benchmarks else None,
        base_model=base_model,
        datasets=[data] if "/" in data else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=TASK,
        tags=tags,
        eval_results=[
            EvalResult(
                task_type=TASK,
                dataset_type=data,
                dataset_name=data,
                dataset_split="held out",
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            for name, value in metrics.items()
        ]
        + benchmarks
        or None,
        **(license or {}),
    )
    if (path := _users_card(directory)) is not None:
        own = ModelCard.load(path)
        users = [tag for tag in own.data.tags or [] if not tag.startswith("base_model:")]
        known = {key: value for key, value in vars(metadata).items() if value is not None}
        for key, value in (known | {"tags": [*users, *(tag for tag in tags if tag not in users)]}).items():
            own.data[key] = value
        own.data["base_model"] = base_model
        return own
    known = read_clear_config(directory).instructions if (directory / CONFIG_FILE).is_file() else [CLEAR]
    thinks = recipe.get("method") == "interleaved"
    parts = [MARK, f"# {title}", _about(base_model, family, data, step_of(directory), bool(known), thinks)]
    others = [name for name in known if name != CLEAR]
    parts += [_further(others)] if others else []
    parts.append(_usage(repo_id, THINK if thinks else EDIT if known else DRAW))
    if base_model is None and is_adapter and recipe.get("base_model") == LEFT_OUT:
        parts.append(
            "The base model was a folder on the machine that trained, so it is not named here. "
            "`thinkclearly push DIR --base_model_id owner/name` names it."
        )
    if samples:
        shown = "\n\n".join(f"![{Path(path).stem.replace('_', ' ')}]({path})" for path in samples)
        parts.append(f"## Samples\n\nEach row: source, raw decode, composite, CLEAR mask.\n\n{shown}")
    if metrics:
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
        unseen = f"On records of {data} that neither training nor calibration saw."
        parts.append(f"## Measured\n\n{unseen}\n\n| | |\n|---|---|\n{rows}")
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
        parts.append(f"## Recipe\n\n`thinkclearly train {RECIPE_FILE}` with\n\n```yaml\n{text}\n```")
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(parts) + "\n")


def write_card(directory: str | Path, repo_id: str | None = None) -> None:
    """Puts our card into a folder that training wrote, for whoever shares it without `thinkclearly push`.

    A user's own README.md stays as it is. Samples are not shown: whether they may be is decided by a push.
    """
    directory = Path(directory)
    if _users_card(directory) is not None:
        return
    is_adapter = (directory / ADAPTER_FILE).is_file()
    base = read_base_name(directory) if is_adapter else None
    known = base if base and base not in BUILT_IN and not is_local(base) else None
    model_card(directory, repo_id, known, [], is_adapter=is_adapter).save(directory / CARD_FILE)


def step_of(directory: Path) -> int | None:
    """The step that a checkpoint was written after; None for the folder of a run, whose weights are the last ones."""
    match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", directory.name)
    return int(match[1]) if match else None


def run_of(directory: Path) -> Path:
    """The folder of the run: that of a checkpoint lies around it."""
    return directory if step_of(directory) is None else directory.parent


def read_recipe(directory: Path) -> dict:
    """The options that the weights were trained with; empty where nothing tells them."""
    path = directory / RECIPE_FILE
    return _read(path if path.is_file() else run_of(directory) / RECIPE_FILE, yaml.safe_load)


def read_benchmarks(directory: Path) -> list[dict]:
    """What `thinkclearly evaluate --benchmark` left in the run, where it measured these weights as they are now."""
    found = []
    for path in sorted((run_of(directory) / SHARED_FOLDER).glob("*.json")):
        results, head = _read(path, json.loads), read_tensors(directory / HEAD_FILE)["weight"]
        if results.get("run", {}).get("head") == head_digest(head, read_clear_config(directory)):
            found.append(results)
        else:
            logger.warning("%s is of other weights or another calibration; the card leaves it out", path)
    return found


def read_metrics(directory: Path) -> dict[str, float]:
    """Name → value: the evaluation of these weights, and the demo's measured edits where they were made."""
    if (step := step_of(directory)) is None:
        results = _read(directory / "all_results.json", json.loads)
    else:
        log = _read(directory / TRAINER_STATE_NAME, json.loads).get("log_history", [])
        results = {name: value for entry in log if entry.get("step") == step for name, value in entry.items()}
    timing = ("runtime", "samples_per_second", "steps_per_second")
    found = {
        name.removeprefix("eval_").replace("_", " "): value
        for name, value in results.items()
        if name.startswith("eval_") and not name.endswith(timing)
    }
    # The demo measures beside its checkpoint.
    measured = directory.parent if directory.name == "checkpoint" else directory
    edits = _read(measured / "metrics.json", json.loads)
    held_out = edits.get("held_out", {}) if isinstance(edits, dict) else {}
    for picture in ("raw", "pixel_composite"):
        values = held_out.get("pictures", {}).get(picture, {})
        words = picture.replace("_", " ")
        found |= {
            f"{text}, {words}": values[key]
            for key, text in _COMPARED.items()
            if values.get(key) is not None and math.isfinite(float(values[key]))
        }
        if picture in held_out.get("done", {}):
            found[f"asked edit done, {words}"] = held_out["done"][picture]
    labels = held_out.get("clear", {}).get("labels", {})
    for key, text in (("f1", "CLEAR F1 against pixel labels"), ("f1_always_clear", "F1 of always CLEAR")):
        if labels.get(key) is not None:
            found[text] = labels[key]
    return found


def dataset_card(repo_id: str, preparation: Preparation) -> DatasetCard:
    """The card of a tokenized data set."""
    configs = [{"config_name": "default", "data_files": "shard-*/data-*.arrow"}]
    metadata = DatasetCardData(configs=configs, tags=["thinkclearly", "clear-edit"], task_categories=[TASK])
    facts = {name: value for name, value in vars(preparation).items() if name not in ("skipped", "transforms")}
    facts |= {"instructions": ", ".join(preparation.transforms)} if preparation.transforms else {}
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    text = (
        f"{MARK}\n\n# {repo_id.split('/')[-1]}\n\nPicture edits as the image codes of a model: source, target, "
        "instruction, and how far each patch changed. They fit the model whose codebook has this hash; another one "
        f"is refused.\n\n| | |\n|---|---|\n{rows}\n\n"
        f"```bash\nthinkclearly train recipe.yaml --source prepared --path {repo_id}\n```\n"
    )
    return DatasetCard(f"---\n{metadata}\n---\n\n{text}")


def _users_card(directory: Path) -> Path | None:
    """The README.md that a user wrote, beside the weights or for the whole run."""
    for path in (directory / CARD_FILE, run_of(directory) / CARD_FILE):
        if path.is_file() and not any(sign in path.read_text(encoding="utf-8") for sign in _NOT_THE_USERS):
            return path
    return None


def _about(base_model: str | None, family: str, data: str, step: int | None, copies: bool, thinks: bool) -> str:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"a {family.capitalize()} model"
    clear = (
        f"Edits pictures by instruction: {base}, fine-tuned on {data} to say `<CLEAR>` wherever the source should "
        "stay. Those patches are copied from the photo itself, byte for byte and at its own resolution."
    )
    plain = (
        f"Draws pictures, edits them and answers questions about them: {base}, fine-tuned on {data}. It has no "
        "instruction tokens: an edit draws the whole picture anew."
    )
    thinking = f"Thinks in words and pictures that alternate: {base}, fine-tuned on {data}."
    if copies:
        thinking += " A picture that edits an earlier one says `<CLEAR>` where that one stays, patch by patch."
    about = thinking if thinks else clear if copies else plain
    return about + (f" These are the weights after step {step}." if step is not None else "")


def _further(names: list[str]) -> str:
    """What a model with other instruction tokens than CLEAR says, and what it needs before it can be loaded."""
    lines = "\n".join(f'thinkclearly.register_instruction("{name}", transform)' for name in names)
    return (
        f"It also says {', '.join(f'`<{name}>`' for name in names)}: such patches are copied from the token's own "
        "transform of the photo, picture to picture, which this repository does not hold. Before loading, register "
        f"the one it was trained with:\n\n```\n{lines}\n```"
    )


EDIT = """from transformers import pipeline

edit = pipeline("clear-edit", model="{name}")
result = edit("photo.jpg", prompt="Make the circle red.")
result["image"].save("edited.png")
```

`result` also has `mask`, `raw`, `token_composite`, `class_ids` and `clear_fraction`."""
THINK = """
model = thinkclearly.load_model("{name}")
for part in model.think("a red circle at the left and a blue star at the top on a white background"):
    ...  # words have .text, pictures have .image
```"""
DRAW = """
model = thinkclearly.load_model("{name}")
model.generate("a red circle on a blue background")[0].save("drawn.png")
model.edit("photo.jpg", "Make the circle red.").image.save("edited.png")
model.describe("photo.jpg", "What is in the picture?")
```"""


def _usage(repo_id: str | None, lines: str) -> str:
    where = "" if repo_id else ", with the path of this folder or the name of its repository as NAME"
    return f"""## Use

It needs ThinkClearly, which is not on PyPI: run `pip install .` in a checkout of its source. Then{where}:

```python
import thinkclearly
""" + lines.format(name=repo_id or "NAME")


def data_name(recipe: dict) -> str:
    """The Hub id of the data, `SHAPES`, or what it is in words."""
    source, path = recipe.get("source"), recipe.get("path")
    if source == "magicbrush" and path != LEFT_OUT:
        return path or "osunlp/MagicBrush"
    if source == "prepared" and path not in (None, LEFT_OUT):
        return path
    if source == "shapes" and "photos_folder" in recipe:
        return "built-in shapes on private photographs"
    return {None: "unnamed data", "shapes": SHAPES}.get(source, f"private data ({source})")


def _read(path: Path, parse) -> dict:
    return parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
