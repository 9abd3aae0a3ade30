"""The benchmark's results, as `thinkclearly bench` stores them in JSON, in Markdown. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from thinkclearly.reporting.tables import markdown_table

NOTES = {
    "edits": (
        "Each edit alone, batch 1. *decode* is embedding the prompt, reading it and decoding; *whole edit* goes from "
        "picture to composite. Speed is against the reference loop in the same round: median, and least to most over "
        "the rounds. The reference decodes three guidance rows, as the originals do."
    ),
    "equal_rows": (
        "This model's settings give one of the three guidance rows weight 0, and ours does not decode it. The second "
        "row is the reference without it: it would choose the same tokens. *Equal rows* is the speed against that."
    ),
    "scripted": (
        "Random weights: the mask is scripted (one blob), the cost of a pass is real. Sampled at temperature 1 with "
        "guidance 5 and 5. How far edited codes can be guessed ahead is a property of trained weights; here it is set "
        "by a factor on the logits, under which the same model draws in the passes of the next table. One by one and "
        "long blocks are at 15 % changed."
    ),
    "precisions": (
        "The same edits, adaptive block. Changed against float32, free running: after the first other token the rest "
        "of an edit may differ as well. 8 and 4 bits are bitsandbytes', the adapter beside the weights; in float32 it "
        "is merged into them."
    ),
    "draw": "Tokens only, one picture at a time, two guidance rows everywhere.",
}


def render(results: Mapping) -> str:
    """The whole report; sections that were not run are left out."""
    setup = results["setup"]
    blocks = [
        "# Decoding, measured",
        f"{setup['machine']}; torch {setup['torch']}, transformers {setup['transformers']}, {setup['dtype']}; "
        f"written by `{setup['command']}`. How to read it: docs/performance.md.",
    ]
    if results["targets"]:
        rows = [[t["what"], t["target"], t["found"], "yes" if t["met"] else "no"] for t in results["targets"]]
        blocks += ["## Targets", markdown_table(["", "target", "found", "met"], rows)]
    for case in results["models"].values():
        scripted = case["scripted"]
        blocks += [f"## {case['title']}", "### Edits", NOTES["edits"]]
        blocks += [NOTES["scripted"]] if scripted else []
        equal = case.get("equal_rows")
        blocks += [NOTES["equal_rows"]] if equal else []
        blocks.append(_speed(case["edits"], ("decode", "seconds"), equal))
        blocks += ["### Text-to-image", NOTES["draw"], _speed(case["draw"], ("decode",))]
        if "limit" in case:
            limit = case["limit"]
            blocks.append(
                f"One pass reads {limit['bytes'] / 1e9:.3f} GB of weights; at the {limit['bandwidth'] / 1e9:.0f} GB/s "
                f"of a copy that takes {1000 * limit['seconds']:.2f} ms. Ours one by one took "
                f"{1000 * limit['pass']:.2f} ms a pass, {limit['pass'] / limit['seconds']:.1f} times that."
            )
        if "acceptance" in case:
            blocks += ["### What its own gate gives", _acceptance(case["acceptance"], case["tokens"])]
        if "batches" in case:
            blocks += ["### Batches", _batches(case["batches"])]
        if "precisions" in case:
            blocks += ["### Types of the weights", NOTES["precisions"], _precisions(case["precisions"])]
        if "grids" in case:
            blocks += ["### Number of tokens", "15 % changed.", _grids(case["grids"])]
        if "profile" in case:
            blocks += ["### Where the time goes", *_profile(case["profile"])]
    if results["passes"]:
        blocks += ["## Passes by how far codes can be guessed", *_passes(results["passes"])]
    return "\n\n".join(blocks) + "\n"


def _times(ratio: Sequence[float]) -> str:
    middle, least, most = ratio
    return f"{middle:.2f} × ({least:.2f}–{most:.2f})"


def _speed(rows: Mapping, clocks: Sequence[str], equal: Mapping | None = None) -> str:
    """Seconds and speed of each row by each clock; `equal` holds the same rows with ratios to another one."""
    head, body = ["", "passes"], [[name, f"{row['passes']:.1f}"] for name, row in rows.items()]
    for clock in clocks:
        head += [f"{'whole edit' if clock == 'seconds' else clock}, s", "speed"] + ["equal rows"] * bool(equal)
        for (name, row), cells in zip(rows.items(), body):
            cells += [f"{row[clock]:.3f}", _times(row[f"{clock}_ratio"])]
            cells += [_times(equal[name][f"{clock}_ratio"])] if equal else []
    return markdown_table(head, body)


def _acceptance(rows: Sequence[Mapping], tokens: int) -> str:
    groups = [(0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 1.01)]
    body = []
    for low, high in [*groups, (0, 1.01)]:
        inside = [row for row in rows if low <= row["painted"] < high]
        if inside:
            label = "all" if (low, high) == (0, 1.01) else f"{low:.0%} to {min(high, 1):.0%}"
            shares = [f"{mean(row[key] for row in inside):.1%}" for key in ("painted", "changed")]
            passes = [f"{mean(row[key] for row in inside):.1f}" for key in ("draft_passes", "passes")]
            body.append([label, str(len(inside)), *shares, *passes, str(max(row["passes"] for row in inside))])
    head = ["painted by the gate", "edits", "painted", "tokens unlike the source's"]
    return markdown_table([*head, "passes, source draft alone", f"passes of {tokens}", "most"], body)


def _batches(rows: Mapping) -> str:
    body = []
    for size, row in rows.items():
        each = row["seconds"] / int(size)
        body.append([size, f"{row['passes']:.0f}", f"{row['seconds']:.3f}", f"{each:.3f}", f"{1 / each:.1f}"])
    return markdown_table(["pictures at once", "passes", "s", "s a picture", "pictures a second"], body)


def _precisions(rows: Mapping) -> str:
    body = []
    for name, row in rows.items():
        shares = [f"{row[key]:.2%}" for key in ("tokens", "decisions")]
        body.append([name, f"{row['bytes'] / 1e6:.1f}", *shares, f"{row['decode']:.3f}", _times(row["decode_ratio"])])
    head = ["", "MB of the language model", "tokens changed", "copy decisions changed", "decode, s", "speed"]
    return markdown_table(head, body)


def _grids(rows: Mapping) -> str:
    body = []
    for tokens, case in rows.items():
        reference, *_, ours = case.values()
        body.append(
            [tokens, f"{reference['decode']:.3f}", f"{ours['decode']:.3f}", f"{ours['passes']:.0f}"]
            + [_times(ours["decode_ratio"])]
        )
    return markdown_table(["tokens", "reference loop, decode, s", "ours, decode, s", "passes", "speed"], body)


def _profile(found: Mapping) -> list[str]:
    stages, total = found["stages"], sum(found["stages"].values())
    text = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in stages.items())
    text = (
        f"One edit, {found['passes']} passes: {text}. Within decoding, the first pass, which reads the prompt, and "
        f"what comes before it took {1000 * found['first_pass']:.0f} ms, each other pass "
        f"{1000 * found['each_other_pass']:.1f} ms. "
        "Operators by their own time in the whole edit:"
    )
    rows = [[f"`{name}`", str(count), f"{share:.1%}"] for name, count, share in found["operators"]]
    return [text, markdown_table(["operator", "calls", "share"], rows)]


def _passes(entries: Sequence[Mapping]) -> list[str]:
    text = (
        "24×24 positions, random weights, one blob, temperature 1, guidance 5 and 5, batch 1, float32 on the CPU: "
        "mean (least–most) over masks. Each row is a level at which codes can be guessed, and a block; *draws all* is "
        "what text-to-image takes by the same model and block. Plain Jacobi decoding with long blocks (SJD) is "
        "reported to take 318 of 576 passes for text-to-image on Janus-Pro-7B (SCD, arXiv 2510.24211): the level that "
        "draws in about as many by long blocks is the one to compare with. Random weights look back less far than "
        "trained ones, which helps long blocks."
    )
    body = []
    for entry in entries:
        cells = [f"{mean(p):.1f} ({min(p)}–{max(p)})" for p in entry["shares"].values()]
        body.append([f"{entry['level']:g}", str(entry["block"] or "adaptive"), f"{entry['draw']:.0f}", *cells])
    heads = [f"{share} changed, masks: {len(p)}" for share, p in entries[0]["shares"].items()]
    return [text, markdown_table(["logits' deviation", "block", "draws all", *heads], body)]
