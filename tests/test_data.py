"""fastvae.data: what is read, how damaged files are refused, and binarisation."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastvae.data import ImageDataset, binarize, collate_binarized, images_of, load


def idx_bytes(array: np.ndarray[Any, Any]) -> bytes:
    header = bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(np.uint8).tobytes()


def pixels(count: int, *shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    write(tmp_path / "train-images-idx3-ubyte.gz", idx_bytes(pixels(12, 5, 4)))
    write(tmp_path / "train-labels-idx1-ubyte.gz", idx_bytes(np.arange(12)))
    write(tmp_path / "t10k-images-idx3-ubyte", idx_bytes(pixels(6, 5, 4, seed=1)))
    write(tmp_path / "t10k-labels-idx1-ubyte", idx_bytes(np.arange(6) + 20))
    return tmp_path


def test_digits() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    whole = load("digits", split="all")
    assert whole.images.dtype == torch.uint8 and whole.images.shape == (1797, 1, 8, 8)
    assert int(whole.images.max()) == 255 and int(whole.images.min()) == 0
    images, labels = whole.tensors()
    # A byte holds value/16 rounded to the nearest of 256 levels: off by at most half a level.
    expected = torch.from_numpy(datasets.load_digits().images / 16).unsqueeze(1)
    assert float((images - expected).abs().max()) <= 0.5 / 255 + 1e-7
    assert labels is not None and labels.unique().tolist() == list(range(10))
    train, test = load("digits"), load("digits", split="test")
    assert (len(train), len(test)) == (1617, 180)
    joined = torch.cat([train.images, test.images]).flatten(1)
    assert torch.equal(joined.unique(dim=0), whole.images.flatten(1).unique(dim=0))


def test_idx_folder_keeps_its_own_split(idx_folder: Path) -> None:
    train, test, whole = (load(idx_folder, split=split) for split in ("train", "test", "all"))
    assert np.array_equal(train.images.numpy()[:, 0], pixels(12, 5, 4))
    assert test.labels is not None and test.labels.tolist() == list(range(20, 26))
    assert torch.equal(whole.images, torch.cat([train.images, test.images])) and len(whole) == 18
    image, label = train[3]
    assert image.dtype == torch.float32 and torch.equal(image * 255, train.images[3].float()) and label == 3


def test_idx_names_and_contents(tmp_path: Path) -> None:
    """One unlabelled file without a role is split by seed; the plain file wins; gzip is told by content."""
    write(tmp_path / "mine-images.idx3-ubyte", gzip.compress(idx_bytes(pixels(20, 3, 3))))
    write(tmp_path / "mine-images.idx3-ubyte.gz", b"not read")
    train, test = load(tmp_path, test_fraction=0.25), load(tmp_path, split="test", test_fraction=0.25)
    assert (len(train), len(test), train.labels) == (15, 5, None)
    assert len(train[0]) == 1
    assert not torch.equal(train.images, load(tmp_path, test_fraction=0.25, seed=1).images)
    colour = tmp_path / "colour"
    colour.mkdir()
    write(colour / "train-images-idx4-ubyte.gz", idx_bytes(pixels(4, 3, 2, 2)))
    assert load(colour).images.shape == (4, 3, 2, 2)
    with pytest.raises(FileNotFoundError, match=r"split='test', found train-images-idx4-ubyte.gz"):
        load(colour, split="test")


def test_ambiguous_or_foreign_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"IDX files or one \.npz file, found nothing"):
        load(tmp_path)
    write(tmp_path / "a-train-images-idx3-ubyte", idx_bytes(pixels(2, 2, 2)))
    write(tmp_path / "b-train-images-idx3-ubyte", idx_bytes(pixels(2, 2, 2)))
    with pytest.raises(ValueError, match="found a-train-images-idx3-ubyte, b-train-images-idx3-ubyte"):
        load(tmp_path)


GOOD = idx_bytes(pixels(4, 3, 3))
DAMAGED = {
    "empty": (b"", "magic 00 00 08 03 or 00 00 08 04.*found nothing"),
    "html": (b"<html>404</html>", "magic 00 00 08 03.*found 3c 68 74 6d"),
    "labels": (idx_bytes(np.arange(4)), "magic.*found 00 00 08 01"),
    "floats": (b"\0\0\x0d\x03" + GOOD[4:], "magic.*found 00 00 0d 03"),
    "short header": (GOOD[:10], "header of 16 bytes, found 10 bytes"),
    "short payload": (GOOD[:-1], r"52 bytes for shape \[4, 3, 3\], found 51"),
    "long payload": (GOOD + b"x", "52 bytes .* found 53"),
    "huge sizes": (GOOD[:4] + b"\xff" * 12, r"\d{29} bytes .* found 16"),
    "no images": (
        GOOD[:4] + struct.pack(">3I", 0, 28, 28),
        r"at least one image, got torch.uint8 \[0, 1, 28, 28\]",
    ),
    "truncated gzip": (gzip.compress(GOOD)[:-12], "whole gzip file, found a damaged one"),
    "damaged gzip": (gzip.compress(GOOD)[:-6] + b"garbag", "whole gzip file, found a damaged one"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_idx(tmp_path: Path, case: str) -> None:
    data, message = DAMAGED[case]
    (tmp_path / "train-images-idx3-ubyte").write_bytes(data)
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte: expected.*{message}"):
        load(tmp_path)


def test_idx_label_count(idx_folder: Path) -> None:
    write(idx_folder / "train-labels-idx1-ubyte.gz", idx_bytes(np.arange(11)))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte.gz: expected 12 labels.*found 11"):
        load(idx_folder)


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "set.npz"
    np.savez(path, images=pixels(10, 4, 4), labels=np.arange(10, dtype=np.uint8))
    train, test = load(path), load(path, split="test")
    assert (
        (len(train), len(test)) == (9, 1) and train.labels is not None and train.labels.dtype == torch.int64
    )
    assert test.labels is not None
    assert sorted(train.labels.tolist() + test.labels.tolist()) == list(range(10))
    for image, label in zip(train.images, train.labels, strict=True):
        assert np.array_equal(image[0].numpy(), pixels(10, 4, 4)[int(label)])
    assert torch.equal(load(tmp_path, split="all").images, load(path, split="all").images)
    np.savez_compressed(path, images=pixels(3, 2, 4, 4))
    assert load(path, split="all").images.shape == (3, 2, 4, 4) and load(path, split="all").labels is None


def _npz_case(path: Path, case: str) -> str:
    good: dict[str, Any] = {"images": pixels(4, 3, 3), "labels": np.arange(4)}
    if case == "missing key":
        np.savez(path, x_train=good["images"])
        return "expected the key images .* found x_train"
    if case == "pickled":
        np.savez(path, images=np.array([good["images"], None], dtype=object))
        return "unreadable entry .*allow_pickle"
    if case == "floats":
        np.savez(path, images=good["images"] * 1.0)
        return r"values in \[0, 1\], found .* divide by 255"
    if case == "flat":
        np.savez(path, images=pixels(4, 9))
        return r"images as uint8 .* found uint8 \[4, 9\]"
    if case == "channels last":
        np.savez(path, images=pixels(4, 28, 28, 3))
        return r"channels first, .* found uint8 \[4, 28, 28, 3\]"
    if case == "label count":
        np.savez(path, images=good["images"], labels=np.arange(5))
        return r"labels as integers \[4\], one an image, got torch.int64 \[5\]"
    if case == "label dtype":
        np.savez(path, images=good["images"], labels=np.linspace(0, 1, 4))
        return r"labels as integers or strings, found float64 \[4\]"
    np.savez(path, **good)
    data = bytearray(path.read_bytes())
    if case == "truncated":
        path.write_bytes(data[: len(data) // 2])
        return "expected an .npz file"
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("images.npy").header_offset
    data[start + 200] ^= 0xFF
    path.write_bytes(data)
    return "unreadable entry .*CRC"


@pytest.mark.parametrize(
    "case",
    [
        "missing key",
        "pickled",
        "floats",
        "flat",
        "channels last",
        "label count",
        "label dtype",
        "truncated",
        "bit flip",
    ],
)
def test_damaged_npz(tmp_path: Path, case: str) -> None:
    path = tmp_path / "set.npz"
    message = _npz_case(path, case)
    with pytest.raises(ValueError, match=f"set.npz: .*{message}"):
        load(path)


def npy_header(shape: str, descr: str = "|u1") -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def npz_with(path: Path, entry: bytes, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("images.npy", entry)
    return path


ANNOUNCED = {
    "gzip": (
        "images.idx3-ubyte",
        gzip.compress(GOOD[:4] + struct.pack(">3I", 1000, 1000, 1000)),
        "cannot hold",
    ),
    "gzip, short": (
        "images.idx3-ubyte",
        gzip.compress(GOOD[:4] + struct.pack(">3I", 10, 28, 28)),
        r"7856 bytes for shape \[10, 28, 28\], found 16",
    ),
    "gzip, long": ("images.idx3-ubyte", gzip.compress(GOOD + b"x"), "52 bytes .* found more than 52"),
    "gzip, sizes beyond all": (
        "images.idx3-ubyte",
        gzip.compress(GOOD[:4] + b"\xff" * 12),
        "max_unpacked=4294967296",
    ),
}


@pytest.mark.parametrize("case", ANNOUNCED)
def test_idx_sizes_are_believed_only_if_the_file_can_hold_them(tmp_path: Path, case: str) -> None:
    name, data, message = ANNOUNCED[case]
    (tmp_path / name).write_bytes(data)
    refused_in_little_memory(tmp_path, message)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize(
    ("shape", "descr"),
    [
        ("(1000000, 1000, 1000)", "|u1"),
        ("(2000, 1000, 1000)", "|u1"),
        ("(-1, 28, 28)", "|u1"),
        ("(-2000, -1000, 1000)", "|u1"),
        ("(10, 28, 27)", "|u1"),
        ("(10, 28, 28)", "<f8"),
        ("(10, 28, 28)", "|S1000000000"),
        ("(99999999999999999999, 28, 28)", "|u1"),
    ],
)
def test_npz_sizes_are_believed_only_if_the_file_can_hold_them(
    tmp_path: Path, method: int, shape: str, descr: str
) -> None:
    path = npz_with(tmp_path / "set.npz", npy_header(shape, descr) + bytes(7840), method)
    refused_in_little_memory(
        path, r"set\.npz: expected plain arrays, found an unreadable entry \(.* needs -?\d+ bytes"
    )


def refused_in_little_memory(path: Path, message: str, **options: Any) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            load(path, **options)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    """4 MB of zeros in 4 kB: more than the limit given, and read with a larger one."""
    images = np.zeros((1000, 64, 64), np.uint8)
    idx = tmp_path / "idx"
    idx.mkdir()
    write(idx / "images-idx3-ubyte.gz", idx_bytes(images))
    np.savez_compressed(tmp_path / "set.npz", images=images)
    for source in (idx, tmp_path / "set.npz"):
        message = r"at most max_unpacked=4096000 bytes .* found 4096\d{3}; if you trust"
        refused_in_little_memory(source, message, max_unpacked=4_096_000)
        assert len(load(source, split="all", max_unpacked=4_096_200)) == 1000
    # What is not compressed has the size of its file and needs no limit.
    (idx / "images-idx3-ubyte.gz").unlink()
    write(idx / "images-idx3-ubyte", idx_bytes(images))
    np.savez(tmp_path / "set.npz", images=images)
    for source in (idx, tmp_path / "set.npz"):
        assert len(load(source, split="all", max_unpacked=0)) == 1000
    for wrong in (-1, 1.5, True):
        with pytest.raises(ValueError, match="load: max_unpacked: expected a number of bytes"):
            load(idx, max_unpacked=wrong)  # type: ignore[arg-type]


def test_npz_with_more_than_an_array_or_of_a_later_format(tmp_path: Path) -> None:
    entry = npy_header("(10, 28, 28)") + bytes(7840)
    assert len(load(npz_with(tmp_path / "set.npz", entry), split="all")) == 10
    for damaged in (entry + b"x", entry[:-1], b"\x93NUMPY\x03" + entry[7:], b"\x93NUMPY", b"", b"x" * 200):
        with pytest.raises(ValueError, match=r"set\.npz: expected plain arrays, found an unreadable entry"):
            load(npz_with(tmp_path / "set.npz", damaged))


def test_npz_whose_directory_hides_an_array(tmp_path: Path) -> None:
    """One bit of a name that has no checksum: the labels would be gone without a word."""
    path = tmp_path / "set.npz"
    np.savez(path, images=pixels(4, 3, 3), labels=np.arange(4))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"labels.npy")] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"set\.npz: expected plain arrays.*differ"):
        load(path)


def test_npy(tmp_path: Path) -> None:
    images = pixels(4, 3, 3)
    for values in (images, images / 255, np.asfortranarray(images)):
        np.save(tmp_path / "images.npy", values)
        assert torch.equal(
            load(tmp_path / "images.npy", split="all").images, torch.from_numpy(images)[:, None]
        )
    entry = npy_header("(10, 28, 28)") + bytes(7840)
    np.save(tmp_path / "pickled.npy", np.array([images, Planted(tmp_path / "ran")], dtype=object))
    np.savez(tmp_path / "archive.npz", images=images)
    cases = {"long": entry + b"x", "short": entry[:-1], "empty": b"", "text": b"x" * 200}
    cases |= {name: (tmp_path / name).read_bytes() for name in ("pickled.npy", "archive.npz")}
    for content in cases.values():
        (tmp_path / "bad.npy").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npy: expected a plain array, found another kind of file"):
            load(tmp_path / "bad.npy")
    assert not (tmp_path / "ran").exists()


class Planted:
    """Makes a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_npz_of_floats_and_named_labels(tmp_path: Path) -> None:
    images = pixels(4, 3, 3)
    np.savez(tmp_path / "set.npz", images=images / 255, labels=np.array(["b", "a", "b", "c"]))
    data = load(tmp_path / "set.npz", split="all")
    assert torch.equal(data.images[:, 0], torch.from_numpy(images)) and data.classes == ("a", "b", "c")
    assert data.labels is not None and data.labels.tolist() == [1, 0, 1, 2]


