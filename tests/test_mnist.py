import fcntl
import gzip
import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from distprop.data import load_mnist, mnist, read_idx
from mnist_files import idx, mnist_contents

TRAIN_ROWS, TEST_ROWS = 12, 5


@pytest.fixture(scope="module")
def contents():
    """A small MNIST: the name of each file and its uncompressed bytes."""
    return mnist_contents(TRAIN_ROWS, TEST_ROWS)


@pytest.fixture
def root(tmp_path, contents):
    """A folder with the small MNIST, uncompressed."""
    folder = tmp_path / "root"
    folder.mkdir()
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


# read_idx


@pytest.mark.parametrize(
    ("code", "stored", "native"),
    [
        (0x08, "u1", "uint8"),
        (0x09, "i1", "int8"),
        (0x0B, ">i2", "int16"),
        (0x0C, ">i4", "int32"),
        (0x0D, ">f4", "float32"),
        (0x0E, ">f8", "float64"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_read_idx_reads_every_dtype(tmp_path, code, stored, native, compress):
    array = np.arange(24).reshape(2, 3, 4).astype(stored)
    path = tmp_path / "any-name"
    path.write_bytes(compress(idx(array, code)))
    result = read_idx(path)
    assert result.dtype == np.dtype(native)
    assert result.dtype.isnative
    assert result.flags.writeable
    np.testing.assert_array_equal(result, array)


def test_read_idx_goes_by_content_and_not_by_name(tmp_path):
    plain, packed = tmp_path / "plain.gz", tmp_path / "packed"
    plain.write_bytes(idx(np.arange(3, dtype=np.uint8)))
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_idx(plain).tolist() == read_idx(str(packed)).tolist() == [0, 1, 2]


def test_read_idx_reads_no_rows(tmp_path):
    (tmp_path / "none").write_bytes(idx(np.zeros((0, 28, 28), np.uint8)))
    assert read_idx(tmp_path / "none").shape == (0, 28, 28)


GOOD = idx(np.arange(6, dtype=np.uint8).reshape(2, 3))
PACKED = gzip.compress(GOOD, mtime=0)  # the time would be in the names of tests


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an IDX file: it begins with nothing"),
        (b"\0\0\x08", "is not an IDX file: it begins with 00 00 08"),
        (b"PK\3\4" + GOOD[4:], "is not an IDX file: it begins with 50 4b 03 04"),
        (b"\0\0\x0a" + GOOD[3:], "dtype code 0x0a; the known codes are 0x08, 0x09"),
        (GOOD[:9], "is truncated: 9 bytes, where the header alone takes 12"),
        (GOOD[:-1], r"is truncated: 17 bytes, where shape \(2, 3\) of uint8 takes 18"),
        (GOOD + b"\0", "has trailing bytes: 19 bytes, .* takes 18"),
        (idx(np.zeros((0, 1), np.uint8))[:4] + b"\xff" * 8, "is truncated: 12 bytes"),  # claims 2**64 values
        (PACKED[:-9], "is truncated: its gzip stream ends early"),
        (PACKED[:2], "is truncated: its gzip stream ends early"),
        (PACKED[:-8] + bytes(4) + PACKED[-4:], "is a corrupt gzip file: CRC"),
        (PACKED[:10] + b"\xff" * 9 + PACKED[19:], "is a corrupt gzip file"),
        (PACKED + b"more", "is a corrupt gzip file"),
    ],
)
def test_read_idx_names_the_damaged_file(tmp_path, content, message):
    path = tmp_path / "some-file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{message}"):
        read_idx(path)


def test_read_idx_of_a_missing_file_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent-idx"):
        read_idx(tmp_path / "absent-idx")


# load_mnist from a folder


def test_load_mnist_scales_pixels_and_widens_labels(root, contents):
    train, test = load_mnist(root)
    assert (train.x.shape, train.y.shape) == ((TRAIN_ROWS, 784), (TRAIN_ROWS,))
    assert (test.x.shape, test.y.shape) == ((TEST_ROWS, 784), (TEST_ROWS,))
    for dataset, part in ((train, "train"), (test, "t10k")):
        assert dataset.x.dtype == np.float32
        assert dataset.y.dtype == np.int64
        pixels = np.frombuffer(contents[f"{part}-images-idx3-ubyte"], np.uint8, offset=16).reshape(-1, 784)
        np.testing.assert_array_equal(dataset.x, pixels.astype(np.float32) / np.float32(255))
        assert dataset.y.tolist() == list(contents[f"{part}-labels-idx1-ubyte"][8:])


