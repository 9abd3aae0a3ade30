"""What is timed: one edit or one drawn picture by each decoder, and how cost grows.

Every row of a table is a function without arguments that does the same work and returns a `Run`. Knows nothing of
files or of how a table is printed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean

import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from thinkclearly.bench.loops import reference_loop, transformers_generate
from thinkclearly.bench.measure import Run, now, weight_bytes
from thinkclearly.bench.scripted import SHARES, SMALL_TOWERS, ScriptedModel, changed_patches, random_model
from thinkclearly.decoding.engine import decode, guided_rows
from thinkclearly.decoding.settings import DecodeSettings
from thinkclearly.editing.composite import composite
from thinkclearly.editing.editor import Editor
from thinkclearly.images import Letterbox, load_image, to_image
from thinkclearly.sequence import FULL, NO_SOURCE, UNCOND, Row, drawing, named_rows

REFERENCE, TRANSFORMERS = "reference loop", "transformers' generate"
EQUAL_ROWS = "reference loop, without its row of weight 0"
SEQUENTIAL, DRAFT, ADAPTIVE = "ours, one by one", "ours, source draft alone", "ours, adaptive block"
LONG = 64
DECODERS = {
    SEQUENTIAL: {"block": 1},
    DRAFT: {"jacobi": False},
    f"ours, block {LONG}": {"block": LONG},
    ADAPTIVE: {},
}

# Width and depth matter to the clock alone: passes are counted on a model that is small enough for many seeds.
COUNTING = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
LEVELS = (0.5, 1.0, 4.0)  # standard deviations of the codes' logits, from predictable to not


def sampling(editor: Editor) -> dict:
    """The editor's own guidance and temperature, for the loops that it is compared with."""
    return {name: getattr(editor.settings, name) for name in ("cfg_weight", "cfg_weight2", "temperature")}


def reference_edit(editor: Editor, picture: Image.Image, instruction: str, names: list[str]) -> Run:
    """From picture to composite with the reference loop in the middle and our own functions around it.

    Args:
        names: the guidance rows that it decodes.
    """
    model, processor, device = editor.model, editor.processor, editor.model.device
    start = now(device)
    source = load_image(picture)
    box = Letterbox(*source.size, processor.image_size)
    with torch.inference_mode():
        pixels = processor.pixel_values([box.fit(source)]).to(device)
        source_tokens, features = model.token_model.encode(pixels), model.token_model.see(pixels)
        encoded = now(device)
        rows = processor.rows(named_rows([drawing(instruction, [0])], names)).to(device)
        embeds = model.token_model.embed_prompt(rows, features, source_tokens)
        n = processor.num_image_tokens
        ids, tokens = reference_loop(model, embeds, n, source_tokens=source_tokens[0], **sampling(editor))
        decoded = now(device)
        tokens = torch.tensor(tokens, device=device).unsqueeze(0)
        edited = box.unfit(to_image(model.token_model.decode(tokens)[0].cpu()))
    clear = model.vocabulary.is_instruction(torch.tensor(ids)).view(processor.grid, -1).numpy()
    composite(source, edited, clear, box, editor.settings.feather_radius_px, editor.settings.feather)
    return Run(now(device) - start, decoded - encoded, n)


def edit_rows(editor: Editor, edits: list[tuple[Image.Image, str]]) -> dict[str, Callable[[], Run]]:
    """The given edits, one after the other: by the reference loop, and by each of `DECODERS`.

    The reference decodes three guidance rows, as the originals do, also where the no_source row's weight is 0. There
    it comes a second time with the two rows that ours decodes.
    """

    def ours(settings: dict) -> Run:
        start = now(editor.model.device)
        results = [editor.edit(picture, words, **settings) for picture, words in edits]
        seconds = now(editor.model.device) - start
        return Run(seconds, sum(r.seconds["decode"] for r in results), mean(r.passes for r in results))

    def reference(*names: str) -> Run:
        runs = [reference_edit(editor, picture, words, list(names)) for picture, words in edits]
        return Run(sum(r.seconds for r in runs), sum(r.decode for r in runs), mean(r.passes for r in runs))

    rows = {REFERENCE: partial(reference, FULL, NO_SOURCE, UNCOND)}
    if not editor.settings.cfg_weight2:
        rows[EQUAL_ROWS] = partial(reference, FULL, UNCOND)
    return rows | {name: partial(ours, settings) for name, settings in DECODERS.items()}


