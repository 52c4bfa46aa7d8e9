import numpy as np
import pytest

from distprop.data import CharVocabulary, Loader, RandomWindows, TextWindows
from distprop.data.loader import share
from test_data import rank_of

TEXT = "To be, or not to be: that is the question.\n"


def test_a_vocabulary_is_the_sorted_characters_and_decodes_what_it_encodes():
    vocabulary = CharVocabulary(TEXT)
    assert vocabulary.characters == "".join(sorted(set(TEXT)))
    assert len(vocabulary) == len(set(TEXT))
    ids = vocabulary.encode(TEXT)
    assert (ids.dtype, ids.shape) == (np.int64, (len(TEXT),))
    assert [vocabulary.characters[i] for i in ids] == list(TEXT)
    assert vocabulary.decode(ids) == TEXT
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.decode([]) == ""


def test_a_vocabulary_holds_any_character():
    text = "naïve 日本 \U0001f600 \ud800"
    vocabulary = CharVocabulary(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda v: CharVocabulary(""), ValueError, "empty text"),
        (lambda v: v.encode("bzc"), ValueError, "the character 'z' at position 1 is not among the 3 .* 'abc'"),
        (lambda v: v.encode("ab "), ValueError, "the character ' ' at position 2"),
        (lambda v: v.decode([0, 3]), IndexError, "the number 3 at position 1 is no character; .* from 0 to 2"),
        (lambda v: v.decode([-1]), IndexError, "the number -1 at position 0"),
    ],
)
def test_a_vocabulary_says_what_it_does_not_know(call, error, message):
    with pytest.raises(error, match=message):
        call(CharVocabulary("cab"))


@pytest.mark.parametrize(("tokens", "block_size"), [(10, 3), (9, 4), (8, 4), (2, 1), (5, 4), (100, 7)])
def test_windows_make_every_token_but_a_rest_the_target_once(tokens, block_size):
    ids = np.random.default_rng(0).permutation(tokens)
    windows = TextWindows(ids, block_size)
    x, y = windows[np.arange(len(windows))]
    assert x.shape == y.shape == (len(windows), block_size)
    np.testing.assert_array_equal(x.ravel(), ids[: x.size])
    np.testing.assert_array_equal(y.ravel(), ids[1 : x.size + 1])
    assert tokens - 1 - x.size < block_size  # one more would not fit


@pytest.mark.parametrize("stride", [1, 2, 5])
def test_windows_may_overlap_or_leave_gaps(stride):
    windows = TextWindows(np.arange(12), 4, stride=stride)
    x, _ = windows[np.arange(len(windows))]
    assert x[:, 0].tolist() == list(range(0, 12 - 4, stride))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("kind", [TextWindows, RandomWindows])
def test_windows_are_int64_and_consecutive_whatever_the_tokens_are(kind, dtype):
    windows = kind(np.arange(50, dtype=dtype), 6)
    x, y = windows[np.array([1, 0, 1])]
    assert x.dtype == y.dtype == np.int64
    np.testing.assert_array_equal(np.diff(x, axis=1), 1)
    np.testing.assert_array_equal(y, x + 1)
    np.testing.assert_array_equal(x[0], x[2])
    x, y = windows[np.empty(0, np.int64)]
    assert x.shape == y.shape == (0, 6)


