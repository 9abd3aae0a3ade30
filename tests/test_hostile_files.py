"""Files made to harm: each is refused with an error that says what is wrong, nothing is executed.

What the rooms refuse for themselves is tested with them: recipes in test_config, records in test_jsonl, paths in
metadata in test_sources, pictures in test_images.
"""

import io
import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from thinkclearly.data.sources import BadRecord, folder, read_example, sharegpt4o
from thinkclearly.images import ImageError, load_image
from thinkclearly.models.chameleon.checkpoint import load_chameleon
from thinkclearly.models.finetunes import load_clear_model
from thinkclearly.models.instruction_head import ClearConfig, read_clear_config
from thinkclearly.models.janus.checkpoint import load_janus
from thinkclearly.models.janus.original_finetune import read_original_finetune
from thinkclearly.models.load import load_checkpoint
from thinkclearly.training.adapters import add_lora

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def originals(golden, chameleon, tmp_path_factory):
    """One directory of each kind that is loaded, to be spoilt in copies."""
    root = tmp_path_factory.mktemp("originals")
    shutil.copytree(golden / "checkpoint", root / "deepseek")
    shutil.copytree(golden / "finetune", root / "original_finetune")
    shutil.copytree(chameleon, root / "chameleon")
    checkpoint = load_checkpoint(golden / "checkpoint")
    checkpoint.network.save_pretrained(root / "native")
    checkpoint.processor.save_pretrained(root / "native")
    names = {
        "codebook_hash": checkpoint.token_model.codebook_fingerprint(),
        "base_hash": checkpoint.token_model.base_fingerprint(),
    }
    model = add_lora(checkpoint, str(golden / "checkpoint"), ClearConfig(128, **names), r=4)
    model.save_pretrained(root / "finetune")
    return root


@pytest.fixture
def copy(originals, tmp_path):
    """A fresh copy of the directory of a kind."""

    def fresh(kind):
        shutil.rmtree(tmp_path / kind, ignore_errors=True)
        return shutil.copytree(originals / kind, tmp_path / kind)

    return fresh


LOAD = {
    "deepseek": load_janus,
    "native": load_janus,
    "chameleon": load_chameleon,
    "finetune": load_clear_model,
    "original_finetune": read_original_finetune,
}


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- weights -----------------------------------------------------------------------------------------------------


class Touch:
    """A pickle that leaves a trace when it is read unsafely."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


SAFETENSORS = [
    ("deepseek", "model.safetensors"),
    ("native", "model.safetensors"),
    ("chameleon", "model.safetensors"),
    ("finetune", "adapter_model.safetensors"),
    ("finetune", "gen_head_clear.safetensors"),
    ("original_finetune", "adapter_model.safetensors"),
]
PICKLES = [
    ("deepseek", "model.safetensors", "pytorch_model.bin"),
    ("native", "model.safetensors", "pytorch_model.bin"),
    ("chameleon", "model.safetensors", "pytorch_model.bin"),
    ("finetune", "adapter_model.safetensors", "adapter_model.bin"),
    ("original_finetune", "adapter_model.safetensors", "adapter_model.bin"),
    ("original_finetune", "gen_head_clear.pt", "gen_head_clear.pt"),
]


def spoilt_safetensors(data):
    """Cut short in the header and in the tensors, empty, and with lengths and offsets beyond the file."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    header[name] |= {"shape": [1 << 24, 1 << 24], "data_offsets": [0, 1 << 50]}
    lying = json.dumps(header).encode()
    yield from (b"", data[:6], data[: length // 2], data[:-4], struct.pack("<Q", 1 << 62) + data[8:])
    yield data[:8] + b"?" * length + data[8 + length :]
    yield struct.pack("<Q", len(lying)) + lying + data[8 + length :]


@pytest.mark.parametrize(("kind", "name"), SAFETENSORS)
def test_safetensors_that_are_cut_short_or_lie_about_lengths(copy, kind, name):
    directory = copy(kind)
    contents = list(spoilt_safetensors((directory / name).read_bytes()))
    for content in contents if kind == "deepseek" else contents[2:4]:  # all go through one function
        (directory / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is cut short or damaged"):
            LOAD[kind](directory)


@pytest.mark.parametrize(("kind", "replaced", "name"), PICKLES)
def test_pickles_are_never_executed(copy, tmp_path, kind, replaced, name):
    directory, marker = copy(kind), tmp_path / "executed"
    (directory / replaced).unlink()
    spoilers = [
        lambda path: torch.save({"clear_linear.weight": Touch(marker)}, path),
        lambda path: path.write_bytes(pickle.dumps(Touch(marker), protocol=2)),
        lambda path: torch.save({"a": Touch(marker)}, path, _use_new_zipfile_serialization=False),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"not a pickle"),
        lambda path: path.write_bytes(b"PK\3\4" + bytes(60)),
        lambda path: torch.save([torch.zeros(1)], path),
        lambda path: torch.save({"clear_linear.weight": 1}, path),
    ]
    for write in spoilers:
        write(directory / name)
        with pytest.raises(ValueError, match=f"{name} (is damaged or holds more than tensors|holds .* state dict)"):
            LOAD[kind](directory)
        assert not marker.exists()


# ---- an adapter of another base ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ("gen_vision_model.quantize.embedding.weight", "was trained on codebook"),
        ("gen_head.vision_head.weight", "was trained on base weights .* another base"),
        ("language_model.model.norm.weight", "was trained on base weights .* another base"),
    ],
)
def test_an_adapter_on_a_base_of_the_same_shape_is_refused(copy, changed, message):
    other = copy("deepseek")
    weights = load_file(other / "model.safetensors")
    noise = torch.randn(weights[changed].shape, generator=torch.Generator().manual_seed(0))
    save_file(weights | {changed: weights[changed] + 0.1 * noise}, other / "model.safetensors", {"format": "pt"})
    finetune = copy("finetune")
    load_clear_model(finetune)
    with pytest.raises(ValueError, match=f"{finetune} {message}"):
        load_clear_model(finetune, base=other)