def script_edit(editor: Editor, instruction: str, share: float) -> None:
    """Has a model of random weights change `share` of the patches, whatever picture comes with the instruction."""
    start = editor.processor.rows([Row(drawing(instruction, [0]))]).input_ids.shape[1] - 1
    editor.model.script(changed_patches(share, editor.processor.grid), start)


def scripted_rows(editor: Editor, edit: tuple[Image.Image, str], shares=SHARES) -> dict[str, Callable[[], Run]]:
    """One edit by a model of random weights: as `edit_rows`, the adaptive block for each share of changed patches."""
    rows = edit_rows(editor, [edit])

    def scripted(row, share: float) -> Callable[[], Run]:
        def run() -> Run:
            script_edit(editor, edit[1], share)
            return row()

        return run

    fixed = {name: scripted(row, 0.15) for name, row in rows.items() if name != ADAPTIVE}
    return fixed | {f"{ADAPTIVE}, {share:.0%} changed": scripted(rows[ADAPTIVE], share) for share in shares}


def draw_rows(editor: Editor, prompts: list[str]) -> dict[str, Callable[[], Run]]:
    """Text-to-image, tokens only: by the reference loop, transformers, and each of `DECODERS` that needs no source."""
    model, processor, n = editor.model, editor.processor, editor.processor.num_image_tokens
    if isinstance(model, ScriptedModel):
        model.script(torch.ones(1, dtype=torch.bool), 0)  # everything is painted
    weights = {name: value for name, value in sampling(editor).items() if name != "cfg_weight2"}

    def rows_of(prompt: str):
        rows = processor.rows(named_rows([drawing(prompt)], (FULL, UNCOND))).to(model.device)
        with torch.inference_mode():
            return rows.attention_mask, model.token_model.embed_prompt(rows)

    def timed(draw: Callable[[str], int]) -> Callable[[], Run]:
        def run() -> Run:
            start = now(model.device)
            passes = mean(draw(prompt) for prompt in prompts)
            seconds = now(model.device) - start
            return Run(seconds, seconds, passes)

        return run

    def ours(options: dict):
        settings = DecodeSettings(**options, **weights)

        def draw(prompt: str) -> int:
            mask, embeds = rows_of(prompt)
            rows = {FULL: settings.cfg_weight, UNCOND: 1 - settings.cfg_weight}
            return decode(model, embeds, mask, n, settings, rows=rows, samples=[(0, 0)]).passes

        return timed(draw)

    return {
        REFERENCE: timed(lambda prompt: len(reference_loop(model, rows_of(prompt)[1], n, **weights)[0])),
        TRANSFORMERS: timed(lambda prompt: len(transformers_generate(model.base, processor, prompt, **weights))),
    } | {name: ours(options) for name, options in DECODERS.items() if name != DRAFT}


def batch_rows(editor: Editor, edits: list[tuple[Image.Image, str]], sizes) -> dict[str, Callable[[], Run]]:
    """Ours for batches of the first `size` edits; seconds are of the whole batch."""

    def run(size: int) -> Run:
        start = now(editor.model.device)
        pictures, words = zip(*edits[:size])
        results = editor.edit_many(list(pictures), list(words))
        return Run(now(editor.model.device) - start, results[0].seconds["decode"], results[0].passes)

    return {str(size): lambda size=size: run(size) for size in sizes}


