"""Which records belong together, and whole groups of them held out.

A turn's target is the next turn's source, and one photograph may be edited many times. Knows names of pictures and
sessions, not the pictures.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def token_origins(input_tokens: Sequence[int], target_tokens: Sequence[int]) -> list[str]:
    """Names of a record's pictures where nothing but their codes is known."""
    return [hashlib.sha256(np.asarray(codes, np.int32)).hexdigest() for codes in (input_tokens, target_tokens)]


def group_records(origins: Sequence[Sequence[str]]) -> np.ndarray:
    """The group of each record, int (R,), counted from 0.

    Records are in one group where they share an entry of `origins`, directly or through other records.
    """
    records = np.repeat(np.arange(len(origins)), [len(names) for names in origins])
    _, nodes = np.unique([name for names in origins for name in names], return_inverse=True)
    size = len(origins) + len(nodes)
    edges = coo_array((np.ones(len(nodes), bool), (records, len(origins) + nodes)), shape=(size, size))
    _, labels = connected_components(edges, directed=False)
    return np.unique(labels[: len(origins)], return_inverse=True)[1]


def hold_out(groups: np.ndarray, counts: Sequence[int], seed: int) -> list[np.ndarray]:
    """Whole groups at random, for each count as many as fit into it: the records' numbers, in random order.

    Args:
        groups: int (R,), as `group_records` gives them.
        counts: records wanted; a part gets fewer where no group is small enough for what is missing.
    """
    rng = np.random.default_rng(seed)
    sizes = np.bincount(groups)
    order, parts = list(rng.permutation(len(sizes))), []
    for count in counts:
        chosen = []
        for group in order:
            if sizes[group] <= count:
                chosen.append(group)
                count -= sizes[group]
        taken = set(chosen)
        order = [group for group in order if group not in taken]
        parts.append(rng.permutation(np.flatnonzero(np.isin(groups, chosen))))
    return parts
