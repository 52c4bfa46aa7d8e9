"""MNIST: 60,000 + 10,000 handwritten digits of 28 × 28 pixels, from IDX files on disk or downloaded once.

Files that are there are read as they are, and checked for being what they say. A download is compared with a pinned
SHA-256 of its *uncompressed* content (mirrors compress differently), moved into place whole, and made by one process of
all that ask at once while the others wait.

Source: LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", 1998.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distprop.data.dataset import ArrayDataset

if TYPE_CHECKING:
    from pathlib import Path  # its import takes as long as that of a third of this package

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
STALL_SECONDS = 15.0  # a mirror that is silent for this long is given up
DOWNLOAD_SECONDS = 300.0  # and so is one that takes this long over one file


class Content(NamedTuple):
    """What a file must be after decompression."""

    length_bytes: int
    sha256: str


FILES = {
    "train-images-idx3-ubyte": Content(47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": Content(60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": Content(7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": Content(10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}

_GZIP_MAGIC = b"\x1f\x8b"
_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_IMAGE = (28, 28)
_CLASSES = 10


def load_mnist(
    root: str | os.PathLike[str] | None = None, *, download: bool = True
) -> tuple[ArrayDataset, ArrayDataset]:
    """MNIST as (train, test): x float32 `(n, 784)` with values k/255 in [0, 1], y int64 `(n,)`, the digit 0..9.

    The four IDX files, with or without `.gz`, named `train-images-idx3-ubyte` or `train-images.idx3-ubyte`, are taken
    from `root`. If it is None, they are taken from the first of `$DISTPROP_DATA/mnist` and the cache
    (`$XDG_CACHE_HOME/distprop/mnist`, by default `~/.cache/distprop/mnist`) that has all four. If neither has, the
    missing ones are downloaded into the cache, 11 MB in all. Nothing is written to `root` or `$DISTPROP_DATA`.

    Raises FileNotFoundError if files are missing and may not be downloaded, OSError if the download failed, ValueError
    if a file is damaged or is not MNIST (see `read_idx`).
    """
    from pathlib import Path

    folders = _folders() if root is None else [Path(root).expanduser()]
    for folder in folders:
        found = _find(folder)
        if len(found) == len(FILES):
            return _read(found, "train"), _read(found, "t10k")
    if root is not None or not download:
        raise FileNotFoundError(f"MNIST was not found. {_advice(folders)}")
    cache = folders[-1]
    try:
        _download_once(cache)
    except OSError as error:
        advice = _advice(folders)
        raise OSError(f"MNIST could not be downloaded into {cache}:\n{error}\n{advice}") from error
    found = _find(cache)
    return _read(found, "train"), _read(found, "t10k")


def read_idx(path: str | os.PathLike[str]) -> NDArray[Any]:
    """The array in the IDX file `path`, gzipped or not (its content decides, not its name), in native byte order.

    The format: two zero bytes, a dtype code, the number of dimensions d, d big-endian 32-bit lengths, then the values
    in C order. Raises FileNotFoundError if there is no such file, and ValueError naming the file if the gzip is corrupt
    or truncated, the first bytes are not IDX, the dtype code is unknown, or the values are fewer or more than the
    header says.
    """
    from pathlib import Path

    content = _uncompressed(Path(path))
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(
            f"{path} is not an IDX file: it begins with {content[:4].hex(' ') or 'nothing'}; "
            f"IDX begins with 00 00, a dtype code and the number of dimensions"
        )
    code, ndim = content[2], content[3]
    if code not in _IDX_DTYPES:
        known = ", ".join(f"0x{known:02x}" for known in _IDX_DTYPES)
        raise ValueError(f"{path} has the IDX dtype code 0x{code:02x}; the known codes are {known}")
    header_bytes = 4 + 4 * ndim
    if len(content) < header_bytes:
        raise ValueError(f"{path} is truncated: {len(content)} bytes, where the header alone takes {header_bytes}")
    dtype = np.dtype(_IDX_DTYPES[code])
    shape = tuple(np.frombuffer(content, ">u4", count=ndim, offset=4).tolist())
    expected_bytes = header_bytes + dtype.itemsize * math.prod(shape)
    if len(content) != expected_bytes:
        state = "is truncated" if len(content) < expected_bytes else "has trailing bytes"
        raise ValueError(f"{path} {state}: {len(content)} bytes, where shape {shape} of {dtype} takes {expected_bytes}")
    return np.frombuffer(content, dtype, offset=header_bytes).reshape(shape).astype(dtype.newbyteorder("="))


def _uncompressed(path: Path) -> bytes:
    import gzip
    import zlib

    content = path.read_bytes()
    if content[:2] != _GZIP_MAGIC:
        return content
    try:
        return gzip.decompress(content)
    except EOFError as error:
        raise ValueError(f"{path} is truncated: its gzip stream ends early, after {len(content)} bytes") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is a corrupt gzip file: {error}") from error


def _read(found: dict[str, Path], part: str) -> ArrayDataset:
    """The dataset of `part` ("train" or "t10k"), after checking that the two files are images and labels that match."""
    images_path, labels_path = found[f"{part}-images-idx3-ubyte"], found[f"{part}-labels-idx1-ubyte"]
    images, labels = read_idx(images_path), read_idx(labels_path)
    for path, array, shape in ((images_path, images, ("n", *_IMAGE)), (labels_path, labels, ("n",))):
        if array.dtype != np.uint8 or array.ndim != len(shape) or array.shape[1:] != shape[1:]:
            raise ValueError(
                f"{path} holds {array.dtype} of shape {array.shape}; "
                f"MNIST's is uint8 of shape ({', '.join(map(str, shape))})"
            )
    if len(images) != len(labels):
        raise ValueError(f"{images_path} has {len(images)} images but {labels_path} has {len(labels)} labels")
    if labels.size and labels.max() >= _CLASSES:
        row = int(labels.argmax())
        raise ValueError(
            f"{labels_path} has the label {labels[row]} at row {row}; MNIST's labels are 0..{_CLASSES - 1}"
        )
    x = np.divide(images.reshape(len(images), _IMAGE[0] * _IMAGE[1]), np.float32(255), dtype=np.float32)
    return ArrayDataset(x, labels.astype(np.int64))


def _folders() -> list[Path]:
    """Where to look when the caller names no folder. The last one is the cache, the only one that is written to."""
    from pathlib import Path

    folders = []
    if data := os.environ.get("DISTPROP_DATA"):
        folders.append(Path(data).expanduser() / "mnist")
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return [*folders, Path(cache).expanduser() / "distprop" / "mnist"]


def _find(folder: Path) -> dict[str, Path]:
    """The files of MNIST that `folder` has, under whichever of the four spellings of each name."""
    found = {}
    for name in FILES:
        dotted = name.replace("-idx", ".idx")
        for spelling in (name, f"{name}.gz", dotted, f"{dotted}.gz"):
            if (folder / spelling).is_file():
                found[name] = folder / spelling
                break
    return found


def _missing(folder: Path) -> list[str]:
    found = _find(folder)
    return [name for name in FILES if name not in found]


def _advice(folders: list[Path]) -> str:
    looked = [
        f"{folder}: " + (f"lacks {', '.join(_missing(folder))}" if folder.is_dir() else "no such folder")
        for folder in folders
    ]
    return (
        "Looked for its four files, each with or without .gz, in\n  "
        + "\n  ".join(looked)
        + "\nPut them there, or set DISTPROP_DATA to a folder whose subfolder mnist has them, "
        "or call load_mnist() without root where there is a network."
    )


def _download_once(cache: Path) -> None:
    """Download what `cache` lacks, unless another process just did. If that one just failed, fail with its reason."""
    cache.mkdir(parents=True, exist_ok=True)
    failure = cache / ".lock"  # the lock file holds the reason of the last failure
    with _turn(failure) as failed_meanwhile:
        if not (missing := _missing(cache)):
            return
        if failed_meanwhile:
            raise OSError(failure.read_text())
        print(f"distprop: downloading MNIST (11 MB) into {cache}", file=sys.stderr, flush=True)
        try:
            for name in missing:
                _download(name, cache)
        except OSError as error:
            failure.write_text(str(error))
            raise


@contextlib.contextmanager
def _turn(path: Path) -> Iterator[bool]:
    """Hold the lock file `path`, after waiting for whoever holds it; the kernel frees it if that process dies.

    Yields whether somebody wrote into the file meanwhile, which is how a failure is told to those who wait: else
    64 ranks of a node without network would each sit through the timeouts, one after the other.
    """
    import fcntl

    with path.open("a") as lock:
        before = os.fstat(lock.fileno()).st_mtime_ns
        # Some network file systems have no locks: then each process downloads, and each result is whole.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield os.fstat(lock.fileno()).st_mtime_ns != before


def _download(name: str, cache: Path) -> None:
    """Put the file `name` into `cache`, from the first mirror that has it. If none has, OSError with every reason."""
    import hashlib
    from http.client import HTTPException

    expected, reasons = FILES[name], []
    for mirror in MIRRORS:
        url = f"{mirror}{name}.gz"
        try:
            content = _fetch(url, expected.length_bytes)
        except (OSError, HTTPException) as error:
            reasons.append(f"  {url}: {error}")
            continue
        sha256 = hashlib.sha256(content).hexdigest()
        if sha256 == expected.sha256:
            _place(content, cache / name)
            return
        reasons.append(
            f"  {url}: uncompressed, {len(content)} bytes with SHA-256 {sha256}; "
            f"expected {expected.length_bytes} with {expected.sha256}"
        )
    raise OSError("\n".join(reasons))


def _fetch(url: str, length_bytes: int) -> bytes:
    """What is at `url`, uncompressed, up to one byte more than `length_bytes`: enough to be recognised as wrong."""
    import time
    import zlib
    from urllib.request import urlopen

    deadline = time.monotonic() + DOWNLOAD_SECONDS
    packed = bytearray()
    with urlopen(url, timeout=STALL_SECONDS) as response:
        while chunk := response.read1(1 << 16):
            packed += chunk
            if len(packed) > length_bytes + (1 << 16):  # even an incompressible file would have ended by now
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(packed)} bytes in {DOWNLOAD_SECONDS:.0f} seconds")
    if packed[:2] != _GZIP_MAGIC:  # a proxy may have unpacked it
        return bytes(packed)
    try:
        return zlib.decompressobj(wbits=31).decompress(packed, length_bytes + 1)
    except zlib.error as error:
        raise OSError(f"a corrupt gzip file: {error}") from error


def _place(content: bytes, path: Path) -> None:
    """Write `content` to `path` so that the name only ever stands for the whole file."""
    import tempfile

    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
