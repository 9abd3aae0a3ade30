"""In 8 or 4 bits only the language model is; what decides about pictures' tokens stays as it was."""

import logging

import numpy as np
import pytest
import torch

pytest.importorskip("bitsandbytes")

from thinkclearly import cli, load_editor  # noqa: E402
from thinkclearly.data.shapes import packaged_photos, random_edit  # noqa: E402
from thinkclearly.images import Letterbox  # noqa: E402
from thinkclearly.models.finetunes import TINY_CLEAR, load_clear_model  # noqa: E402
from thinkclearly.models.load import load_checkpoint, token_model  # noqa: E402
from thinkclearly.models.quantization import quantization  # noqa: E402
from thinkclearly.sequence import Row, drawing  # noqa: E402


def layers_below(model, kind):
    return {name for name, module in model.named_modules() if kind in type(module).__name__}


@pytest.mark.parametrize("bits, kind", [(8, "Linear8bitLt"), (4, "Linear4bit")])
def test_towers_and_heads_stay_what_they_were(bits, kind):
    plain, config = load_checkpoint("tiny").network, quantization(bits, torch.float32)
    model = load_checkpoint("tiny", quantization_config=config, device="cpu").network
    assert config.llm_int8_skip_modules is None, "the caller's own stays as it was"
    linear = {name for name in layers_below(plain, "Linear") if "language_model.layers" in name}
    assert layers_below(model, kind) == linear and linear
    by_dict = load_checkpoint("tiny", quantization_config={f"load_in_{bits}bit": True}).network
    assert layers_below(by_dict, kind) == linear
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(token_model(model).encode(pixels), token_model(plain).encode(pixels))
    features = [network.model.get_image_features(pixels).pooler_output for network in (model, plain)]
    assert torch.equal(*features)


@pytest.mark.parametrize("bits", [8, 4])
def test_edits_are_nearly_those_of_float32_and_copies_exact(bits, caplog):
    edits = [random_edit(11, i, packaged_photos("test")) for i in range(3)]
    pictures, words = [edit.render(64)[0] for edit in edits], [edit.instruction for edit in edits]
    editor = load_editor(str(TINY_CLEAR), quantization_config=quantization(bits, torch.float32))
    with caplog.at_level(logging.WARNING):
        found = editor.edit_many(pictures, words)
    assert "cast" not in caplog.text
    for result, plain in zip(found, load_editor(str(TINY_CLEAR)).edit_many(pictures, words)):
        assert (result.fed_codes == plain.fed_codes).float().mean() > 0.8
        clear = torch.from_numpy(Letterbox(*result.source.size, 64).unfit_grid(result.clear))
        edited, source = (torch.from_numpy(np.array(p)) for p in (result.image, result.source))
        assert clear.any() and torch.equal(edited[clear], source[clear])


def test_qlora_trains_and_its_adapter_loads_in_either_precision(tmp_path):
    flags = "--limit 16 --max_steps 2 --eval_samples 4 --eval_strategy no --calibration_edits 0 --sample_edits 0"
    flags += " --per_device_train_batch_size 8 --gradient_accumulation_steps 1 --shapes_size 64 --load_in_4bit true"
    flags += " --lora_r 8 --learning_rate 1e-3"
    output = tmp_path / "out"
    cli.main(["train", *flags.split(), "--output_dir", str(output), "--prepared_dir", str(tmp_path / "prepared")])
    plain, processor = load_clear_model(output)
    small, _ = load_clear_model(output, quantization_config=quantization(4, torch.float32))
    assert layers_below(small, "Linear4bit") and not layers_below(plain, "Linear4bit")
    trained = [p for name, p in plain.named_parameters() if "lora_B" in name]
    assert trained and all(p.abs().max() > 0 for p in trained)
    rows = processor.rows([Row(drawing("a red circle"))])
    embeds = [model.base.get_input_embeddings()(rows.input_ids) for model in (plain, small)]
    hidden = [
        model.token_model.language_model(inputs_embeds=e).last_hidden_state[:, -1]
        for model, e in zip((plain, small), embeds)
    ]
    assert torch.cosine_similarity(*hidden).item() > 0.95
