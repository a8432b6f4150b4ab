"""Places in the arena: values alive together never share a byte, and little is wasted."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from qsearch.build.arena import ALIGNMENT, Lifetime, live_bytes, plan_arena


@st.composite
def lifetimes(draw):
    spans = draw(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 20), st.integers(0, 8)), max_size=24))
    return [Lifetime(f"v{i}", size, first, first + length) for i, (size, first, length) in enumerate(spans)]


@given(lifetimes())
def test_values_alive_together_do_not_share_bytes(values):
    arena = plan_arena(values)
    assert set(arena.offsets) == {value.name for value in values}
    for value in values:
        start = arena.offsets[value.name]
        assert start % ALIGNMENT == 0
        assert start >= 0
        assert start + value.bytes <= arena.bytes
    for a, b in combinations(values, 2):
        if a.first <= b.last and b.first <= a.last:
            x, y = arena.offsets[a.name], arena.offsets[b.name]
            assert x + a.bytes <= y or y + b.bytes <= x


@given(lifetimes())
def test_the_size_lies_between_the_bound_and_no_sharing(values):
    assert live_bytes(values) <= plan_arena(values).bytes <= sum(value.aligned_bytes for value in values)


@given(lifetimes(), st.randoms(use_true_random=False))
def test_the_plan_does_not_depend_on_the_order_given(values, random):
    shuffled = random.sample(values, len(values))
    assert plan_arena(shuffled) == plan_arena(values)


def test_a_chain_needs_two_neighbours_at_a_time():
    chain = [Lifetime(f"v{i}", size, i, i + 1) for i, size in enumerate((640, 1280, 320, 960, 64))]
    assert plan_arena(chain).bytes == live_bytes(chain) == 640 + 1280


def test_small_values_share_the_place_of_a_large_one():
    # Two halves alive together after a whole: separate buffers would need one and a half.
    values = [Lifetime("whole", 2048, 0, 1), Lifetime("left", 1024, 2, 3), Lifetime("right", 1024, 2, 3)]
    assert plan_arena(values).bytes == 2048


def test_nothing_needs_no_arena():
    assert plan_arena([]).bytes == live_bytes([]) == 0
