"""fastvae.data.load of folders of pictures, arrays and data sets: what they become, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from fastvae.data import ImageDataset, load, shapes

Image = pytest.importorskip("PIL.Image")


def noise(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, values: np.ndarray[Any, Any], mode: str | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values)
    (picture if mode is None else picture.convert(mode)).save(path, **options)
    return path


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Six colour pictures of two classes, among what is no picture."""
    for index in range(6):
        save(tmp_path / ("cats", "dogs")[index % 2] / f"{index}.png", noise(8, 9, 3, seed=index))
    (tmp_path / "cats" / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_bytes(b"no picture either")
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / ".thumbs" / "a.png").write_bytes(b"nor this")
    return tmp_path


def test_a_folder_with_labels(labelled: Path) -> None:
    data = load(labelled, split="all")
    assert data.images.shape == (6, 3, 8, 9) and data.classes == ("cats", "dogs")
    assert data.files == ("cats/0.png", "cats/2.png", "cats/4.png", "dogs/1.png", "dogs/3.png", "dogs/5.png")
    assert data.labels is not None and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    for image, name in zip(data.images, data.files, strict=True):
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(noise(8, 9, 3, seed=int(name[5]))))
    train, test = load(labelled, test_fraction=0.3), load(labelled, split="test", test_fraction=0.3)
    assert (len(train), len(test)) == (4, 2)
    assert sorted((train.files or ()) + (test.files or ())) == list(data.files)
    assert (load(labelled, test_fraction=0.3).files, train.classes) == (train.files, data.classes)
    assert load(labelled, labels=None).labels is None


def test_train_and_test_folders(tmp_path: Path) -> None:
    for index, (part, label) in enumerate(
        [("train", "10"), ("train", "2"), ("val", "2"), ("val", "10"), ("val", "2")]
    ):
        save(tmp_path / part / label / f"{index}.png", noise(4, 4, seed=index))
    train, test, whole = (load(tmp_path, split=split) for split in ("train", "test", "all"))  # type: ignore[arg-type]
    assert [len(part) for part in (train, test, whole)] == [2, 3, 5]
    assert train.classes == test.classes == ("2", "10"), "as numbers"
    assert test.files == ("val/10/3.png", "val/2/2.png", "val/2/4.png")
    assert test.labels is not None and test.labels.tolist() == [1, 0, 0]
    save(tmp_path / "test" / "2" / "9.png", noise(4, 4))
    assert len(load(tmp_path, split="test")) == 1 and len(load(tmp_path, split="all")) == 6


def test_one_picture(tmp_path: Path) -> None:
    path = save(tmp_path / "one.PNG", noise(5, 6))
    data = load(path, split="all")
    assert data.images.shape == (1, 1, 5, 6) and data.files == ("one.PNG",)


def test_modes(tmp_path: Path) -> None:
    grey = noise(8, 8)
    save(tmp_path / "a.png", grey)
    save(tmp_path / "b.png", grey, "1")
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    deep.save(tmp_path / "c.png")
    data = load(tmp_path, split="all")
    assert data.images.shape == (3, 1, 8, 8)
    for index in (0, 2):
        assert torch.equal(data.images[index, 0], torch.from_numpy(grey)), "16 bits are scaled to 8"
    assert set(data.images[1].unique().tolist()) <= {0, 255}

    transparent = np.dstack([noise(8, 8, 3), np.zeros((8, 8), np.uint8)])
    transparent[:4, :, 3] = 255
    save(tmp_path / "d.png", transparent)
    save(tmp_path / "e.gif", transparent[:, :, :3], "P")
    save(tmp_path / "f.jpg", noise(8, 8, 4), "CMYK")
    mixed = load(tmp_path, split="all")
    assert mixed.images.shape == (6, 3, 8, 8)
    assert torch.equal(mixed.images[0], torch.from_numpy(grey).expand(3, 8, 8)), "grey, among colour"
    assert torch.equal(mixed.images[3, :, :4], torch.from_numpy(transparent[:4, :, :3]).permute(2, 0, 1))
    assert bool((mixed.images[3, :, 4:] == 255).all()), "white where it is transparent"
    assert load(tmp_path, split="all", channels=1).images.shape == (6, 1, 8, 8)


def test_palettes_with_a_transparent_colour(tmp_path: Path) -> None:
    picture = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2))
    picture.putpalette([10, 0, 0, 0, 20, 0, 0, 0, 30, 40, 40, 40])
    picture.save(tmp_path / "a.png", transparency=2)
    found = load(tmp_path, split="all").images[0].permute(1, 2, 0).reshape(4, 3).tolist()
    assert found == [[10, 0, 0], [0, 20, 0], [255, 255, 255], [40, 40, 40]]


