"""Every example runs, with small arguments, on one process and on two ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mnist_files import mnist_contents

EXAMPLES = Path(__file__).parent.parent / "examples"
LIMIT_SECONDS = 100

# The example, its small arguments, and what its output must match.
CASES = [
    ("digits.py", ["--epochs", "4"], r"[89]\d\.\d\d% of the 360 held-out digits are right"),
    ("single_process.py", ["--epochs", "2"], r"dc/da = 9, dc/db = 2\n.*finite differences\nepoch 2: loss"),
    ("custom_loop.py", ["--epochs", "3"], r"epoch 3: [89]\d\.\d\d% of the held-out"),
    ("mnist_conv.py", ["--epochs", "1", "--limit", "100"], r"% of 60 test images are right"),
    ("mnist_conv.py", ["--epochs", "1", "--limit", "100", "--expanded"], r"% of 60 test images are right"),
    (
        "char_gpt.py",
        ["--steps", "4", "--context", "16", "--sample", "20"],
        r"validation loss \d\.\d{4} over [\d,]+ characters\n[\s\S]{20,}\n",  # then the sample
    ),
    (
        "lstm_text.py",
        ["--steps", "4", "--window", "16", "--sample", "20"],
        r"validation loss \d\.\d{4} over [\d,]+ characters\n[\s\S]{20,}\n",  # then the sample
    ),
    ("resnet_cifar.py", ["--epochs", "1", "--batch-size", "25"], r"% of 10 test images are right"),
    ("vanishing.py", ["--images", "100", "--run-dir", "run"], r"4 hidden, sigmoid .*\n(.*\n)+.*norm 1(.*\n)+epoch 20 "),
    ("mnist.py", ["--epochs", "1"], r"% of 60 held-out images are right"),
    ("mnist.py", ["--recipe", "nielsen", "--epochs", "1", "--limit", "100"], r"% of \d+ held-out images are right"),
]


def test_every_example_is_among_the_cases() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {name for name, _, _ in CASES}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Examples find small stand-ins: noise in MNIST's and CIFAR's format, and a text of a few thousand characters."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "tinyshakespeare").mkdir()
    (folder / "tinyshakespeare" / "input.txt").write_text("To be, or not to be: that is the question.\n" * 100)
    (folder / "cifar10").mkdir()
    rng = np.random.default_rng(0)
    for name in (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"):
        records = rng.integers(0, 256, (10, 3073), np.uint8)
        records[:, 0] %= 10
        (folder / "cifar10" / name).write_bytes(records.tobytes())
    (folder / "mnist").mkdir()
    for name, content in mnist_contents(train=1200, test=60).items():
        (folder / "mnist" / name).write_bytes(content)
    return {**os.environ, "DISTPROP_DATA": str(folder), "OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "arguments", "expected"), CASES, ids=lambda value: str(value))
def test_example(
    name: str, arguments: list[str], expected: str, ranks: int, environment: dict[str, str], tmp_path: Path
) -> None:
    if name == "single_process.py" and ranks > 1:
        ranks = 1  # it is about one process; the second time is as good as the first
    launcher = [sys.executable] if ranks == 1 else [sys.executable, "-m", "distprop", "run", "-n", str(ranks)]
    answer = subprocess.run(
        [*launcher, str(EXAMPLES / name), *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert re.search(expected, answer.stdout), answer.stdout
    assert "Warning" not in answer.stderr
    verdicts = re.findall(r"^.*; try .*$", answer.stdout, re.MULTILINE)
    assert len(verdicts) == (name == "vanishing.py"), (
        answer.stdout
    )  # of all networks that are trained, one is to be sick


@pytest.mark.parametrize("name", ["char_gpt.py", "lstm_text.py"])
def test_a_text_that_is_not_there_is_one_message(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / name), "--text", "missing.txt"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert answer.returncode == 2
    assert answer.stderr.endswith("error: no file missing.txt: give --text FILE, or set DISTPROP_DATA\n")
