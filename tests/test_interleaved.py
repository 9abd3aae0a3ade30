"""Words and pictures in one stream: token for token the original's, and the same thought whatever stands beside it."""

import json

import pytest
import torch
from conftest import GOLDEN_ROOT
from safetensors.torch import load_file

from thinkclearly.decoding.interleaved import Context, Drew, Ended, Said, _Interleaver, context, interleave
from thinkclearly.decoding.sampling import warpers
from thinkclearly.decoding.thought_settings import ThoughtSettings
from thinkclearly.models.instruction_head import ClearConfig, InstructionModel
from thinkclearly.models.load import load_checkpoint
from thinkclearly.sequence import FULL, UNCOND

ROOT = GOLDEN_ROOT / "chameleon_tiny"
pytestmark = [pytest.mark.golden, pytest.mark.skipif(not ROOT.is_dir(), reason=f"{GOLDEN_ROOT} has no such set")]
GREEDY = {"temperature": 0.0, "picture_temperature": 0.0, "picture_top_k": 0}
MODES = {"image_critique": "critique", "object_thoughts": "subgoals", "general": "general"}
SCALES = ("full_scale", "pictures_scale", "negative_scale", "prompt_scale")
# The original's order of the rows of each kind.
ROWS = {
    "normal": (FULL, UNCOND, "pictures"),
    "obj": (FULL, UNCOND, "negative"),
    "full": (FULL, "pictures", UNCOND, "negative", "prompt"),
}
TOLERANCE = {"atol": 1e-4, "rtol": 0}


def expected_values() -> dict:
    return json.loads((ROOT / "expected.json").read_text(encoding="utf-8")) if ROOT.is_dir() else {}


@pytest.fixture(scope="module")
def values():
    return expected_values()


