"""Chameleon prompts: rows of segments to token ids and slots, for training and for inference, and pictures to pixels.

Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import EntryNotFoundError
from PIL import Image
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from thinkclearly.files import write_json
from thinkclearly.images import to_pixel_values
from thinkclearly.models.chameleon.vocabulary import image_ids
from thinkclearly.models.config_files import read_config
from thinkclearly.models.prompt_rows import RowLayout, batch_rows
from thinkclearly.models.protocol import PromptBatch
from thinkclearly.sequence import Drawn, Known, Row, Seen, Words, conditions

BOS, PAD, EOS, SEP = "<s>", "<pad>", "</s>", "<reserved08706>"
IMAGE, BOI, EOI = "<image>", "<racm3:break>", "<eoss>"
SPECIAL_TOKENS = (BOS, PAD, EOS, SEP, IMAGE, BOI, EOI)
RESCALE = 0.0078  # levels 0 … 255 to -1 … 0.989 with `MEAN`: about 1 / 127.5
MEAN = STD = (1.0, 1.0, 1.0)

# What "Thinking with Generated Images" was trained on, by mode; {p} is the prompt.
TEMPLATES = {
    "general": "{p}",
    "critique": (
        "Generate an image based on the given prompt. Then analyze whether the image matches the prompt, and generate "
        "a better image based on your analysis. The prompt is: {p}"
    ),
    "subgoals": (
        "Generate the objects in the prompt step by step, and then generate the complete image. The prompt is: {p}"
    ),
}

_NAMES = ("size", "crop_size", "shortest_edge", "height", "width", "image_mean", "image_std", "rescale_factor")
_NAMES += ("image_seq_length",)  # what is read of the processor files


class ChameleonProcessor:
    """Pictures to pixel values and text to prompts, as Anole and TwGI read them.

    A turn is BOS, pictures as BOI, N codes, EOI, and words, then SEP; what the model says or draws follows.

    Args:
        tokenizer: holds the special tokens of `SPECIAL_TOKENS` and the names of the codes; ids are always looked up
            by string.
        image_size (`int`): side of the model's square pictures, pixels.
        num_image_tokens (`int`): N, tokens of one picture.

    Attributes:
        code_ids: the token id of each of the K codes.
        unsaid_ids: token ids that are no words: those of pictures, and of the tokens around them.
        image_mean, image_std: normalisation of the channels, the same for every Chameleon.

    Raises:
        ValueError: the tokenizer lacks a token that is needed.
    """

    image_mean, image_std = MEAN, STD
    sees_codes = True

    def __init__(self, tokenizer: PreTrainedTokenizerBase, image_size: int, num_image_tokens: int):
        self.tokenizer, self.image_size, self.num_image_tokens = tokenizer, image_size, num_image_tokens
        vocabulary = tokenizer.get_vocab()
        if missing := [token for token in SPECIAL_TOKENS if token not in vocabulary]:
            raise ValueError(
                f"The tokenizer lacks {missing}; expected the tokenizer of a Chameleon, Anole or TwGI checkpoint. "
                "Copy its files beside the weights."
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = PAD
        self.bos_id, self.pad_id, self.eos_id, self.sep_id = (vocabulary[t] for t in (BOS, PAD, EOS, SEP))
        self.image_id, self.boi_id, self.eoi_id = (vocabulary[t] for t in (IMAGE, BOI, EOI))
        self.code_ids = image_ids(vocabulary, "The tokenizer")
        self.unsaid_ids = [*self.code_ids, self.boi_id, self.eoi_id, self.image_id]

    @property
    def grid(self) -> int:
        """Patches along one side; N = grid²."""
        return round(self.num_image_tokens**0.5)

    @classmethod
    def from_pretrained(cls, name_or_path: str, revision: str | None = None, token: str | None = None):
        """Reads tokenizer, `preprocessor_config.json` and `processor_config.json` of a folder or Hub repository.

        Raises:
            FileNotFoundError: one of the two is missing. ValueError: it scales pictures in another way.
        """
        hub = {"revision": revision, "token": token}
        pictures = _read_json(name_or_path, "preprocessor_config.json", hub)
        prompts = _read_json(name_or_path, "processor_config.json", hub)
        for name, expected in (("rescale_factor", RESCALE), ("image_mean", list(MEAN)), ("image_std", list(STD))):
            if (found := pictures.get(name, expected)) != expected:
                raise ValueError(
                    f"preprocessor_config.json of {name_or_path} has {name} {found!r:.60}; expected {expected}, as "
                    "every Chameleon has it. Copy the file of the base model."
                )
        size = (pictures.get("crop_size") or {}).get("height") or (pictures.get("size") or {}).get("shortest_edge")
        # Checkpoints name LlamaTokenizer, which would cut words in another way than tokenizer.json says.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(name_or_path, **hub)
        return cls(tokenizer, size or 512, prompts.get("image_seq_length", 1024))

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes the same files, which transformers' `ChameleonProcessor` reads too."""
        directory, side = Path(directory), self.image_size
        directory.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(directory)
        pictures = {
            "image_processor_type": "ChameleonImageProcessor",
            "processor_class": "ChameleonProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": int(Image.Resampling.LANCZOS),
            "do_center_crop": True,
            "crop_size": {"height": side, "width": side},
            "do_rescale": True,
            "rescale_factor": RESCALE,
            "do_normalize": True,
            "image_mean": list(MEAN),
            "image_std": list(STD),
        }
        prompts = {
            "processor_class": "ChameleonProcessor",
            "image_seq_length": self.num_image_tokens,
            "image_token": IMAGE,
        }
        write_json(directory / "preprocessor_config.json", pictures)
        write_json(directory / "processor_config.json", prompts)

    def square(self, picture: Image.Image) -> Image.Image:
        """A picture as the original prepares it: on white, the shorter side to the model's, the middle cut out.

        Transparency is blended in float and truncated, as there. Source: `blend_rgba` and `resize` in
        [image_processing_chameleon.py](https://github.com/GAIR-NLP/thinking-with-generated-images).
        """
        if picture.mode != "RGB":
            pixels = np.asarray(picture.convert("RGBA"))
            alpha = pixels[..., 3:] / 255
            picture = Image.fromarray(((1 - alpha) * 255 + alpha * pixels[..., :3]).astype(np.uint8))
        side, shorter = self.image_size, min(picture.size)
        picture = picture.resize([n * side // shorter for n in picture.size], Image.Resampling.LANCZOS)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        return picture.crop((left, top, left + side, top + side))

    def pixel_values(self, squares) -> torch.Tensor:
        """Square PIL pictures of the model's size to float32 (B, 3, S, S)."""
        return to_pixel_values(squares, MEAN, STD, RESCALE)

    def encode_words(self, text: str, bos: bool) -> list[int]:
        """Token ids of text, after BOS if asked for."""
        return [self.bos_id] * bos + self.tokenizer.encode(text, add_special_tokens=False)

    def decode_words(self, ids: Sequence[int]) -> str:
        """Text of token ids without special tokens, which codes of pictures are too."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def picture_ids(self, codes: Sequence[int]) -> list[int]:
        """BOI, the token id of each code, EOI."""
        return [self.boi_id, *(self.code_ids[code] for code in codes), self.eoi_id]

    def answer_ids(self, answer: str) -> list[int]:
        """What follows the prompt of a question: the words and the end of the turn."""
        return [*self.encode_words(answer.strip(), bos=False), self.eos_id]

    def rows(self, rows: Sequence[Row], outputs: bool = False) -> PromptBatch:
        """Token ids and slots of rows, left-padded to one length.

        A picture is laid out once, by its codes; where they are withheld it is left out. A row that is told nothing
        is BOI alone, as the original's unconditional row.

        Args:
            outputs: also room for what is to be predicted, for teacher forcing: N - 1 codes after the last BOI. An
                answer in words belongs to its sample and is always there.

        Raises:
            ValueError: a row that withholds words, or a picture that is only seen, but not everything.
        """
        return batch_rows(
            [self._layout(row) for row in rows], self.pad_id, self.num_image_tokens - 1 if outputs else 0
        )

    def _layout(self, row: Row) -> RowLayout:
        draws = any(isinstance(segment, Drawn) for segment in row.sample)
        if draws and not conditions(row.sample) - row.withheld:
            return RowLayout([self.boi_id], [], [], [], 1)
        known_too = {segment.picture for segment in row.sample if isinstance(segment, Known)}
        ids, answer, seen, known = [self.bos_id], [], {}, {}
        for i, segment in enumerate(row.sample):
            if isinstance(segment, Drawn) or (isinstance(segment, Seen) and segment.picture in known_too):
                continue
            if isinstance(segment, Words) and segment.answer:
                answer += self.answer_ids(segment.text)
            elif isinstance(segment, Known) and i in row.withheld:
                continue
            elif i in row.withheld:
                raise ValueError("Chameleon withholds words and seen pictures only together with everything else")
            elif isinstance(segment, Words):
                ids += self.encode_words(segment.text, bos=False)
            else:
                slots = known if isinstance(segment, Known) else seen
                slots[segment.picture] = len(ids) + 1
                ids += [self.boi_id, *[self.image_id] * self.num_image_tokens, self.eoi_id]
        ids += [self.sep_id, *([self.boi_id] if draws else answer)]
        pictures = [*known, *seen]
        found = ([slots.get(picture, -1) for picture in pictures] for slots in (seen, known))
        return RowLayout(ids, *found, pictures, len(ids) if draws else -1)


def _read_json(name_or_path: str, name: str, hub: dict) -> dict:
    try:
        path = cached_file(name_or_path, name, **hub)
    except (OSError, EntryNotFoundError) as error:
        raise FileNotFoundError(
            f"{name_or_path} has no {name}. Chameleon checkpoints carry one; copy it from the base model."
        ) from error
    return read_config(path, _NAMES)
