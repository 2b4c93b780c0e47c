"""Which documents make a row: every document once, rows full, all of it from numbers alone."""

import collections
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgen.data import packing
from mmgen.data.packing import DROP_IMAGES, DROP_TEXT, VARIANTS, Part, Plan, best_fit, chance, mix, permute


def simple(lengths):
    """Lengths [N, 1, 3] of documents that have nothing to drop."""
    lengths = np.asarray(lengths)
    return np.stack([lengths, 0 * lengths, 0 * lengths], -1)[:, None]


def plan(lengths, row_length=40, **options):
    return Plan(simple(lengths), [Part("all", 0, len(lengths))], row_length, **options)


def epoch_of(plan, epoch):
    """[(documents, variants), ...] of the rows of an epoch."""
    first = sum(plan.rows(before) for before in range(epoch))
    return [plan.row(first + row) for row in range(plan.rows(epoch))]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=120),
    st.integers(1, 60),
    st.integers(0, 9),
    st.integers(0, 3),
)
def test_every_document_once_an_epoch_and_no_row_too_long(lengths, window, seed, epoch):
    p = plan(lengths, window=window, seed=seed)
    rows = [documents for documents, _ in epoch_of(p, epoch)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    fills = sorted(sum(lengths[i] for i in row) for row in rows)
    assert 0 < fills[0] and fills[-1] <= 40
    # Best fit opens a row only for what fits nowhere, so no two rows of a window fit into one.
    if window >= len(lengths) and len(rows) > 1:
        assert fills[0] + fills[1] > 40
    again = plan(lengths, window=window, seed=seed)
    first = sum(p.rows(before) for before in range(epoch))
    for row in (len(rows) - 1, 0):
        assert again.row(first + row)[0].tolist() == rows[row].tolist()


@pytest.mark.smoke
def test_rows_are_a_function_of_their_number(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 30, 1000)
    one, other = plan(lengths, window=64, folder=tmp_path), plan(lengths, window=64)
    forwards = [one.row(number) for number in range(2000)]
    epochs = [one.find(number)[0] for number in (0, 1999)]
    assert epochs[0] == 0 and epochs[1] >= 3
    third = pickle.loads(pickle.dumps(plan(lengths, window=64, folder=tmp_path)))
    for number in np.random.default_rng(1).permutation(2000)[:300].tolist() + [1999, 0]:
        for source in (other, third, one):
            assert all((a == b).all() for a, b in zip(source.row(number), forwards[number]))
    assert [one.find(number) for number in (1999, 0)] == [other.find(number) for number in (1999, 0)]


def test_orders_differ_between_epochs_seeds_and_windows():
    lengths = [10] * 400
    orders = [
        np.concatenate([d for d, _ in epoch_of(plan(lengths, seed=seed, window=50), epoch)]).tolist()
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(set(map(tuple, orders))) == 3
    for order in orders:
        # Documents that were neighbours are far apart, and a window holds some from everywhere.
        assert np.abs(np.diff(order)).mean() > 100
        assert max(order[:50]) > 300 and min(order[:50]) < 100


def test_the_table_of_rows_saves_packing_again(tmp_path, monkeypatch):
    monkeypatch.setattr(packing._Table, "SAVE_EVERY", 3)
    lengths = np.random.default_rng(0).integers(1, 30, 1000)
    options = dict(window=50, folder=str(tmp_path), identity="x")
    first = plan(lengths, **options)
    last = first.row(first.rows(0) + first.rows(1) - 1)
    half = first.row(first.rows(0) + 5)
    assert len(list(tmp_path.iterdir())) == 2

    packed = []
    monkeypatch.setattr(packing, "best_fit", lambda *a: packed.append(1) or best_fit(*a))
    again = plan(lengths, **options)
    assert all((a == b).all() for a, b in zip(again.row(first.rows(0) + first.rows(1) - 1), last))
    assert len(packed) == 1  # the window of that row, and none before
    # Other seeds, rows, windows, mixtures, drops or documents have tables of their own.
    others = [
        plan(lengths, **{**options, "seed": 5}), plan(lengths, 41, **options), plan(lengths, **{**options, "window": 49}),
        plan(lengths, **options, text_drop=0.1), plan(lengths, **options, image_drop=0.1),
        plan(lengths, **{**options, "identity": "y"}), plan(lengths, **options, overlong="drop"),
    ]  # fmt: skip
    halves = [Part("a", 0, 500), Part("b", 500, 1000)]
    others += [Plan(simple(lengths), halves, 40, mixture={"a": 1, "b": b}, **options) for b in (1, 2)]
    assert len({other.key for other in others} | {first.key}) == len(others) + 1
    # A table that is damaged or cut is made again, as is one that another process has begun.
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[: os.path.getsize(path) // 2])
    again = plan(lengths, **options)
    assert all((a == b).all() for a, b in zip(again.row(first.rows(0) + 5), half))
    np.save(tmp_path / f"{first.key}-0.npy", np.load(tmp_path / f"{first.key}-0.npy")[:2])
    again = plan(lengths, **options)
    assert all((a == b).all() for a, b in zip(again.row(first.rows(0) + 5), half))


def test_fill_on_realistic_mixes():
    rng = np.random.default_rng(0)
    captions = rng.integers(78, 105, 20_000)  # 8 x 8 codes and a caption
    parts = (rng.integers(20, 120, 10_000), rng.integers(280, 330, 10_000), rng.integers(500, 2000, 2_000))
    mixed = np.concatenate(parts)  # captions, small images, large images
    skewed = np.clip(rng.lognormal(5, 0.8, 20_000), 10, 2048).astype(int)
    cases = ((captions, 190, 0.95), (captions, 1024, 0.97), (mixed, 2048, 0.99), (skewed, 2048, 0.99))
    for lengths, row_length, least in cases:
        assert lengths.sum() / (plan(lengths, row_length).rows(0) * row_length) >= least


def test_documents_longer_than_a_row():
    with pytest.raises(
        ValueError, match="2 of 4 documents are longer than a row of 10 tokens.*document 2, has 30"
    ):
        plan([5, 20, 30, 10], 10).row(0)
    p = plan([5, 20, 30, 10], 10, overlong="drop")
    assert sorted(np.concatenate([d for d, _ in epoch_of(p, 0)]).tolist()) == [0, 3] and p.dropped(0) == 2
    with pytest.raises(ValueError, match="no document fits"):
        plan([20, 30], 10, overlong="drop").row(0)
    with pytest.raises(ValueError, match="overlong"):
        plan([3], 10, overlong="cut")
    with pytest.raises(ValueError, match="no document"):
        plan([], 10)


def test_an_epoch_in_which_nothing_fits_is_passed_over():
    lengths = np.array([[[100, 60, 0]]])
    p = Plan(lengths, [], 50, text_drop=0.5, overlong="drop")
    assert all(variants.tolist() == [DROP_TEXT] for _, variants in (p.row(number) for number in range(20)))


@pytest.mark.soak
def test_many_epochs_take_no_room_and_are_not_packed_again(tmp_path, monkeypatch):
    p = plan([10] * 4, folder=tmp_path)
    assert p.find(1000) == (1000, 0) and len(p._tables) <= 3
    assert p.find(7) == (7, 0) and len(p.row(7)[0]) == 4
    packed = []
    monkeypatch.setattr(packing, "best_fit", lambda *a: packed.append(1) or best_fit(*a))
    again = plan([10] * 4, folder=tmp_path)
    assert again.row(1000)[0].tolist() == p.row(1000)[0].tolist() and len(packed) < 64 + 8


def test_without_room_for_its_table_a_plan_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    p = plan([10] * 400, window=20, folder=tmp_path / "file" / "plans")
    with pytest.warns(UserWarning, match="could not be written"):
        assert p.rows(0) == 100


@pytest.mark.parametrize("options", [{"text_drop": 2.0}, {"image_drop": -0.1}, {"window": 0}])
def test_chances_and_windows_that_make_no_sense(options):
    with pytest.raises(ValueError, match="from 0 to 1"):
        plan([10] * 4, **options)


# Variants.


def several(n, rng):
    """Lengths of documents with 1 to 3 phrasings: [N, 3, 3]."""
    lengths = np.stack(
        [rng.integers(20, 30, (n, 3)), rng.integers(1, 9, (n, 3)), rng.integers(1, 9, (n, 3))], -1
    )
    lengths[np.arange(3) >= rng.integers(1, 4, n)[:, None]] = 0
    return lengths


def test_variants_are_drawn_at_their_rates_and_planned_at_their_lengths():
    lengths = several(5000, np.random.default_rng(0))
    p = Plan(lengths, [], 60, seed=3, text_drop=0.3, image_drop=0.2)
    documents, variants = map(np.concatenate, zip(*epoch_of(p, 0)))
    assert abs(((variants & DROP_TEXT) > 0).mean() - 0.3) < 0.02
    assert abs(((variants & DROP_IMAGES) > 0).mean() - 0.2) < 0.02
    assert abs((variants % VARIANTS == DROP_TEXT | DROP_IMAGES).mean() - 0.06) < 0.01
    phrasings = (lengths[documents, :, 0] > 0).sum(1)
    for count in (1, 2, 3):
        shares = (
            np.bincount((variants // VARIANTS)[phrasings == count], minlength=3) / (phrasings == count).sum()
        )
        np.testing.assert_allclose(shares, [1 / count] * count + [0] * (3 - count), atol=0.04)
    for d, v in epoch_of(p, 1)[:500]:
        whole, text, images = lengths[d, v // VARIANTS].T
        assert (whole - text * (v & 1) - images * (v >> 1 & 1)).sum() <= 60
    other = dict(zip(*map(np.ndarray.tolist, map(np.concatenate, zip(*epoch_of(p, 1))))))
    same = np.mean([other[d] == v for d, v in zip(documents.tolist(), variants.tolist())])
    assert same < 0.7  # drawn anew each epoch


# Mixtures.


def test_shares_of_tokens_are_exact_in_the_long_run():
    rng = np.random.default_rng(0)
    lengths = np.concatenate([several(300, rng), 4 * several(900, rng), several(40, rng)])
    parts = [Part("a", 0, 300), Part("b", 300, 1200), Part("c", 1200, 1240), ]  # fmt: skip
    weights = {"a": 5, "b": 3, "c": 2}
    p = Plan(lengths, parts, 128, seed=1, mixture=weights, text_drop=0.2, image_drop=0.1, window=256)
    tokens, counts = collections.Counter(), collections.Counter()
    for number in range(sum(p.rows(epoch) for epoch in range(20))):
        d, v = p.row(number)
        whole, text, images = lengths[d, v // VARIANTS].T
        left = whole - text * (v & 1) - images * (v >> 1 & 1)
        for part in parts:
            mine = (d >= part.start) & (d < part.stop)
            tokens[part.name] += int(left[mine].sum())
        counts.update(d.tolist())
    for name, weight in weights.items():
        assert abs(tokens[name] / sum(tokens.values()) - weight / 10) < 0.003
    for part in parts:  # within a part all documents come equally often
        often = [counts[i] for i in range(part.start, part.stop)]
        assert max(often) - min(often) <= 1


def test_a_name_stands_for_all_parts_that_have_it():
    parts = [Part("a#0", 0, 10), Part("b", 10, 30), Part("a#2", 30, 60), Part("a#3", 60, 70)]
    plan = lambda mixture: Plan(simple([10] * 70), parts, 40, mixture=mixture)
    together = plan({"a": 3, "b": 1})
    assert together.parts == parts
    assert np.allclose(together.rates, [70 * 3 / 4 / 5, 70 / 4, 70 * 9 / 4 / 5, 70 * 3 / 4 / 5])
    assert np.allclose(plan({"a": 3, "b": 1, "a#2": 0}).rates, [40 * 3 / 8, 40 / 4, 40 * 3 / 8])
    mixed = Plan(simple([10] * 30 + [40] * 40), parts, 40, mixture={"a": 3, "b": 1})  # documents of other lengths
    often = {part.name: rate / (part.stop - part.start) for part, rate in zip(parts, mixed.rates)}
    assert np.allclose([often["a#2"], often["a#3"]], often["a#0"]) and not np.isclose(often["b"], often["a#0"])
    with pytest.raises(ValueError, match="leaves out"):
        plan({"a#0": 1, "a#2": 1, "b": 1})
    with pytest.raises(ValueError, match="not there"):
        plan({"a": 1, "b": 1, "c": 1})


def test_a_mixture_counts_what_fits():
    """Documents left out as too long give no tokens; the others make up for them."""
    lengths = simple([10] * 200 + [10, 90] * 100)
    parts = [Part("a", 0, 200), Part("b", 200, 400)]
    p = Plan(lengths, parts, 40, mixture={"a": 1, "b": 1}, overlong="drop")
    documents = np.concatenate([d for epoch in range(10) for d, _ in epoch_of(p, epoch)])
    assert abs((documents < 200).mean() - 0.5) < 0.01


def test_a_weight_of_zero_leaves_a_part_out():
    parts = [Part("a", 0, 30), Part("b", 30, 60)]
    p = Plan(simple([10] * 60), parts, 40, mixture={"a": 0, "b": 2})
    assert {int(i) for d, _ in epoch_of(p, 0) for i in d} == set(range(30, 60))


@pytest.mark.parametrize(
    "mixture, words",
    [({"a": 1}, "leaves out"), ({"a": 1, "b": 1, "c": 1}, "are not there"), ({"a": 0, "b": 0}, "not all 0"),
     ({"a": -1, "b": 2}, ">= 0"), ({"a": 1, "b": float("inf")}, "weight")],
)  # fmt: skip
def test_mixtures_that_make_no_sense(mixture, words):
    with pytest.raises(ValueError, match=words):
        Plan(simple([10] * 60), [Part("a", 0, 30), Part("b", 30, 60)], 40, mixture=mixture)


# Chance by number.


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 65, 1000, 4096, 12_345])
def test_a_permutation_has_every_place_once(size):
    orders = {tuple(permute(np.arange(size), size, mix(key)).tolist()) for key in range(3)}
    assert all(sorted(order) == list(range(size)) for order in orders)
    assert len(orders) == 3 or size < 4
    some = np.random.default_rng(0).integers(0, size, 7)
    whole = permute(np.arange(size), size, mix(9))
    assert permute(some, size, mix(9)).tolist() == whole[some].tolist()  # any place alone


@pytest.mark.parametrize("size", [3, 5, 17, 60])
def test_all_orders_come_equally_often(size):
    count, rounds = np.zeros((size, size)), 20_000
    places, keys = np.tile(np.arange(size), rounds), np.repeat(np.arange(rounds), size)
    np.add.at(count, (places, permute(places, size, mix(5, keys))), 1)
    expected = rounds / size
    assert ((count - expected) ** 2 / expected).sum() / (
        size - 1
    ) ** 2 < 3.5  # chi square a degree of freedom


def test_a_permutation_of_a_billion_needs_no_room():
    places = np.arange(10**9 - 5, 10**9)
    found = permute(places, 10**9, mix(1))
    assert len(set(found.tolist())) == 5 and (found >= 0).all() and (found < 10**9).all()


def test_chances_are_uniform_and_independent():
    numbers = np.arange(100_000)
    a, b = chance(1, 2, numbers), chance(1, 3, numbers)
    for drawn in (a, b, chance(numbers, 7)):
        counts = np.histogram(drawn, 20, (0, 1))[0]
        assert ((counts - 5000) ** 2 / 5000).sum() < 45  # chi square of 19 degrees of freedom: p > .0007
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.015 and abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.015
    assert chance(1, 2, 77) == a[77]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_best_fit_places_all(lengths):
    rows = best_fit(lengths, 50)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in row) <= 50 for row in rows)