def acceptance(editor: Editor, edits: list[tuple[Image.Image, str]]) -> list[dict]:
    """What the model's own gate gives: per edit the shares that changed, and passes by each decoder."""
    rows = []
    for picture, words in edits:
        result, draft = (editor.edit(picture, words, **DECODERS[name]) for name in (ADAPTIVE, DRAFT))
        rows.append(
            {
                "painted": 1 - float(editor.model.vocabulary.is_instruction(result.class_ids).float().mean()),
                "changed": float((result.fed_codes != result.source_tokens).float().mean()),
                "draft_passes": draft.passes,
                "passes": result.passes,
            }
        )
    return rows


def precisions(editors: dict[str, Editor], edits: list[tuple[Image.Image, str]]) -> dict[str, dict]:
    """What other weights of a model change against the first one's: shares of tokens and of copy decisions."""
    found, first = {}, None
    for name, editor in editors.items():
        results = [editor.edit(*edit) for edit in edits]
        tokens = torch.stack([result.fed_codes for result in results])
        copied = torch.stack([editor.model.vocabulary.is_instruction(result.class_ids) for result in results])
        first = first or (tokens, copied)
        changed = [float((mine != theirs).float().mean()) for mine, theirs in zip((tokens, copied), first)]
        size = weight_bytes(editor.model.token_model.language_model)
        found[name] = dict(zip(("tokens", "decisions"), changed)) | {"bytes": size}
    return found


def count_passes(seeds: int, tick: Callable[[], None], grid: int = 24, levels=LEVELS, blocks=(0, LONG)) -> list[dict]:
    """Passes by a scripted mask of one blob, for each level of predictability, block and share, over many seeds.

    Each entry also has what the same model takes to draw all positions, by which a level can be placed.
    """
    model, _ = random_model(COUNTING, grid=grid, codes=1024, towers=SMALL_TOWERS)
    generator, n, start = torch.Generator().manual_seed(0), grid**2, 7
    embeds = torch.randn(3, start + 1, model.token_model.hidden_size, generator=generator)
    mask = torch.ones(embeds.shape[:2], dtype=torch.long)
    entries = []
    for level in levels:
        model.scale = level
        for block in blocks:
            settings = DecodeSettings(block=block)
            rows, fewer = (guided_rows(settings, has_source) for has_source in (True, False))
            model.script(torch.ones(1, dtype=torch.bool), 0)
            drawn = [
                decode(model, embeds[::2], mask[::2], n, settings, rows=fewer, samples=[(seed, 0)]).passes
                for seed in range(min(seeds, 3))
            ]
            entry = {"level": level, "block": block, "draw": mean(drawn), "shares": {}}
            for share in SHARES:
                passes = []
                for seed in range(seeds if share <= 0.15 else -(-seeds // 5)):
                    model.script(changed_patches(share, grid, seed=seed), start)
                    source = torch.randint(0, 1024, (1, n), generator=generator)
                    sources = {"source_tokens": source, "transformed": source.unsqueeze(1)}
                    decoded = decode(model, embeds, mask, n, settings, rows=rows, samples=[(seed, 0)], **sources)
                    passes.append(decoded.passes)
                entry["shares"][f"{share:.0%}"] = passes
                tick()
            entries.append(entry)
    return entries


def where_time_goes(editor: Editor, edit: tuple[Image.Image, str], top: int = 8) -> dict:
    """Stages of one edit, its first pass against the others, and the operators that take most of it."""
    device, laps = editor.model.device, []
    editor.edit(*edit)  # warm
    start = now(device)
    result = editor.edit(*edit, progress=lambda done, total: laps.append(now(device) - start))
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiler:
        editor.edit(*edit)
    cost = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    table = sorted(profiler.key_averages(), key=lambda entry: -getattr(entry, cost))
    total = sum(getattr(entry, cost) for entry in table)
    return {
        "stages": result.seconds,
        "passes": result.passes,
        "first_pass": laps[0] - result.seconds["encode"],
        "each_other_pass": (laps[-1] - laps[0]) / max(len(laps) - 1, 1),
        "operators": [[entry.key, entry.count, getattr(entry, cost) / total] for entry in table[:top]],
    }