def test_data_folder_from_environment(
    idx_folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("cwd")
    monkeypatch.chdir(elsewhere)
    monkeypatch.delenv("FASTVAE_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"'tiny'.*FASTVAE_DATA is not set"):
        load("tiny")
    monkeypatch.setenv("FASTVAE_DATA", str(idx_folder))
    assert len(load(None)) == 12
    np.savez(idx_folder / "tiny.npz", images=pixels(3, 2, 2))
    assert len(load("tiny", split="all")) == len(load("tiny.npz", split="all")) == 3
    with pytest.raises(FileNotFoundError, match=f"no such file: nowhere, {idx_folder}"):
        load("nowhere")


def test_arguments() -> None:
    with pytest.raises(ValueError, match=r"split: expected .*'valid'"):
        load("digits", split="valid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="test_fraction"):
        load("digits", test_fraction=1.0)


def test_split_and_subset() -> None:
    data = ImageDataset(torch.from_numpy(pixels(100, 1, 2, 2)), torch.arange(100), "hundred")
    big, small = data.split(90, 10, seed=3)
    assert big.labels is not None and small.labels is not None
    assert sorted(big.labels.tolist() + small.labels.tolist()) == list(range(100))
    torch.manual_seed(1)
    again = data.split(90, 10, seed=3)[1].labels
    assert again is not None and torch.equal(small.labels, again)
    assert torch.equal(small.images, data.images[small.labels])
    for sizes in ((), (90, 11), (0, 5)):
        with pytest.raises(ValueError, match="at most 100"):
            data.split(*sizes)
    assert "100 images of 1x2x2, 100 labels" in repr(data)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(3, 1, 2, 2), None, r"uint8 \[N, C, H, W\].*torch.float32 \[3, 1, 2, 2\]"),
        (torch.zeros(3, 2, 2, dtype=torch.uint8), None, r"got torch.uint8 \[3, 2, 2\]"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), None, "at least one image"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(2).long(), r"integers \[3\].*int64 \[2\]"),
        (torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.zeros(3), r"integers \[3\].*float32 \[3\]"),
    ],
)
def test_dataset_checks(images: Tensor, labels: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageDataset(images, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_binarize_follows_the_probabilities(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=dtype)
    draws = binarize(x.expand(20000, 5), torch.Generator().manual_seed(0))
    assert draws.dtype == dtype and set(draws.unique().tolist()) == {0.0, 1.0}
    mean = draws.double().mean(0)
    # 20,000 draws have a standard deviation of at most 0.0036; four of them.
    assert float((mean - x.double()).abs().max()) < 0.015
    assert mean[0] == 0.0 and mean[-1] == 1.0


def test_binarize_is_seeded_and_checked() -> None:
    x = torch.rand(4, 1, 3, 3)
    first, second = (binarize(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    for bad in (x * 3, -x - 0.1, x * float("nan")):
        with pytest.raises(ValueError, match=r"values in \[0, 1\], got"):
            binarize(bad)
    with pytest.raises(ValueError, match="uint8; divide by 255"):
        binarize(torch.zeros(3, dtype=torch.uint8))
    assert binarize(torch.zeros(0, 1, 2, 2)).shape == (0, 1, 2, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_collate_binarized(workers: int) -> None:
    data = ImageDataset(torch.full((8, 1, 4, 4), 128, dtype=torch.uint8), torch.arange(8))
    loader = DataLoader(data, batch_size=4, collate_fn=collate_binarized, num_workers=workers)

    def epochs() -> list[Tensor]:
        torch.manual_seed(7)
        return [torch.cat([images_of(batch) for batch in loader]) for _ in range(2)]

    first, second = epochs()
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(first, second) and not torch.equal(first[:4], first[4:])
    assert all(torch.equal(a, b) for a, b in zip((first, second), epochs(), strict=True))
    assert torch.cat([batch[1] for batch in loader]).tolist() == list(range(8))


def test_collate_binarized_keeps_the_batch_kind() -> None:
    image = torch.full((1, 2, 2), 0.5)
    assert isinstance(collate_binarized([image, image]), Tensor)
    batch = collate_binarized([{"data": image, "labels": 1}, {"data": image, "labels": 2}])
    assert batch["labels"].tolist() == [1, 2] and set(batch["data"].unique().tolist()) <= {0.0, 1.0}


def test_images_of() -> None:
    x = torch.rand(2, 1, 3, 3)
    for batch in (x, (x, 1), [x], {"data": x, "labels": 0}):
        assert images_of(batch) is x
    for bad, message in (
        ({"image": x}, r"mapping.*got dict with keys 'image' \(Tensor\)"),
        ((1, x), "got tuple of int, Tensor"),
        ([], "got list of nothing"),
        ("text", "got str"),
    ):
        with pytest.raises(TypeError, match=message):
            images_of(bad)


@pytest.mark.skipif("FASTVAE_DATA" not in os.environ, reason="FASTVAE_DATA names no data")
def test_real_data() -> None:
    train, test = load(None), load(None, split="test")
    assert len(train) > len(test) > 0 and train.images.shape[1:] == test.images.shape[1:]
    assert int(train.images.max()) > 128
