"""Model and data set cards: what a repository's page says, made from what training left in the folder.

Knows the files of a fine-tune directory. Does not know how anything is uploaded.
"""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import yaml
from huggingface_hub import DatasetCard, DatasetCardData, EvalResult, ModelCard, ModelCardData

from thinkclearly.config import LEFT_OUT
from thinkclearly.data.prepare import Preparation
from thinkclearly.evaluation.benchmark import SHARED_FOLDER
from thinkclearly.evaluation.benchmark_report import eval_results
from thinkclearly.models.clear_head import HEAD_FILE, head_digest, read_clear_config
from thinkclearly.models.weight_files import read_tensors

logger = logging.getLogger(__name__)

CARD_FILE, RECIPE_FILE = "README.md", "recipe.yaml"
TASK = "image-to-image"
TAGS = ["clear-edit", "thinkclearly", "janus", "image-editing"]
MARK = "<!-- Written by `thinkclearly push`, anew each time. Delete this line, and the text is yours and stays. -->"
# The second is PEFT's form with nothing filled in, which it leaves beside every adapter.
_NOT_THE_USERS = (MARK, "# Model Card for Model ID")
_COMPARED = {
    "psnr_pooled_outside": "PSNR outside the true mask, dB",
    "exact_outside": "bit-identical pixels outside the true mask",
    "mse_inside": "MSE to the target inside the true mask",
}


def model_card(
    run: Path,
    weights: Path,
    repo_id: str,
    base_model: str | None,
    samples: list[str],
    license: dict[str, str] | None = None,
    is_adapter: bool = True,
) -> ModelCard:
    """The card of a fine-tune. A README.md that a user wrote keeps its text, and gets the metadata.

    Args:
        run: the folder that training wrote: `recipe.yaml`, `all_results.json`, perhaps `metrics.json`,
            `benchmarks/` and README.md.
        weights: the folder of what is shared, `run` or a checkpoint in it.
        base_model: Hub id; None where the base has no page there.
        samples: pictures of the gallery, as paths inside the repository.
        license: `license`, and `license_name` and `license_link` where there are any.
        is_adapter: whether the repository holds PEFT's adapter rather than whole weights.
    """
    recipe = _read(run / RECIPE_FILE, yaml.safe_load)
    data = _data_name(recipe)
    metrics = read_metrics(run)
    benchmarks = [result for found in read_benchmarks(run, weights) for result in eval_results(found)]
    metadata = ModelCardData(
        model_name=repo_id.split("/")[-1] if metrics or benchmarks else None,
        base_model=base_model,
        datasets=[data] if "/" in data else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=TASK,
        tags=TAGS,
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
    own = _users_card(run)
    if own is not None:
        tags = [tag for tag in own.data.tags or [] if not tag.startswith("base_model:")]
        known = {key: value for key, value in vars(metadata).items() if value is not None}
        for key, value in (known | {"tags": [*tags, *(tag for tag in TAGS if tag not in tags)]}).items():
            own.data[key] = value
        own.data["base_model"] = base_model
        return own
    parts = [MARK, f"# {repo_id.split('/')[-1]}", _about(base_model, data), _usage(repo_id)]
    if samples:
        shown = "\n\n".join(f"![{Path(path).stem.replace('_', ' ')}]({path})" for path in samples)
        parts.append(f"## Samples\n\nEach row: source, raw decode, composite, CLEAR mask.\n\n{shown}")
    if metrics:
        rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in metrics.items())
        parts.append(f"## Measured\n\nOn records of {data} that training did not see.\n\n| | |\n|---|---|\n{rows}")
    if recipe:
        text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
        parts.append(f"## Recipe\n\n`thinkclearly train {RECIPE_FILE}` with\n\n```yaml\n{text}\n```")
    return ModelCard(f"---\n{metadata}\n---\n\n" + "\n\n".join(parts) + "\n")


def read_benchmarks(run: Path, weights: Path) -> list[dict]:
    """What `thinkclearly evaluate --benchmark` left in `run`, where it measured `weights` as they are now."""
    found = []
    for path in sorted((run / SHARED_FOLDER).glob("*.json")):
        results, head = _read(path, json.loads), read_tensors(weights / HEAD_FILE)["weight"]
        if results.get("run", {}).get("head") == head_digest(head, read_clear_config(weights)):
            found.append(results)
        else:
            logger.warning("%s is of other weights or another calibration; the card leaves it out", path)
    return found


def read_metrics(run: Path) -> dict[str, float]:
    """Name → value: the Trainer's evaluation, and the demo's measured edits where they were made."""
    results = _read(run / "all_results.json", json.loads)
    timing = ("runtime", "samples_per_second", "steps_per_second")
    found = {
        name.removeprefix("eval_").replace("_", " "): value
        for name, value in results.items()
        if name.startswith("eval_") and not name.endswith(timing)
    }
    # The demo measures beside its checkpoint.
    edits = _read((run.parent if run.name == "checkpoint" else run) / "metrics.json", json.loads)
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
    if f1 := held_out.get("clear", {}).get("labels", {}).get("f1"):
        found["CLEAR F1 against pixel labels"] = f1
    return found


def dataset_card(repo_id: str, preparation: Preparation) -> DatasetCard:
    """The card of a tokenized data set."""
    configs = [{"config_name": "default", "data_files": "shard-*/data-*.arrow"}]
    metadata = DatasetCardData(configs=configs, tags=["thinkclearly", "clear-edit"], task_categories=[TASK])
    facts = {name: value for name, value in vars(preparation).items() if name != "skipped"}
    rows = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in facts.items())
    text = (
        f"{MARK}\n\n# {repo_id.split('/')[-1]}\n\nPicture edits as the image codes of a Janus model: source, target, "
        "instruction, and how far each patch changed. They fit the model whose codebook has this hash; another one "
        f"is refused.\n\n| | |\n|---|---|\n{rows}\n\n"
        f"```bash\nthinkclearly train recipe.yaml --source prepared --path {repo_id}\n```\n"
    )
    return DatasetCard(f"---\n{metadata}\n---\n\n{text}")


def _users_card(run: Path) -> ModelCard | None:
    path = run / CARD_FILE
    if not path.is_file():
        return None
    card = ModelCard.load(path)
    return None if any(sign in card.text for sign in _NOT_THE_USERS) else card


def _about(base_model: str | None, data: str) -> str:
    base = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a Janus model"
    return (
        f"Edits pictures by instruction: {base}, fine-tuned on {data} to say `<CLEAR>` wherever the source should "
        "stay. Those patches are copied from the photo itself, byte for byte and at its own resolution."
    )


def _usage(repo_id: str) -> str:
    return f"""## Use

`pip install thinkclearly`, then

```python
import thinkclearly
from transformers import pipeline

edit = pipeline("clear-edit", model="{repo_id}")
result = edit("photo.jpg", prompt="Make the circle red.")
result["image"].save("edited.png")
```

`result` also has `mask`, `raw`, `token_composite`, `class_ids` and `clear_fraction`."""


def _data_name(recipe: dict) -> str:
    """The Hub id of the data, or what it is in words."""
    source, path = recipe.get("source"), recipe.get("path")
    if source == "magicbrush" and path != LEFT_OUT:
        return path or "osunlp/MagicBrush"
    if source == "prepared" and path not in (None, LEFT_OUT):
        return path
    if source == "shapes" and "photos_folder" in recipe:
        return "built-in shapes on private photographs"
    return {None: "unnamed data", "shapes": "built-in shapes"}.get(source, f"private data ({source})")


def _read(path: Path, parse) -> dict:
    return parse(path.read_text(encoding="utf-8")) if path.is_file() else {}
