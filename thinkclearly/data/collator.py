"""Prepared records to a training batch: prompt, slots, labels, and which conditions each row is shown.

One collator for every supervised method: edits, text-to-image and questions may stand in one batch. Knows nothing of
weights.
"""

from __future__ import annotations

import numpy as np
import torch

from thinkclearly.data.features import FeatureCache, pictures_of, source_square
from thinkclearly.data.sources import BadRecord
from thinkclearly.instructions import CLEAR, InstructionVocabulary
from thinkclearly.models.protocol import Processor
from thinkclearly.sequence import Dropout, Known, Row, Seen, answering, drawing


class Collator:
    """Builds batches for `InstructionModel.forward`.

    Labels of withheld rows: without the source's codes instructions stay labels, since the picture's features and the
    words still tell what stays. Rows that show nothing of the source are labelled with plain codes: an instruction
    would mean nothing there.

    Args:
        processor: the one that inference uses.
        vocabulary: class ids of the labels.
        dropout: which conditions are withheld; none where not given.
        features: read instead of the pictures, where given.
        source_weight: weight of codes of an edit that are the source's own at their place, where others have 1.
        skip_padding: the bars beside a picture that is not square carry no loss.
        legacy_shift: the first code carries no loss, as in Janus-4o's own training script, which never trains it.
    """

    def __init__(
        self,
        processor: Processor,
        vocabulary: InstructionVocabulary,
        dropout: Dropout = Dropout(),  # noqa: B008 (frozen)
        features: FeatureCache | None = None,
        source_weight: float = 1.0,
        skip_padding: bool = False,
        legacy_shift: bool = False,
    ):
        self.processor, self.vocabulary, self.dropout, self.features = processor, vocabulary, dropout, features
        self.source_weight, self.skip_padding, self.legacy_shift = source_weight, skip_padding, legacy_shift
        # Shared memory: data loader workers must see the epoch that the training loop is in.
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()

    def without_dropout(self) -> Collator:
        """The same for evaluation: every condition is shown."""
        options = {name: getattr(self, name) for name in ("source_weight", "skip_padding", "legacy_shift")}
        return Collator(self.processor, self.vocabulary, features=self.features, **options)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        n, epoch = self.processor.num_image_tokens, int(self.epoch)
        # 1. What each row says, and what of it is shown. Pictures are numbered through the batch.
        codes = [np.asarray(row["input_tokens"], np.int64).reshape(-1, n) for row in rows]
        first = np.cumsum([0, *map(len, codes)])
        shown = []
        for k, row in enumerate(rows):
            pictures = range(first[k], first[k + 1])
            if len(row["output_tokens"]):
                sample = drawing(row["instruction"], pictures)
            else:
                sample = answering(row["instruction"], pictures, row["answer"])
            shown.append(self.dropout.row(sample, row["key"], epoch))
        prompt = self.processor.rows(shown, outputs=True)
        batch = dict(vars(prompt))
        # 2. The pictures that are shown.
        if first[-1]:
            batch["source_tokens"] = torch.from_numpy(np.concatenate(codes))
            batch |= {} if self.processor.sees_codes else self._pictures(rows)
        # 3. The codes that are drawn.
        drawn = [k for k, row in enumerate(rows) if len(row["output_tokens"])]
        labels = torch.tensor([rows[k]["output_tokens"] for k in drawn], dtype=torch.long).view(len(drawn), n)
        if len(self.vocabulary):
            transformed = torch.stack([self._transformed(rows[k], codes[k]) for k in drawn])
            sees_nothing = torch.tensor([not self._shows_pictures(shown[k]) for k in drawn])
            labels = torch.where(sees_nothing[:, None], self.vocabulary.remap(labels, transformed), labels)
            batch["transformed"] = transformed
        batch["labels"] = labels
        if self.skip_padding or self.legacy_shift or self.source_weight != 1:
            batch["counted"] = self._counted([rows[k] for k in drawn])
        # 4. The words that are answered. The position before each predicts it.
        answers = {k: self.processor.answer_ids(row["answer"]) for k, row in enumerate(rows) if k not in drawn}
        if answers:
            length = prompt.input_ids.shape[1]
            batch["word_rows"] = torch.tensor([k for k, ids in answers.items() for _ in ids])
            columns = [torch.arange(length - len(ids) - 1, length - 1) for ids in answers.values()]
            batch["word_columns"] = torch.cat(columns)
            batch["word_labels"] = torch.tensor([token for ids in answers.values() for token in ids])
        return batch

    def _shows_pictures(self, row: Row) -> bool:
        kinds = Known if self.processor.sees_codes else (Seen, Known)
        return any(isinstance(segment, kinds) and i not in row.withheld for i, segment in enumerate(row.sample))

    def _transformed(self, row: dict, codes: np.ndarray) -> torch.Tensor:
        """Codes (I, N) of each instruction's transform of the source; zeros, never used, where there is no source."""
        found = row.get("transformed_tokens")
        if found is None:  # the data knows the identity alone
            if self.vocabulary.names != (CLEAR,) and len(codes):
                raise BadRecord(
                    f"{row['key']}: no transformed_tokens, the codes that {', '.join(self.vocabulary.names)} stand "
                    "for. Prepare the data again with these `instructions`."
                )
            found = np.repeat(codes[:1], len(self.vocabulary), axis=0) if len(codes) else None
        shape = len(self.vocabulary), self.processor.num_image_tokens
        if found is None:
            return torch.zeros(shape, dtype=torch.long)
        return torch.from_numpy(np.asarray(found, np.int64)).view(shape)

    def _counted(self, rows: list[dict]) -> torch.Tensor:
        """Float32 (D, N): how much each code counts in the loss, 0 where it carries none."""
        counted = torch.ones(len(rows), self.processor.num_image_tokens)
        for weights, row in zip(counted, rows):
            if len(row["input_tokens"]) == len(weights):
                weights[torch.tensor(row["input_tokens"]) == torch.tensor(row["output_tokens"])] = self.source_weight
        if self.skip_padding:
            counted *= torch.tensor([row["content"] for row in rows]).float()
        if self.legacy_shift:
            counted[:, 0] = 0
        return counted

    def _pictures(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        pictures = {row["key"]: pictures_of(row) for row in rows if len(row["input_tokens"])}
        missing = [key for key, found in pictures.items() if not found]
        if missing and len(missing) < len(pictures):
            raise BadRecord(
                f"{', '.join(missing)}: no source picture, while other records have one. Leave these records out, or "
                "remove the column 'source' to train on pictures decoded from the codes."
            )
        if missing:
            return {}
        named = [(key, picture) for key, found in pictures.items() for picture in found]
        if self.features is not None:
            return {"features": self.features.read(named)}
        squares = [source_square(picture, key, self.processor.image_size) for key, picture in named]
        return {"pixel_values": self.processor.pixel_values(squares)}
