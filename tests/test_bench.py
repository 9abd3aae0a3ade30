"""The benchmark compares decoders that do the same work, on masks that are what they are said to be."""

import json
import re
from statistics import mean

import numpy as np
import pytest
import torch
from scipy.ndimage import label

from thinkclearly import cli, load_editor
from thinkclearly.bench import cases
from thinkclearly.bench.loops import reference_loop, transformers_generate
from thinkclearly.bench.measure import Run, copy_bandwidth, interleaved, summary, weight_bytes
from thinkclearly.bench.run import TINY_CLEAR, BenchArguments, random_case, targets
from thinkclearly.bench.scripted import SMALL_TOWERS, changed_patches, random_model
from thinkclearly.bench.tables import render
from thinkclearly.data.shapes import packaged_photos, random_edit
from thinkclearly.decoding.engine import decode, guided_rows
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.editing.editor import Editor
from thinkclearly.sequence import FULL, NO_SOURCE, UNCOND, drawing, named_rows

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def editor():
    return load_editor(str(TINY_CLEAR))


@pytest.fixture(scope="module")
def scripted():
    """A model of random weights with 6×6 tokens."""
    return Editor(*random_model(SIZES | {"vocab_size": 512}, grid=6, codes=64, towers=SMALL_TOWERS, scale=4.0))


def edits(count):
    scenes = [random_edit(3, i, packaged_photos("test")) for i in range(count)]
    return [(scene.render(64)[0], scene.instruction) for scene in scenes]


def embedded(editor, picture, words):
    """Three guidance rows of one edit, their mask, and the source's tokens (1, N)."""
    model, processor = editor.model, editor.processor
    pixels = processor.pixel_values([picture.resize((processor.image_size,) * 2)])
    source, features = model.token_model.encode(pixels), model.token_model.see(pixels)
    rows = processor.rows(named_rows([drawing(words, [0])], (FULL, NO_SOURCE, UNCOND)))
    return model.token_model.embed_prompt(rows, features, source), rows.attention_mask, source


def decoded(editor, embeds, mask, settings, source=None):
    """One sample of one prompt: an edit where there is a source, else text-to-image."""
    copied = {} if source is None else {"source_tokens": source, "transformed": source.unsqueeze(1)}
    rows = guided_rows(settings, has_source=source is not None)
    assert len(rows) == len(embeds)
    return decode(
        editor.model, embeds, mask, editor.processor.num_image_tokens, settings, rows=rows, samples=[(0, 0)], **copied
    )


# ---- what we are compared with -----------------------------------------------------------------------------------


def test_the_reference_loop_chooses_what_our_decoder_does_by_the_same_formula(editor):
    for picture, words in edits(1):
        embeds, mask, source = embedded(editor, picture, words)
        weights = {"cfg_weight": 2.0, "cfg_weight2": 1.0, "temperature": 0.0}
        settings = DecodeSettings(guidance="joint", **weights)
        ids, tokens = reference_loop(editor.model, embeds, 64, source_tokens=source[0], **weights)
        ours = decoded(editor, embeds, mask, settings, source)
        assert ours.class_ids[0].tolist() == ids and ours.fed_codes[0].tolist() == tokens
        assert 0 < sum(i == 1024 for i in ids) < 64


def test_a_row_of_weight_0_costs_the_reference_loop_time_and_changes_nothing(editor):
    embeds, _, source = embedded(editor, *edits(1)[0])
    settings = {"cfg_weight": 2.0, "cfg_weight2": 0.0, "temperature": 0.0}
    three, two = (
        reference_loop(editor.model, rows, 64, source_tokens=source[0], **settings) for rows in (embeds, embeds[::2])
    )
    assert three == two
    assert editor.settings.cfg_weight2 == 0  # so the benchmark has both rows
    assert list(cases.edit_rows(editor, []))[:2] == [cases.REFERENCE, cases.EQUAL_ROWS]


def test_all_draw_the_same_tokens_when_greedy(editor):
    prompt = "a red circle at the top left"
    rows = editor.processor.rows(named_rows([drawing(prompt)], (FULL, UNCOND)))
    embeds, weights = editor.model.token_model.embed_prompt(rows), {"cfg_weight": 3.0, "temperature": 0.0}
    _, tokens = reference_loop(editor.model, embeds, 64, **weights)
    assert transformers_generate(editor.model.base, editor.processor, prompt, **weights) == tokens
    ours = decoded(editor, embeds, rows.attention_mask, DecodeSettings(**weights))
    assert ours.fed_codes[0].tolist() == tokens and len(set(tokens)) > 1


