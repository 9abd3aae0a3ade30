"""pipeline("clear-edit") behaves like any other pipeline, and edits as the editor does."""

import runpy
import struct
import sys
import threading
import zlib
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import icc
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

import thinkclearly

PROMPTS = ["Make the red circle blue.", "Night.", "Remove the green square from the table and nothing else."]


@pytest.fixture(scope="module")
def names(golden):
    return [str(golden / "images" / f"{name}.png") for name in ("square", "landscape", "portrait")]


@pytest.fixture(scope="module")
def finetune(golden, tmp_path_factory):
    """The golden fine-tune in our own layout, its gate's zero put among its values."""
    editor = thinkclearly.load_editor(golden / "finetune", base=golden / "checkpoint")
    gate = editor.edit(golden / "images" / "square.png", PROMPTS[0], temperature=0).gate
    editor.model.clear_config.edit = {"clear_bias": -gate.median().item()}
    editor.model.network.peft_config["default"].base_model_name_or_path = str(golden / "checkpoint")
    directory = tmp_path_factory.mktemp("finetune")
    editor.model.save_pretrained(directory)
    editor.processor.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def edit(finetune):
    return pipeline("clear-edit", model=str(finetune), device="cpu")


def tokens(outputs):
    return [output.class_ids.tolist() for output in outputs]


def test_it_gives_what_the_editor_gives(edit, finetune, names):
    expected = thinkclearly.load_editor(finetune).edit(names[1], PROMPTS[0], seed=5)
    output = edit(names[1], prompt=PROMPTS[0], seed=5)
    assert set(output) >= {"image", "mask", "raw", "token_composite", "class_ids", "clear_fraction"}
    for name in ("image", "mask", "raw", "token_composite"):
        assert np.array_equal(output[name], getattr(expected, name))
    assert output.class_ids.tolist() == expected.class_ids.tolist() and 0 < output["clear_fraction"] < 1
    source, clear = np.asarray(Image.open(names[1]).convert("RGB")), np.asarray(output.mask) > 127
    assert output.image.size == Image.open(names[1]).size and (np.asarray(output.image)[clear] == source[clear]).all()


def test_pictures_that_nobody_asks_for_are_not_decoded(edit, names):
    output = edit(names[0], prompt="Night.", use_cfg=False)
    assert not {"raw", "input_decoded"} & set(vars(output.result))
    assert output.raw is output["raw"] is output.result.raw and "input_decoded" not in vars(output.result)


def test_a_name_means_the_same_in_the_output_and_in_the_result(edit, names):
    output = edit(names[0], prompt="Night.", use_cfg=False)
    for name in set(output) - {"prompt"}:
        assert output[name] is getattr(output.result, name) or name == "gate_mask"
    assert output.prompt == output.result.instruction == "Night."
    assert len(output) == len(list(output)) and "tokens" not in output and "Night." in repr(output)
    with pytest.raises(AttributeError, match="no 'tokens'; choose from .*class_ids, fed_codes, codes"):
        _ = output.tokens


def test_a_photo_s_profile_and_transparency_stay(edit, names, tmp_path):
    glass = Image.open(names[0]).convert("RGBA")
    glass.putalpha(100)
    glass.save(tmp_path / "glass.png", icc_profile=icc.display_p3())
    for output in edit([str(tmp_path / "glass.png")] * 2, prompt="Night.", use_cfg=False, batch_size=2):
        assert output.image.mode == "RGBA" and output.image.info["icc_profile"] == icc.display_p3()


def test_a_picture_may_be_a_path_bytes_pil_an_array_or_a_row(edit, names):
    picture = Image.open(names[0]).convert("RGB")
    with open(names[0], "rb") as file:
        forms = [names[0], file.read(), picture, np.asarray(picture)]
    rows = [*forms, {"image": picture, "prompt": PROMPTS[0]}, {"source": picture, "instruction": PROMPTS[0]}]
    found = tokens([edit(form, prompt=PROMPTS[0]) for form in rows] + [edit(image=names[0], prompt=PROMPTS[0])])
    assert all(ids == found[0] for ids in found)


def test_a_batch_gives_the_tokens_of_one_by_one(edit, names):
    one_by_one = tokens([edit(name, prompt=prompt) for name, prompt in zip(names, PROMPTS)])
    assert len(set(map(tuple, one_by_one))) == 3
    for size in (2, 3):
        assert tokens(edit(names, prompt=PROMPTS, batch_size=size)) == one_by_one


def test_lists_generators_and_datasets_stream_in_order(edit, names):
    edit = partial(edit, use_cfg=False)  # a third of the work
    pictures = [Image.open(name).convert("RGB") for name in names]
    expected = tokens(edit(names, prompt=PROMPTS))
    rows = [{"image": picture, "prompt": prompt} for picture, prompt in zip(pictures, PROMPTS)]
    assert tokens(edit(rows)) == expected
    stream = edit((row for row in rows), batch_size=2)
    assert not isinstance(stream, list) and tokens(stream) == expected
    data = Dataset.from_list([{"image": {"path": n, "bytes": None}, "prompt": p} for n, p in zip(names, PROMPTS)])
    assert tokens(edit(data, batch_size=3)) == tokens(edit(data["image"], prompt=data["prompt"])) == expected
    same = tokens(edit(names, prompt=PROMPTS[0]))
    assert tokens(edit(KeyDataset(data, "image"), prompt=PROMPTS[0])) == same
    assert tokens(edit(names[0], prompt=PROMPTS)) == tokens(edit([names[0]] * 3, prompt=PROMPTS))
    assert edit([], prompt=PROMPTS[0]) == []


