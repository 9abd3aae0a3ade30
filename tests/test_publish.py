"""What is pushed is what the card promises, nothing else leaves the machine, and a push that broke off goes on."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType
from typing import get_args, get_origin, get_type_hints

import pytest
import torch
import yaml
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from tiny_runs import make_trainer, records

from thinkclearly import load_editor
from thinkclearly.data import sources
from thinkclearly.data.encode import load_encoded
from thinkclearly.data.prepare import prepare_dataset
from thinkclearly.files import write_text
from thinkclearly.hub.publish import check_publishable, push, staged, staged_checkpoint
from thinkclearly.models.finetunes import load_clear_model
from thinkclearly.models.instruction_head import ClearConfig
from thinkclearly.models.load import load_checkpoint
from thinkclearly.recipe import CODE, LEFT_OUT
from thinkclearly.training.adapters import add_lora
from thinkclearly.training.methods import METHODS, load_method, option_classes, parse_options
from thinkclearly.training.options import _NOT_SHARED, effective_recipe
from thinkclearly.training.run import train

BIN = Path(sys.executable).parent
INSTRUCTION = "Make the red circle blue."
SHARED = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "clear_config.json", "config.json"),
    *("clear_edit_pipeline.py", "gen_head_clear.safetensors", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "recipe.yaml", "samples/step_000002.png"),
}
JUNK = ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", ".env") + (
    "runs/events.out.tfevents.1",
    "checkpoint-2/adapter_model.safetensors",
    "samples/step_000002.tmp",
)
RECIPE = {"base_model": "you/base", "source": "magicbrush", "lora_r": 4}


@pytest.fixture(scope="module")
def finetune(golden, tmp_path_factory):
    """What training leaves, with a gate that copies some patches and paints others."""
    directory = tmp_path_factory.mktemp("run") / "checkpoint"
    torch.manual_seed(0)
    checkpoint = load_checkpoint(golden / "checkpoint")
    hashes = {
        "codebook_hash": checkpoint.token_model.codebook_fingerprint(),
        "base_hash": checkpoint.token_model.base_fingerprint(),
    }
    config = ClearConfig(128, clear_weight=0.3, gate_bias=0.7, **hashes)
    model = add_lora(checkpoint, str(golden / "checkpoint"), config, r=4, lora_alpha=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name == "clear_head.weight":
                parameter.normal_(std=0.05)
    for _ in range(2):
        model.save_pretrained(directory)
        checkpoint.processor.save_pretrained(directory)
        gate = landscape(golden, directory).gate
        model.clear_head.bias.data -= gate.median()
    for name in JUNK:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text("secret")
    Image.new("RGB", (8, 8)).save(directory / "samples" / "step_000002.png")
    (directory / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (directory / "all_results.json").write_text(json.dumps({"eval_loss": 2.5}))
    return directory


def landscape(golden, directory, **options):
    return load_editor(directory, **options).edit(golden / "images" / "landscape.png", INSTRUCTION, seed=3)


def share(directory, **options):
    """What would be pushed, without asking any Hub for a license or for the data."""
    known = {"base_model_id": "you/base", "license": "mit", "share_samples": True}
    return staged(directory, "you/edit", **known | options)


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# ---- what is shared ----------------------------------------------------------------------------------------------


def test_a_repository_has_the_files_of_the_fine_tune_and_no_others(finetune):
    before = {name: (finetune / name).stat().st_mtime_ns for name in names(finetune)}
    with share(finetune) as folder:
        assert names(folder) == SHARED
        assert not any(b"secret" in (folder / name).read_bytes() for name in SHARED)
        config = json.loads((folder / "config.json").read_text())
        card = ModelCard.load(folder / "README.md")
    assert "![step 000002](samples/step_000002.png)" in card.text and "lora_r: 4" in card.text
    assert [result.metric_value for result in card.data.eval_results] == [2.5]
    assert config["model_type"] == "janus" and "clear-edit" in config["custom_pipelines"]
    assert {name: (finetune / name).stat().st_mtime_ns for name in names(finetune)} == before


def test_a_checkpoint_brings_the_recipe_of_its_run_and_samples_of_its_own(finetune, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copytree(finetune / "samples", tmp_path / "run" / "samples")
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    (tmp_path / "run" / "all_results.json").write_text(json.dumps({"eval_loss": 2.5}))
    for step in (1, 2):
        ignore = shutil.ignore_patterns("samples", "recipe.yaml", "all_results.json", "trainer_state.json")
        checkpoint = tmp_path / "run" / f"checkpoint-{step}"
        shutil.copytree(finetune, checkpoint, ignore=ignore)
        log = [{"step": step, "eval_loss": 3.0 + step}]
        (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": log}))
        with share(checkpoint) as folder:
            assert names(folder) == SHARED - ({"samples/step_000002.png"} if step == 1 else set())
            card = ModelCard.load(folder / "README.md")
            assert [result.metric_value for result in card.data.eval_results] == [3.0 + step]


@pytest.mark.parametrize(
    ("recipe", "is_shared"),
    [
        ({"source": "shapes"}, True),
        ({"source": "shapes", "photos_folder": LEFT_OUT}, False),
        ({"source": "folder", "path": LEFT_OUT}, False),
        ({"source": "jsonl", "path": LEFT_OUT}, False),
        ({"source": "prepared", "path": LEFT_OUT}, False),
        ({"source": "magicbrush", "path": LEFT_OUT}, False),
        ({}, False),
    ],
)
def test_held_out_pictures_of_local_data_are_shared_only_when_asked(finetune, tmp_path, recipe, is_shared):
    run = shutil.copytree(finetune, tmp_path / "run")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    sample = "samples/step_000002.png"
    with share(run, share_samples=None) as folder:
        assert (sample in names(folder)) is is_shared is (sample in (folder / "README.md").read_text())
    with share(run, share_samples=not is_shared) as folder:
        assert (sample in names(folder)) is not is_shared


def test_what_is_pushed_stays_what_it_was_when_training_saves_again(golden, finetune, tmp_path):
    run = shutil.copytree(finetune, tmp_path / "run")
    model, processor = load_clear_model(run)
    with torch.no_grad():
        model.clear_head.bias.add_(1)
        for name, parameter in model.named_parameters():
            parameter.mul_(2 if "lora_B" in name else 1)
    for name in ("tokenizer_config.json", "tokenizer.json"):  # as an older version wrote them
        write_text(run / name, (run / name).read_text() + "\n")
    with share(run) as folder:
        before = {name: (folder / name).read_bytes() for name in names(folder)}
        make_trainer((model, processor), records(golden, 1), run).save_model()
        assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    for name in ("adapter_model.safetensors", "gen_head_clear.safetensors", "tokenizer_config.json", "tokenizer.json"):
        assert before[name] != (run / name).read_bytes()
    assert not list(run.glob("*.tmp")) and (run / "optimizer.pt").read_text() == "secret"


def test_a_whole_checkpoint_goes_without_paths_of_this_machine(golden, finetune, tmp_path):
    checkpoint = shutil.copytree(finetune, tmp_path / "checkpoint-2")
    state = {"global_step": 2, "best_model_checkpoint": str(checkpoint)}
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with staged_checkpoint(checkpoint) as folder:
        assert {"optimizer.pt", "rng_state.pth", "adapter_model.safetensors"} <= names(folder)
        assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2
        for path in (tmp_path, golden):
            assert not any(str(path).encode() in (folder / name).read_bytes() for name in names(folder))
    assert json.loads((checkpoint / "trainer_state.json").read_text()) == state


def test_a_local_base_model_is_refused_until_its_hub_id_is_given(golden, finetune):
    base = str(golden / "checkpoint")
    with pytest.raises(ValueError, match=f"has the base model '{base}'.*--base_model_id"):
        with share(finetune, base_model_id=None):
            pass
    with share(finetune, base_model_id="they/janus") as folder:
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "they/janus"
        assert not any(base.encode() in (folder / name).read_bytes() for name in names(folder))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("recipe.yaml", "key: hf_abcdefghijklmnopqrst", "looks like a Hub token"),
        ("tokenizer_config.json", '{"file": "/home/me/tokenizer.json"}', "holds /home/me/tokenizer.json, a path"),
        ("config.json", r'{"file": "C:\\Users\\me"}', "a path of this machine"),
    ],
)
def test_tokens_and_paths_of_this_machine_are_not_published(name, content, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        check_publishable(tmp_path)


def test_training_that_could_not_be_pushed_does_not_begin(golden, tmp_path):
    argv = ["--base_model", str(golden / "checkpoint"), "--push_to_hub", "true", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="nobody else can load.*--base_model_id"):
        train(*parse_options(argv, "thinkclearly train"))
    assert not (tmp_path / "out").exists()


def test_other_folders_are_not_taken_for_a_fine_tune(tmp_path):
    with pytest.raises(FileNotFoundError, match="lacks gen_head_clear.safetensors.*thinkclearly train"):
        push(tmp_path, "you/edit")


# A value other than the default for every option whose type alone does not say which words it takes.
WORDS = {
    **{"dtype": "bfloat16", "source": "magicbrush", "match": "all", "clear_label": "mask", "on_bad_record": "skip"},
    **{"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.15}, "optim": "sgd"},
    **{"logging_strategy": "epoch", "eval_strategy": "no", "save_strategy": "best", "log_level": "info"},
    **{"log_level_replica": "error", "dataloader_multiprocessing_context": "fork"},
    **{"train_sampling_strategy": "sequential", "debug": ["underflow_overflow"], "dataloader_num_workers": 2},
    **{"accelerator_config": {"split_batches": True, "gradient_accumulation_kwargs": {"sync_each_batch": True}}},
    **{"activation_checkpointing_kwargs": {"use_reentrant": False}, "gradient_checkpointing_kwargs": None},
    **{"gradient_checkpointing": None, "torch_compile_mode": "default", "fsdp_config": {"min_num_params": 5}},
    **{"optim_target_modules": ["q_proj"], "report_to": ["tensorboard"], "label_names": ["labels", "source"]},
    **{"task": "edit", "scale_rewards": "batch", "logprob_scale": "cond", "reward_weights": [0.25, 1.0]},
    **{"reward_funcs": ["shapes", "clip:you/clip"], "truth_steps": [3, 7], "truth_shares": [0.5, 0.25]},
    **{"thought_mode": ["critique"], "reconstruction_at": "own"},
}
# What needs a GPU, a launch or another package, contradicts another option, or has no form on a command line.
NOT_HERE = {
    *("fp16", "fp16_full_eval", "tf32", "torch_compile", "fsdp", "deepspeed", "ddp_backend", "parallelism_config"),
}


def every_option(method):
    """(name, kinds of values, default) of all options of a method that a recipe holds, but for its name."""
    for kind in option_classes(load_method(method)):
        hints = get_type_hints(kind)
        for f in fields(kind):
            left_out = {"method", *NOT_HERE, *_NOT_SHARED, *CODE}
            if f.name not in left_out and "hub" not in f.name.split("_"):
                default = f.default if f.default_factory is MISSING else f.default_factory()
                yield f.name, {get_origin(k) or k for k in get_args(hints[f.name]) or [hints[f.name]]}, default


def another_value(name, kinds, default):
    if name in WORDS:
        return WORDS[name]
    examples = {bool: not default, int: (default or 0) + 3 if int in kinds else 0, float: 0.25, dict: {"a": True}}
    return next((value for kind, value in (examples | {list: ["a", "7"], str: "a word"}).items() if kind in kinds))


def of(options):
    parts = (options.model, options.lora, options.data, options.method, options.training)
    return {name: value for part in parts for name, value in vars(part).items()} | options.settings


OF_SHAPES = {"shapes_size", "photos_folder", "pair_shapes", "thought_mode", "wrong_share"}
OF_TABLES = {"path", "split", "turn_index", "streaming", "shuffle", "include", "exclude", "match"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("values", ["shapes", "magicbrush", "null", "default"])
def test_the_recipe_repeats_the_run_whatever_its_options(values, method, tmp_path, monkeypatch):
    monkeypatch.setattr("thinkclearly.training.options.find_spec", lambda name: name)  # is a tracker installed
    every = list(every_option(method))
    changed = {name: another_value(name, kinds, default) for name, kinds, default in every}
    null = {name: None for name, kinds, default in every if NoneType in kinds and default is not None}
    chosen = {
        "shapes": {name: value for name, value in changed.items() if name not in OF_TABLES} | {"source": "shapes"},
        "magicbrush": {name: value for name, value in changed.items() if name not in OF_SHAPES},
        "null": null,
        "default": {},
    }[values]
    assert {"save_total_limit", "eval_steps", "label_names"} <= set(null)
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(chosen | {"method": method}))
    options, _ = parse_options([str(tmp_path / "given.yaml")], "thinkclearly train")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(effective_recipe(options)))
    repeated, _ = parse_options([str(tmp_path / "recipe.yaml")], "thinkclearly train")
    found, expected = of(repeated), of(options)
    for name, _, default in every:
        assert found.get(name) == expected.get(name), name
        was_changed = name in expected and expected[name] != default
        assert name not in chosen or was_changed or name == "source", f"{name}: try another value"
    assert found["method"] == method


@pytest.mark.parametrize(("source", "place"), [("jsonl", "path"), ("shapes", "photos_folder")])
def test_the_recipe_names_no_path_of_this_machine_and_asks_for_what_it_left_out(source, place, tmp_path, capsys):
    argv = ["--base_model", str(tmp_path), "--output_dir", str(tmp_path), "--source", source]
    argv += [f"--{place}", str(tmp_path / "data"), "--hub_token", "hf_of_you"]
    options, _ = parse_options(argv, "thinkclearly train")
    recipe = effective_recipe(options)
    assert str(tmp_path) not in str(recipe) and "hub" not in str(recipe)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(SystemExit):
        parse_options([str(tmp_path / "recipe.yaml")], "thinkclearly train")
    assert "required: --base_model" in capsys.readouterr().err
    given = ["--base_model", "you/base", f"--{place}", "mine"]
    again, _ = parse_options([str(tmp_path / "recipe.yaml"), *given], "thinkclearly train")
    assert (again.model.base_model, getattr(again.data, place)) == ("you/base", "mine")


# ---- the same edits in other forms -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "below"),
    [
        ({"merged": "native", "dtype": torch.float32, "max_shard_size": "1MB"}, ""),
        ({"merged": "deepseek", "dtype": torch.float32, "max_shard_size": "1MB"}, ""),
        ({"pt": True}, "original"),
    ],
    ids=["native", "deepseek", "original"],
)
def test_merged_weights_and_the_originals_format_edit_as_the_adapter_does(golden, finetune, options, below):
    expected = landscape(golden, finetune)
    assert 0 < expected.clear_fraction < 1
    with share(finetune, **options) as folder:
        found = landscape(golden, folder / below, **({"base": golden / "checkpoint"} if below else {}))
        if "merged" in options:
            assert (
                len(list(folder.glob("model-*-of-*.safetensors"))) > 1
                and not (folder / "adapter_config.json").exists()
            )
    assert torch.equal(found.class_ids, expected.class_ids) and found.image.tobytes() == expected.image.tobytes()
    torch.testing.assert_close(found.gate, expected.gate, atol=1e-4, rtol=1e-4)


# ---- over HTTP ---------------------------------------------------------------------------------------------------


def client(hub: HubServer, cache: Path, **environment) -> dict:
    """The environment of a client that knows no Hub but this one and has nothing in its cache."""
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_of_you", "HF_HOME": str(cache), "NO_PROXY": "127.0.0.1"}
    return outer | own | {"HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"} | environment


def python(script: str, *arguments, env: dict):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


PUSH_TWICE = """
import json, sys
from huggingface_hub import HfApi
from thinkclearly import cli
for _ in range(2):
    cli.main(sys.argv[1:])
    HfApi().whoami()
