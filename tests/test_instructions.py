import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from thinkclearly import instructions
from thinkclearly.instructions import TRANSFORMS, InstructionVocabulary

K = 16


@pytest.fixture
def two(monkeypatch):
    """A vocabulary with a second word, as a later version may have."""
    monkeypatch.setitem(instructions.TRANSFORMS, "BLUR", lambda picture: picture)
    return InstructionVocabulary(K, ("CLEAR", "BLUR"))


def tensors(*bounds):
    """Strategy for long tensors (2, N) of one N, each with values in [0, its bound)."""
    return st.integers(1, 8).flatmap(
        lambda n: st.tuples(
            *(
                st.lists(st.integers(0, b - 1), min_size=2 * n, max_size=2 * n).map(
                    lambda v: torch.tensor(v).view(2, -1)
                )
                for b in bounds
            )
        )
    )


def test_clear_is_the_identity_and_the_only_word():
    picture = Image.new("RGB", (8, 8), "red")
    assert list(TRANSFORMS) == ["CLEAR"] and TRANSFORMS["CLEAR"](picture) is picture
    vocabulary = InstructionVocabulary(K)
    assert len(vocabulary) == 1 and vocabulary.num_classes == K + 1


def test_unknown_words():
    with pytest.raises(ValueError, match=r"Unknown instruction tokens \['BLUR'\]; known are \['CLEAR'\]"):
        InstructionVocabulary(K, ("CLEAR", "BLUR"))


def test_ids(two):
    assert two.num_classes == K + 2
    assert two.is_instruction(torch.tensor([0, K - 1, K, K + 1])).tolist() == [False, False, True, True]


@settings(deadline=None)
@given(tensors(K, K, 2))
def test_label_then_remap(drawn):
    source, target, holds = drawn
    holds = holds.bool()
    vocabulary = InstructionVocabulary(K)
    labels = vocabulary.label(target, holds.unsqueeze(-2))
    assert labels.dtype == torch.long and labels.shape == target.shape
    assert torch.equal(vocabulary.is_instruction(labels), holds)
    assert torch.equal(labels[~holds], target[~holds])
    assert torch.equal(vocabulary.remap(labels, source.unsqueeze(-2)), torch.where(holds, source, target))


@settings(deadline=None)
@given(tensors(K, K))
def test_labels_by_equal_tokens_lose_nothing(drawn):
    source, target = drawn
    vocabulary = InstructionVocabulary(K)
    labels = vocabulary.label(target, (source == target).unsqueeze(-2))
    assert torch.equal(vocabulary.remap(labels, source.unsqueeze(-2)), target)


@settings(deadline=None)
@given(tensors(K, K))
def test_codes_alone_stay(drawn):
    codes, source = drawn
    assert torch.equal(InstructionVocabulary(K).remap(codes, source.unsqueeze(-2)), codes)


def test_the_first_word_that_holds_wins(two):
    holds = torch.tensor([[True, True, False, False], [True, False, True, False]])
    labels = two.label(torch.tensor([3, 4, 5, 6]), holds)
    assert labels.tolist() == [K, K, K + 1, 6]


def test_each_word_has_its_own_transform(two):
    transformed = torch.tensor([[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]])
    ids = torch.tensor([[K, K + 1, 0], [K + 1, 13, K]])
    assert two.remap(ids, transformed).tolist() == [[1, 5, 0], [10, 13, 9]]


def test_one_position_without_a_batch():
    vocabulary = InstructionVocabulary(K)
    assert vocabulary.label(torch.tensor([5]), torch.tensor([[True]])).tolist() == [K]
    assert vocabulary.remap(torch.tensor([K]), torch.tensor([[7]])).tolist() == [7]
