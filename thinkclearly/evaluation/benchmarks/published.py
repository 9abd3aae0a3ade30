"""Numbers that others published on the field's benchmarks, each with its source; printed beside ours, never ours.

Values are in the units of each benchmark's columns. `None` is what the source does not give.
"""

from __future__ import annotations

SOURCES = {
    "MB": "MagicBrush, arXiv 2306.10012, Table 2",
    "NEP": "NEP, arXiv 2508.06044, Table 1",
    "NEP3": "NEP, arXiv 2508.06044, Table 3 (30,000 steps; an ablation)",
    "MB#27": "outside rerun of the MagicBrush checkpoint, github.com/OSU-NLP-Group/MagicBrush/issues/27",
    "MLN": "README of MLN, arXiv 2604.14591, which reruns all its rows",
    "ViMA": "README of ViMAEdit, arXiv 2410.10496",
    "EditAR": "EditAR, arXiv 2501.04699, as quoted by a paper note; not checked against the paper",
    "KV": "KV-Edit, arXiv 2502.17363, as quoted by hyper.ai; not checked against the paper",
    "FD": "README of github.com/wendell0218/FocusDiff; its public file has 550 pairs, it speaks of 924",
    "GE": "README of github.com/djghosh13/geneval",
    "JP": "Janus-Pro, arXiv 2501.17811, Table 4; its sampling settings are not published",
    "J#210": "outside rerun with Janus's own script at temperature 1, github.com/deepseek-ai/Janus/issues/210",
}
_GENEVAL = ("single_object", "two_object", "counting", "colors", "position", "color_attr", "overall")
_MAGICBRUSH = ("l1", "l2", "clip_i", "dino", "clip_t")
_PIE = ("structure", "psnr", "lpips", "mse", "ssim", "clip_whole", "clip_edited")
# model, arithmetic, geometric: the averages alone
_PAIRCOMP = [
    ("Janus-FocusDiff-7B", 85.0, 83.5),
    ("SD3-Medium", 84.4, 81.4),
    ("Sana-1.5", 83.2, 80.0),
    ("T2I-R1", 82.4, 79.3),
    ("Janus-Pro-R1", 82.0, 79.2),
    ("FLUX.1-dev", 80.3, 75.7),
    ("BLIP3-o", 79.3, 75.5),
    ("Infinity-8B", 77.0, 72.7),
    ("Janus-Pro-7B", 75.5, 70.4),
    ("Janus-FocusDiff-1B", 71.0, 68.1),
    ("Emu3", 68.5, 63.2),
    ("Janus-Pro-1B", 64.6, 59.2),
    ("Show-o", 63.6, 59.1),
    ("JanusFlow", 55.5, 49.0),
    ("LlamaGen", 49.1, 42.3),
]


def _rows(names: tuple[str, ...], rows: list[tuple]) -> list[tuple[str, str, dict]]:
    return [(method, source, dict(zip(names, values))) for method, source, *values in rows]