@pytest.mark.parametrize("spelling", ["{}", "{}.gz", "dotted {}", "dotted {}.gz"])
def test_load_mnist_knows_the_spellings_of_the_names(tmp_path, contents, spelling):
    for name, content in contents.items():
        shown = name.replace("-idx", ".idx") if spelling.startswith("dotted") else name
        suffix = ".gz" if spelling.endswith(".gz") else ""
        (tmp_path / f"{shown}{suffix}").write_bytes(gzip.compress(content) if suffix else content)
    assert len(load_mnist(str(tmp_path))[0]) == TRAIN_ROWS


def test_a_given_root_is_never_downloaded_into(root, monkeypatch):
    monkeypatch.setattr(mnist, "_download_once", lambda cache: pytest.fail("downloaded"))
    (root / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(root))}: lacks t10k-labels-idx1-ubyte\n"):
        load_mnist(root)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_mnist(root / "nowhere")
    assert len(list(root.iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("train-labels-idx1-ubyte", np.zeros(11, np.uint8), "has 12 images but .*train-labels.* has 11 labels"),
        ("t10k-labels-idx1-ubyte", np.array([1, 2, 10, 3, 4], np.uint8), "t10k-labels.* has the label 10 at row 2"),
        (
            "train-labels-idx1-ubyte",
            np.zeros((12, 28, 28), np.uint8),
            r"train-labels.* holds uint8 .*uint8 of shape \(n\)",
        ),
        ("train-images-idx3-ubyte", np.zeros(12, np.uint8), r"train-images.* shape \(12,\); .* of shape \(n, 28, 28\)"),
        ("t10k-images-idx3-ubyte", np.zeros((5, 8, 8), np.uint8), r"t10k-images.* shape \(5, 8, 8\)"),
    ],
)
def test_load_mnist_refuses_what_is_not_mnist(root, name, array, message):
    (root / name).write_bytes(idx(array))
    with pytest.raises(ValueError, match=message):
        load_mnist(root)


def test_images_must_be_bytes(root):
    (root / "t10k-images-idx3-ubyte").write_bytes(idx(np.zeros((5, 28, 28), "i1"), code=0x09))
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte holds int8"):
        load_mnist(root)


# where load_mnist looks without a root, and the download


