"""What a run of a benchmark keeps: measurements line by line, then results.json and results.md.

Knows files and when a measurement still holds. Knows nothing of what is measured, or how a table reads.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from thinkclearly.evaluation.benchmarks.report import report
from thinkclearly.files import strict, write_json, write_text

logger = logging.getLogger(__name__)

MEASURED_FILE, RESULTS_FILE, REPORT_FILE, SHARED_FOLDER = "measured.jsonl", "results.json", "results.md", "benchmarks"
Place = tuple[str, str]  # setting, key: where a measurement counts, and its name there


def measure_each(
    path: Path,
    header: dict,
    fingerprints: dict[Place, str],
    instrument: Callable[[], Callable[[Sequence[Place]], dict[Place, dict]]],
    batch_size: int,
) -> dict[Place, dict]:
    """Measures what is not yet measured, and keeps it line by line, so that the same call goes on where it stopped.

    Args:
        path: where the lines are kept, under a first one that is `header`.
        header: what all measurements depend on; under another one everything is measured anew.
        fingerprints: of what is to be seen at each place; where it is another one, the place is measured anew.
        instrument: makes the function that measures a batch; called only if there is something to measure. A place
            that the function leaves out is not kept.

    Returns:
        `dict`: place → what was measured, for all places that could be.
    """
    # A place that is not asked for this time, under a limit, is kept.
    lines = {
        place: line
        for place, line in _read(path, header).items()
        if line["fingerprint"] == fingerprints.get(place, line["fingerprint"])
    }
    write_text(path, "".join(json.dumps(line) + "\n" for line in [header, *lines.values()]))
    measured = {place: line["rows"] for place, line in lines.items()}
    todo = [place for place in fingerprints if place not in measured]
    measure = instrument() if todo else None
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(fingerprints), desc="measure", unit="item") as bar:
        bar.update(len(fingerprints) - len(todo))
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            for place, rows in measure(batch).items():
                measured[place] = rows
                line = {"setting": place[0], "key": place[1], "fingerprint": fingerprints[place], "rows": rows}
                file.write(json.dumps(line) + "\n")
            file.flush()
            bar.update(len(batch))
    return measured


def _read(path: Path, header: dict) -> dict[Place, dict]:
    """Lines that an earlier call wrote under the same header; one that was cut short is measured again."""
    found: dict[Place, dict] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        if not lines or json.loads(lines[0]) != json.loads(json.dumps(header)):
            return {}
        for line in map(json.loads, lines[1:]):
            found[line["setting"], line["key"]] = line
    except ValueError:
        logger.warning("%s ends in the middle of a line; going on from there", path)
    return found


def write_results(folder: Path, results: dict, shared: Path | None) -> dict:
    """Writes results.json and results.md.

    Args:
        results: `run` (its `benchmark`, `model`, …), `left_out`, `results` (setting → row → column → number) and, if
            there are any, `notes`.
        shared: the fine-tune's folder, whose card shall show the numbers; None where they are not its own results.

    Returns:
        `dict`: the content of results.json.
    """
    text = report(results)
    write_json(folder / RESULTS_FILE, results)
    write_text(folder / REPORT_FILE, text)
    logger.info("%s, %s\n\n%s", folder / RESULTS_FILE, folder / REPORT_FILE, text)
    if shared is not None:
        write_json(shared / SHARED_FOLDER / f"{results['run']['benchmark']}.json", results)
    return strict(results)
