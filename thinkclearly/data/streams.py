"""Token streams to a training batch: ids, what each position predicts, and what a row withholds.

Knows nothing of weights. `data.collator` does the same for rows that draw one picture.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from thinkclearly.instructions import CLEAR, InstructionVocabulary
from thinkclearly.models.chameleon.processor import ChameleonProcessor


@dataclass(frozen=True)
class StreamDropout:
    """Shares of records that show a row of the sampler's guidance in place of the whole stream.

    Keyed to (seed, epoch, record): the same for any batch size, worker and process. Records without pictures are
    always shown whole.

    Args:
        drop_all: one picture of the record, told nothing: `BOI picture`.
        drop_context: the last picture, told the bare prompt: `prompt BOI picture`.
        drop_words: all pictures, told the ones before: `BOI picture EOI BOI picture …`.
        seed: keys the draws.
    """

    drop_all: float = 0.0
    drop_context: float = 0.0
    drop_words: float = 0.0
    seed: int = 0


@dataclass
class _Shown:
    """A record as a row shows it.

    Attributes:
        ids: int (L,).
        counted: bool (L,), ids that carry loss.
        pictures: number of the picture in the record → index of its first id, of those that are taught.
        instructed: whether an edit's source is shown, so that an instruction means something.
    """

    ids: np.ndarray
    counted: np.ndarray
    pictures: dict[int, int]
    instructed: bool


class StreamCollator:
    """Builds batches for `StreamModel.forward`.

    Args:
        processor: the one that inference uses.
        vocabulary: class ids of edited pictures' labels. Where it is empty, edited pictures are labelled as others.
        dropout: what rows withhold.

    Raises:
        ValueError: other instruction tokens than CLEAR, for which streams hold no labels.
    """

    def __init__(
        self,
        processor: ChameleonProcessor,
        vocabulary: InstructionVocabulary,
        dropout: StreamDropout = StreamDropout(),  # noqa: B008 (frozen)
    ):
        if vocabulary.names not in ((), (CLEAR,)):
            raise ValueError(f"instructions={[*vocabulary.names]}: token streams know {CLEAR} alone, or none")
        self.processor, self.vocabulary, self.dropout = processor, vocabulary, dropout
        self.codes = np.full(max(processor.code_ids) + 1, -1)
        self.codes[processor.code_ids] = np.arange(len(processor.code_ids))
        # Shared memory: data loader workers must see the epoch that the training loop is in.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def without_dropout(self) -> StreamCollator:
        """The same for evaluation: every record is shown whole."""
        return StreamCollator(self.processor, self.vocabulary)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """B rows, padded on the right to L positions, with P pictures in all, E of them labelled as edits.

        Returns:
            input_ids, attention_mask: long (B, L).
            word_rows, word_columns, word_labels: long (A,). The hidden state there predicts the id, a word's or a
                code's.
            picture_rows, picture_columns: long (P,), where a picture's first id is; picture_codes: long (P, N).
            edit_rows, edit_columns: long (E,), likewise; edit_labels: long (E, N), class ids in [0, K + I).
        """
        n, shown = self.processor.num_image_tokens, [self._show(row) for row in rows]
        length = max(len(each.ids) for each in shown)
        input_ids = np.full((len(rows), length), self.processor.pad_id)
        attention_mask, counted = np.zeros_like(input_ids), np.zeros(input_ids.shape, bool)
        pictures, edits, copied = [], [], []
        for k, (row, each) in enumerate(zip(rows, shown)):
            input_ids[k, : len(each.ids)], attention_mask[k, : len(each.ids)] = each.ids, 1
            counted[k, : len(each.ids)] = each.counted
            pictures += [(k, start) for start in each.pictures.values()]
            if not each.instructed or not len(self.vocabulary):
                continue
            for number, start in each.pictures.items():
                if row["edit_of"][number] >= 0:
                    counted[k, start : start + n] = False
                    edits.append((k, start))
                    copied.append(np.asarray(row["copied"], bool)[number * n : (number + 1) * n])
        labelled, columns = np.nonzero(counted)
        codes = {name: self._codes_of(input_ids, found) for name, found in (("picture", pictures), ("edit", edits))}
        holds = torch.from_numpy(np.stack(copied) if copied else np.zeros((0, n), bool))
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "word_rows": labelled,
            "word_columns": columns - 1,
            "word_labels": input_ids[labelled, columns],
            "picture_codes": codes["picture"],
            **_places("picture", pictures),
            **_places("edit", edits),
        }
        batch = {name: torch.from_numpy(value.astype(np.int64)) for name, value in batch.items()}
        batch["edit_labels"] = self.vocabulary.label(torch.from_numpy(codes["edit"]), holds[:, None])
        return batch

    def _codes_of(self, input_ids: np.ndarray, places: list[tuple[int, int]]) -> np.ndarray:
        rows, starts = np.array(places, np.int64).reshape(-1, 2).T
        return self.codes[input_ids[rows[:, None], starts[:, None] + np.arange(self.processor.num_image_tokens)]]

    def _show(self, row: dict) -> _Shown:
        n, ids, starts = self.processor.num_image_tokens, np.asarray(row["input_ids"]), row["picture_starts"]
        rng = np.random.default_rng((self.dropout.seed, int(self.epoch), zlib.crc32(row["key"].encode())))
        edges = np.cumsum([self.dropout.drop_all, self.dropout.drop_context, self.dropout.drop_words])
        taught = {number: start for number, start in enumerate(starts) if start >= row["response_start"]}
        drawn = int(np.searchsorted(edges, rng.random(), side="right")) if taught else 3
        if drawn == 3:
            pictures = taught
            return _Shown(ids, np.arange(len(ids)) >= row["response_start"], pictures, instructed=True)
        numbers = [[int(rng.choice([*taught]))], [len(starts) - 1], [*range(len(starts))]][drawn]
        told = np.asarray(row["prompt_ids"] if drawn == 1 else [], np.int64)
        blocks = [ids[starts[number] - 1 : starts[number] + n + 1] for number in numbers]  # BOI, codes, EOI
        places = {number: len(told) + 1 + i * (n + 2) for i, number in enumerate(numbers)}
        pictures = {number: start for number, start in places.items() if number in taught}
        ids = np.concatenate([told, *blocks])
        counted = np.zeros(len(ids), bool)
        for start in pictures.values():
            counted[start : start + n] = True
        return _Shown(ids, counted, pictures, instructed=drawn == 2)


def _places(name: str, places: list[tuple[int, int]]) -> dict[str, np.ndarray]:
    rows, columns = np.array(places, np.int64).reshape(-1, 2).T
    return {f"{name}_rows": rows, f"{name}_columns": columns}