class Mirror(http.server.ThreadingHTTPServer):
    """A web server on this machine that counts what it is asked for."""

    daemon_threads = True

    def __init__(self):
        self.answers = {}
        self.asked = Counter()
        self.before_answer = lambda: None
        super().__init__(("127.0.0.1", 0), Answer)
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.lstrip("/")
        self.server.asked[name] += 1
        self.server.before_answer()
        if name not in self.server.answers:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.answers[name])))
        self.end_headers()
        self.wfile.write(self.server.answers[name])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(contents):
    """A mirror that has the four files, compressed in its own way."""
    with Mirror() as server:
        server.answers = {f"{name}.gz": gzip.compress(content, 1, mtime=7) for name, content in contents.items()}
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path, contents, monkeypatch):
    """The empty cache, in a world where the small MNIST is the one that is pinned, and no mirror answers."""
    monkeypatch.delenv("DISTPROP_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    pinned = {name: mnist.Content(len(c), hashlib.sha256(c).hexdigest()) for name, c in contents.items()}
    monkeypatch.setattr(mnist, "FILES", pinned)
    monkeypatch.setattr(mnist, "MIRRORS", ("http://127.0.0.1:9/",))  # the discard port: refused
    return tmp_path / "cache" / "distprop" / "mnist"


def files_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def test_download_fills_the_cache_once(mirror, cache, contents, monkeypatch, capsys):
    monkeypatch.setattr(mnist, "MIRRORS", (mirror.url,))
    train, test = load_mnist()
    assert (len(train), len(test)) == (TRAIN_ROWS, TEST_ROWS)
    assert files_in(cache) == sorted(contents)
    assert f"downloading MNIST (11 MB) into {cache}" in capsys.readouterr().err
    load_mnist()
    assert mirror.asked == Counter(f"{name}.gz" for name in contents)


def test_download_takes_only_what_is_missing(mirror, cache, contents, monkeypatch):
    monkeypatch.setattr(mnist, "MIRRORS", (mirror.url,))
    cache.mkdir(parents=True)
    (cache / "train-images.idx3-ubyte.gz").write_bytes(gzip.compress(contents["train-images-idx3-ubyte"]))
    load_mnist()
    assert sorted(mirror.asked) == sorted(f"{name}.gz" for name in contents if name != "train-images-idx3-ubyte")


def test_download_of_a_plain_file_is_accepted(mirror, cache, contents, monkeypatch):
    """Some proxies unpack what they pass on."""
    monkeypatch.setattr(mnist, "MIRRORS", (mirror.url,))
    mirror.answers = {f"{name}.gz": content for name, content in contents.items()}
    assert len(load_mnist()[1]) == TEST_ROWS


def test_the_next_mirror_is_asked_when_one_fails(mirror, cache, monkeypatch):
    monkeypatch.setattr(mnist, "MIRRORS", ("http://127.0.0.1:9/", f"{mirror.url}moved/", mirror.url))
    assert len(load_mnist()[0]) == TRAIN_ROWS


def other_content(answer):
    return gzip.compress(gzip.decompress(answer)[:-1] + b"\xff")


def longer_content(answer):
    return gzip.compress(gzip.decompress(answer) + bytes(1 << 20))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (other_content, "13 bytes with SHA-256 [0-9a-f]{64}; expected 13 with"),
        (longer_content, "14 bytes with SHA-256"),  # no more of it is unpacked than shows that it is wrong
        (lambda answer: answer[:20], r"\d+ bytes with SHA-256"),
        (lambda answer: b"<html>please log in</html>", "26 bytes with SHA-256"),
        (lambda answer: b"\x1f\x8b" + b"\xff" * 30, "a corrupt gzip file"),
        (lambda answer: bytes(1 << 22), r"uncompressed, \d{5,6} bytes with SHA-256"),  # 4 MB are not read to the end
    ],
)
def test_a_download_that_is_not_the_pinned_file_is_an_error_and_leaves_no_file(
    mirror, cache, monkeypatch, spoil, message
):
    monkeypatch.setattr(mnist, "MIRRORS", (mirror.url,))
    spoiled = "t10k-labels-idx1-ubyte.gz"
    mirror.answers[spoiled] = spoil(mirror.answers[spoiled])
    with pytest.raises(OSError, match=rf"could not be downloaded into(.|\n)*{spoiled}: .*{message}"):
        load_mnist()
    assert "t10k-labels-idx1-ubyte" not in files_in(cache)
    assert not [name for name in files_in(cache) if name.startswith(".")]


def test_a_download_that_cannot_be_stored_leaves_no_file(mirror, cache, monkeypatch):
    def refuse(partial, path):
        assert os.path.dirname(partial) == os.path.dirname(path)  # between two file systems it could not be renamed
        raise OSError("disk full")

    monkeypatch.setattr(mnist, "MIRRORS", (mirror.url,))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        load_mnist()
    assert files_in(cache) == []


def test_without_network_the_error_says_what_to_do(cache):
    with pytest.raises(OSError, match="could not be downloaded") as caught:
        load_mnist()
    message = str(caught.value)
    assert "http://127.0.0.1:9/train-images-idx3-ubyte.gz: " in message
    assert "refused" in message
    assert f"{cache}: lacks train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images" in message
    assert "DISTPROP_DATA" in message
    assert files_in(cache) == []


def test_a_silent_mirror_is_given_up(mirror, cache, monkeypatch):
    monkeypatch.setattr(mnist, "MIRRORS", (mirror.url,))
    monkeypatch.setattr(mnist, "STALL_SECONDS", 0.05)
    given_up = threading.Event()
    mirror.before_answer = lambda: given_up.wait(20)
    with pytest.raises(OSError, match="timed out"):  # and not, after a while, an answer
        load_mnist()
    given_up.set()


