"""Folders, subsets and splits of images."""

import os

import numpy as np
import pytest
from PIL import Image

from bitkern.transfer import data
from bitkern.transfer.data.decoders import read_image
from bitkern.transfer.data.lazy_images import Labels, LazyImages
from bitkern.transfer.data.lazy_images import labelled_set as labelled
from tests.transfer.images import CLASSES, image_set, picture, write_folder


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def test_image_folder(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "train" / "bee" / "notes.txt").write_text("not an image")
    (folder / "train" / "bee" / ".hidden.jpg").write_text("nor this")
    (folder / "train" / ".cache").mkdir()
    deeper = folder / "train" / "bee" / "more"
    deeper.mkdir()
    Image.fromarray(picture(1, 9)).save(deeper / "9.png")
    found = data.image_folder(folder, "train")
    assert found.classes == CLASSES
    assert found.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 4
    assert all(CLASSES[label] in path for path, label in zip(*found[:2], strict=True))
    assert data.image_size(found) == (13, 17)


def test_median_image_size(tmp_path):
    sizes = [(10, 90), (20, 30), (5, 5)]
    images = [picture(0, 0, *size) for size in sizes]
    assert data.image_size(data.ImageSet(images, np.zeros(3, np.int64), ("a",))) == (20, 30)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK", "LA"])
def test_reads_any_8_bit_mode_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(picture(0, 0)).convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (17, 13)


def test_does_not_clip_floats(tmp_path):
    Image.fromarray(np.full((8, 8), 5000, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(data.DataError, match="8 bits"):
        read_image(tmp_path / "a.tif")


def with_orientation(path, value, **options):
    """Four pixels wide and two high, the first of them white, and what the camera says of it."""
    pixels = np.zeros((2, 4), np.uint8)
    pixels[0, 0] = 255
    exif = Image.Exif()
    exif[0x0112] = value
    Image.fromarray(pixels).save(path, exif=exif, **options)


SAVE = {"webp": {"lossless": True}}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp"])
@pytest.mark.parametrize(
    ("value", "size", "white"),
    [(1, (4, 2), (0, 0)), (3, (4, 2), (3, 1)), (6, (2, 4), (1, 0)), (8, (2, 4), (0, 3))],
)
def test_turns_photographs_upright(tmp_path, suffix, value, size, white):
    path = tmp_path / f"a.{suffix}"
    with_orientation(path, value, **SAVE.get(suffix, {}))
    image = read_image(path)
    assert image.size == size and image.mode == "RGB"
    assert image.getpixel(white) == (255, 255, 255)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_make_an_image_unreadable(tmp_path):
    path = tmp_path / "a.jpg"
    with_orientation(path, 6)
    data = path.read_bytes()
    start = data.index(b"Exif\0\0") + 6
    for damage in (b"\xff" * 8, b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0"):
        path.write_bytes(data[:start] + damage + data[start + len(damage) :])
        assert set(read_image(path).size) == {2, 4}


def remove_test(folder):
    os.rename(folder / "test", folder / "elsewhere")


def empty_test(folder):
    remove_test(folder)
    (folder / "test").mkdir()


def empty_class(folder):
    for path in (folder / "test" / "bee").iterdir():
        path.unlink()


def one_class(folder):
    remove_test(folder)
    (folder / "test").mkdir()
    os.rename(folder / "elsewhere", folder / "test" / "images")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove_test, "test: no such folder; expected images in .*/test/CLASS/"),
        (empty_test, "test: has 0 class folders, at least 2 are needed"),
        (one_class, "test: has 1 class folder, at least 2 are needed"),
        (empty_class, "bee: no images"),
    ],
)
def test_rejects_folders(tmp_path, damage, message):
    folder = write_folder(tmp_path)
    damage(folder)
    with pytest.raises(data.DataError, match=message):
        data.image_folder(folder, "test")