@pytest.mark.parametrize("kind", [TextWindows, RandomWindows])
def test_an_integer_gives_one_window_and_a_loop_all_of_them(kind):
    windows = kind(np.arange(50) % 7, 8)
    x, y = windows[np.arange(len(windows))]
    for number, examples in enumerate(windows):
        np.testing.assert_array_equal(examples, (x[number], y[number]), strict=True)
        np.testing.assert_array_equal(windows[np.int64(number)], examples, strict=True)
    assert number == len(windows) - 1
    np.testing.assert_array_equal(windows[-1], (x[-1], y[-1]), strict=True)
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_windows_read_a_memory_map(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    ids = np.memmap(tmp_path / "train.bin", np.uint16)
    windows = TextWindows(ids, 10)
    assert windows.ids is ids
    assert windows[np.array([3])][1].tolist() == [list(range(31, 41))]


def test_random_windows_begin_everywhere_with_the_same_probability():
    starts = RandomWindows(np.arange(14), 4, length=20_000)[np.arange(20_000)][0][:, 0]
    counts = np.bincount(starts)
    assert len(counts) == 10  # 0..9: the last window ends with the last token
    assert abs(counts - 2000).max() < 5 * np.sqrt(2000)


def test_where_a_window_begins_is_a_function_of_seed_epoch_and_number():
    ids, rows = np.arange(10_000), np.arange(60)
    first = RandomWindows(ids, 8, length=100, seed=1)
    x = first[rows][0]
    np.testing.assert_array_equal(x, RandomWindows(ids, 8, length=100, seed=1)[rows][0])
    np.testing.assert_array_equal(x, RandomWindows(ids, 8, length=60, seed=1)[rows][0])  # not of the length
    np.testing.assert_array_equal(x[[7, 3]], first[np.array([7, 3])][0])
    others = [RandomWindows(ids, 8, length=100, seed=2), first.at_epoch(1), first.at_epoch(2)]
    values = [x, *(other[rows][0] for other in others)]
    assert len({v.tobytes() for v in values}) == 4
    np.testing.assert_array_equal(first[rows][0], x)  # at_epoch left it alone
    np.testing.assert_array_equal(first.at_epoch(2).at_epoch(0)[rows][0], x)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_ranks_together_get_the_windows_of_one_process_and_new_ones_each_epoch(size):
    windows = RandomWindows(np.arange(5000), 8, length=30, seed=3)

    def epochs(comm):
        loader = Loader(windows, batch_size=7, comm=comm, seed=3)
        return [[x for x, _ in loader] for _ in range(2)]

    alone, ranks = epochs(None), [epochs(rank_of(rank, size)) for rank in range(size)]
    for epoch in range(2):
        for batch, whole in enumerate(alone[epoch]):
            np.testing.assert_array_equal(np.concatenate([rank[epoch][batch] for rank in ranks]), whole)
            assert len(ranks[0][epoch][batch]) == share(len(whole), 0, size).stop
    starts = [{int(x[0]) for batch in epoch for x in batch} for epoch in alone]
    assert len(starts[0] & starts[1]) < 5


def test_an_epoch_of_random_windows_is_about_as_long_as_the_text():
    assert len(RandomWindows(np.arange(1000), 64)) == 15
    assert len(RandomWindows(np.arange(5), 4)) == 1


@pytest.mark.parametrize("kind", [TextWindows, RandomWindows])
@pytest.mark.parametrize(
    ("ids", "block_size", "error", "message"),
    [
        ("a text", 2, TypeError, "takes token numbers, got a text: encode it with CharVocabulary"),
        (np.zeros((3, 4), int), 2, TypeError, r"integers of shape \(n,\), got int64 of shape \(3, 4\)"),
        (np.zeros(9), 2, TypeError, "got float64"),
        (np.arange(5), 5, ValueError, "block_size 5 and 5 tokens; .* one token more"),
        (np.arange(5), 0, ValueError, "block_size 0 and 5 tokens"),
    ],
)
def test_windows_say_what_they_cannot_cut(kind, ids, block_size, error, message):
    with pytest.raises(error, match=f"{kind.__name__} .*{message}"):
        kind(ids, block_size)


def test_a_length_or_stride_below_one_is_refused():
    with pytest.raises(ValueError, match="a length of 1 or more, got 0"):
        RandomWindows(np.arange(9), 2, length=0)
    with pytest.raises(ValueError, match="a stride of 1 or more, got 0"):
        TextWindows(np.arange(9), 2, stride=0)
