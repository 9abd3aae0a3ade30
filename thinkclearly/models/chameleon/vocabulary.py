"""Which token ids of Chameleon's vocabulary are codes of pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping

_DIGITS = str.maketrans("ABCDEFGHIJ", "0123456789")


def image_ids(vocabulary: Mapping[str, int], where: str) -> list[int]:
    """The token id of each code 0 … K - 1, as the names "IMGIMG…Z" say: letters A–J are the code's digits.

    Ids need not rise with the codes. Source: `ChameleonImageVocabularyMapping` of transformers.

    Args:
        vocabulary: names to ids, of a tokenizer or `vocabulary_map` of a config.
        where: names it in errors.

    Raises:
        ValueError: no such names, a code that is missing or named twice, an id that two codes have.
    """
    ids = {}
    for name, token in vocabulary.items():
        if not name.startswith("IMGIMG"):
            continue
        match = re.fullmatch("IMGIMG([A-J]{1,9})Z", name)
        if match is None or type(token) is not int or token < 0:
            raise ValueError(
                f"{where} has {name!r:.60}: {token!r:.60}; expected 'IMGIMG', letters A to J, 'Z', and a token id."
            )
        ids[int(match[1].translate(_DIGITS))] = token
    if not ids or sorted(ids) != list(range(len(ids))) or len(set(ids.values())) < len(ids):
        raise ValueError(
            f"{where} names {len(ids)} codes of pictures (IMGIMG…Z); expected each of 0 … K - 1 once, with an id of "
            "its own. Get it again, from a Chameleon, Anole or TwGI checkpoint."
        )
    return [ids[code] for code in range(len(ids))]
