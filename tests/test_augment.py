import itertools

import numpy as np
import pytest

from distprop.data import (
    ArrayDataset,
    Augmented,
    Loader,
    RandomCrop,
    RandomHorizontalFlip,
    RandomRotation,
    RandomShift,
)
from test_data import rank_of

ALL = [RandomCrop(6, padding=1), RandomShift(2), RandomHorizontalFlip(), RandomRotation(30)]


def images(n=12, channels=2, height=8, width=8, dtype=np.float32):
    return np.random.default_rng(0).uniform(0.1, 1, (n, channels, height, width)).astype(dtype)


def numbers(n, draws, seed=0):
    return np.random.default_rng(seed).random((n, draws))


# what each transform does to an image


def test_a_crop_is_a_window_of_the_padded_image():
    x = images(300, height=5, width=6)
    crops = RandomCrop(4, padding=1)(x, numbers(300, 2))
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    assert crops.shape == (300, 2, 4, 4)
    found = set()
    for image, crop in zip(padded, crops, strict=True):
        places = [(t, e) for t in range(4) for e in range(5) if np.array_equal(image[:, t : t + 4, e : e + 4], crop)]
        assert len(places) == 1
        found |= set(places)
    assert len(found) == 20  # everywhere


def test_numbers_choose_the_place_from_the_upper_left_to_the_lower_right():
    x = images(3, height=5, width=5)
    rows = np.array([[0.0, 0.0], [1 - 1e-16, 1 - 1e-16], [0.5, 0.0]])
    crops = RandomCrop(3)(x, rows)
    np.testing.assert_array_equal(crops[0], x[0, :, :3, :3])
    np.testing.assert_array_equal(crops[1], x[1, :, 2:, 2:])
    np.testing.assert_array_equal(crops[2], x[2, :, 1:4, :3])


@pytest.mark.parametrize("pixels", [1, 2])
def test_a_shift_moves_the_image_and_lets_zeros_in(pixels):
    x = images(200)
    shifted = RandomShift(pixels)(x, numbers(200, 2))
    found = set()
    for image, result in zip(x, shifted, strict=True):
        for dy, dx in itertools.product(range(-pixels, pixels + 1), repeat=2):
            expected = np.zeros_like(image)
            expected[:, max(dy, 0) : 8 + dy, max(dx, 0) : 8 + dx] = image[:, max(-dy, 0) : 8 - dy, max(-dx, 0) : 8 - dx]
            if np.array_equal(expected, result):
                found.add((dy, dx))
                break
        else:
            pytest.fail("no shift by so many pixels")
    assert len(found) == (2 * pixels + 1) ** 2


def test_a_flip_mirrors_its_share_of_the_images():
    x = images(1000, channels=1, height=2, width=3)
    for p in (0.0, 0.3, 1.0):
        flipped = RandomHorizontalFlip(p)(x, numbers(1000, 1))
        mirrored = [np.array_equal(a, b[..., ::-1]) for a, b in zip(flipped, x, strict=True)]
        same = [np.array_equal(a, b) for a, b in zip(flipped, x, strict=True)]
        assert all(a != b for a, b in zip(mirrored, same, strict=True))
        assert abs(np.mean(mirrored) - p) < 0.06


@pytest.mark.parametrize(("height", "width"), [(8, 8), (5, 9), (28, 28), (1, 4)])
@pytest.mark.parametrize("degrees", [5, 45, 180])
def test_a_rotation_agrees_with_pytorchs_grid_sample(height, width, degrees, torch):
    x = images(9, 2, height, width, np.float64)
    chances = numbers(9, 1)
    angle = np.deg2rad((2 * chances[:, 0] - 1) * degrees)
    ratio = width / height  # affine_grid measures both sides of the image as 2
    theta = np.zeros((9, 2, 3))
    theta[:, 0, 0] = theta[:, 1, 1] = np.cos(angle)
    theta[:, 0, 1], theta[:, 1, 0] = -np.sin(angle) / ratio, np.sin(angle) * ratio
    grid = torch.nn.functional.affine_grid(torch.tensor(theta), x.shape, align_corners=False)
    expected = torch.nn.functional.grid_sample(torch.tensor(x), grid, align_corners=False).numpy()
    np.testing.assert_allclose(RandomRotation(degrees)(x, chances), expected, atol=1e-12)