def test_a_turned_photograph(tmp_path: Path) -> None:
    values = np.zeros((8, 16, 3), np.uint8)
    values[:, :8] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned right by 90 degrees: white at the top
    save(tmp_path / "a.jpg", values, exif=exif, quality=95)
    image = load(tmp_path, split="all").images[0].float()
    assert image.shape == (3, 16, 8)
    assert float(image[:, :7].mean()) > 250 and float(image[:, 9:].mean()) < 5


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_scaled_to_cover_and_cropped(tmp_path: Path, suffix: str) -> None:
    """Wide, with a grey middle: what is left is the middle. JPEG takes its way through reduced decoding."""
    values = np.zeros((300, 900, 3), np.uint8)
    values[:, 300:600] = 128
    save(tmp_path / f"a.{suffix}", values)
    save(tmp_path / f"b.{suffix}", values[:200, 300:500])
    images = load(tmp_path, split="all", size=20).images.int()
    assert images.shape == (2, 3, 20, 20)
    # Of the border, an interpolation's ringing.
    assert int((images[:, :, :, 2:-2] - 128).abs().max()) <= 3
    assert load(tmp_path, split="all", size=(10, 30)).images.shape == (2, 3, 10, 30)


def test_several_sizes_are_refused_with_what_to_do(tmp_path: Path) -> None:
    for index, side in enumerate((8, 8, 6, 5, 4)):
        save(tmp_path / f"{index}.png", noise(side, 9))
    with pytest.raises(
        ValueError, match=r"found 8x9: 2, such as 0\.png; 6x9: 1.*; and 1 more sizes; pass size=64"
    ):
        load(tmp_path)


def test_damaged_pictures_are_named(labelled: Path) -> None:
    whole = (labelled / "cats" / "0.png").read_bytes()
    (labelled / "cats" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"cats/0\.png: expected a picture that Pillow can read, found a damaged"
    ):
        load(labelled)
    for name in ("a", "b"):
        (labelled / "dogs" / f"{name}.jpg").write_bytes(b"<html>404</html>")
    with pytest.raises(ValueError, match=r"dogs/a\.jpg: .*; 2 of 8 files are bad, also .*dogs/b\.jpg$"):
        load(labelled)
    (labelled / "dogs" / "c.png").symlink_to(labelled / "nowhere.png")
    with pytest.raises(ValueError, match=r"3 of 9 files are bad"):
        load(labelled)


def test_pipes_are_not_waited_for(labelled: Path) -> None:
    os.mkfifo(labelled / "cats" / "pipe.png")
    with pytest.raises(ValueError, match=r"pipe\.png: expected a picture .*no regular file"):
        load(labelled)


