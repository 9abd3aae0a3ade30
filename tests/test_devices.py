"""A model whose parts lie on several devices edits, draws and answers as one that lies on one."""

import pytest
from accelerate import dispatch_model
from pretended_devices import pretended_devices

from thinkclearly.editing.editor import Editor
from thinkclearly.models.finetunes import load_base, load_clear_model
from thinkclearly.models.janus.checkpoint import load_janus
from thinkclearly.models.janus.model import Janus
from thinkclearly.models.load import load_checkpoint

HOME = "vision_model aligner generation_embeddings language_model.embed_tokens language_model.layers.0".split()
AWAY = "vqmodel generation_aligner generation_head language_model.norm".split()


def split_over(home, away, layers):
    """A device_map: towers and first layer at home, tokenizer, heads and the other layers away."""
    names = {name: home for name in HOME} | {name: away for name in AWAY}
    names |= {f"language_model.layers.{n}": away for n in range(1, layers)}
    return {f"model.{name}": device for name, device in names.items()} | {
        "model.language_model.rotary_emb": home,
        "lm_head": away,
    }


def layers_of(janus):
    return janus.config.text_config.num_hidden_layers


@pytest.fixture
def native(golden, tmp_path):
    """The golden base in transformers' layout."""
    checkpoint = load_checkpoint(golden / "checkpoint")
    checkpoint.network.save_pretrained(tmp_path)
    checkpoint.processor.save_pretrained(tmp_path)
    return tmp_path


def everything(editor, golden):
    """Edits with several samples, which finish at different times, a drawing and an answer."""
    picture = golden / "images" / "landscape.png"
    edits = editor.edit_many([picture], ["Night."], num_images=3, seed=1, clear_bias=3.0)
    drawn = editor.generate("a red circle", temperature=0, use_cfg=False)
    answer = editor.describe(picture, "What is it?", max_new_tokens=3)
    return [(edit.class_ids.tolist(), edit.fed_codes.tolist(), edit.image.tobytes()) for edit in edits], drawn, answer


@pytest.mark.parametrize(
    ("kind", "home", "away"), [("base", "cpu", "cpu:1"), ("finetune", "cpu:1", "cpu:2")], ids=["base", "finetune"]
)
def test_a_model_over_two_devices_decodes_as_on_one(golden, kind, home, away):
    def load():
        base = golden / "checkpoint"
        return load_base(base) if kind == "base" else load_clear_model(golden / "finetune", base=base)

    expected = everything(Editor(*load()), golden)
    model, processor = load()
    with pretended_devices():
        janus = model.base
        parts = split_over(home, away, layers_of(janus))
        dispatch_model(janus, parts, main_device=home, skip_keys=janus._skip_keys_device_placement, force_hooks=True)
        assert {str(p.device) for p in janus.parameters()} == {home, away}
        assert everything(Editor(model, processor), golden) == expected


def test_layers_may_lie_on_disk(native, golden):
    expected = everything(Editor(*load_base(native)), golden)
    parts = split_over("cpu", "cpu", layers_of(load_janus(native)))
    parts = {name: "disk" if ".layers." in name or name == "lm_head" else device for name, device in parts.items()}
    model, processor = load_base(native, device_map=parts)
    assert any(p.is_meta for p in model.base.parameters())
    assert model.token_model.base_fingerprint() == Janus(load_janus(native)).base_fingerprint()
    assert everything(Editor(model, processor), golden) == expected


def test_other_parts_and_the_base_of_an_adapter_may_not(native, golden):
    parts = split_over("cpu", "cpu", layers_of(load_janus(native)))
    with pytest.raises(ValueError, match="device_map offloads model.vqmodel.*only the language model can be"):
        load_base(native, device_map=parts | {"model.vqmodel": "disk"})
    with pytest.raises(ValueError, match="device_map offloads .*layers.0.*an adapter needs all of its base"):
        load_clear_model(
            golden / "finetune", base=native, device_map=parts | {"model.language_model.layers.0": "disk"}
        )