def test_a_quarter_turn_is_counter_clockwise_and_exact():
    x = images(1, dtype=np.float64)
    turned = RandomRotation(90)(x, np.array([[1.0]]))
    np.testing.assert_allclose(turned, np.rot90(x, axes=(2, 3)), atol=1e-12)


def test_the_angle_is_uniform_on_both_sides():
    bar = np.zeros((1, 1, 41, 41))
    bar[..., 20, :] = 1
    rows = np.array([[0.0], [0.5], [1.0]])
    turned = RandomRotation(20)(np.repeat(bar, 3, axis=0), rows)
    middle = turned[:, 0, :, 35].argmax(1) - 20  # how far down the bar lies 15 pixels right of the middle
    assert middle.tolist() == [5, 0, -5]  # 15 tan(20°) = 5.5


@pytest.mark.parametrize("transform", ALL, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_transform_keeps_the_dtype_its_input_and_the_order_and_takes_no_images_too(transform, dtype):
    x = images(dtype=dtype)
    x.setflags(write=False)
    chances = numbers(12, transform.draws)
    result = transform(x, chances)
    assert result.dtype == dtype
    alone = [transform(x[i : i + 1], chances[i : i + 1])[0] for i in range(12)]
    np.testing.assert_array_equal(result, alone)
    assert transform(x[:0], chances[:0]).shape == (0, *result.shape[1:])


@pytest.mark.parametrize("transform", ALL, ids=str)
def test_a_transform_says_which_shape_it_needs(transform):
    with pytest.raises(ValueError, match=r"got images of shape \(12, 64\); it needs \(n, channels, height, width\)"):
        transform(images(12, 1, 8, 8).reshape(12, 64), numbers(12, transform.draws))


def test_a_crop_larger_than_the_padded_image_is_refused():
    with pytest.raises(ValueError, match=r"RandomCrop\(size=11, padding=1\) got .* \(2, 1, 8, 12\), too small"):
        RandomCrop(11, padding=1)(np.zeros((2, 1, 8, 12)), numbers(2, 2))
    for size in (1, 10):
        assert RandomCrop(size, padding=1)(np.zeros((2, 1, 8, 12)), numbers(2, 2)).shape == (2, 1, size, size)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop(0), r"RandomCrop\(size=0, padding=0\): the size must be 1 or more"),
        (lambda: RandomCrop(6, -1), "padding 0 or more"),
        (lambda: RandomShift(-1), r"RandomShift\(pixels=-1\): .* 0 or more"),
        (lambda: RandomHorizontalFlip(1.5), r"RandomHorizontalFlip\(p=1.5\): .* between 0 and 1"),
    ],
)
def test_arguments_out_of_range_are_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomCrop(2.5), "RandomCrop: size must be an integer, got 2.5"),
        (lambda: RandomCrop(6, "a"), "RandomCrop: padding must be an integer, got 'a'"),
        (lambda: RandomShift(1.5), "RandomShift: pixels must be an integer, got 1.5"),
        (lambda: RandomHorizontalFlip("a"), "RandomHorizontalFlip: p must be a number, got 'a'"),
        (lambda: RandomRotation("a"), "RandomRotation: degrees must be a number, got 'a'"),
    ],
)
def test_arguments_of_another_type_are_refused_at_once(make, message):
    with pytest.raises(TypeError, match=message):
        make()


def test_a_rotation_of_integers_is_refused():
    with pytest.raises(TypeError, match="dtype uint8; means of pixels need floating point"):
        RandomRotation(10)(np.zeros((1, 1, 4, 4), np.uint8), numbers(1, 1))


# the dataset


