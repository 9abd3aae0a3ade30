"""A card tells what the folder tells: base, data, recipe, and numbers of the weights that are shared, no others."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from thinkclearly.hub.card import model_card, write_card
from thinkclearly.hub.pipeline import DEFAULT_MODEL
from thinkclearly.models.instruction_head import HEAD_FILE, head_digest, read_clear_config, write_clear_config
from thinkclearly.models.weight_files import read_tensors
from thinkclearly.recipe import LEFT_OUT


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
    return model_card(run, "you/edit", "you/base", ["samples/step_000002.png"], {"license": license})


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


def test_the_folder_that_training_leaves_has_a_card_without_a_path(run):
    (run / "recipe.yaml").write_text(yaml.safe_dump({"base_model": LEFT_OUT, "source": "folder", "path": LEFT_OUT}))
    settings = json.loads((run / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(run)}
    (run / "adapter_config.json").write_text(json.dumps(settings))
    for name in (None, "you/edit"):
        write_card(run, name)
        text = (run / "README.md").read_text()
        assert str(run) not in text and "base_model_id" in text and f'model="{name or "NAME"}"' in text
    (run / "README.md").write_text("---\n: broken\n---\nMine.\n")
    write_card(run)
    assert "Mine." in (run / "README.md").read_text()


def test_a_model_that_thinks_is_used_by_thinking(run):
    (run / "recipe.yaml").write_text(yaml.safe_dump({"method": "interleaved", "source": "thoughts", "path": LEFT_OUT}))
    text = card_of(run).text
    assert "Thinks in words and pictures" in text and "private data (thoughts)" in text and "<CLEAR>" in text
    assert 'load_model("you/edit")\nfor part in model.think(' in text and "pipeline(" not in text
    write_clear_config(replace(read_clear_config(run), instructions=[]), run)
    assert "<CLEAR>" not in card_of(run).text


def test_it_does_not_name_a_package_that_is_not_ours(run):
    card = card_of(run)
    assert "pip install thinkclearly" not in card.text and "`pip install .` in a checkout" in card.text


def test_a_checkpoint_has_the_numbers_of_its_own_weights(run):
    checkpoint = Path(shutil.copytree(DEFAULT_MODEL, run / "checkpoint-2"))
    (checkpoint / "recipe.yaml").unlink()
    log = [{"step": 1, "eval_loss": 4.0}, {"step": 2, "loss": 3.5}, {"step": 2, "eval_loss": 3.0, "eval_runtime": 1.0}]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": log}))
    card = card_of(checkpoint)
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == {"loss": 3.0}
    assert "after step 2" in card.text and "lora_r: 4" in card.text
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": log[:2]}))
    assert card_of(checkpoint).data.eval_results is None
    assert "after step" not in card_of(run).text


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"source": "shapes"}, "fine-tuned on built-in shapes to"),
        ({"source": "shapes", "photos_folder": LEFT_OUT}, "built-in shapes on private photographs"),
        ({"source": "folder", "path": LEFT_OUT}, "private data (folder)"),
        ({"source": "magicbrush", "path": LEFT_OUT}, "private data (magicbrush)"),
        ({"source": "prepared", "path": "you/data"}, "fine-tuned on you/data to"),
    ],
)
def test_data_of_this_machine_is_called_private(run, recipe, words):
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    card = card_of(run)
    assert words in card.text and card.data.datasets == (["you/data"] if "you/data" in words else None)


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
