"""Records that share a picture or a session stay together, whatever is held out."""

import numpy as np

from thinkclearly.data.groups import group_records, hold_out, token_origins


def test_records_are_joined_directly_and_through_others():
    sessions = [["a", "b"], ["c", "d"], ["b", "e"], ["x", "y"], ["e", "f"], []]
    groups = group_records(sessions)
    assert groups[0] == groups[2] == groups[4]
    assert len({groups[0], groups[1], groups[3], groups[5]}) == groups.max() + 1 == 4


def test_parts_are_whole_groups_and_as_large_as_asked_where_that_is_possible():
    groups = np.repeat(np.arange(40), 3)
    test, calibration = hold_out(groups, (14, 30), seed=0)
    assert len(test) == 12 and len(calibration) == 30  # no session of three fits into the last two places
    rest = np.setdiff1d(np.arange(120), np.concatenate([test, calibration]))
    assert not set(groups[test]) & set(groups[calibration]) and not set(groups[rest]) & set(
        groups[[*test, *calibration]]
    )
    assert len(set(groups[test][:4])) > 1  # in random order, not session after session


def test_the_seed_decides_and_a_later_part_changes_no_earlier_one():
    groups = group_records([[str(i // 2)] for i in range(60)])
    parts = [hold_out(groups, counts, seed) for counts, seed in (((10, 5), 1), ((10, 20), 1), ((10, 5), 2))]
    assert np.array_equal(parts[0][0], parts[1][0]) and not np.array_equal(parts[0][0], parts[2][0])


def test_a_group_that_is_too_large_is_left_to_train_on():
    assert sorted(hold_out(np.array([0, 0, 0, 1]), (2,), seed=0)[0]) == [3]


def test_equal_codes_are_one_picture():
    assert token_origins([1, 2], [3, 4])[1] == token_origins(np.array([3, 4]), [5, 6])[0]
