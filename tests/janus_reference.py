"""The golden checkpoint (tests/fixtures/janus_tiny/README.md) as transformers' model, and what tests ask of it."""

import json
from types import SimpleNamespace

import torch
from peft import get_peft_model, set_peft_model_state_dict

from thinkclearly.models.janus.checkpoint import load_janus
from thinkclearly.models.janus.original_finetune import check_original_base, read_original_finetune

CODEBOOK = "gen_vision_model.quantize.embedding.weight"


def special_ids(golden):
    added = json.loads((golden / "checkpoint" / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {item["content"]: item["id"] for item in added}
    names = {"image": "<image_placeholder>", "boi": "<begin_of_image>", "eoi": "<end_of_image>", "pad": "<｜▁pad▁｜>"}
    return SimpleNamespace(**{name: ids[text] for name, text in names.items()})


def pictures_of(expected):
    """The names of the golden set's pictures."""
    return sorted(key.removesuffix(".pixel_values") for key in expected if key.endswith(".pixel_values"))


def t2i_keys(expected):
    """The text-to-image prompts of the golden set."""
    return sorted(key.removesuffix(".greedy_tokens") for key in expected if key.startswith("t2i") and "greedy" in key)


def t2i_text(prompts, key):
    return prompts[f"{key}.prompt"].removeprefix("<|User|>: ").split("\n\n<|Assistant|>")[0]


def between(gate, share=0.5):
    """A value of which about `share` of the log-odds lie below, in the widest gap there.

    A median is one of them: as a bias it would put that position exactly on the border, to be decided by rounding.
    """
    values, reach = gate.flatten().sort().values, len(gate.flatten()) // 10
    start, stop = (int(share * len(values)) + side * reach for side in (-1, 1))
    window = values[max(start, 0) : stop + 1]
    k = window.diff().argmax()
    return (window[k : k + 2].sum() / 2).item()


def encode(model, pixel_values):
    return model.model.vqmodel.encode(pixel_values[None]).image_tokens


def fill(embeds, mask, values):
    return embeds.masked_scatter(mask.unsqueeze(-1), values)


def edit_embeds(model, golden, expected, name):
    """The three guidance rows, full, part and uncond: (3, L, H), as in ShareGPT-4o-Image's inference."""
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