# benchmark → setting → (method, key of SOURCES, column → value)
PUBLISHED: dict[str, dict[str, list[tuple[str, str, dict[str, float | None]]]]] = {
    "magicbrush": {
        "single-turn": _rows(
            _MAGICBRUSH,
            [
                ("Text2LIVE (global description)", "MB", 0.0636, 0.0169, 0.9244, 0.8807, 0.2424),
                ("HIVE", "MB", 0.1092, 0.0341, 0.8519, 0.7500, 0.2752),
                ("HIVE tuned on MagicBrush", "MB", 0.0658, 0.0224, 0.9189, 0.8655, 0.2812),
                ("InstructPix2Pix", "MB", 0.1122, 0.0371, 0.8524, 0.7428, 0.2764),
                ("InstructPix2Pix tuned on MagicBrush", "MB", 0.0625, 0.0203, 0.9332, 0.8987, 0.2781),
                ("the same checkpoint, rerun", "MB#27", 0.0656, 0.0217, 0.9253, 0.8895, 0.2722),
                ("UltraEdit", "NEP", 0.0575, 0.0172, 0.9307, 0.8982),
                ("FireEdit", "NEP", 0.0701, 0.0238, 0.9131, 0.8619),
                ("AnySD", "NEP", 0.1114, 0.0439, 0.8676, 0.7680),
                ("EditAR (autoregressive)", "NEP", 0.1028, 0.0285, 0.8679, 0.8042),
                ("NEP (autoregressive, human mask given)", "NEP", 0.0547, 0.0163, 0.9350, 0.9044),
            ],
        ),
        "multi-turn": _rows(
            _MAGICBRUSH,
            [
                ("Text2LIVE (global description)", "MB", 0.0989, 0.0284, 0.8795, 0.7926, 0.2716),
                ("HIVE", "MB", 0.1521, 0.0557, 0.8004, 0.6463, 0.2673),
                ("HIVE tuned on MagicBrush", "MB", 0.0966, 0.0365, 0.8785, 0.7891, 0.2796),
                ("InstructPix2Pix", "MB", 0.1584, 0.0598, 0.7924, 0.6177, 0.2726),
                ("InstructPix2Pix tuned on MagicBrush", "MB", 0.0964, 0.0353, 0.8924, 0.8273, 0.2754),
                ("the same checkpoint, rerun", "MB#27", 0.0850, 0.0297, 0.8985, 0.8436, 0.2764),
                ("UltraEdit", "NEP", 0.0745, 0.0236, 0.9045, 0.8505),
                ("FireEdit", "NEP", 0.0911, 0.0326, 0.8819, 0.8010),
                ("AnySD", "NEP", 0.0748, 0.0273, 0.9152, 0.8623),
                ("EditAR (autoregressive)", "NEP", 0.1341, 0.0433, 0.8256, 0.7200),
                ("NEP, all tokens drawn anew", "NEP3", 0.0968, 0.0309, 0.8854, 0.8235),
                ("NEP (autoregressive, human mask given)", "NEP", 0.0707, 0.0269, 0.9107, 0.8493),
            ],
        ),
    },
    "pie-bench": {
        "background": _rows(
            _PIE,
            [
                ("EditAR (autoregressive, instruction)", "EditAR", 39.43, 21.32, 117.15, None, None, 24.87, 21.87),
                ("AREdit, own mask, 512 px", "MLN", 26.1, 23.46, 80.11, 80.34, 80.33, 25.57, 22.14),
                ("MLN, own mask, 512 px", "MLN", 12.5, 27.52, 41.07, 32.77, 86.01, 24.96, 21.55),
                ("AREdit, true mask given, 512 px", "MLN", 37.9, 26.00, 41.64, 36.80, 85.76, 25.44, 22.58),
                ("MLN, own mask, 1024 px", "MLN", 8.1, 28.48, 35.37, 23.39, 89.61, 25.03, 21.48),
                ("AREdit, true mask given, 1024 px", "MLN", 36.7, 29.55, 28.34, 16.36, 93.48, 25.38, 22.49),
                ("Prompt-to-Prompt", "ViMA", 11.64, 27.19, 54.44, 33.15, 84.71, 25.03, 22.13),
                ("ViMAEdit-XL", "ViMA", 12.06, 29.65, 48.75, 24.50, 92.30, 25.98, 22.89),
                ("KV-Edit (user's mask)", "KV", 1.98, 35.87, 9.92, None, None, 25.63, None),
            ],
        ),
    },
    "paircomp": {
        f"{kind} mean": [(row[0], "FD", {"Average": row[column]}) for row in _PAIRCOMP]
        for column, kind in enumerate(("arithmetic", "geometric"), start=1)
    },
    "geneval": {
        "images": _rows(
            _GENEVAL,
            [
                ("Stable Diffusion v1.5", "GE", 0.97, 0.38, 0.35, 0.76, 0.04, 0.06, 0.43),
                ("Stable Diffusion XL", "GE", 0.98, 0.74, 0.39, 0.85, 0.15, 0.23, 0.55),
                ("IF-XL", "GE", 0.97, 0.74, 0.66, 0.81, 0.13, 0.35, 0.61),
                ("SD3-Medium", "JP", 0.99, 0.94, 0.72, 0.89, 0.33, 0.60, 0.74),
                ("DALL-E 3", "JP", 0.96, 0.87, 0.47, 0.83, 0.43, 0.45, 0.67),
                ("Show-o", "JP", 0.95, 0.52, 0.49, 0.82, 0.11, 0.28, 0.53),
                ("TokenFlow-XL", "JP", 0.95, 0.60, 0.41, 0.81, 0.16, 0.24, 0.55),
                ("Janus", "JP", 0.97, 0.68, 0.30, 0.84, 0.46, 0.42, 0.61),
                ("Janus-Pro-1B", "JP", 0.98, 0.82, 0.51, 0.89, 0.65, 0.56, 0.73),
                ("the same, rerun", "J#210", None, 0.697, None, None, 0.4625),
                ("Janus-Pro-7B", "JP", 0.99, 0.89, 0.59, 0.90, 0.79, 0.66, 0.80),
            ],
        ),
    },
}
