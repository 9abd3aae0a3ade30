"""How far the gate's log-odds can be taken at their word, and the two numbers that mend them.

Log-odds and truth in, numbers out; `calibrate` first decodes held-out edits as inference does. Knows nothing of
training or files.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch
from scipy.optimize import minimize
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error

from thinkclearly.decoding.settings import PREFERENCES
from thinkclearly.editing.editor import Editor
from thinkclearly.editing.result import EditResult

logger = logging.getLogger(__name__)

MIN_AUC = 0.6  # below, a gate is little better than a coin, whose AUC is 0.5
MAX_LOG_TEMPERATURE = 4.0  # beyond, the fit calls every position the same, whatever the order of the log-odds
BINS = 15  # of equal width, for the calibration error and its curve


def fit_gate(log_odds: np.ndarray, clear: np.ndarray) -> tuple[float, float]:
    """Bias and temperature that make σ((log_odds + bias) / temperature) the probability of copying.

    Maximum likelihood with Platt's targets (N₊ + 1)/(N₊ + 2) and 1/(N₋ + 2) (Platt 1999), which stay finite where
    the classes can be told apart without an error.

    Args:
        log_odds: float (M,), of the gate as it is.
        clear: bool (M,), whether an instruction is true: CLEAR, or another where the model has others.

    Raises:
        ValueError: all true or all false, or an AUC below `MIN_AUC`. The likeliest bias and temperature of log-odds
            that tell nothing make them all the base rate's: the model would copy everything, or nothing.
    """
    positives, negatives = int(clear.sum()), int((~clear).sum())
    if not positives or not negatives:
        raise ValueError(
            f"{positives} CLEAR and {negatives} other positions; calibration needs both. Hold more edits out."
        )
    targets = np.where(clear, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def loss(parameters: np.ndarray) -> float:
        scaled = (log_odds + parameters[0]) * np.exp(-parameters[1])
        return float(np.mean(np.logaddexp(0, scaled) - targets * scaled))

    bias, log_temperature = minimize(loss, np.zeros(2), method="Nelder-Mead").x
    auc = gate_metrics(log_odds, clear)["auc"]
    if auc < MIN_AUC or log_temperature > MAX_LOG_TEMPERATURE:
        raise ValueError(
            f"The gate hardly tells what is unchanged: AUC {auc:.2f} (chance is 0.5, calibration needs {MIN_AUC}). "
            "Train longer, or look at the labels with `thinkclearly prepare`."
        )
    return float(bias), float(np.exp(log_temperature))


def gate_metrics(log_odds: np.ndarray, clear: np.ndarray) -> dict[str, float | None]:
    """`auc` of the ROC curve and `ece`, the expected calibration error over `BINS` bins (Guo et al. 2017).

    Args:
        log_odds: float (M,), calibrated or not.
        clear: bool (M,).

    Returns:
        `auc` is None where all positions are of one kind, both are where there are none.
    """
    if not len(log_odds):
        return {"auc": None, "ece": None}
    probabilities, truth = torch.from_numpy(log_odds).double().sigmoid(), torch.from_numpy(clear).long()
    auc = None
    if 0 < truth.sum() < len(truth):  # the order is that of the log-odds: large ones are all 1.0 after the sigmoid
        ranks = np.unique(log_odds, return_inverse=True)[1] / max(1, len(log_odds) - 1)
        auc = float(binary_auroc(torch.from_numpy(ranks), truth))
    return {"auc": auc, "ece": float(binary_calibration_error(probabilities, truth, n_bins=BINS, norm="l1"))}


def calibrated_log_odds(result: EditResult) -> np.ndarray:
    """Of an edit, whatever operating point it used: float64 (N,); NaN without a head and in joint guidance."""
    settings = result.settings
    if settings["guidance"] == "joint":
        return np.full(len(result.gate), np.nan)
    return result.gate.numpy().astype(np.float64) + PREFERENCES[settings["prefer"]] - settings["clear_bias"]


def calibrate(editor: Editor, rows: Iterable[dict], batch_size: int = 16) -> dict[str, float]:
    """Fits the gate of the editor's model to held-out edits, decoded freely with the editor's settings.

    Args:
        editor: its model's configuration is changed in place, unless there is nothing to fit.
        rows: prepared records with their source pictures: `instruction`, `source`, `output_tokens` (N classes).

    Returns:
        `gate_bias`, `gate_temperature`, and `gate_metrics` as they were before and would be after (same decoding).

    Raises:
        ValueError: see `fit_gate`; the gate stays as it is.
    """
    config, rows = editor.model.clear_config, list(rows)
    as_it_is = config.gate_bias, config.gate_temperature
    config.gate_bias, config.gate_temperature = 0.0, 1.0
    try:
        log_odds, clear = _decode(editor, rows, batch_size)
        fitted = fit_gate(log_odds, clear)
    except BaseException:
        config.gate_bias, config.gate_temperature = as_it_is
        raise
    config.gate_bias, config.gate_temperature = fitted
    before = gate_metrics(log_odds, clear)
    after = gate_metrics((log_odds + config.gate_bias) / config.gate_temperature, clear)
    logger.info(
        "Gate calibrated on %d edits: bias %+.2f, temperature %.2f; expected calibration error %.3f -> %.3f",
        *(len(rows), config.gate_bias, config.gate_temperature, before["ece"], after["ece"]),
    )
    found = {"gate_bias": config.gate_bias, "gate_temperature": config.gate_temperature, "gate_auc": before["auc"]}
    return found | {"gate_ece_before": before["ece"], "gate_ece_after": after["ece"]}


def _decode(editor: Editor, rows: list[dict], batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """The gate's log-odds (float64) and whether an instruction is true (bool), at all positions: (rows·N,)."""
    settings = replace(editor.settings, guidance="factorised", prefer="balanced", clear_bias=0.0)
    editor = Editor(editor.model, editor.processor, settings)
    gates, clears = [], []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        results = editor.edit_many([row["source"] for row in batch], [row["instruction"] for row in batch])
        gates += [result.gate.numpy() for result in results]
        labels = torch.tensor([row["output_tokens"] for row in batch])
        clears += [*editor.model.vocabulary.is_instruction(labels).numpy()]
    return np.concatenate(gates).astype(np.float64), np.concatenate(clears)
