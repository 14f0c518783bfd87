"""Files as people have them: which are read, what is said of others, and in which way up."""

import os
import shutil
import unicodedata

import numpy as np
import pytest
from PIL import Image

from bitkern import files
from bitkern.transfer import DataError, data
from bitkern.transfer.data import decoders
from bitkern.transfer.data.decoders import DECODERS, read_image, read_region
from bitkern.transfer.data.resized import ResizedImages
from tests.transfer.images import CLASSES, picture, write_folder


@pytest.fixture(autouse=True)
def nothing_noted(monkeypatch):
    monkeypatch.setattr(decoders, "notes", {})


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
        said = "16-bit images are scaled to 8 bits by their full range"
        assert capsys.readouterr().err == f"{said}\n" and [*decoders.notes] == [said]
    Image.fromarray(grey.astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="a.tif"):
        DECODERS[decoder](tmp_path / "a.tif", 64)


OPTIONS = {"webp": {"lossless": True}, "avif": {"quality": 100, "subsampling": "4:4:4"}}


@pytest.mark.parametrize(
    ("decoder", "suffix"),
    [("pillow", suffix) for suffix in ("jpg", "png", "webp", "avif", "tif", "lzw.tif")]
    + [("torchvision", suffix) for suffix in ("jpg", "png", "webp")],  # it reads no others
)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.filterwarnings("ignore:The image decoding")
def test_upright_in_every_format_decoder_and_region(tmp_path, suffix, orientation, decoder):
    shown = np.zeros((16, 32, 3), np.uint8)  # a white corner, and a red one, at the upper side
    shown[:8, :8], shown[:8, 24:] = 255, (255, 0, 0)
    turn = Image.Transpose
    # What a camera held in another way stores, so that turning it as EXIF says gives the picture.
    stored = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    image = Image.fromarray(shown)
    image = image.transpose(stored[orientation]) if orientation > 1 else image
    exif = image.getexif()
    exif[0x0112] = orientation
    options = {"compression": "tiff_lzw"} if suffix == "lzw.tif" else OPTIONS.get(suffix, {})
    image.save(tmp_path / f"a.{suffix}", exif=exif, **options)

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
    with pytest.raises(
        OSError, match=rf"^{path}: cannot be written: .*; \d+\.\d+ GB are free there"
    ):
        with files.atomic_write(path) as part:
            part.write_text("half")
            raise error
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]
    assert path.read_text() == "whole"
