import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.shares import equal_number, micro_batches, split_evenly


@given(start=st.integers(0, 10**12), sequences=st.integers(1, 300), workers=st.integers(1, 16))
def test_every_sequence_goes_to_one_worker_in_order(start, sequences, workers):
    step = range(start, start + sequences)
    if sequences < workers:
        with pytest.raises(ValueError, match="cannot be shared out"):
            split_evenly(step, workers)
        return
    shares = split_evenly(step, workers)
    assert [index for share in shares for index in share] == list(step)
    assert len(shares) == workers
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(sequences=st.integers(0, 100), size=st.integers(1, 20), extra=st.integers(0, 5))
def test_micro_batches_cover_a_share_within_the_limit(sequences, size, extra):
    share = range(7, 7 + sequences)
    fewest = micro_batches(share, size)
    assert len(fewest) == -(-sequences // size)
    for pieces in (fewest, micro_batches(share, size, len(fewest) + extra)):
        assert [index for piece in pieces for index in piece] == list(share)
        assert all(len(piece) <= size for piece in pieces)


@given(sequences=st.integers(1, 100), workers=st.integers(1, 8), size=st.integers(1, 20))
def test_all_workers_can_cut_their_shares_into_equally_many_micro_batches(sequences, workers, size):
    shares = split_evenly(range(sequences + workers), workers)
    number = equal_number(shares, size)
    assert {len(micro_batches(share, size, number)) for share in shares} == {number}


def test_a_micro_batch_never_exceeds_its_limit():
    with pytest.raises(ValueError, match="do not fit in 2 micro-batches of 4"):
        micro_batches(range(9), 4, 2)