print("null")
"""


def test_a_killed_push_goes_on_with_what_is_missing(finetune, tmp_path, hub):
    hub.lfs, hub.cut_after, hub.stays_down = (".safetensors",), 1_500_000, True
    env = client(hub, tmp_path, HF_HUB_DISABLE_XET="1")
    argv = ["push", finetune, "--repo_id", "you/merged", "--merged", "native", "--max_shard_size", "1MB"]
    argv = [*map(str, argv), "--base_model_id", "you/base", "--license", "mit"]
    with subprocess.Popen([BIN / "thinkclearly", *argv], env=env, stderr=subprocess.PIPE, text=True) as process:
        assert hub.was_cut.wait(300), process.communicate()[1]
        process.kill()
    there = {path.name for path in hub.folder.iterdir()}
    hub.mend()
    python(PUSH_TWICE, *argv, env=env)
    files = hub.repositories["models", "you/merged"].find("main").files
    shards = {blob.sha256 for path, blob in files.items() if path.endswith(".safetensors")}
    first, second = runs(hub)
    sent = {path.removeprefix("/lfs/") for method, path, _ in first if method == "PUT"}
    assert there & shards and sent == shards - there
    assert not [path for method, path, _ in second if method == "PUT" or "/commit/" in path]


def runs(hub):
    """The log between the client's calls of whoami."""
    parts = [[]]
    for entry in hub.log:
        parts.append([]) if entry[1] == "/api/whoami-v2" else parts[-1].append(entry)
    return parts[:-1]


