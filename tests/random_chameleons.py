"""A Chameleon of random weights: real classes at the smallest sizes that are still a Chameleon."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from thinkclearly.models.chameleon.processor import BOS, EOS, PAD, SEP, SPECIAL_TOKENS
from thinkclearly.models.chameleon.random import random_chameleon
from thinkclearly.models.load import Checkpoint

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 1024, "initializer_range": 0.2}
VQ = {"resolution": 64, "channel_multiplier": [1, 1, 1, 1], "base_channels": 32, "num_res_blocks": 1}
VQ |= {"num_embeddings": 40, "embed_dim": 8, "latent_channels": 8}


def byte_tokenizer(codes: int) -> PreTrainedTokenizerFast:
    """Bytes as words, the special tokens, and names of codes whose ids fall as the codes rise."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = [f"IMGIMG{str(code).translate(letters)}Z" for code in reversed(range(codes))]
    special = [*SPECIAL_TOKENS[:3], *names, *SPECIAL_TOKENS[3:]]
    words = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    names = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "sep_token": SEP}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def small_chameleon(seed: int = 0) -> Checkpoint:
    return Checkpoint(*random_chameleon(SIZES, VQ, byte_tokenizer(VQ["num_embeddings"]), seed))


def save(checkpoint: Checkpoint, folder: Path, **options) -> Path:
    checkpoint.network.save_pretrained(folder, **options)
    checkpoint.processor.save_pretrained(folder)
    return folder