def test_a_mirror_that_trickles_is_given_up(mirror, cache, monkeypatch):
    monkeypatch.setattr(mnist, "MIRRORS", (mirror.url,))
    monkeypatch.setattr(mnist, "DOWNLOAD_SECONDS", -1.0)
    with pytest.raises(OSError, match="bytes in -1 seconds"):
        load_mnist()


def test_a_cache_that_cannot_be_made_is_named(cache, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(OSError, match=f"could not be downloaded into {re.escape(str(cache))}"):
        load_mnist()


def test_download_false_lists_every_folder(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("DISTPROP_DATA", str(tmp_path / "shared"))
    with pytest.raises(FileNotFoundError) as caught:
        load_mnist(download=False)
    assert f"{tmp_path / 'shared' / 'mnist'}: no such folder" in str(caught.value)
    assert f"{cache}: no such folder" in str(caught.value)
    assert not cache.exists()


def test_distprop_data_comes_before_the_cache(root, cache, contents, monkeypatch, tmp_path):
    root.rename(tmp_path / "mnist")
    monkeypatch.setenv("DISTPROP_DATA", str(tmp_path))
    cache.mkdir(parents=True)
    for name in contents:
        (cache / name).write_bytes(b"not MNIST")
    assert len(load_mnist()[0]) == TRAIN_ROWS
    monkeypatch.setenv("DISTPROP_DATA", "")
    with pytest.raises(ValueError, match="is not an IDX file"):
        load_mnist()


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("DISTPROP_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / ".cache" / "distprop" / "mnist"))):
        load_mnist(download=False)


RANK = """
import sys
from distprop.data import mnist
mnist.FILES = {name: mnist.Content(*content) for name, content in eval(sys.argv[1]).items()}
mnist.MIRRORS = (sys.argv[2],)
train, test = mnist.load_mnist()
print(len(train), len(test))
"""


def run_ranks(count, url):
    """What each of `count` processes prints that load MNIST at the same time."""
    pinned = repr({name: tuple(content) for name, content in mnist.FILES.items()})
    command = [sys.executable, "-c", RANK, pinned, url]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    return [rank.communicate(timeout=60)[0] for rank in ranks]


def test_processes_that_start_together_download_once(mirror, cache, contents):
    mirror.before_answer = lambda: time.sleep(0.2)
    assert run_ranks(4, mirror.url) == [f"{TRAIN_ROWS} {TEST_ROWS}\n"] * 4
    assert mirror.asked == Counter(f"{name}.gz" for name in contents)


def test_those_who_waited_for_a_failure_share_it(mirror, cache, monkeypatch):
    """They do not sit through the same failure one after the other. Threads stand for the processes here."""
    monkeypatch.setattr(mnist, "MIRRORS", (mirror.url,))
    mirror.answers = {}
    everyone_waits = threading.Semaphore(0)
    flock = fcntl.flock

    def counted_flock(*arguments):
        everyone_waits.release()
        flock(*arguments)

    def hold_the_answer():
        for _ in range(4):
            assert everyone_waits.acquire(timeout=10)
        time.sleep(0.02)  # more than the grain of a file's time of change

    monkeypatch.setattr(fcntl, "flock", counted_flock)
    mirror.before_answer = hold_the_answer
    with ThreadPoolExecutor(4) as pool:
        failures = [future.exception() for future in [pool.submit(load_mnist) for _ in range(4)]]
    assert all(isinstance(failure, OSError) and "HTTP Error 404" in str(failure) for failure in failures)
    assert sum(mirror.asked.values()) == 1


def test_a_failure_is_not_remembered(mirror, cache, monkeypatch):
    with pytest.raises(OSError, match="refused"):
        load_mnist()
    monkeypatch.setattr(mnist, "MIRRORS", (mirror.url,))
    assert len(load_mnist()[0]) == TRAIN_ROWS


def test_the_pinned_content_has_the_length_of_mnist():
    assert {name: content.length_bytes for name, content in mnist.FILES.items()} == {
        "train-images-idx3-ubyte": 16 + 60_000 * 784,
        "train-labels-idx1-ubyte": 8 + 60_000,
        "t10k-images-idx3-ubyte": 16 + 10_000 * 784,
        "t10k-labels-idx1-ubyte": 8 + 10_000,
    }
