"""One decoding loop gives what the reference does: text-to-image, three-row edits, the original's CLEAR fine-tune."""

import json

import pytest
import torch
from safetensors.torch import load_file

from thinkclearly.decoding.engine import DecodeSettings, decode
from thinkclearly.models.backbone import embed_prompt, image_features
from thinkclearly.models.prompt import FULL, PART, UNCOND
from thinkclearly.training.adapters import load_base, load_clear_model

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def expected(golden):
    return load_file(golden / "expected.safetensors")


@pytest.fixture(scope="module")
def prompts(golden):
    return json.loads((golden / "prompts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def base(golden):
    return load_base(str(golden / "checkpoint"))


@pytest.fixture(scope="module")
def finetune(golden):
    return load_clear_model(str(golden / "finetune"), base=str(golden / "checkpoint"))


def edit_rows(pair, expected, prompts, name, conditions):
    model, processor = pair
    instruction = prompts["instructions"][name]
    rows = processor.edit_rows([instruction] * len(conditions), conditions)
    features = image_features(model.base, expected[f"{name}.pixel_values"][None])
    source = expected[f"{name}.image_tokens"][None]
    count = len(conditions)
    embeds = embed_prompt(model.base, rows, features.expand(count, -1, -1), source.expand(count, -1))
    return rows, embeds, source


def names(expected):
    return sorted({key.split(".")[0] for key in expected if key.endswith(".edit.greedy_tokens")})


def test_prompts_are_the_reference_ids(base, expected, prompts):
    _, processor = base
    for name in names(expected):
        assert processor.edit_ids(prompts["instructions"][name]) == expected[f"{name}.edit.input_ids"].tolist()
        rows = processor.describe_rows([prompts["question"]])
        assert rows.input_ids[0].tolist() == expected[f"{name}.understand.input_ids"].tolist()


def test_three_row_edit_matches_the_reference(base, expected, prompts):
    for name in names(expected):
        rows, embeds, _ = edit_rows(base, expected, prompts, name, [FULL, PART, UNCOND])
        decoded = decode(
            base[0],
            embeds,
            rows.attention_mask,
            base[1].num_image_tokens,
            DecodeSettings(temperature=0),
            samples=[(0, 0)],
            keep_logits=True,
        )
        assert decoded.codes[0].tolist() == expected[f"{name}.edit.greedy_tokens"].tolist()
        steps = expected[f"{name}.edit.guided_logits"].shape[0]
        torch.testing.assert_close(
            decoded.logits[0, :steps], expected[f"{name}.edit.guided_logits"], atol=TOLERANCE, rtol=TOLERANCE
        )


def test_text_to_image_matches_the_reference(base, expected, prompts):
    for key in (k.split(".")[0] for k in expected if k.startswith("t2i") and k.endswith("greedy_tokens")):
        text = prompts[f"{key}.prompt"].removeprefix("<|User|>: ").split("\n\n<|Assistant|>")[0]
        rows = base[1].generate_rows([text, text], [FULL, UNCOND])
        assert rows.input_ids[0].tolist() == expected[f"{key}.input_ids"].tolist()
        decoded = decode(
            base[0],
            embed_prompt(base[0].base, rows),
            rows.attention_mask,
            base[1].num_image_tokens,
            DecodeSettings(temperature=0),
            samples=[(0, 0)],
        )
        assert decoded.tokens[0].tolist() == expected[f"{key}.greedy_tokens"].tolist()


@pytest.mark.parametrize("mode", ["one_row", "guided"])
def test_original_finetune_decodes_as_the_original_did(golden, finetune, expected, prompts, mode):
    wanted = load_file(golden / "expected_finetune.safetensors")
    settings = json.loads((golden / "finetune_settings.json").read_text())[mode]
    conditions = [FULL, PART, UNCOND] if mode == "guided" else [FULL]
    for name in names(expected):
        rows, embeds, source = edit_rows(finetune, expected, prompts, name, conditions)
        decoded = decode(
            finetune[0],
            embeds,
            rows.attention_mask,
            finetune[1].num_image_tokens,
            DecodeSettings(guidance="joint", temperature=0, **settings),
            source_tokens=source,
            samples=[(0, 0)],
            keep_logits=True,
        )
        assert decoded.ids[0].tolist() == wanted[f"{name}.{mode}.ids"].tolist()
        assert decoded.tokens[0].tolist() == wanted[f"{name}.{mode}.mapped_tokens"].tolist()
        torch.testing.assert_close(decoded.logits[0], wanted[f"{name}.{mode}.logits"], atol=TOLERANCE, rtol=TOLERANCE)
