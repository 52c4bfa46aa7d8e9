"""The figures of the literature that take minutes to an hour each: `make published` prints ours, on 1 and on 2 ranks.

They are not part of `make test`. The data are those of $DISTPROP_DATA; without them it fails.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

# The example and its options, how its figure reads, and the published one: at least or at most.
JOBS = [
    ("lstm_text.py", [], r"validation loss ([\d.]+)", "at most", 1.62),  # the example's own
    ("char_gpt.py", [], r"validation loss ([\d.]+)", "at most", 1.88),  # nanoGPT's
    ("mnist_conv.py", [], r"([\d.]+)% of 10,000 test images", "at least", 99.23),  # Nielsen, chapter 6
    ("mnist_conv.py", ["--expanded"], r"([\d.]+)% of 10,000 test images", "at least", 99.6),
]


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("example", "options", "pattern", "limit", "published"), JOBS)
def test_an_example_reaches_its_published_figure(
    example: str, options: list[str], pattern: str, limit: str, published: float, ranks: int, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    start = [sys.executable, "-m", "distprop", "run", "-n", str(ranks)]
    began = time.monotonic()
    done = subprocess.run(
        [*start, str(EXAMPLES / example), *options], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    figure = float(re.findall(pattern, done.stdout)[-1])
    command, seconds = " ".join([example, *options]), time.monotonic() - began
    with capsys.disabled():
        print(f"\n{command} on {ranks}: {figure}, published {limit} {published}, {seconds:,.0f} s", flush=True)
    assert figure >= published if limit == "at least" else figure <= published