ROUND_TRIP = """
import json, shutil, sys
from pathlib import Path
import torch
from huggingface_hub import HfApi
from peft import PeftModel
from safetensors.torch import load_file
from thinkclearly import load_editor
from thinkclearly.data.encode import load_encoded
from thinkclearly.data.splits import pull_dataset
from thinkclearly.hub.publish import is_public, push, upload
from thinkclearly.models.load import load_checkpoint

finetune, base, prepared, photo, instruction = sys.argv[1:]
api, options = HfApi(), {"base_model_id": "you/base"}

def message(call, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except OSError as error:
        return f"{type(error).__name__}: {error}"

upload(Path(base), "you/base")
push(finetune, "you/edit", private=True, **options)
push(finetune, "you/edit", revision="pt", pt=True, **options)
api.create_tag("you/edit", tag="v1")
request = push(finetune, "you/edit", create_pr=True, license="mit", **options)
refs = api.list_repo_refs("you/edit")
checkpoint = load_checkpoint("you/base")
push(prepared, "you/data")
encoded = load_encoded(pull_dataset("you/data"), checkpoint)
adapter = PeftModel.from_pretrained(checkpoint.network, "you/edit").state_dict()
saved = load_file(f"{finetune}/adapter_model.safetensors")

# Another kind of push over an earlier one.
options["license"] = "mit"
push(finetune, "you/again", pt=True, share_samples=True, **options)
api.upload_file(path_or_fileobj=b"mine", path_in_repo="notes.txt", repo_id="you/again")
once = api.list_repo_files("you/again")
push(finetune, "you/again", merged="native", dtype=torch.float32, max_shard_size="1MB", **options)
merged = load_editor("you/again")
two = Path(f"{prepared}-of-two")
shutil.copytree(prepared, two)
shutil.copytree(two / "shard-00000-of-00001", two / "shard-00001-of-00002")
(two / "shard-00000-of-00001").rename(two / "shard-00000-of-00002")
push(two, "you/replaced")
push(prepared, "you/replaced")
push(prepared, "you/secret", private=True)

print(json.dumps({
    "files before": once,
    "files after": api.list_repo_files("you/again"),
    "merged": [type(merged.model.network).__name__, merged.edit(photo, instruction, seed=3).class_ids.tolist()],
    "replaced": load_encoded(pull_dataset("you/replaced"), checkpoint)["key"][:],
    "commits of data": len(api.list_repo_commits("you/replaced", repo_type="dataset")),
    "public": [is_public({"source": "prepared", "path": f"you/{name}"}) for name in ("data", "secret", "nothing")],
    "files": {name: api.list_repo_files("you/edit", revision=name) for name in ("main", "pt")},
    "models": sorted(model.id for model in api.list_models(author="you")),
    "refs": [[ref.name for ref in refs.branches], [ref.name for ref in refs.tags]],
    "commits": [commit.title for commit in api.list_repo_commits("you/edit")],
    "private": api.model_info("you/edit").private,
    "pull request": request.pr_url,
    "peft": all((adapter[key.replace(".weight", ".default.weight")] == saved[key]).all().item() for key in saved),
    "ids": [load_editor("you/edit", revision=revision).edit(photo, instruction, seed=3).class_ids.tolist()
            for revision in ("main", "v1")],
    "data": [list(encoded[name]) for name in ("key", "target_tokens")],
    "wrong token": message(push, finetune, "you/edit", token="hf_wrong", **options),
    "not theirs": message(push, finetune, "you/edit", token="hf_of_them", **options),
    "private to others": message(load_editor, "you/edit", token="hf_of_them", revision="pt"),
    "missing": message(load_editor, "you/nothing"),
    "missing revision": message(load_editor, "you/edit", revision="v2"),
}))
"""


