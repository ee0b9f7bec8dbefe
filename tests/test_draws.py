import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from carina.draws import Draws, permutation, philox


def test_philox_gives_the_published_answers():
    """Known answers of Random123 (Salmon et al., SC 2011) for philox4x32-10."""
    zeros = philox(np.zeros(4, dtype=np.uint64), (0, 0))
    assert [hex(v) for v in zeros] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    ones = philox(np.full(4, 0xFFFFFFFF, dtype=np.uint64), (0xFFFFFFFF, 0xFFFFFFFF))
    assert [hex(v) for v in ones] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]
    pi = philox(np.array([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], dtype=np.uint64), (0xA4093822, 0x299F31D0))
    assert [hex(v) for v in pi] == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20, unique=True), st.integers(0, 2**31), st.data())
def test_a_sample_draws_the_same_in_any_batch(codes, seed, data):
    everyone = Draws(seed, 3, np.array(codes, dtype=np.uint64))
    i = data.draw(st.integers(0, len(codes) - 1))
    alone = Draws(seed, 3, np.array([codes[i]], dtype=np.uint64))
    np.testing.assert_array_equal(everyone.uniform("x", shape=(5,))[i], alone.uniform("x", shape=(5,))[0])


def test_names_epochs_seeds_and_parts_are_independent_streams():
    codes = np.arange(4000, dtype=np.uint64)
    base = Draws(1, 0, codes)
    others = [Draws(2, 0, codes), Draws(1, 1, codes), base.part("view")]
    values = base.uniform("x")
    assert kstest(values, "uniform").pvalue > 1e-3
    assert kstest(base.normal("n"), "norm").pvalue > 1e-3
    for other in [*(d.uniform("x") for d in others), base.uniform("y")]:
        assert abs(np.corrcoef(values, other)[0, 1]) < 0.06
    assert values.min() >= 0 and values.max() < 1
    assert set(base.integers("i", 2, 5)) == {2, 3, 4}


def test_permutation_depends_on_its_key_alone():
    assert sorted(permutation(50, 1, "order", 0)) == list(range(50))
    np.testing.assert_array_equal(permutation(50, 1, "order", 0), permutation(50, 1, "order", 0))
    assert (permutation(50, 1, "order", 0) != permutation(50, 1, "order", 1)).any()
