"""Files as people have them, folders, subsets and splits: what is read, and what is said."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from bitkern import files
from bitkern.transfer import DataError, data
from bitkern.transfer.data import decoders
from bitkern.transfer.data.decoders import DECODERS, SCALED, read_image, read_region
from bitkern.transfer.data.lazy_images import Labels, LazyImages
from bitkern.transfer.data.lazy_images import labelled_set as labelled
from bitkern.transfer.data.open_images import ImageReadOptions, open_resized
from bitkern.transfer.data.resized import ResizedImages
from tests.transfer.images import CLASSES, image_set, picture, write_folder


@pytest.fixture(autouse=True)
def nothing_noted():
    decoders.notes.clear()


def test_what_pillow_reads_is_read_and_the_rest_is_counted(tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    bees = folder / "train" / "bee"
    for suffix in ("jfif", "avif", "jp2", "TIF", "bmp", "qoi"):
        Image.fromarray(picture(1, 9)).save(bees / f"a.{suffix}")
    for name in ("notes.txt", "b.txt", "Thumbs.db", "README", ".hidden", "page.eps"):
        (bees / name).write_text("no image")
    os.mkfifo(bees / "pipe.jpg")
    (bees / "nowhere.png").symlink_to(tmp_path / "nowhere")
    found = data.image_folder(folder, "train")
    assert np.bincount(found.labels).tolist() == [4, 10, 4]
    for image in found.images:
        read_image(image)
    where, counts = capsys.readouterr().err.strip().split(": not images, left out: ")
    assert where == str(folder / "train")
    counted = {"2 .txt", "2 that are no files", "1 .db", "1 .eps", "1 without a suffix"}
    assert {*counts.split(", ")} == counted


def test_a_folder_is_read_once(tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    bees = folder / "train" / "bee"
    (bees / "again").symlink_to(bees)
    (bees / "deeper").mkdir()
    (bees / "deeper" / "up").symlink_to(folder / "train" / "bee")
    assert len(data.image_folder(folder, "train").images) == 12
    said = f"{folder}/train: 2 folders that are linked more than once, read once\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.filterwarnings("ignore:The image decoding")
def test_sixteen_bits_are_scaled_and_floats_refused(tmp_path, capsys, suffix, decoder):
    grey = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(grey).save(path)
    if (suffix, decoder) != ("tif", "torchvision"):  # which reads no TIFF
        for _ in range(2):
            pixels = DECODERS[decoder](path, 64)
        assert np.array_equal(pixels, np.rint(grey / 257).astype(np.uint8)[:, :, None].repeat(3, 2))
        assert capsys.readouterr().err == f"{SCALED}\n" and [*decoders.notes] == [SCALED]
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif"):
        DECODERS[decoder](tmp_path / "a.tif", 64)


def test_a_cache_remembers_that_images_were_scaled(tmp_path, capsys):
    Image.fromarray(np.full((9, 9), 4000, np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(picture(1, 9)).save(tmp_path / "a.png")
    for names, said in ((["a.png"], []), (["deep.png", "a.png"], [SCALED])):
        for _ in range(2):  # filled, then taken as it is
            decoders.notes.clear()
            open_resized([tmp_path / name for name in names], 12, ImageReadOptions("disk"))
            assert [*decoders.notes] == capsys.readouterr().err.splitlines() == said


OPTIONS = {"webp": {"lossless": True}, "avif": {"quality": 100, "subsampling": "4:4:4"}}
OPTIONS["heic"] = {"quality": 100, "chroma": 444}


# What a camera held in another way stores, so that turning it as EXIF says gives the picture.
STORED = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270"
STORED = {number: Image.Transpose[name] for number, name in enumerate(STORED.split(), 2)}


@pytest.mark.parametrize(
    ("decoder", "suffix"),
    [("pillow", suffix) for suffix in ("jpg", "png", "webp", "avif", "heic", "tif", "lzw.tif")]
    + [("torchvision", suffix) for suffix in ("jpg", "png", "webp")],  # it reads no others
)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.filterwarnings("ignore:The image decoding")
def test_upright_in_every_format_decoder_and_region(tmp_path, suffix, orientation, decoder):
    shown = np.zeros((16, 32, 3), np.uint8)  # a white corner, and a red one, at the upper side
    shown[:8, :8], shown[:8, 24:] = 255, (255, 0, 0)
    image = Image.fromarray(shown)
    image = image.transpose(STORED[orientation]) if orientation in STORED else image
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"compression": "tiff_lzw"} if suffix == "lzw.tif" else OPTIONS.get(suffix, {})
    image.save(tmp_path / f"a.{suffix}", exif=exif.tobytes(), **options)

    def region(height, width):
        assert (height, width) == (16, 32)
        return 0, 24, 8, 8

    read = DECODERS[decoder]
    whole = read(tmp_path / f"a.{suffix}", 16).astype(int)
    corner = read(tmp_path / f"a.{suffix}", 8, region).astype(int)
    assert np.abs(whole[2, 1] - 255).max() < 60 and np.abs(whole[2, 14] - (255, 0, 0)).max() < 60
    assert np.abs(corner[4, 4] - (255, 0, 0)).max() < 60


def test_a_test_set_without_some_classes(tmp_path, capsys):
    folder = write_folder(tmp_path / "data")
    shutil.rmtree(folder / "test" / "bee")
    (folder / "test" / "cat" / "0.jpg").unlink()
    (folder / "test" / "cat" / "1.png").unlink()
    found = data.load_split(folder, "test", CLASSES)
    assert found.classes == CLASSES and found.labels.tolist() == [0, 0]
    said = f"{folder}/test: no images of 2 of 3 classes: bee, cat\n"
    assert capsys.readouterr().err == said
    shutil.rmtree(folder / "test" / "ant")
    with pytest.raises(DataError, match="test: no images; expected some"):
        data.load_split(folder, "test", CLASSES)


def test_classes_in_two_forms_of_unicode():
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    with pytest.raises(DataError) as error:
        data.check_same_classes(["a", names[0]], ["a", names[1]], "test", "train")
    message = str(error.value)
    assert r"missing: 'cafe\u0301'; unexpected: 'caf\xe9'" in message and "Unicode" in message


def test_other_names_of_splits(tmp_path):
    folder = write_folder(tmp_path / "data")
    for name in ("valid", "validation", "val"):  # the later ones go before
        shutil.copytree(folder / "test", folder / name)
        (folder / name / "ant" / "0.jpg").rename(folder / name / "ant" / f"{name}.jpg")
    shutil.rmtree(folder / "test")
    assert any(image.endswith("val.jpg") for image in data.load_split(folder, "test").images)
    with pytest.raises(DataError, match=rf"name the folder above it: --data {folder}$"):
        data.load_split(folder / "train", "train")


def test_a_flat_folder_of_classes(tmp_path):
    folder = write_folder(tmp_path / "data") / "train"
    flat = folder.rename(tmp_path / "flat")
    with pytest.raises(DataError, match=r"flat/train: no such folder; if .*--holdout 0.2 tests on"):
        data.load_split(flat, "train")
    assert len(data.load_split(flat, "train", flat=True).images) == 12
    assert len(data.load_split(flat, "test", CLASSES, flat=True).images) == 12


def test_corrupt_images_are_named_at_once(tmp_path):
    paths = []
    for i in range(30):
        paths.append(str(tmp_path / f"{i:02}.png"))
        Image.fromarray(picture(0, i)).save(paths[-1])
        if i % 6:
            (tmp_path / f"{i:02}.png").write_bytes(b"nothing")
    resized = ResizedImages(paths, 8, DECODERS["pillow"])
    with pytest.raises(DataError) as error:
        resized.decode_all(lambda *_: None, skip_corrupt=False)
    message = str(error.value)
    assert message.startswith(f"25 images cannot be read: {paths[1]}: not a readable image (")
    assert message.count("not a readable") == 20 and "; and 5 more: repair or delete" in message


def test_read_region_of_what_has_no_format():
    image, box = read_region(picture(0, 0), 8, lambda height, width: (1, 2, height - 1, width - 2))
    assert image.size == (17, 13) and box == (2, 1, 17, 13)


@pytest.mark.parametrize("error", [OSError(28, "No space"), RuntimeError("PytorchStreamWriter")])
def test_a_full_disk_is_named(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_text("whole")
    message = rf"^{path}: cannot be written: .*; \d+\.\d+ GB are free there"
    with pytest.raises(OSError, match=message), files.atomic_write(path) as part:
        part.write_text("half")
        raise error
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert path.read_text() == "whole"


def test_image_folder(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "train" / ".cache").mkdir()
    deeper = folder / "train" / "bee" / "more"
    deeper.mkdir()
    Image.fromarray(picture(1, 9)).save(deeper / "9.png")
    found = data.image_folder(folder, "train")
    assert found.classes == CLASSES
    assert found.labels.tolist() == [0] * 4 + [1] * 5 + [2] * 4
    assert all(CLASSES[label] in path for path, label in zip(*found[:2], strict=True))
    assert data.image_size(found) == (13, 17)


def test_median_image_size():
    images = [picture(0, 0, *size) for size in [(10, 90), (20, 30), (5, 5)]]
    assert data.image_size(data.ImageSet(images, np.zeros(3, np.int64), ("a",))) == (20, 30)


@pytest.mark.parametrize("mode", ["L", "P", "1", "RGBA", "CMYK", "LA"])
def test_reads_any_8_bit_mode_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.fromarray(picture(0, 0)).convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == (17, 13)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_data_does_not_make_an_image_unreadable(tmp_path):
    path, exif = tmp_path / "a.jpg", Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (4, 2)).save(path, exif=exif)
    data = path.read_bytes()
    start = data.index(b"Exif\0\0") + 6
    for damage in (b"\xff" * 8, b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0"):
        path.write_bytes(data[:start] + damage + data[start + len(damage) :])
        assert set(read_image(path).size) == {2, 4}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        ([], "test: no such folder; expected images in .*/test/CLASS/"),
        (["test"], "test: has 0 class folders, at least 2 are needed"),
        (["test/ant"], "test: has 1 class folder, at least 2 are needed"),
        (["test/ant", "test/bee"], "ant: no images"),
    ],
)
def test_rejects_folders(tmp_path, folders, message):
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(data.DataError, match=message):
        data.image_folder(tmp_path, "test")


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