@pytest.fixture(scope="module")
def tensors():
    return load_file(ROOT / "expected.safetensors")


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint(str(ROOT / "checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return InstructionModel(checkpoint.network, ClearConfig(checkpoint.token_model.codebook_size, instructions=[]))


def settings_of(kind: str, scales, **options) -> ThoughtSettings:
    return ThoughtSettings(guidance_kind=kind, **dict(zip(SCALES, scales)), **GREEDY, **options)


def interleaver(model, checkpoint, start: Context, settings: ThoughtSettings) -> _Interleaver:
    return _Interleaver(model, checkpoint.processor, [start], settings, [(0, 0)], None)


def guided_cases() -> list[tuple[str, ...]]:
    """(context, kind, preset) of every guided picture of the set."""
    names = load_file(ROOT / "expected.safetensors") if ROOT.is_dir() else ()
    end = ".mixed_logits"
    return sorted(tuple(name.removesuffix(end).split(".")) for name in names if name.endswith(end))


def start_of(values, name: str) -> Context:
    found = values[f"context.{name}"]
    return Context(found["ids"], found["original_prompt_ids"])


@pytest.mark.parametrize("name, kind, preset", guided_cases())
def test_rows_logits_and_the_whole_picture_are_the_originals(model, checkpoint, values, tensors, name, kind, preset):
    case = f"{name}.{kind}.{preset}"
    scales = values["guidance_scales_full_image_negative_prompt"][preset]
    settings = settings_of(kind, scales, block=1, mode="general")
    stream = interleaver(model, checkpoint, start_of(values, name), settings)
    code_ids = torch.tensor(checkpoint.processor.code_ids)
    # 1. The rows, left-padded in the original.
    (thought,) = stream.thoughts
    ids, mask = tensors[f"{name}.{kind}.input_ids"], tensors[f"{name}.{kind}.attention_mask"].bool()
    for row, shown, one in zip(ROWS[kind], mask, ids):
        if row in thought.rows:
            assert thought.rows[row].ids == one[shown].tolist(), row
    # 2. The picture.
    (_, drawn), *_ = [part for part in stream.draw() if isinstance(part[1], Drew)]
    assert code_ids[drawn.codes].tolist() == tensors[f"{case}.image_ids"][: len(drawn.codes)].tolist()
    # 3. Logits of its first steps: unmasked by row, and mixed.
    wanted, mixed = tensors[f"{case}.row_logits"], tensors[f"{case}.mixed_logits"]
    steps, found = len(wanted), {}
    for row, shown, one in zip(ROWS[kind], mask, ids):
        fed = torch.cat([one[shown].long(), code_ids[drawn.codes[: steps - 1]]])[None]
        family = model.token_model
        hidden = family.language_model(inputs_embeds=family.embed_words(fed), use_cache=False).last_hidden_state
        found[row] = family.word_logits(hidden[0, -steps:])
    torch.testing.assert_close(torch.stack([found[row] for row in ROWS[kind]], 1), wanted, **TOLERANCE)
    guided = sum(weight * found[row] for row, weight in settings.weights(0).items())
    torch.testing.assert_close(guided, mixed, atol=3e-4, rtol=0)


@pytest.mark.parametrize("name", ["first", "later", "general"])
def test_words_are_chosen_from_the_originals_logits_by_its_rules(model, checkpoint, values, tensors, name):
    case = f"text.{name}"
    ids = tensors[f"{case}.input_ids"].flatten().tolist()
    settings = settings_of(
        "normal", (2.0, 1.2, 0.0, 5.0), mode="general", max_length=values[f"{case}.checks"]["max_length"]
    )
    stream = interleaver(model, checkpoint, Context(ids, []), settings)
    raw, masked = tensors[f"{case}.raw_logits"], tensors[f"{case}.masked_logits"]
    new = tensors[f"{case}.new_ids"].tolist()
    (thought,) = stream.thoughts
    for wanted, after, token in zip(raw, masked, new):
        hidden = stream._read([(thought, FULL)], up_to=0)
        logits = model.token_model.word_logits(hidden)[0]
        torch.testing.assert_close(logits, wanted, **TOLERANCE)
        lowest = torch.finfo(after.dtype).min
        allowed = ~stream._forbidden([thought])[0]
        assert torch.equal(allowed, after > lowest)
        stream._append(thought, [token])
    stream = interleaver(model, checkpoint, Context(ids, []), settings)
    list(stream.write())
    assert stream.thoughts[0].ids[len(ids) :] == new


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["first", "later"])
def test_words_and_codes_are_drawn_from_the_originals_distribution(
    model, checkpoint, values, tensors, name, temperature
):
    case = f"sampling.{name}"
    # 1. Words.
    settings = ThoughtSettings(mode="general", temperature=temperature, max_length=10_000)
    ids = tensors[f"text.{name}.input_ids"].flatten().tolist()
    stream = interleaver(model, checkpoint, Context(ids, []), settings)
    logits = model.token_model.word_logits(stream._read([(stream.thoughts[0], FULL)], up_to=0))
    logits = logits.masked_fill(stream._forbidden(stream.thoughts), torch.finfo(logits.dtype).min)
    wanted = tensors[f"{case}.text.temperature_{temperature}.probs"].flatten()
    torch.testing.assert_close(stream.filters(None, logits)[0].softmax(-1), wanted, **TOLERANCE)
    # 2. Codes.
    code_ids = torch.tensor(checkpoint.processor.code_ids)
    mixed = tensors[f"{name}.full.code.mixed_logits"][:1, code_ids]
    drawing = ThoughtSettings(picture_temperature=temperature).drawing()
    found = warpers(drawing.temperature, drawing.top_k, drawing.top_p)(None, mixed)[0].softmax(-1)
    wanted = tensors[f"{case}.image_full_code.temperature_{temperature}.probs"].flatten()
    torch.testing.assert_close(found, wanted[code_ids], **TOLERANCE)


def run_settings(values, run: dict) -> ThoughtSettings:
    kind = None if run["mode"] != "general" else run["cfg_type"]
    paper = "paper" in run["preset"]
    return ThoughtSettings(
        mode=MODES[run["mode"]],
        preset="paper" if paper else "code",
        guidance_kind=kind,
        max_length=run["max_length"],
        **GREEDY,
    )


def run_start(values, run: dict) -> Context:
    ids = run["prompt_ids"]
    told = run["original_prompt_ids"] if run["original_prompt_row"] != "BOI only" else []
    return Context(ids, told)


@pytest.mark.parametrize("block", [0, 1])
@pytest.mark.parametrize("name", expected_values().get("runs", {}))
def test_whole_runs_are_the_originals(model, checkpoint, values, name, block):
    run = values["runs"][name]
    settings = run_settings(values, run)
    settings.block = block
    parts = [part for _, part in interleave(model, checkpoint.processor, [run_start(values, run)], settings, [(0, 0)])]
    assert parts[-1].ids == run["response"]
    assert parts[-1].reason == {"max_images": "max_pictures"}.get(run["ended"], run["ended"])
    assert sum(isinstance(part, Drew) for part in parts) == run["num_images"]


def test_the_runs_contexts_are_those_that_we_build(checkpoint, values):
    for run in values["runs"].values():
        settings, pictures = run_settings(values, run), []
        if run.get("images"):
            index = {token: code for code, token in enumerate(checkpoint.processor.code_ids)}
            codes = [index[token] for token in run["prompt_ids"] if token in index]
            pictures = [codes]
        found = context(checkpoint.processor, run["prompt"], settings, pictures)
        assert found.ids == run["prompt_ids"]
        if run["mode"] == "image_critique":
            assert found.prompt_ids == run["original_prompt_ids"]


def test_the_repaired_preset_begins_as_training_does_and_tells_the_prompt_row_its_prompt(checkpoint):
    processor = checkpoint.processor
    code, repaired = (
        context(processor, "A cup.", ThoughtSettings(mode="subgoals", preset=p)) for p in ("code", "repaired")
    )
    assert repaired.ids == [processor.bos_id, *code.ids]
    assert code.prompt_ids == [] and repaired.prompt_ids == processor.encode_words("A cup.", bos=False)


@pytest.mark.parametrize("mode", ["critique", "subgoals", "general"])
def test_thoughts_beside_each_other_are_those_that_stand_alone(model, checkpoint, mode):
    settings = ThoughtSettings(mode=mode, max_length=300, max_pictures=2)
    prompts, keys = ["A red kite.", "Two hills at dusk, and a boat.", "A cup."], [(5, 0), (5, 1), (9, 0)]
    starts = [context(checkpoint.processor, prompt, settings) for prompt in prompts]

    def thoughts(numbers):
        found = {number: [] for number in numbers}
        chosen = [starts[i] for i in numbers], settings, [keys[i] for i in numbers]
        for k, part in interleave(model, checkpoint.processor, *chosen):
            found[numbers[k]].append(part if not isinstance(part, Drew) else part.codes)
        return found

    together = thoughts([0, 1, 2])
    assert together == {**thoughts([0]), **thoughts([2]), **thoughts([1])}
    assert together == thoughts([0, 1, 2]), "the same noise each time"
    assert together[0] != together[1]


def test_parts_are_the_stream(model, checkpoint):
    settings = ThoughtSettings(mode="subgoals", max_length=400, **GREEDY)
    processor, start = checkpoint.processor, context(checkpoint.processor, "A kite.", settings)
    ids, counts = list(start.ids), []
    for _, part in interleave(model, processor, [start], settings, [(0, 0)], on_step=counts.append):
        if isinstance(part, Said):
            ids += part.ids
        elif isinstance(part, Drew):
            ids += processor.picture_ids(part.codes)
        else:
            end = part
    assert isinstance(end, Ended) and end.ids == ids + [processor.eos_id] * (end.reason == "eos")
    assert counts == sorted(counts)
    assert counts[-1] == len(end.ids) - len(start.ids) - end.ids.count(processor.eoi_id), "EOI is no choice"


def test_nothing_is_read_twice(model, checkpoint):
    """The original reads the whole stream again for every phase."""
    alone = {"guidance_kind": "normal", "full_scale": 1.0, "pictures_scale": 0.0}
    settings = ThoughtSettings(mode="subgoals", max_length=400, block=1, **alone, **GREEDY)
    start, read = context(checkpoint.processor, "A kite.", settings), []
    language_model = model.token_model.language_model
    hook = language_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    try:
        *_, (_, end) = interleave(model, checkpoint.processor, [start], settings, [(0, 0)])
    finally:
        hook.remove()
    unread = 2 if end.reason == "max_pictures" else 1  # the last code and EOI, or EOS
    assert end.ids.count(checkpoint.processor.boi_id) > 1 and sum(read) == len(end.ids) - unread


def test_a_picture_is_begun_only_where_it_fits(model, checkpoint):
    n = checkpoint.processor.num_image_tokens
    for extra in range(0, n + 40, 7):
        settings = ThoughtSettings(mode="subgoals", max_length=60 + extra)
        start = context(checkpoint.processor, "A red kite above two hills.", settings)
        for _, part in interleave(model, checkpoint.processor, [start], settings, [(extra, 0)]):
            if isinstance(part, Drew):
                assert len(part.codes) == n
            if isinstance(part, Ended):
                assert len(part.ids) <= max(settings.max_length, len(start.ids))


def test_the_picture_before_as_draft_changes_no_code(model, checkpoint):
    """Without instruction tokens `second: edit` is a draft and nothing more."""
    found = {}
    for second in ("edit", "draw"):
        settings = ThoughtSettings(mode="critique", second=second, max_length=400)
        start = context(checkpoint.processor, "A red kite.", settings)
        found[second] = [p for _, p in interleave(model, checkpoint.processor, [start], settings, [(1, 0)])]
    codes = {second: [p.codes for p in parts if isinstance(p, Drew)] for second, parts in found.items()}
    assert codes["edit"] == codes["draw"] and len(codes["edit"]) > 1
    assert all(p.copied is None for parts in found.values() for p in parts if isinstance(p, Drew))


def test_where_clear_is_chosen_the_second_picture_is_the_first(checkpoint):
    model = InstructionModel(checkpoint.network, ClearConfig(checkpoint.token_model.codebook_size))
    generator = torch.Generator().manual_seed(3)
    torch.nn.init.normal_(model.clear_head.weight, std=0.5, generator=generator)
    settings = ThoughtSettings(mode="critique", max_pictures=2, max_length=600, temperature=0.9)
    start = context(checkpoint.processor, "A red kite.", settings)
    for seed in range(20):
        parts = [p for _, p in interleave(model, checkpoint.processor, [start], settings, [(seed, 0)])]
        first, *later = [p for p in parts if isinstance(p, Drew)]
        assert first.copied is None
        for second in later:
            same = [a == b for a, b in zip(first.codes, second.codes)]
            assert all(s for s, c in zip(same, second.copied) if c)
            if any(second.copied) and not all(second.copied):
                return
    pytest.fail("no second picture was copied in part")


def test_prompts_and_pictures_have_to_fit(checkpoint):
    general, critique = ThoughtSettings(mode="general"), ThoughtSettings(mode="critique")
    codes = [0] * checkpoint.processor.num_image_tokens
    for prompt, settings, pictures, message in (
        (" ", critique, [], "prompt is empty"),
        ("Draw <image>.", general, [], "1 marks <image> and comes with 0 pictures"),
        ("Draw it.", general, [codes], "0 marks <image> and comes with 1 pictures"),
        ("Draw <image>.", critique, [codes], "expected as many of one as of the other, in mode 'general'"),
    ):
        with pytest.raises(ValueError, match=message):
            context(checkpoint.processor, prompt, settings, pictures)
