"""Tables of edits: the right rows, in order, under the right keys, whatever the columns are called."""

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from random_photos import photo, png

from thinkclearly.data.magicbrush import magicbrush
from thinkclearly.data.sources import FEATURES, BadRecord, read_example

pytestmark = pytest.mark.usefixtures("own_cache")
INSTRUCTIONS = [
    "Add a red hat",
    "remove the dog",
    "Make the HAT blue",
    "change the background",
    "add a dog with a hat",
    "",
]


@pytest.fixture
def table(tmp_path):
    """A Parquet file as the Hub has it: decoded pictures, MagicBrush's columns, masks that are transparent holes."""
    hole = photo(9).convert("RGBA")
    alpha = np.full((30, 40), 255, np.uint8)
    alpha[:10] = 0
    hole.putalpha(Image.fromarray(alpha))
    rows = [
        {
            "img_id": i,
            "turn_index": 1 + i % 2,
            "source_img": photo(i),
            "mask_img": hole,
            "instruction": text,
            "target_img": photo(50 + i),
        }
        for i, text in enumerate(INSTRUCTIONS)
    ]
    features = Features(
        img_id=Value("int64"), turn_index=Value("int64"), source_img=ImageFeature(), mask_img=ImageFeature(),
        instruction=Value("string"), target_img=ImageFeature(),
    )  # fmt: skip
    path = tmp_path / "table" / "train.parquet"
    path.parent.mkdir()
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path


def test_magicbrush_columns_and_pictures(table):
    dataset = magicbrush(str(table))
    assert dataset.features == FEATURES and len(dataset) == len(INSTRUCTIONS)
    example = read_example(dataset[2])
    assert example.key == "train.parquet[2]" and example.instruction == "Make the HAT blue"
    assert np.array_equal(example.source, photo(2)) and np.array_equal(example.target, photo(52))
    assert (np.asarray(example.mask)[:10] == 255).all() and (np.asarray(example.mask)[10:] == 0).all()
    with pytest.raises(BadRecord, match=r"train.parquet\[5\]: the instruction is empty"):
        read_example(dataset[5])
    assert magicbrush(str(table.parent))["key"][1] == "train[1]"


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"include": ["hat"]}, [0, 2, 4]),
        ({"include": ["hat", "dog"], "match": "all"}, [4]),
        ({"include": ["hat", "dog"], "exclude": ["ADD"]}, [1, 2]),
        ({"turn_index": 2}, [1, 3, 5]),
        ({"include": ["hat"], "limit": 2}, [0, 2]),
    ],
)
def test_filters(table, streaming, options, rows):
    dataset = magicbrush(str(table), streaming=streaming, **options)
    found = list(dataset)
    assert [row["key"] for row in found] == [f"train.parquet[{i}]" for i in rows]
    assert set(found[0]) == set(FEATURES)
    assert np.array_equal(read_example(found[0]).source, photo(rows[0]))


def test_shuffle_is_repeatable_and_comes_before_the_limit(table):
    for streaming in (False, True):
        orders = [
            [row["key"] for row in magicbrush(str(table), shuffle_seed=s, limit=3, streaming=streaming)]
            for s in (1, 1, 2)
        ]
        assert orders[0] == orders[1] and len(orders[0]) == 3
        assert sorted(orders[0]) != sorted(orders[2])


@pytest.mark.parametrize("streaming", [False, True])
def test_keys_tell_the_row_across_shuffled_files(table, streaming):
    whole = Dataset.from_parquet(str(table))
    for part in range(3):
        whole.shard(3, part, contiguous=True).to_parquet(table.parent / f"train-{part:05d}-of-00003.parquet")
    table.unlink()
    for row in magicbrush(str(table.parent), shuffle_seed=3, streaming=streaming):
        assert row["instruction"] == INSTRUCTIONS[int(row["key"][len("train[") : -1])]


@pytest.mark.parametrize("streaming", [False, True])
def test_other_column_names_and_no_mask(tmp_path, streaming):
    path = tmp_path / "other.parquet"
    rows = {
        "original_image": [{"bytes": png(photo(1)), "path": None}],
        "edited_image": [{"bytes": png(photo(2)), "path": None}],
    }
    Dataset.from_dict({**rows, "edit_prompt": ["go"]}).to_parquet(path)
    row = next(iter(magicbrush(str(path), streaming=streaming)))
    example = read_example(row)
    assert example.mask is None and example.instruction == "go" and np.array_equal(example.target, photo(2))
    with pytest.raises(ValueError, match="no column for turn_index"):
        magicbrush(str(path), turn_index=1, streaming=streaming)
    Dataset.from_dict({**rows, "words": ["go"]}).to_parquet(path)
    with pytest.raises(ValueError, match="no column for instruction .*Found: original_image, edited_image, words"):
        magicbrush(str(path), streaming=streaming)


def test_magicbrush_says_when_nothing_is_left(table):
    with pytest.raises(ValueError, match="none of 6 records"):
        magicbrush(str(table), include=["zebra"])
    with pytest.raises(ValueError, match="limit=-1"):
        magicbrush(str(table), limit=-1)
    with pytest.raises(FileNotFoundError, match="gone.parquet"):
        magicbrush(str(table.with_name("gone.parquet")))
    with pytest.raises(ValueError, match="'any' or 'all'"):
        magicbrush(str(table), match="some")
