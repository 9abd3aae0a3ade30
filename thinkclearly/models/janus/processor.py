"""Janus prompts: rows of segments to token ids and slots, for training and for inference, and pictures to pixels.

String layout of Janus-Pro and Janus-4o (ShareGPT-4o-Image's train_janus.py and demo/app_janus4o.py). The tokenizer is
called on finished strings: the native processor would expand the image placeholder a second time. Knows nothing of
weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.utils import EntryNotFoundError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from thinkclearly.images import to_pixel_values
from thinkclearly.models.config_files import read_config
from thinkclearly.models.prompt_rows import RowLayout, batch_rows
from thinkclearly.models.protocol import PromptBatch
from thinkclearly.sequence import Drawn, Known, Row, Sample, Seen, Words, conditions

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
PAD, IMAGE = "<｜▁pad▁｜>", "<image_placeholder>"
BOI, EOI = "<begin_of_image>", "<end_of_image>"
SPECIAL_TOKENS = (BOS, EOS, PAD, IMAGE, BOI, EOI)
# How DeepSeek's conversation templates call user and model, by their names: tokens, or plain words.
ROLES = {"deepseek": ("<|User|>", "<|Assistant|>"), "deepseek_old": ("User", "Assistant")}
SYSTEM = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)

_NAMES = (
    "image_size",
    "size",
    "image_mean",
    "image_std",
    "num_image_tokens",
    "sft_format",
)  # what is read of the processor files


class JanusProcessor:
    """Pictures to pixel values and text to prompts, exactly as DeepSeek's processor and the Janus-4o demo do.

    Args:
        tokenizer: holds the special tokens of `SPECIAL_TOKENS`; ids are always looked up by string. One without a
            pad token, as of the first Janus-1.3B, gets `PAD`.
        image_size (`int`): side of the model's square pictures, pixels.
        num_image_tokens (`int`): N, tokens of one picture.
        image_mean, image_std (three `float`): normalisation of the channels after scaling to [0, 1].
        sft_format (`str`): DeepSeek's name of the conversation template, a key of `ROLES`.

    Raises:
        ValueError: another template, or the tokenizer lacks a token that is needed.
    """

    sees_codes = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_size: int,
        num_image_tokens: int,
        image_mean: Sequence[float] = (0.5, 0.5, 0.5),
        image_std: Sequence[float] = (0.5, 0.5, 0.5),
        sft_format: str = "deepseek",
    ):
        if not isinstance(sft_format, str) or sft_format not in ROLES:
            raise ValueError(
                f"processor_config.json has sft_format {sft_format!r:.60}; expected {' or '.join(map(repr, ROLES))}. "
                "The model was trained on another conversation template, which is not known here."
            )
        self.sft_format = sft_format
        self.user, self.assistant = ROLES[sft_format]
        self.tokenizer = tokenizer
        self.image_size, self.num_image_tokens = image_size, num_image_tokens
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        vocabulary = tokenizer.get_vocab()
        roles = ROLES["deepseek"] if sft_format == "deepseek" else ()
        if missing := [token for token in (*SPECIAL_TOKENS, *roles) if token not in vocabulary]:
            advice = "Copy the tokenizer files of the base model beside the weights."
            if set(missing) <= set(roles):
                advice = "If its prompts say 'User: …', set sft_format to 'deepseek_old' in processor_config.json."
            raise ValueError(
                f"The tokenizer lacks {missing}; expected the tokenizer of a Janus or Janus-Pro checkpoint or a "
                f"derivative, with sft_format {sft_format!r}. {advice}"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = PAD
        self.bos_id, self.eos_id, self.pad_id = vocabulary[BOS], vocabulary[EOS], vocabulary[PAD]
        self.image_id, self.boi_id, self.eoi_id = vocabulary[IMAGE], vocabulary[BOI], vocabulary[EOI]
        self.unsaid_ids: list[int] = []  # codes of pictures have a vocabulary of their own

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
        return cls(tokenizer, size, tokens, **norm, sft_format=prompts.get("sft_format", "deepseek"))

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
            "sft_format": self.sft_format,
        }
        for name, content in (("preprocessor_config.json", pictures), ("processor_config.json", prompts)):
            (directory / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    def pixel_values(self, squares) -> torch.Tensor:
        """Square PIL pictures of the model's size to float32 (B, 3, S, S)."""
        return to_pixel_values(squares, mean=self.image_mean, std=self.image_std)

    def rows(self, rows: Sequence[Row], outputs: bool = False) -> PromptBatch:
        """Token ids and slots of rows, left-padded to one length.

        Args:
            outputs: also room for what is to be predicted, for teacher forcing: N - 1 codes after the last BOI. An
                answer in words belongs to its sample and is always there.
        """
        return batch_rows(list(map(self._layout, rows)), self.pad_id, self.num_image_tokens - 1 if outputs else 0)

    def answer_ids(self, answer: str) -> list[int]:
        """What follows the prompt of a question: the words and the end of the turn."""
        ids = self.tokenizer.encode(f" {answer.strip()}{EOS}", add_special_tokens=False)
        return ids[1:] if ids[0] == self.bos_id else ids

    def _layout(self, row: Row) -> RowLayout:
        ids = self._tokenize(self._text(row.sample))
        begins = iter(i for i, token in enumerate(ids) if token == self.boi_id)
        seen, known = {}, {}
        for i, segment in enumerate(row.sample):
            if isinstance(segment, (Seen, Known)):
                slots = seen if isinstance(segment, Seen) else known
                start = next(begins) + 1
                slots[segment.picture] = -1 if i in row.withheld else start
        pictures = list(dict.fromkeys([*seen, *known]))
        draws = any(isinstance(segment, Drawn) for segment in row.sample)
        told = conditions(row.sample) - row.withheld
        if draws and not told:  # everything between BOS and the last BOI
            ids = [ids[0], *[self.pad_id] * (len(ids) - 2), ids[-1]]
        elif any(isinstance(row.sample[i], (Words, Seen)) for i in row.withheld):
            raise ValueError("Janus withholds words and seen pictures only together with everything else")
        for segment in row.sample:
            if isinstance(segment, Words) and segment.answer:
                ids = ids + self.answer_ids(segment.text)
        found = ([slots.get(picture, -1) for picture in pictures] for slots in (seen, known))
        return RowLayout(ids, *found, pictures, len(ids) if draws else -1)

    def _text(self, sample: Sample) -> str:
        """The prompt up to where the model goes on: with the BOI of a picture to draw, without an answer."""
        n = self.num_image_tokens
        slot = {Seen: f"{BOI}{IMAGE * n}{EOI}", Known: f"{BOI}{PAD * n}{EOI}"}
        draws = any(isinstance(segment, Drawn) for segment in sample)
        parts = []
        for segment in sample:
            if isinstance(segment, Words) and not segment.answer:
                parts.append(segment.text)
            elif type(segment) in slot:
                parts.append(slot[type(segment)] + ("" if draws else "\n"))
        # The original's template strips the whole turn, pictures included.
        turn = f"{self.user}: {''.join(parts).strip()}\n\n{self.assistant}:"
        return turn + BOI if draws else f"{SYSTEM}\n\n{turn}"

    def _tokenize(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        # Some releases of transformers drop the BOS that the checkpoint's tokenizer_config asks for.
        return ids if ids[0] == self.bos_id else [self.bos_id, *ids]


def _read_json(name_or_path: str, name: str, hub: dict) -> dict:
    try:
        path = cached_file(name_or_path, name, **hub)
    except (OSError, EntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name_or_path} has no {name}. Janus-Pro checkpoints and their derivatives carry one; copy it from the "
            "base model (fine-tunes sometimes leave it out)."
        ) from error
    return read_config(path, _NAMES)