def test_few_shot_is_drawn_by_the_seed():
    whole = image_set(per_class=9)
    shots = data.few_shot(whole, 4, seed=1)
    assert np.bincount(shots.labels).tolist() == [4, 4, 4]
    assert shots.labels.tolist() == whole.labels[chosen(whole, shots)].tolist()
    assert chosen(whole, shots) == chosen(whole, data.few_shot(whole, 4, seed=1))
    others = {tuple(chosen(whole, data.few_shot(whole, 4, seed=s))) for s in range(20)}
    assert len(others) > 15
    within = [[i % 9 for i in chosen(whole, shots)[k : k + 4]] for k in (0, 4, 8)]
    assert within[0] != within[1] or within[1] != within[2], "classes must not share a draw"
    assert chosen(whole, data.few_shot(whole, 9, seed=3)) == list(range(27))


def chosen(whole, part):
    """Positions in ``whole`` of the images of ``part``."""
    places = {id(image): i for i, image in enumerate(whole.images)}
    return [places[id(image)] for image in part.images]


def test_hold_out_splits_every_class():
    whole = image_set(per_class=10)
    kept, held = data.hold_out(whole, 0.2, seed=0)
    assert np.bincount(held.labels).tolist() == [2, 2, 2]
    assert sorted(chosen(whole, kept) + chosen(whole, held)) == list(range(30))
    assert chosen(whole, held) == chosen(whole, data.hold_out(whole, 0.2, seed=0)[1])
    assert chosen(whole, held) != chosen(whole, data.hold_out(whole, 0.2, seed=1)[1])


def test_hold_out_leaves_both_parts_an_example():
    whole = image_set(per_class=3)
    for fraction, expected in ((0.01, 1), (0.99, 2)):
        _, held = data.hold_out(whole, fraction, seed=0)
        assert np.bincount(held.labels).tolist() == [expected] * 3
    single = whole.subset([0, 3, 4, 6])
    kept, held = data.hold_out(single, 0.5, seed=0)
    assert np.bincount(kept.labels).tolist() == [1, 1, 1]
    assert held.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: data.few_shot(s, 6, 0), "shots: expected at most 5, all of 'ant', got 6"),
        (lambda s: data.few_shot(s, 0, 0), "shots: expected a positive number, got 0"),
        (lambda s: data.hold_out(s, 1.0, 0), "holdout: expected a fraction"),
        (lambda s: data.hold_out(s, 0.0, 0), "holdout: expected a fraction"),
        (lambda s: data.hold_out(s.subset([0, 5, 10]), 0.5, 0), "more than one training image"),
    ],
)
def test_rejects_subsets(call, message):
    with pytest.raises(data.DataError, match=message):
        call(image_set())


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("ab", "test: expected the 3 classes of train; missing: c"),
        ("abcd", "unexpected: d"),
        ("abx", "missing: c; unexpected: x"),
        ("acb", "found another order"),
    ],
)
def test_classes_must_agree(classes, message):
    data.check_same_classes("abc", "abc", "test", "train")
    with pytest.raises(data.DataError, match=message):
        data.check_same_classes(classes, "abc", "test", "train")


def test_digits():
    train_set, test_set = data.digits("train"), data.digits("test")
    assert len(train_set.images) + len(test_set.images) == 1797
    assert min(np.bincount(train_set.labels)) > 80 and min(np.bincount(test_set.labels)) > 80
    pixels = np.stack(train_set.images)
    assert pixels.dtype == np.uint8 and pixels.shape[1:] == (8, 8)
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert read_image(train_set.images[0]).mode == "RGB"


def test_labels_take_no_room_for_classes_that_images_have_not():
    values = np.stack([np.arange(2000), np.full(2000, 999_999), np.arange(2000)], 1)
    images = LazyImages(lambda row: None, np.arange(2000))
    found = labelled(images, Labels(values.ravel(), np.full(2000, 3), None), None, "here")
    assert found.labels.shape == (2000, 1_000_000) and found.multi_label  # 2 GB, were it dense
    assert found.labels.data.nbytes + found.labels.indices.nbytes < 25_000
    assert np.flatnonzero(found.subset([3, 7]).labels_of([1])).tolist() == [7, 999_999]
    assert found.labels.sum(0)[999_999] == 2000