def test_a_base_is_the_same_in_half_precision(originals):
    whole, half = (load_checkpoint(originals / "deepseek", dtype=t) for t in (torch.float32, torch.bfloat16))
    assert whole.token_model.base_fingerprint() == half.token_model.base_fingerprint()
    load_clear_model(originals / "finetune", dtype=torch.float16)  # rounds otherwise, and is not compared


# ---- configurations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [10**9, -1, 2.5e300, "many", [1] * 10**5])
@pytest.mark.parametrize(
    ("kind", "part", "name"),
    [
        ("native", "text_config", "hidden_size"),
        ("native", "text_config", "num_hidden_layers"),
        ("native", "vision_config", "image_size"),
        ("native", "vq_config", "num_embeddings"),
        ("native", "vq_config", "channel_multiplier"),
        ("deepseek", "language_config", "vocab_size"),
        ("deepseek", "language_config", "num_hidden_layers"),
    ],
)
def test_absurd_sizes_are_refused_before_anything_is_built(copy, kind, part, name, value):
    directory = copy(kind)
    config = json.loads((directory / "config.json").read_text())
    config[part][name] = value
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config.json: {name} is .*; expected a number from 0 to"):
        load_janus(directory)


def test_a_config_of_a_far_larger_model_than_its_weights_is_refused(copy):
    directory = copy("native")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"] |= {"hidden_size": 1 << 16, "intermediate_size": 1 << 16}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"describes a model of [\d,]+ weights, the files hold [\d,]+"):
        load_janus(directory)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("preprocessor_config.json", {"image_size": 10**9}),
        ("preprocessor_config.json", {"image_size": None}),
        ("processor_config.json", {"num_image_tokens": 10**9}),
    ],
)
def test_a_processor_for_other_pictures_is_refused(copy, name, changes):
    directory = copy("deepseek")
    edit_json(directory / name, **changes)
    with pytest.raises(ValueError, match="the model has 96 and 36"):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 10**9}, r"ranks \[1000000000\]; the matrices beside it have 4"),
        ({"r": -1}, r"r.* -1|ranks \[-1\]"),
        ({"r": "many"}, "many"),
        ({"rank_pattern": {".*": 10**9}}, "1000000000"),
        ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
        ({"megatron_config": {"a": 1}, "megatron_core": "antigravity"}, "megatron_config"),
        ({"peft_type": "PROMPT_TUNING"}, "expected plain LoRA"),
        ({"peft_type": "NONSENSE"}, "NONSENSE"),
        ({"lora_alpha": "many"}, "lora_alpha 'many'; expected a number"),
        ({"lora_alpha": None}, "lacks lora_alpha"),
        ({"target_modules": 5}, "target_modules 5; expected module names"),
        ({"target_modules": ["q_proj", "(a+)+"]}, "target_modules .*; expected module names"),
        ({"target_modules": "("}, "target_modules is '\\('"),
        ({"target_modules": "q" * 10**5}, "at most 4096 characters"),
        ({"target_modules": "nothing"}, "target_modules is 'nothing', which matches no module"),
        ({"rank_pattern": {"(a|aa)+$": 4}}, "rank_pattern .*; expected ranks by module names"),
        ({"alpha_pattern": {"(a|aa)+$": 4}}, "alpha_pattern .*; expected numbers by module names"),
        ({"exclude_modules": "(a|aa)+$"}, "exclude_modules '.*where it is off"),
        ({"layers_to_transform": [0]}, "layers_to_transform .*where it is off"),
        ({"layers_pattern": ["(a|aa)+$"]}, "layers_pattern .*where it is off"),
        ({"modules_to_save": ["(a|aa)+$"]}, "modules_to_save .*where it is off"),
        ({"target_parameters": ["weight"]}, "target_parameters .*where it is off"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'.*where it is off"),
        ({"bias": "all"}, "bias 'all'.*where it is off"),
        ({"invented_later": {"x": 1}}, "invented_later .*where it is off"),
    ],
)
def test_adapter_configurations(copy, changes, message):
    directory = copy("finetune")
    edit_json(directory / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load_clear_model(directory)


# On "model.language_model.layers.0.self_attn.q_proj" Python's own engine tries 2 ** 45 ways.
@pytest.mark.parametrize("pattern", ["(?:(?:.|.)){45}x?l", r"(?:[\w.]|[\w.])*\d"])
def test_a_pattern_of_modules_that_never_ends_is_refused(copy, pattern):
    directory = copy("finetune")
    edit_json(directory / "adapter_config.json", target_modules=pattern)
    with pytest.raises(ValueError, match="adapter_config.json: target_modules is .*, a pattern that cannot be used"):
        load_clear_model(directory)


def test_modules_may_be_a_list_or_an_honest_pattern(copy):
    directory = copy("finetune")
    want = load_clear_model(directory)[0].state_dict()
    names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    names = [
        f"language_model.layers.{layer}.{p}.{n}" for layer in range(20) for p in ("self_attn", "mlp") for n in names
    ]
    for targets in (
        names + ["generation_head.proj_out", "vision_head"],
        r".*language_model.*_proj|.*generation_head\.(proj_out|vision_head)",
    ):
        edit_json(directory / "adapter_config.json", target_modules=targets, invented_later=None)
        found = load_clear_model(directory)[0].state_dict()
        assert found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize(
    ("kind", "name", "part", "key", "other"),
    [
        ("finetune", "adapter_config.json", None, "lora_alpha", "Lora_alpha"),
        ("finetune", "clear_config.json", None, "gate_bias", "Gate_bias"),
        ("native", "config.json", "text_config", "rms_norm_eps", "RMS_norm_eps"),
        ("deepseek", "config.json", "language_config", "rms_norm_eps", "Rms_Norm_Eps"),
    ],
)
def test_names_in_other_letters_are_not_passed_over(copy, kind, name, part, key, other):
    path = copy(kind) / name
    content = json.loads(path.read_text())
    settings = content[part] if part else content
    value = settings.pop(key)
    settings[other] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name} has '{other}'; expected '{key}'"):
        LOAD[kind](path.parent)
    settings[key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{name} has '{other}' and '{key}' in one object"):
        LOAD[kind](path.parent)


def test_a_name_that_stands_twice_is_refused(copy):
    path = copy("finetune") / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha":', '"lora_alpha": 1, "lora_alpha":'))
    with pytest.raises(ValueError, match="has 'lora_alpha' and 'lora_alpha' in one object"):
        load_clear_model(path.parent)


def test_processor_files_are_read_as_strictly(copy):
    path = copy("deepseek") / "preprocessor_config.json"
    edit_json(path, Image_mean=[0, 0, 0])
    with pytest.raises(ValueError, match="preprocessor_config.json has 'image_mean' and 'Image_mean'"):
        load_checkpoint(path.parent)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@given(
    content=st.binary(max_size=40)
    | st.dictionaries(st.sampled_from(list(ClearConfig.__dataclass_fields__)), VALUES).map(
        lambda values: json.dumps({"codebook_size": 128} | values).encode()
    )
)
@quick
def test_any_clear_config_is_read_or_refused(tmp_path, content):
    (tmp_path / "clear_config.json").write_bytes(content)
    try:
        config = read_clear_config(tmp_path)
    except ValueError as error:
        assert "clear_config.json" in str(error)
    else:
        assert config.clear_weight > 0 and type(config.codebook_size) is int


def leaves(config, path=()):
    for name, value in config.items():
        yield path + (name,)
        if isinstance(value, dict):
            yield from leaves(value, path + (name,))


@pytest.mark.parametrize("kind", ["native", "deepseek", "chameleon"])
def test_any_checkpoint_config_loads_or_is_refused(copy, kind):
    directory = copy(kind)
    path = directory / "config.json"
    original = json.loads(path.read_text())

    names = [path for path in leaves(original) if path[:-1] != ("vocabulary_map",)]  # whose words are many

    @given(change=st.dictionaries(st.sampled_from(names), VALUES, min_size=1, max_size=2))
    @settings(quick, max_examples=25)
    def check(change):
        config = json.loads(json.dumps(original))
        for (*parents, last), value in change.items():
            part = config
            for name in parents:
                part = part[name] if isinstance(part.get(name), dict) else {}
            part[last] = value
        path.write_text(json.dumps(config))
        try:
            LOAD[kind](directory)
        except (ValueError, OSError, ImportError) as error:
            assert str(error)

    check()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 10**5, b"null"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("native", "config.json"),
        ("chameleon", "config.json"),
        ("finetune", "clear_config.json"),
        ("finetune", "adapter_config.json"),
        ("original_finetune", "adapter_config.json"),
    ],
)
def test_json_that_is_none_is_named(copy, kind, name, content):
    directory = copy(kind)
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} (cannot be read as JSON|holds .*; expected an object)"):
        LOAD[kind](directory)


