"""Whose garbage is whose."""

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def garbage():
    """A file's tests answer for their own garbage: what is left open there is said there, not in another file's test.

    What was there before, the modules above all, is never looked at again: DeepSpeed and the tests collect often.
    """
    gc.freeze()
    yield
    gc.collect()