def test_sampling_stays_within_the_codes(editor):
    rows = editor.processor.rows(named_rows([drawing("a star")], (FULL, UNCOND)))
    embeds = editor.model.token_model.embed_prompt(rows)
    torch.manual_seed(0)
    first, second = (reference_loop(editor.model, embeds, 8, temperature=1.5)[0] for _ in range(2))
    assert first != second and max(first + second) < 1024
    drawn = transformers_generate(editor.model.base, editor.processor, "a star", temperature=1.5)
    assert len(drawn) == 64 and max(drawn) < 1024


# ---- scripts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.05, 0.15, 0.3, 0.6])
def test_a_scripted_mask_is_a_blob_of_the_share_it_says(share):
    masks = [changed_patches(share, 24, seed=seed) for seed in range(8)]
    assert all(int(mask.sum()) == round(share * 576) for mask in masks)
    assert len({tuple(mask.tolist()) for mask in masks}) == 8
    assert torch.equal(masks[3], changed_patches(share, 24, seed=3))
    largest = [np.bincount(label(mask.view(24, 24).numpy())[0].ravel())[1:].max() for mask in masks]
    assert mean(largest) > 0.8 * share * 576


@pytest.mark.parametrize("guidance", ["factorised", "joint"])
def test_a_scripted_model_copies_where_the_script_says_by_every_decoder(scripted, guidance):
    picture, words = edits(1)[0]
    embeds, mask, source = embedded(scripted, picture, words)
    changed = changed_patches(0.3, 6, seed=1)
    scripted.model.script(changed, embeds.shape[1] - 1)
    ids, _ = reference_loop(scripted.model, embeds, 36, source_tokens=source[0])
    assert (torch.tensor(ids) < 64).tolist() == changed.tolist()
    outputs = []
    for block in (1, 7, 0):
        settings = DecodeSettings(block=block, guidance=guidance)
        ours = decoded(scripted, embeds, mask, settings, source)
        assert (ours.class_ids[0] < 64).tolist() == changed.tolist()
        outputs.append(ours.fed_codes[0].tolist())
    assert outputs[0] == outputs[1] == outputs[2]


def test_codes_can_be_guessed_where_the_noise_alone_decides(scripted):
    model = scripted.model
    model.script(torch.ones(1, dtype=torch.bool), 0)
    embeds, mask = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)), torch.ones(1, 4).long()
    passes, scale = [], model.scale
    for model.scale in (0.01, 1.0):
        settings = DecodeSettings(block=36)
        passes.append(decode(model, embeds, mask, 36, settings, rows={FULL: 1.0}, samples=[(0, 0)]).passes)
    model.scale = scale
    assert passes[0] <= 3 < passes[1] <= 36


# ---- clocks and ratios -------------------------------------------------------------------------------------------


def test_rounds_are_interleaved_and_the_first_does_not_count():
    order = []
    rows = {name: lambda name=name: order.append(name) or Run(1, 1, 1) for name in "abc"}
    runs = interleaved(rows, 3, lambda: None)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(row) for name, row in runs.items()} == {"a": 3, "b": 3, "c": 3}


def test_ratios_are_taken_within_a_round():
    runs = {"base": [Run(8, 4, 64), Run(6, 3, 64), Run(9, 9, 64)], "ours": [Run(4, 1, 5), Run(2, 1, 7), Run(3, 1, 6)]}
    table = summary(runs, "base")
    assert table["ours"]["seconds_ratio"] == [3, 2, 3] and table["ours"]["decode_ratio"] == [4, 3, 9]
    assert table["ours"]["seconds"] == 3 and table["ours"]["passes"] == 6
    assert table["base"]["decode_ratio"] == [1, 1, 1]


def test_weights_of_a_pass_leave_embeddings_out():
    model = torch.nn.Sequential(torch.nn.Embedding(100, 8), torch.nn.Linear(8, 4), torch.nn.LayerNorm(4))
    assert weight_bytes(model) == 4 * (8 * 4 + 4 + 4 + 4)
    assert weight_bytes(model.to(torch.bfloat16)) == 2 * (8 * 4 + 4 + 4 + 4)
    assert copy_bandwidth(torch.device("cpu"), 2**16, 2) > 0


# ---- cases -------------------------------------------------------------------------------------------------------


def test_every_row_of_an_edit_takes_the_passes_it_should(scripted):
    rows = cases.scripted_rows(scripted, edits(1)[0], shares=(0.05, 0.6))
    runs = {name: row() for name, row in rows.items()}
    assert runs[cases.REFERENCE].passes == runs[cases.SEQUENTIAL].passes == 36
    few, many = (runs[f"{cases.ADAPTIVE}, {share} changed"].passes for share in ("5%", "60%"))
    assert few < many <= 36
    assert all(0 < run.decode < run.seconds for run in runs.values())