# ---- pictures and where they lie ---------------------------------------------------------------------------------


@pytest.fixture
def sample(tmp_path):
    """A folder data set of one sample, and a picture outside of it that is nobody's business."""
    outside, root = tmp_path / "private.png", tmp_path / "data"
    (root / "sample_0000").mkdir(parents=True)
    for path in (outside, root / "sample_0000" / "source.png", root / "sample_0000" / "target.png"):
        Image.new("RGB", (32, 32)).save(path)
    (root / "sample_0000" / "metadata.json").write_text('{"instruction": "a"}')
    return root / "sample_0000", outside


def test_links_that_lead_out_of_the_data_are_refused(sample):
    directory, outside = sample
    assert len(folder(directory.parent)) == 1
    (directory / "linked.png").symlink_to("source.png")
    edit_json(directory / "metadata.json", source="linked.png")
    read_example(folder(directory.parent)[0])
    (directory / "linked.png").unlink()
    (directory / "linked.png").symlink_to(outside)
    with pytest.raises(BadRecord, match="source is 'linked.png', a link that leads outside .*private.png"):
        folder(directory.parent)
    (directory / "away").symlink_to(outside.parent)
    records = [{"input_prompt": "a", "input_image": ["away/private.png"], "output_image": "target.png"}]
    (directory / "data.json").write_text(json.dumps(records))
    with pytest.raises(BadRecord, match=r"data.json\[0\]: input_image is 'away/private.png', a link"):
        sharegpt4o(directory / "data.json")


