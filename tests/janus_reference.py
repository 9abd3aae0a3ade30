"""The golden checkpoint (tests/fixtures/janus_tiny/README.md) as transformers' model, and what tests ask of it."""

import json
from types import SimpleNamespace

import torch
from peft import get_peft_model, set_peft_model_state_dict

from thinkclearly.models.checkpoint import load_janus
from thinkclearly.models.original_finetune import check_original_base, read_original_finetune

NAMES = ("square", "landscape", "portrait")
CODEBOOK = "gen_vision_model.quantize.embedding.weight"


def special_ids(golden):
    added = json.loads((golden / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {item["content"]: item["id"] for item in added}
    names = {"image": "<image_placeholder>", "boi": "<begin_of_image>", "eoi": "<end_of_image>", "pad": "<｜▁pad▁｜>"}
    return SimpleNamespace(**{name: ids[text] for name, text in names.items()})


def encode(model, pixel_values):
    return model.model.vqmodel.encode(pixel_values[None]).image_tokens


def fill(embeds, mask, values):
    return embeds.masked_scatter(mask.unsqueeze(-1), values)


def edit_embeds(model, golden, expected, name):
    """The three guidance rows, full, part and uncond: (3, L, H); specs: ShareGPT-4o-Image's inference."""
    ids, special = expected[f"{name}.edit.input_ids"], special_ids(golden)
    uncond = ids.clone()
    uncond[1:-1] = special.pad
    full, uncond = (model.get_input_embeddings()(row) for row in (ids, uncond))
    features = model.model.get_image_features(expected[f"{name}.pixel_values"][None]).pooler_output
    part = fill(full, ids == special.image, features)
    codes = model.prepare_embeddings_for_image_generation(encode(model, expected[f"{name}.pixel_values"]))
    return torch.stack([fill(part, ids == special.pad, codes), part, uncond])


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def adapted(golden, directory):
    model = load_janus(golden / "checkpoint")
    check_original_base(directory, model)
    config, lora, weight, bias = read_original_finetune(directory)
    model = get_peft_model(model, config)
    result = set_peft_model_state_dict(model, lora)
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    return model.eval(), weight, bias
