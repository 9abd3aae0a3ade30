"""A model that reads pictures as a judge: how sure it is that a picture shows what the words say.

Reads one logit vector per picture and writes nothing. Knows nothing of benchmarks, rewards or where pictures are from.
"""

from __future__ import annotations

import torch
from PIL import Image
from transformers import (
    PROCESSOR_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import is_torchvision_available

# FocusDiff's reward; the blank in front is the original's. Its benchmark PairComp asks without the final period.
QUESTION = ' Does this image match the description "{}", please directly respond with yes or no.'
YES, NO = ("yes", "Yes", "YES"), ("no", "No", "NO")


def yes_share(logits: torch.Tensor, yes_ids: list[int], no_ids: list[int]) -> torch.Tensor:
    """P(yes) / (P(yes) + P(no)): logits (..., V) of the answer's first token → float32 (...) in [0, 1].

    From all logits, in float32. The [original](https://github.com/wendell0218/FocusDiff) reads what top-k 50 leaves of
    them, which is 0, 1 or NaN where only one side or neither is left.
    """
    yes, no = (logits[..., ids].float().logsumexp(-1) for ids in (yes_ids, no_ids))
    return torch.sigmoid(yes - no)


class VqaScorer:
    """Scores from an image-text-to-text model of transformers, such as InternVL or Qwen2.5-VL.

    Args:
        name_or_path: Hub id or folder, in transformers' own layout; code of a checkpoint's own is not run.
        device: the GPU if there is one, if not given.
        dtype: of the model; "auto" is the checkpoint's own. Scores are float32 from the logits on.
        batch_size: pictures per forward pass.
        question: what is asked about a picture, with `{}` in place of the description.

    Raises:
        ValueError: for a checkpoint with code of its own, or a tokenizer without a token for yes or no.
    """

    def __init__(
        self,
        name_or_path: str,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        batch_size: int = 8,
        question: str = QUESTION,
    ):
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.processor = _load_processor(name_or_path)
        self.model = AutoModelForImageTextToText.from_pretrained(name_or_path, dtype=dtype, trust_remote_code=False)
        self.model.eval().to(device)
        self.yes_ids, self.no_ids = (_ids(self.processor.tokenizer, words, name_or_path) for words in (YES, NO))
        self.batch_size, self.question = batch_size, question

    def score(self, prompts: list[str], pictures: list[Image.Image]) -> list[float]:
        """How sure the model is that each picture, RGB of any size, shows what its prompt says: [0, 1] each."""
        if len(prompts) != len(pictures):
            raise ValueError(f"{len(prompts)} prompts for {len(pictures)} pictures; give one prompt per picture")
        scores = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            scores += yes_share(self._logits(prompts[part], pictures[part]), self.yes_ids, self.no_ids).tolist()
        return scores

    @torch.inference_mode()
    def _logits(self, prompts: list[str], pictures: list[Image.Image]) -> torch.Tensor:
        """Raw logits of each answer's first token, float32 (B, V)."""
        turns = [
            [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
            for picture, text in zip(pictures, map(self.question.format, prompts))
        ]
        inputs = self.processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,  # a prompt may quote a model's control tokens
            processor_kwargs={"padding": True, "padding_side": "left"},
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        answer = self.model.generate(
            **inputs,
            max_new_tokens=1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return answer.logits[0]


def _load_processor(name: str) -> ProcessorMixin:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"{name} is no model that transformers knows ({error}). Code that comes with a checkpoint is not run; "
            "choose one in transformers' own layout, such as OpenGVLab/InternVL3-8B-hf for OpenGVLab/InternVL3-8B."
        ) from error
    kind = AutoProcessor
    if type(config) in PROCESSOR_MAPPING and not is_torchvision_available():
        kind = _without_video(PROCESSOR_MAPPING[type(config)])
    return kind.from_pretrained(name)


def _without_video(kind: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The processor class for pictures alone: transformers' processors of video need torchvision."""

    class PictureProcessor(kind):
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

    return PictureProcessor


def _ids(tokenizer: PreTrainedTokenizerBase, words: tuple[str, ...], name: str) -> list[int]:
    """Ids of the words that are one token, in every spelling: the vocabulary's own, and that of the word on its own.

    The two differ where a tokenizer marks the beginning of a word. A word of several tokens is left out, as its first
    token begins other words, too.
    """
    vocabulary = tokenizer.get_vocab()
    ids = {vocabulary[word] for word in words if word in vocabulary}
    alone = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    ids.update(tokens[0] for tokens in alone if len(tokens) == 1 and tokens[0] != tokenizer.unk_token_id)
    if not ids:
        raise ValueError(f"{name}'s tokenizer has no token for any of {', '.join(words)}; choose another model")
    return sorted(ids)
