"""Prompts: the one place that turns text into token ids, slots and guidance rows, for training and for inference.

String layout of Janus-Pro and Janus-4o (ShareGPT-4o-Image: its demo and train_janus.py). The tokenizer is called on
finished strings: the native processor would expand the image placeholder a second time. Knows nothing of weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from huggingface_hub.utils import EntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from thinkclearly.images import to_pixel_values
from thinkclearly.models.config_files import read_config

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PAD, IMAGE = "<｜▁pad▁｜>", "<image_placeholder>"
BOI, EOI = "<begin_of_image>", "<end_of_image>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
SPECIAL_TOKENS = (BOS, EOS, PAD, IMAGE, BOI, EOI, USER, ASSISTANT)
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

# What a row is told. FULL: picture, source codes and text. PART: no source codes. UNCOND: nothing but BOS and BOI.
FULL, PART, UNCOND = 0, 1, 2
_NAMES = ("image_size", "size", "image_mean", "image_std", "num_image_tokens")  # what is read of the processor files


@dataclass
class PromptBatch:
    """Left-padded prompts, ready to be embedded.

    Attributes:
        input_ids: long (B, L).
        attention_mask: long (B, L), 0 on the left padding. PAD ids inside a row (dropped conditions) are attended.
        image_slot: long (B,), where the N picture features go; -1 where the row shows none.
        source_slot: long (B,), where the N source codes go; -1 where the row shows none.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    image_slot: torch.Tensor
    source_slot: torch.Tensor

    def to(self, device) -> PromptBatch:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