@pytest.fixture(scope="module")
def prepared(golden, tmp_path_factory):
    """Tokenized data, with a record that was left out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        folder = tmp_path_factory.mktemp("prepared")
        prepare_dataset(sources.shapes(6, 48, seed=3), load_checkpoint(golden / "checkpoint"), folder)
    (folder,) = folder.iterdir()
    info = json.loads((folder / "preparation.json").read_text())
    (folder / "preparation.json").write_text(json.dumps(info | {"skipped": ["/home/me/a.png: no picture"]}))
    return folder


@pytest.fixture(scope="module")
def shared(golden, finetune, prepared, tmp_path_factory):
    """A Hub with base, fine-tune and data, and what the client that pushed them saw."""
    with HubServer(tmp_path_factory.mktemp("hub")) as hub:
        photo = golden / "images" / "landscape.png"
        arguments = [finetune, golden / "checkpoint", prepared, photo, INSTRUCTION]
        yield hub, python(ROUND_TRIP, *arguments, env=client(hub, tmp_path_factory.mktemp("home")))


def test_what_was_pushed_is_listed_downloaded_and_used(golden, finetune, prepared, shared):
    hub, seen = shared
    # Nothing says that the data is public: its owner's page is not on this Hub.
    assert set(seen["files"]["main"]) == SHARED - {"samples/step_000002.png"} | {".gitattributes"}
    assert {"original/gen_head_clear.pt", "original/clear_meta.json"} <= set(seen["files"]["pt"])
    assert seen["models"] == ["you/again", "you/base", "you/edit"] and seen["private"]
    assert seen["refs"] == [["main", "pt"], ["v1"]] and len(seen["commits"]) == 2
    assert seen["peft"]
    assert seen["ids"] == [landscape(golden, finetune).class_ids.tolist()] * 2
    cards = [ModelCard(hub.files("you/edit", name)["README.md"].decode()) for name in ("main", "refs/pr/1")]
    assert [card.data.license for card in cards] == [None, "mit"] and seen["pull request"].endswith("/discussions/1")


def test_tokenized_data_comes_back_and_names_no_file_of_this_machine(golden, prepared, shared):
    hub, seen = shared
    encoded = load_encoded(prepared, load_checkpoint(golden / "checkpoint"))
    assert seen["data"] == [list(encoded[name]) for name in ("key", "target_tokens")]
    files = hub.files("you/data", kind="datasets")
    assert not [name for name, content in files.items() if b"/home/me" in content]
    assert "--path you/data" in files["README.md"].decode()


def test_a_push_replaces_what_an_earlier_one_left_and_nothing_else(golden, finetune, prepared, shared):
    hub, seen = shared
    before, after = (set(seen[f"files {when}"]) for when in ("before", "after"))
    assert {"adapter_config.json", "original/gen_head_clear.pt", "samples/step_000002.png"} <= before
    assert not [name for name in after if name.startswith(("adapter", "original", "samples", "clear_edit"))]
    assert {"notes.txt", "model.safetensors.index.json", "README.md"} <= after
    assert seen["merged"] == ["JanusForConditionalGeneration", landscape(golden, finetune).class_ids.tolist()]


def test_data_pushed_over_other_data_replaces_it_in_one_commit(golden, prepared, shared):
    hub, seen = shared
    assert seen["replaced"] == list(load_encoded(prepared, load_checkpoint(golden / "checkpoint"))["key"])
    assert {name.split("/")[0] for name in hub.files("you/replaced", kind="datasets")} == {
        *(".gitattributes", "README.md", "preparation.json", "shard-00000-of-00001")
    }
    assert seen["commits of data"] == 3, "the empty repository, and one commit for each push"


def test_a_private_data_set_of_the_hub_is_not_taken_for_a_public_one(shared):
    _, seen = shared
    assert seen["public"] == [True, False, False]


def test_refusals_say_what_to_do(shared):
    _, seen = shared
    for name in ("wrong token", "not theirs"):
        assert seen[name].startswith("PermissionError: The Hub at") and "hf auth login" in seen[name]
    assert "Invalid credentials" in seen["wrong token"] and "them may not" in seen["not theirs"]
    for name in ("private to others", "missing"):
        assert "neither a folder nor a Hub repository that can be read now" in seen[name]
    assert "v2" in seen["missing revision"]


def test_push_to_hub_in_a_recipe_shares_what_push_shares(shared, tmp_path):
    hub, _ = shared
    recipe = {
        **{"base_model": "you/base", "source": "prepared", "path": "you/data", "eval_samples": 2, "max_steps": 2},
        **{"save_steps": 1, "eval_steps": 2, "output_dir": str(tmp_path / "clear"), "lora_r": 4},
        **{"push_to_hub": True, "hub_model_id": "you/trained", "hub_strategy": "checkpoint", "hub_always_push": True},
        **{"hub_private_repo": True, "hub_revision": "tries", "hub_token": "hf_of_you"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    env = client(hub, tmp_path / "home", HF_TOKEN="")
    result = subprocess.run(
        [BIN / "thinkclearly", "train", tmp_path / "recipe.yaml"], env=env, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert hub.repositories["models", "you/trained"].private
    assert set(hub.files("you/trained")) == {".gitattributes"}
    files = hub.files("you/trained", "tries")
    own = {name for name in files if not name.startswith("last-checkpoint/")}
    assert own == SHARED | {".gitattributes"}, "with samples: anyone can see you/data"
    assert {"last-checkpoint/optimizer.pt", "last-checkpoint/trainer_state.json"} <= set(files)
    secret = ("hf_of_you", str(tmp_path))
    assert not [name for name, content in files.items() if any(word.encode() in content for word in secret)]
    left = [path for path in (tmp_path / "clear").rglob("*") if path.is_file()]
    assert not [path for path in left if any(word.encode() in path.read_bytes() for word in secret)]
    assert 'pipeline("clear-edit", model="you/trained")' in (tmp_path / "clear" / "README.md").read_text()
    adapter = (tmp_path / "clear" / "adapter_model.safetensors").read_bytes()
    assert files["adapter_model.safetensors"] == files["last-checkpoint/adapter_model.safetensors"] == adapter
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "you/base" and card.data.datasets == ["you/data"]
    assert "loss" in {result.metric_name for result in card.data.eval_results} and "max_steps: 2" in card.text
    assert [commit.title for commit in history(hub, "you/trained", "tries")][0] == "End of training"


def history(hub, name, branch):
    repository = hub.repositories["models", name]
    commit = repository.find(branch)
    while commit:
        yield commit
        commit = repository.commits.get(commit.parent)