def test_passes_are_counted_for_every_level_block_and_share():
    entries = cases.count_passes(2, lambda: None, grid=6, levels=(0.1, 8.0), blocks=(0, 12))
    assert [(e["level"], e["block"]) for e in entries] == [(0.1, 0), (0.1, 12), (8.0, 0), (8.0, 12)]
    for entry in entries:
        assert {share: len(p) for share, p in entry["shares"].items()} == {"5%": 2, "15%": 2, "30%": 1, "60%": 1}
        assert all(1 <= p <= 36 for passes in entry["shares"].values() for p in passes)
    assert entries[0]["draw"] < entries[2]["draw"]


def test_targets_are_met_or_not_as_the_numbers_say():
    def results(passes, ratio):
        shares = {"5%": [passes], "15%": [passes + 10, passes + 20]}
        entries = [{"level": 4.0, "block": block, "draw": 320, "shares": shares} for block in (0, 64)]
        entries += [{"level": 1.0, "block": 64, "draw": 60, "shares": {"5%": [9], "15%": [9]}}]
        row = {"decode_ratio": [ratio, 1, 9], "seconds_ratio": [ratio, 1, 9]}
        tiny = {name: {cases.ADAPTIVE: row} for name in ("edits", "equal_rows", "draw")}
        return {"passes": entries, "models": {"tiny": tiny}}

    assert all(target["met"] for target in targets(results(20, 5.0)))
    assert len(targets(results(20, 5.0))) == 10
    missed = [target["what"] for target in targets(results(60, 1.0)) if not target["met"]]
    assert len(missed) == 9  # all but the most of 576
    assert targets({"passes": [], "models": {}}) == []


def test_the_command_writes_json_and_a_report_of_it(tmp_path, capsys):
    flags = "--models tiny --rounds 1 --edits 2 --seeds 0 --device cpu"
    cli.main(["bench", *flags.split(), "--output_dir", str(tmp_path)])
    results = json.loads((tmp_path / "decoding.json").read_text())
    report = (tmp_path / "decoding.md").read_text(encoding="utf-8")
    assert render(results) == report
    tiny = results["models"]["tiny"]
    assert list(tiny["edits"]) == [cases.REFERENCE, cases.EQUAL_ROWS, *cases.DECODERS]
    assert tiny["edits"][cases.SEQUENTIAL]["passes"] == 64
    assert tiny["edits"][cases.REFERENCE]["decode_ratio"] == tiny["equal_rows"][cases.EQUAL_ROWS]["decode_ratio"]
    assert cases.TRANSFORMERS in tiny["draw"] and list(tiny["batches"]) == ["1", "2"]
    assert all(row["passes"] <= row["draft_passes"] <= 64 for row in tiny["acceptance"])
    # What is timed is what is counted: the passes of the speed table are those of the edits in the table of shares.
    assert tiny["edits"][cases.ADAPTIVE]["passes"] == mean(row["passes"] for row in tiny["acceptance"])
    assert tiny["edits"][cases.DRAFT]["passes"] == mean(row["draft_passes"] for row in tiny["acceptance"])
    assert tiny["precisions"]["float32"]["tokens"] == 0 and 0 <= tiny["precisions"]["bfloat16"]["tokens"] < 0.5
    sizes = [row["bytes"] for row in tiny["precisions"].values()]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)
    assert str(tmp_path) not in json.dumps(results) and "--models tiny" in results["setup"]["command"]
    for name, row in tiny["edits"].items():
        equal = tiny["equal_rows"][name]["decode_ratio"][0]
        cells = (name, f"{row['passes']:.1f}", f"{row['decode']:.3f}", "", f"{equal:.2f} ×")
        pattern = r"\| {} \| {} \| {} \| {}[^|]*\| {}".format(*map(re.escape, cells))
        assert re.search(pattern, report)


def test_random_models_are_reported_with_their_share_their_growth_and_the_limit_of_a_pass():
    device = torch.device("cpu")
    case = random_case("mid", BenchArguments(rounds=1), device, lambda: None, grids=(2, 4))
    assert list(case["edits"])[:2] == [cases.REFERENCE, cases.SEQUENTIAL] and case["tokens"] == 16
    assert list(case["grids"]) == ["4", "16"]
    assert case["limit"]["seconds"] == case["limit"]["bytes"] / case["limit"]["bandwidth"]
    setup = {
        "machine": "a machine",
        "torch": "",
        "transformers": "",
        "dtype": "float32",
        "command": "thinkclearly bench",
    }
    report = render({"setup": setup, "targets": [], "models": {"mid": case}, "passes": []})
    assert "Random weights: the mask is scripted" in report and "a machine" in report
    for text in ("60% changed", "### Number of tokens", "GB of weights", "### Where the time goes"):
        assert text in report


def test_values_are_checked_before_any_work(capsys):
    for flag, value, message in (
        ("--models", "huge", "choose from tiny, mid, 1b, 7b"),
        ("--rounds", "0", "rounds=0; expected 1 or more"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["bench", flag, value])
        assert message in capsys.readouterr().err