class ClearEditProcessor:
    """Pictures to pixel values and text to prompts, exactly as DeepSeek's processor and the Janus-4o demo do.

    Args:
        tokenizer: holds the special tokens of `SPECIAL_TOKENS`; ids are always looked up by string.
        image_size (`int`): side of the model's square pictures, pixels.
        num_image_tokens (`int`): N, tokens of one picture.
        image_mean, image_std (three `float`): normalisation of the channels after scaling to [0, 1].
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        num_image_tokens: int,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
    ):
        self.tokenizer = tokenizer
        self.image_size, self.num_image_tokens = image_size, num_image_tokens
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if missing:
            raise ValueError(
                f"The tokenizer lacks {missing}. Expected the tokenizer of a Janus-Pro checkpoint or a derivative; "
                "copy its tokenizer files beside the weights."
            )
        self.bos_id, self.eos_id, self.pad_id = vocabulary[BOS], vocabulary[EOS], vocabulary[PAD]
        self.image_id, self.boi_id, self.eoi_id = vocabulary[IMAGE], vocabulary[BOI], vocabulary[EOI]

    @property
    def grid(self) -> int:
        """Patches along one side; N = grid²."""
        return round(self.num_image_tokens**0.5)

    @classmethod
    def from_pretrained(cls, name_or_path: str, revision: str | None = None, token: str | None = None):
        """Reads tokenizer, `preprocessor_config.json` and `processor_config.json` of a folder or Hub repository."""
        hub = {"revision": revision, "token": token}
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **hub)
        pictures = _read_json(name_or_path, "preprocessor_config.json", hub)
        prompts = _read_json(name_or_path, "processor_config.json", hub)
        size = pictures.get("image_size") or (pictures.get("size") or {}).get("height")
        tokens = prompts.get("num_image_tokens", 576)
        norm = {name: pictures[name] for name in ("image_mean", "image_std") if name in pictures}
        return cls(tokenizer, size, tokens, **norm)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the same files in DeepSeek's layout, so that the original's code can read them too."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        pictures = {
            "image_processor_type": "VLMImageProcessor",
            "processor_class": "VLChatProcessor",
            "image_size": self.image_size,
            "min_size": 14,
            "do_normalize": True,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
            "rescale_factor": 1 / 255,
            "background_color": [127] * 3,
        }
        prompts = {
            "processor_class": "VLChatProcessor",
            "image_tag": IMAGE,
            "num_image_tokens": self.num_image_tokens,
            "add_special_token": False,
            "mask_prompt": True,
            "ignore_id": -100,
            "sft_format": "deepseek",
        }
        for name, content in (("preprocessor_config.json", pictures), ("processor_config.json", prompts)):
            (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    def pixel_values(self, squares) -> torch.Tensor:
        """Square PIL pictures of the model's size to float32 (B, 3, S, S)."""
        return to_pixel_values(squares, mean=self.image_mean, std=self.image_std)

    def edit_ids(self, instruction: str) -> list[int]:
        """Ids of picture slot, source slot, instruction and the BOI after which the output begins."""
        n = self.num_image_tokens
        picture = f"{BOI}{IMAGE * n}{EOI}{BOI}{PAD * n}{EOI}"
        return self._tokenize(f"{USER}: {picture}{instruction.strip()}\n\n{ASSISTANT}:{BOI}")

    def edit_rows(self, instructions: list[str], conditions: list[int]) -> PromptBatch:
        """One row per (instruction, condition); conditions are FULL, PART or UNCOND."""
        rows, image_slot, source_slot = [], [], []
        for instruction, condition in zip(instructions, conditions, strict=True):
            ids = self.edit_ids(instruction)
            start = ids.index(self.boi_id) + 1
            rows.append(self._dropped(ids) if condition == UNCOND else ids)
            image_slot.append(-1 if condition == UNCOND else start)
            source_slot.append(start + self.num_image_tokens + 2 if condition == FULL else -1)
        return self._batch(rows, image_slot, source_slot)

    def generate_rows(self, prompts: list[str], conditions: list[int]) -> PromptBatch:
        """Text-to-image rows; conditions are FULL or UNCOND."""
        rows = []
        for prompt, condition in zip(prompts, conditions, strict=True):
            ids = self._tokenize(f"{USER}: {prompt.strip()}\n\n{ASSISTANT}:{BOI}")
            rows.append(self._dropped(ids) if condition == UNCOND else ids)
        return self._batch(rows, [-1] * len(rows), [-1] * len(rows))

    def describe_rows(self, questions: list[str]) -> PromptBatch:
        """Question-answering rows: system sentence, picture slot (BOI and EOI around it), question."""
        picture = f"{BOI}{IMAGE * self.num_image_tokens}{EOI}"
        rows = [self._tokenize(f"{SYSTEM}\n\n{USER}: {picture}\n{q.strip()}\n\n{ASSISTANT}:") for q in questions]
        return self._batch(rows, [ids.index(self.boi_id) + 1 for ids in rows], [-1] * len(rows))

    def _tokenize(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        # Some releases of transformers drop the BOS that the checkpoint's tokenizer_config asks for.
        return ids if ids[0] == self.bos_id else [self.bos_id, *ids]

    def _dropped(self, ids: list[int]) -> list[int]:
        """Everything between BOS and the last BOI replaced by PAD."""
        return [ids[0], *[self.pad_id] * (len(ids) - 2), ids[-1]]

    def _batch(self, rows: list[list[int]], image_slot: list[int], source_slot: list[int]) -> PromptBatch:
        length = max(map(len, rows))
        pads = [length - len(row) for row in rows]
        shift = lambda slots: torch.tensor([s + p if s >= 0 else -1 for s, p in zip(slots, pads)])  # noqa: E731
        return PromptBatch(
            torch.tensor([[self.pad_id] * pad + row for pad, row in zip(pads, rows)]),
            torch.tensor([[0] * pad + [1] * len(row) for pad, row in zip(pads, rows)]),
            shift(image_slot),
            shift(source_slot),
        )


def _read_json(name_or_path: str, name: str, hub: dict) -> dict:
    try:
        path = cached_file(name_or_path, name, **hub)
    except (OSError, EntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name_or_path} has no {name}. Janus-Pro checkpoints and their derivatives carry one; copy it from the "
            "base model (fine-tunes sometimes leave it out)."
        ) from error
    return read_config(path, _NAMES)