def test_loading_takes_what_any_pipeline_takes(edit, finetune, names):
    expected = pipeline("clear-edit", device="cpu")(names[0], prompt="Make the background red.")
    options = {"device_map": "cpu", "dtype": torch.float32, "model_kwargs": {"attn_implementation": "eager"}}
    other = pipeline("clear-edit", **options)
    assert tokens([other(names[0], prompt="Make the background red.", progress_bar=False)]) == tokens([expected])
    half = pipeline("clear-edit", model=str(finetune), device="cpu", dtype="bfloat16")
    assert half.model.base.dtype == torch.bfloat16 and half(names[0], prompt="Night.").image.size == (96, 96)


def test_a_url_is_read_like_a_file(edit, golden, names):
    handler = partial(SimpleHTTPRequestHandler, directory=golden / "images")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        found = edit(f"{url}/square.png", prompt="Night.", seed=1)
        with pytest.raises(ValueError, match="The picture.*404"):
            edit(f"{url}/none.png", prompt="Night.")
        server.shutdown()
    assert tokens([found]) == tokens([edit(names[0], prompt="Night.", seed=1)])


class Endless(BaseHTTPRequestHandler):
    """Never stops sending; at `/bomb.png` a short picture that says it is 20,000 x 20,000 pixels."""

    sent = 0

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        if self.path == "/bomb.png":
            chunks = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0), b"IDAT"
            parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
            self.wfile.write(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
            return
        with suppress(ConnectionError):
            while True:
                Endless.sent += self.wfile.write(bytes(2**16))

    def log_message(self, *_):
        pass


def test_a_url_gives_no_more_than_a_picture(edit, monkeypatch):
    monkeypatch.setattr("thinkclearly.hub.pipeline.MAX_DOWNLOAD", 2**20)
    with ThreadingHTTPServer(("127.0.0.1", 0), Endless) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(
            ValueError, match="Item 1: .*endless.png cannot be read: it is larger than 1,048,576 bytes"
        ):
            edit(
                [{"image": Image.new("RGB", (32, 32)), "prompt": "a"}, {"image": f"{url}/endless.png", "prompt": "a"}]
            )
        with pytest.raises(ValueError, match="20000x20000|more than .* pixels"):
            edit(f"{url}/bomb.png", prompt="Night.")
        server.shutdown()
    assert Endless.sent < 2**25  # what was on its way when the connection was closed


def test_without_the_package_the_repository_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "thinkclearly.hub.pipeline", None)
    with pytest.raises(ImportError, match="`pip install .` in a checkout"):
        runpy.run_path(str(Path(thinkclearly.__file__).parent / "hub" / "remote_pipeline.py"))


def test_samples_and_seeds(edit, names):
    three = edit(names[:2], prompt=PROMPTS[:2], num_images=3, seed=4, batch_size=2)
    assert [len(group) for group in three] == [3, 3]
    assert tokens(three[1]) == tokens(edit(names[1], prompt=PROMPTS[1], num_images=3, seed=4))
    assert len(set(map(tuple, tokens(three[0])))) == 3
    drawn = [edit(names[0], prompt="Night.", generator=torch.Generator().manual_seed(7)) for _ in range(2)]
    assert tokens(drawn)[0] == tokens(drawn)[1] and drawn[0].seed == drawn[1].seed
    with pytest.raises(ValueError, match="one of them"):
        edit(names[0], prompt="Night.", generator=torch.Generator(), seed=1)


def test_steps_are_reported_and_settings_pass_through(edit, names, finetune):
    steps = []
    output = edit(names[0], prompt="Night.", temperature=0.0, callback=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (len(output.class_ids), len(output.class_ids)) and output.passes > 0
    greedy = pipeline("clear-edit", model=str(finetune), device="cpu", temperature=0.0)
    assert tokens([greedy(names[0], prompt="Night.", seed=9)]) == tokens([output])
    with pytest.raises(TypeError, match="temprature.*temperature"):
        edit(names[0], prompt="Night.", temprature=0.5)


def test_a_bad_item_is_named(edit, names, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not a picture")
    for bad, prompts in (([*names, str(broken)], "Night."), (names, [*PROMPTS[:2], "  "])):
        with pytest.raises(ValueError, match=f"Item {len(bad) - 1}"):
            edit(bad, prompt=prompts, batch_size=2)
    with pytest.raises(ValueError, match="Item 1.*keys"):
        edit([{"image": names[0], "prompt": "Night."}, {"picture": names[0]}])
    with pytest.raises(ValueError, match="3 pictures and 2 prompts"):
        edit(names, prompt=PROMPTS[:2])
    with pytest.raises(ValueError, match="prompt None"):
        edit(names[0])
    with pytest.raises(ValueError, match="No picture"):
        edit(prompt="Night.")
    with pytest.raises(ValueError, match="127.0.0.1"):
        edit("http://127.0.0.1:9/none.png", prompt="Night.")


def test_what_it_saves_it_reads(edit, names, tmp_path):
    edit.save_pretrained(tmp_path)
    again = pipeline("clear-edit", model=str(tmp_path), device="cpu")
    assert "InstructionModel" in repr(again)
    assert tokens([again(names[0], prompt="Night.")]) == tokens([edit(names[0], prompt="Night.")])


def test_a_model_that_cannot_edit_is_refused(edit):
    from thinkclearly.hub.pipeline import ClearEditPipeline

    with pytest.raises(TypeError, match="InstructionModel with processor="):
        ClearEditPipeline(edit.model.base)
