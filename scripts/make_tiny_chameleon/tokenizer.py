"""The tiny Chameleon's tokenizer: bytes merged to words, and each template's sentences to one token."""

import re

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from thinkclearly.data.thoughts import MAKERS
from thinkclearly.models.chameleon.processor import BOI, BOS, EOI, EOS, IMAGE, PAD, SEP, TEMPLATES

QUESTION = "What is in the picture?"
UNKNOWN = "<unk>"
FIXED = [template.removesuffix(" {p}") for template in TEMPLATES.values() if len(template) > 3] + [QUESTION]
WORDS = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"


def code_names(codes: int) -> list[str]:
    """Names of the codes in the order of their ids, which is no order: who takes one for the other shall see it."""
    order = np.random.default_rng(0).permutation(codes)
    return ["IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z" for code in order]


def train_tokenizer(codes: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on prompts, templates and what thoughts say, with Chameleon's special tokens."""
    special = [BOS, PAD, EOS, UNKNOWN, *code_names(codes), EOI, BOI, SEP, IMAGE]
    thoughts = [make(3, i) for make in MAKERS.values() for i in range(1500)]
    text = [f" {t.prompt}" for t in thoughts] + [t.prompt for t in thoughts]
    text += [part for t in thoughts for part in t.parts if isinstance(part, str)] + FIXED * 1500
    tokenizer = Tokenizer(models.BPE())
    pieces = Regex("|".join([*map(re.escape, FIXED), WORDS]).replace(r"\ ", " "))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    options = {"special_tokens": special, "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    # More merges than there are: every frequent word becomes one token, and so does each of `FIXED`.
    trainer = trainers.BpeTrainer(vocab_size=4096, min_frequency=20, show_progress=False, **options)
    tokenizer.train_from_iterator(text, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN, sep_token=SEP
    )