def augmented(n=13, transforms=ALL, **options):
    return Augmented(ArrayDataset(images(n), np.arange(n)), transforms, **options)


def by_example(loader):
    """What an epoch made of each example."""
    return {int(label): image for x, y in loader for image, label in zip(x, y, strict=True)}


@pytest.mark.parametrize("prefetch", [0, 1])
@pytest.mark.parametrize("size", [1, 3])
def test_an_example_gets_the_same_change_on_any_rank_in_any_batch(size, prefetch):
    dataset = augmented(seed=4)
    alone = Loader(dataset, batch_size=13, seed=0, shuffle=False)
    ranks = [Loader(dataset, batch_size=5, seed=9, comm=rank_of(r, size), prefetch=prefetch) for r in range(size)]
    epochs = []
    for _ in range(2):
        expected = by_example(alone)
        found = [by_example(loader) for loader in ranks]
        assert sorted(label for part in found for label in part) == list(range(13))
        for part in found:
            for label, image in part.items():
                np.testing.assert_array_equal(image, expected[label])
        epochs.append(expected)
    assert all(not np.array_equal(epochs[0][label], epochs[1][label]) for label in range(13))


def test_a_resumed_epoch_makes_the_same_images():
    loader = Loader(augmented(), batch_size=4)
    whole = [x for x, _ in loader.batches(2)]
    for batch, (x, _) in enumerate(loader.batches(2, start=1), start=1):
        np.testing.assert_array_equal(x, whole[batch])


def test_changes_differ_between_examples_seeds_epochs_and_transforms():
    same = Augmented(ArrayDataset(np.repeat(images(1), 40, axis=0)), ALL)
    everything = np.arange(40)
    sets = [same, same.at_epoch(1), Augmented(same.dataset, ALL, seed=1), Augmented(same.dataset, ALL[::-1])]
    made = [dataset[everything][0] for dataset in sets]
    assert len({x.tobytes() for x in made}) == 4
    assert len({image.tobytes() for image in made[0]}) > 35
    twice = Augmented(same.dataset, [RandomHorizontalFlip(), RandomHorizontalFlip()])[everything][0]
    assert not np.array_equal(twice, same.dataset.x)  # the two flips do not undo each other


def test_at_epoch_is_a_view_and_reaches_the_dataset_inside():
    inner = Augmented(ArrayDataset(images()), [RandomShift(2)])
    outer = Augmented(inner, [RandomHorizontalFlip()], seed=3)
    rows = np.arange(12)
    before = outer[rows][0]
    later = outer.at_epoch(5)
    by_hand = Augmented(inner.at_epoch(5), [RandomHorizontalFlip()], seed=3, epoch=5)
    np.testing.assert_array_equal(later[rows][0], by_hand[rows][0])
    np.testing.assert_array_equal(outer[rows][0], before)
    assert not np.array_equal(later.dataset[rows][0], inner[rows][0])


def test_what_comes_behind_the_images_stays_and_any_index_works():
    dataset = augmented()
    x, y = dataset[np.array([5, 2, 5])]
    assert y.tolist() == [5, 2, 5]
    np.testing.assert_array_equal(x[0], x[2])
    np.testing.assert_array_equal(dataset[slice(2, 6)][0][0], x[1])
    assert [len(part) for part in dataset[np.empty(0, np.int64)]] == [0, 0]
    assert len(dataset) == 13


def test_an_integer_gives_one_example_and_a_loop_all_of_them():
    dataset = augmented()
    x, y = dataset[np.arange(len(dataset))]
    for number, (image, label) in enumerate(dataset):
        np.testing.assert_array_equal(image, x[number], strict=True)
        assert label == y[number]
    assert number == len(dataset) - 1


def test_a_transform_of_ones_own_needs_two_names():
    class Darker:
        draws = 1

        def __call__(self, images, numbers):
            return images * numbers[:, :, None, None].astype(images.dtype)

    x = augmented(transforms=[Darker()])[np.arange(13)][0]
    assert len(np.unique((x / images(13))[:, 0, 0, 0].round(4))) == 13
