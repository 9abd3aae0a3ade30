"""A card tells what the folder tells: base, data, recipe, and numbers of the weights that are shared, no others."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from thinkclearly.hub.card import model_card
from thinkclearly.hub.pipeline import DEFAULT_MODEL
from thinkclearly.models.clear_head import HEAD_FILE, head_digest, read_clear_config, write_clear_config
from thinkclearly.models.weight_files import read_tensors


@pytest.fixture
def run(tmp_path):
    """The shipped fine-tune, with what training and the demo leave beside it."""
    directory = Path(shutil.copytree(DEFAULT_MODEL, tmp_path / "checkpoint"))
    recipe = {"base_model": "you/base", "source": "magicbrush", "lora_r": 4}
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    results = {"eval_loss": 2.5, "eval_gate_auc": 0.75, "eval_runtime": 3.0, "train_loss": 3.0}
    (directory / "all_results.json").write_text(json.dumps(results))
    pictures = {"raw": {"psnr_pooled_outside": 17.5}, "pixel_composite": {"psnr_pooled_outside": math.inf}}
    edits = {"held_out": {"pictures": pictures, "done": {"pixel_composite": 0.25}}}
    (tmp_path / "metrics.json").write_text(json.dumps(edits))
    return directory


def card_of(run, license="mit"):
    return model_card(run, run, "you/edit", "you/base", ["samples/step_000002.png"], {"license": license})


def test_it_tells_base_data_metrics_recipe_and_use(run):
    card = card_of(run)
    data = card.data.to_dict()
    assert (data["base_model"], data["license"], data["datasets"]) == ("you/base", "mit", ["osunlp/MagicBrush"])
    assert (data["library_name"], data["pipeline_tag"]) == ("peft", "image-to-image")
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {
        "loss": 2.5,
        "gate auc": 0.75,
        "PSNR outside the true mask, dB, raw": 17.5,
        "asked edit done, pixel composite": 0.25,
    }
    assert "![step 000002](samples/step_000002.png)" in card.text and "lora_r: 4" in card.text
    assert 'edit = pipeline("clear-edit", model="you/edit")' in card.text
    assert "More Information Needed" not in card.text


def test_what_the_user_wrote_keeps_its_text(run):
    (run / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# My model\n\nMy words.\n")
    card = card_of(run, license="apache-2.0")
    assert card.text.strip() == "# My model\n\nMy words."
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0" and data["base_model"] == "you/base" and data["model-index"]
    assert {"mine", "clear-edit"} <= set(data["tags"])


def test_a_benchmark_counts_only_for_the_weights_and_gate_that_it_measured(run, caplog):
    config, weight = read_clear_config(run), read_tensors(run / HEAD_FILE)["weight"]
    (run / "benchmarks").mkdir()
    for name, head in (("magicbrush", head_digest(weight + 1, config)), ("pie-bench", head_digest(weight, config))):
        measured = {"benchmark": name, "split": "all", "model": "x", "head": head}
        results = {"background": {"pixel_composite": {"mse": 4.0, "l1": 5.0}}}
        (run / "benchmarks" / f"{name}.json").write_text(json.dumps({"run": measured, "results": results}))

    def benchmarks():
        return {result.dataset_name for result in card_of(run).data.eval_results if result.dataset_config}

    assert benchmarks() == {"PIE-Bench"} and "magicbrush.json is of other weights" in caplog.text
    config.gate_bias += 1
    write_clear_config(config, run)
    assert benchmarks() == set()