def test_postscript_is_not_run(tmp_path: Path) -> None:
    """Pillow would start a program for it, whatever the file is called."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with pytest.raises(ValueError, match=r"a\.png: expected a picture"):
        load(tmp_path)


def test_folders_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected pictures .* found nothing"):
        load(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected pictures .* found empty, notes\.txt"):
        load(tmp_path)


def test_labels_for_some(labelled: Path) -> None:
    save(labelled / "stray.png", noise(8, 9, 3))
    with pytest.raises(
        ValueError, match=r"found stray\.png \(1 such\) beside the subfolder cats; .*labels=None"
    ):
        load(labelled)
    assert len(load(labelled, labels=None, split="all")) == 7


def test_links_are_followed_once(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    save(elsewhere / "bird.png", noise(8, 9, 3))
    os.symlink(elsewhere, labelled / "birds")
    os.symlink(labelled, labelled / "cats" / "loop")
    data = load(labelled, split="all")
    assert len(data) == 7 and data.classes == ("birds", "cats", "dogs")


def test_too_many_pixels_are_refused(labelled: Path) -> None:
    with pytest.raises(
        ValueError, match=r"6 images of 3x8x9 take .* max_unpacked=1000 bytes; pass a smaller size"
    ):
        load(labelled, max_unpacked=1000)


def test_arrays() -> None:
    values = noise(20, 3, 4, 5)
    assert torch.equal(load(values, split="all").images, torch.from_numpy(values))
    floats = torch.from_numpy(values).float() / 255
    labels = torch.arange(20)
    data = load(floats, labels=labels, split="all")
    assert torch.equal(data.images, torch.from_numpy(values)) and data.labels is not None
    assert load(floats.numpy()[:, 0], split="all").images.shape == (20, 1, 4, 5)
    assert load(values[:, 0] > 100, split="all").images.unique().tolist() == [0, 255]
    assert len(load(values)) == 18 and len(load(values, split="test")) == 2
    assert load(values, size=8, channels=1).images.shape == (18, 1, 8, 8)
    for bad, message in (
        (floats * 2 - 1, r"values in \[0, 1\], found -1 to 1; divide by 255"),
        (floats * torch.nan, "found 1200 of 1200 that are NaN or infinite"),
        (floats.to_sparse(), "dense array or tensor, found torch.sparse_coo"),
        (np.ma.array(values, mask=values > 3), "dense array or tensor, found MaskedArray"),
        (values.transpose(0, 2, 3, 1).repeat(2, 1), r"channels first.*pass images\.transpose"),
        (values.astype(np.int32), "uint8, or floating"),
        (values[0, 0], r"\[N, H, W\]"),
        (values[:0], "at least one image"),
    ):
        with pytest.raises(ValueError, match=message):
            load(bad, split="all")
    with pytest.raises(ValueError, match=r"one an image, got torch.int64 \[3\]"):
        load(values, labels=[1, 2, 3])
    with pytest.raises(ValueError, match=r"labels as integers or strings, found float64"):
        load(values, labels=np.zeros(20))
    named = load(values, labels=["dog", "cat"] * 10, split="all")
    assert named.classes == ("cat", "dog") and named.labels is not None
    assert named.labels.tolist() == [1, 0] * 10


class Pairs(Dataset[Any]):
    """As torchvision's data sets are: Pillow's images and labels."""

    classes: tuple[str, ...] = ("even", "odd")

    def __init__(self, side: int = 6) -> None:
        self.side = side

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        side = self.side + (index == 7)
        return Image.fromarray(noise(side, 6, 3, seed=index)), index % 2


def test_data_sets() -> None:
    data = load(Pairs(), split="all", size=6)
    assert data.images.shape == (10, 3, 6, 6) and data.classes == ("even", "odd")
    assert data.labels is not None and data.labels.tolist() == [0, 1] * 5
    assert torch.equal(data.images[3].permute(1, 2, 0), torch.from_numpy(noise(6, 6, 3, seed=3)))
    with pytest.raises(
        ValueError, match=r"Pairs\[7\]: expected an image of 3x6x6 like those before, found 3x7x6"
    ):
        load(Pairs())
    images = torch.from_numpy(noise(10, 1, 6, 6))
    of_tensors = load(TensorDataset(images.float() / 255, torch.arange(10)), split="all")
    assert torch.equal(of_tensors.images, images) and of_tensors.labels is not None
    assert load(list(images), split="all").labels is None
    drawn = shapes(20, size=8)
    assert load(drawn, split="all") is drawn
    assert load(drawn, size=16, channels=3).images.shape == (18, 3, 16, 16)
    for bad, message in (
        ([], "at least one image, found none"),
        ([{"pixels": images[0]}], "or a mapping with 'image' or .*found a mapping with pixels"),
        (["a.png"], r"list\[0\]: expected an image of Pillow, a tensor or an array, found str"),
        ([(images[0], 1), (images[0], None)], "a label for every image or for none, found 1 for 2"),
    ):
        with pytest.raises(ValueError, match=message):
            load(bad)
    with pytest.raises(TypeError, match=r"a path, an array, a tensor or a data set .* got int"):
        load(3)


def test_samples_as_other_packages_have_them() -> None:
    """Mappings, labels as names or in arrays, parts of a data set that has classes."""
    image = torch.zeros(1, 6, 6)
    for label, expected, classes in (
        ("cat", 0, ("cat",)),
        (np.str_("cat"), 0, ("cat",)),
        (np.int64(2), 2, None),
        (torch.tensor([2]), 2, None),
        (torch.eye(3)[1], None, None),
        (1.5, None, None),
    ):
        for sample in ((image, label), {"image": image, "label": label}, {"data": image, "target": label}):
            data = load([sample] * 2, split="all")
            assert data.classes == classes
            found = None if data.labels is None else data.labels.tolist()
            assert found == (None if expected is None else [expected] * 2)
    part = torch.utils.data.Subset(torch.utils.data.Subset(Pairs(), [0, 1, 2, 3]), [3, 2])
    assert load(part, split="all").classes == ("even", "odd")


def test_arguments(labelled: Path) -> None:
    for options, message in (
        ({"size": 0}, "size: expected an int"),
        ({"size": (8,)}, "size: expected an int"),
        ({"size": 2.5}, "size: expected an int"),
        ({"channels": 4}, "channels: expected 1, 3 or None"),
        ({"labels": [1]}, "labels: expected labels with an array"),
    ):
        with pytest.raises(ValueError, match=message):
            load(labelled, **options)


def test_parts_keep_names() -> None:
    data = ImageDataset(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), files=("a", "b", "c"))
    assert data.subset([2, 0]).files == ("c", "a")
    with pytest.raises(ValueError, match="files: expected 3 names"):
        ImageDataset(data.images, files=("a",))
