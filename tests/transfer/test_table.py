"""Images and labels from a CSV file."""

import numpy as np
import pytest
from PIL import Image

from bitkern.transfer import DataError, data, hold_out
from tests.cli.commands import SMALL, call, finetune_error, json_of, summary_of
from tests.transfer.images import picture

LABELS = ("ant;bee", "", "cat", "bee", "bee; cat ;", "ant")


def table(root, text):
    root.mkdir(exist_ok=True)
    for i in range(6):
        Image.fromarray(picture(i % 3, i)).save(root / f"{i}.png")
    path = root / "data.csv"
    path.write_text(text, encoding="utf-8")
    return path


def multi_label_table(root):
    rows = [f"{i}.png,{labels},{'test' if i > 3 else 'train'}" for i, labels in enumerate(LABELS)]
    return table(root, "\n".join(["image,labels,split", *rows]))


def test_one_label_an_image(tmp_path):
    text = '\ufeffsplit,image,note,label\ntrain,0.png,x,"b, ""2"""\ntest,1.png,,a\n'
    path = table(tmp_path, text)
    train_set = data.image_table(path, "train")
    assert train_set.classes == ("a", 'b, "2"')
    assert train_set.images == [str(tmp_path / "0.png")]
    assert train_set.labels.dtype == np.int64 and train_set.labels.tolist() == [1]
    assert not train_set.multi_label
    test_set = data.load_split(str(path), "test")
    assert test_set.labels.tolist() == [0]


def test_several_labels_an_image(tmp_path):
    train_set = data.image_table(multi_label_table(tmp_path), "train")
    assert train_set.classes == ("ant", "bee", "cat") and train_set.multi_label
    assert train_set.labels.dtype == np.bool_
    assert train_set.labels.astype(int).tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0]]
    kept, held = hold_out(train_set, 0.25, seed=0)
    assert (len(kept.images), len(held.images)) == (3, 1) and held.labels.shape == (1, 3)
    with pytest.raises(DataError, match="shots: expected one label per image"):
        data.few_shot(train_set, 1, 0)


def test_without_splits_every_row_is_in_both(tmp_path):
    path = table(tmp_path, "image,label\n0.png,a\n1.png,b\n")
    train_set, test_set = (data.image_table(path, split) for split in ("train", "test"))
    assert train_set.images == test_set.images
    with pytest.raises(DataError, match="0.png is in the training set and in the test set"):
        data.check_apart(train_set, test_set, str(path))


def test_given_classes(tmp_path):
    path = table(tmp_path, "image,label\n0.png,b\n1.png,b\n")
    found = data.image_table(path, "test", classes=("a", "b", "c"))
    assert found.classes == ("a", "b", "c") and found.labels.tolist() == [1, 1]
    with pytest.raises(DataError, match="line 2: expected one of 2 classes, got 'b'"):
        data.image_table(path, "test", classes=("a", "c"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the columns image and label, or labels, found an empty file"),
        ("image,class\n0.png,a\n", "or labels, found image, class"),
        ("image,label,labels\n0.png,a,a\n", "expected the columns image and label"),
        ("image,label\n", "holds labels of 0 classes, need two"),
        ("image,label\n0.png,a\n1.png,a\n", "holds labels of 1 classes, need two"),
        ("image,labels\n0.png,\n", "holds labels of 0 classes"),
        ("image,label\n0.png,a\n1.png\n", "line 3: label: expected one, got none"),
        ("image,label\n0.png,a\n ,b\n", "line 3: image: expected a path, got none"),
        ("image,label\n0.png,a\n9.png,b\n", "line 3: .*9.png: no such file"),
        ("image,label\n0.png,a\n0.png,b\n", "line 3: .*0.png is named twice"),
        ("image,label,split\n0.png,a,dev\n1.png,b,test", "line 2: split: expected train, test"),
        ("image,label,split\n0.png,a,test\n1.png,b,test", "no images of the split train"),
        ('image,label\n0.png,"a\n', "truncated or not a CSV file"),
    ],
)
def test_bad_files(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        data.image_table(table(tmp_path, text), "train")


def test_not_text(tmp_path):
    path = table(tmp_path, "")
    path.write_bytes(b"image,label\n0.png,\xff\xfe\n")
    with pytest.raises(DataError, match="not UTF-8: save it as CSV UTF-8"):
        data.image_table(path, "train")
    with pytest.raises(DataError, match="none.csv: no such file"):
        data.image_table(tmp_path / "none.csv", "train")


def test_finetune_evaluate_predict(tmp_path, capsys):
    path, out = multi_label_table(tmp_path / "data"), tmp_path / "out"
    options = [*SMALL, "--balance", "loss", "--mixup-alpha", "0.2", "--batch-split", "2"]
    assert call("finetune", "--data", path, "--out", out, *options) == 0
    assert "3 classes, several labels per image" in capsys.readouterr().out
    summary = summary_of(out)
    assert (summary["balance"], summary["multi_label"]) == ("loss", True)
    metrics = json_of(capsys, "evaluate", out, "--data", path, "--workers", 0)
    assert (metrics["images"], metrics["top1"]) == (2, summary["top1"])
    (best,) = json_of(capsys, "predict", out, tmp_path / "data" / "0.png", "--workers", 0)
    # A sigmoid for each class: near 1/2 from zero weights, where a softmax says a third.
    assert all(abs(p["probability"] - 0.5) < 0.1 for p in best["predictions"])
    # A set of one label per image is one of several of which each has one.
    one = table(tmp_path / "one", "image,label\n0.png,ant\n1.png,bee\n2.png,cat\n")
    assert json_of(capsys, "evaluate", out, "--data", one, "--workers", 0)["images"] == 3
    error = finetune_error(capsys, one, tmp_path / "other")
    assert "0.png is in the training set and in the test set" in error