def test_links_of_the_hubs_cache_are_followed(sample, monkeypatch):
    directory, outside = sample
    monkeypatch.setattr("thinkclearly.data.sources.HF_HUB_CACHE", str(outside.parent))
    (directory / "source.png").unlink()
    (directory / "source.png").symlink_to(outside)
    read_example(folder(directory.parent)[0])


def test_loops_and_nul_characters_are_refused(sample):
    directory, _ = sample
    (directory / "loop.png").symlink_to("loop.png")
    edit_json(directory / "metadata.json", source="loop.png")
    with pytest.raises(BadRecord, match="source .*loop.png"):
        read_example(folder(directory.parent)[0])
    edit_json(directory / "metadata.json", source="a\0b.png")
    with pytest.raises(BadRecord, match="source is .*expected a relative path"):
        folder(directory.parent)


def test_a_pipe_is_no_picture(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")  # opening it would wait for a writer for ever
    with pytest.raises(ImageError, match="pipe.png: cannot be read, it is no file"):
        load_image(tmp_path / "pipe.png")


def test_a_bomb_in_the_text_of_a_picture_is_refused():
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "0" * 2**24, zip=True)
    file = io.BytesIO()
    Image.new("L", (32, 32)).save(file, "PNG", pnginfo=text)
    assert len(file.getvalue()) < 2**16
    with pytest.raises(ImageError, match="bomb.png: cannot be read .*too large"):
        load_image(file.getvalue(), "bomb.png")
