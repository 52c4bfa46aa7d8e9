"""The report: complete in one file, right in its numbers, and what a real browser makes of it."""

import html
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from distprop.cli import main
from distprop.comm import run_threads
from distprop.metrics import METRICS
from distprop.report import page
from distprop.rundir import RUN, read_run
from test_rundir import step, train, write

BAD_LAYER = 3


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    if os.environ.get("DISTPROP_REQUIRE_BROWSER") == "1":
        pytest.fail("DISTPROP_REQUIRE_BROWSER=1, but there is none: install Debian's package chromium", pytrace=False)
    pytest.skip("no chromium, chromium-browser or google-chrome on the path; the report was not opened in a browser")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 3 ranks with everything in it."""
    folder = tmp_path / "one"
    run_threads(3, lambda comm: train(comm, folder, steps=12, profile=4))
    with (folder / METRICS).open("a") as file:
        for number in range(1, 13):
            layers = {
                f"{k}.weight": {"grad_norm": 10.0**-k, "weight_norm": 2.0, "update_ratio": 10.0 ** (-k - 2), "bad": 0}
                for k in range(BAD_LAYER)
            }
            layers[f"{BAD_LAYER}.weight"] = {"grad_norm": None, "weight_norm": None, "update_ratio": None, "bad": 7}
            units = {"1": {"kind": "relu", "dead": 0.25, "saturated": 0.0}}
            seconds = {"compute": [0.001, 0.002, None], "step": 0.003, "reduce": 0.001}
            line = {"step": number, "health": layers, "units": units, "noise_scale": 40.0 + number, "seconds": seconds}
            file.write(json.dumps(line) + "\n")
        text = "gradients vanish: `0.weight` learns <4,100> times slower than `8.weight`"
        for number in (3, 6):
            verdict = {"kind": "vanishing", "layer": "0.weight", "text": text}
            file.write(json.dumps({"step": number, "verdict": verdict}) + "\n")
    return folder


def other_run(tmp_path: Path) -> Path:
    """One that crashed, with a loss that was not finite; a folder name that HTML must not take literally."""
    folder = tmp_path / "two <b>&"
    with pytest.raises(KeyError):
        train_until_error(folder)
    with (folder / METRICS).open("a") as file:
        file.write(json.dumps({**step(99), "loss": None}) + "\n" + '{"step": 100, "lo')
    return folder


def train_until_error(folder: Path) -> None:
    from distprop.comm import SoloCommunicator

    def fail(result) -> None:
        if result.step == 7:
            raise KeyError("a <disk> & more")

    train(SoloCommunicator(), folder, steps=9, callbacks=[fail], clip_norm=3.0, health=False)


def test_one_run_has_every_section(run_dir: Path) -> None:
    text = page([read_run(run_dir)])
    for part in (
        *("Verdicts", "Curves", "Gradient health", "Time", "Configuration", "Environment"),
        *("norm of the gradient", "update-to-weight ratio", "share of dead units", "gradient noise scale"),
        *("where the time went", "Rank imbalance: rank", "computing, ms a step", "Profile of 4 steps", "critical path"),
        *("learning rate", "batch_size", "numpy", "0 Linear", "finished"),
    ):
        assert part in text, part
    assert "gradients vanish: <code>0.weight</code> learns &lt;4,100&gt; times slower" in text
    assert "(vanishing, step 3, and 1 times more)" in text
    assert text.count(f"<title>{BAD_LAYER}.weight, step 5: not finite</title>") == 3  # gradient, ratio and weights
    assert "<title>2.weight, step 5: 0.01</title>" in text
    assert "share of saturated units" not in text  # none is


def test_nothing_is_loaded_from_anywhere(run_dir: Path) -> None:
    text = page([read_run(run_dir)])
    assert re.findall(r'\b(?:src|href|action|poster|data)="([^"]*)"', text) == ["data:,"]
    assert not re.search(r"url\(|@import|<script|<iframe|<object|<embed|http://|https://", text)


def test_runs_stand_side_by_side_and_what_differs_is_marked(run_dir: Path, tmp_path: Path) -> None:
    second = other_run(tmp_path)
    text = page([read_run(run_dir), read_run(second)])
    assert "KeyError: &#x27;a &lt;disk&gt; &amp; more&#x27;" in text
    assert "two <b>" not in text
    row = re.search(r'<tr class="differs"><th>clip_norm</th>(.*?)</tr>', text)
    assert re.findall("<td>(.*?)</td>", row[1]) == ["–", "3.0"]
    assert re.search(r"<tr><th>batch_size</th>", text)  # equal: not marked
    assert "This run recorded no gradient health" in text
    assert "1 value not finite" in text
    assert text.count('class="state') == 2


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent / "run").mkdir(parents=True)
        write(tmp_path / parent / "run", step(1))
    text = page([read_run(tmp_path / parent / "run") for parent in ("a", "b")])
    assert "<h1>a/run, b/run</h1>" in text


LINES = {
    "nothing yet": [],
    "one step": [step(1)],
    "a loss that is never finite": [step(n, None) for n in range(1, 5)],
    "strange types": [{**step(1), "loss": "high", "lr": None, "seconds": "x", "examples": None}],
    "empty health": [step(1), {"step": 1, "health": {}}],
    "strange health": [
        step(1), {"step": 1, "health": {"w": 3, "v": {"grad_norm": "x"}}, "units": {"u": None}},
        {"step": 2, "health": {}, "seconds": {"compute": [None]}},
    ],
    "a strange verdict": [step(1), {"step": 1, "verdict": {}}],
    "an epoch of another number of ranks": [
        {"epoch": 0, "step": 1, "epoch_loss": 1.0, "seconds": {"forward": [1.0, 2.0]}},
        {"epoch": 1, "step": 2, "epoch_loss": None, "seconds": {"forward": [1.0], "backward": [2.0]}},
    ],
    "an epoch with strange times": [{"epoch": 0, "step": 1, "epoch_loss": 1.0, "seconds": {"forward": 3}}],
}  # fmt: skip


@pytest.mark.parametrize("lines", LINES.values(), ids=LINES)
def test_whatever_a_run_left_there_is_a_page(lines: list[dict], tmp_path: Path) -> None:
    write(tmp_path, *lines)
    text = page([read_run(tmp_path)])
    assert text.endswith("</html>\n")
    assert "Configuration" in text
    assert not re.search(r'="[^"]*\bnan\b', text)


def test_a_run_that_is_still_going_is_shown_as_such(run_dir: Path) -> None:
    tree = json.loads((run_dir / RUN).read_text())
    del tree["sessions"][0]["ended"]
    (run_dir / RUN).write_text(json.dumps(tree))
    assert '<span class="state busy">going</span>' in page([read_run(run_dir)])


def test_the_command_writes_the_file_and_refuses_with_a_message(run_dir: Path, tmp_path: Path) -> None:
    answer = CliRunner().invoke(main, ["report", str(run_dir)])
    assert answer.exit_code == 0
    assert (run_dir / "report.html").read_text() == page([read_run(run_dir)])
    answer = CliRunner().invoke(main, ["report", str(run_dir), str(tmp_path / "none"), "-o", str(tmp_path / "x.html")])
    assert (answer.exit_code, answer.stderr) == (2, f"Error: there is no folder {tmp_path / 'none'}\n")
    assert not (tmp_path / "x.html").exists()
    answer = CliRunner().invoke(main, ["report", str(run_dir), "-o", str(tmp_path / "none/x.html")])
    assert (answer.exit_code, answer.stderr) == (2, f"Error: {tmp_path}/none/x.html: No such file or directory\n")


# --- in a real browser

MEASURE = """<script>
const seen = {charts: 0, empty: 0, clipped: [], overlapping: []};
seen.wide = document.documentElement.scrollWidth - innerWidth;
for (const svg of document.querySelectorAll("svg")) {
  const frame = svg.getBoundingClientRect();
  seen.charts += 1;
  if (frame.width < 300 || frame.height < 30 || svg.children.length == 0) seen.empty += 1;
  for (const text of svg.querySelectorAll("text")) {
    const box = text.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 2)
      seen.clipped.push(text.textContent);
  }
  const boxes = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([one, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4) seen.overlapping.push([one, other]);
  }));
}
document.title = JSON.stringify(seen);
</script>"""


def browse(chromium: str, folder: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    command += [f"--user-data-dir={folder / 'profile'}", "--hide-scrollbars", "--window-size=1280,2400"]
    command += ["--enable-logging=stderr", *options, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def console(answer: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in answer.stderr.splitlines() if "CONSOLE" in line]


def deep_run(tmp_path: Path, finite: bool) -> Path:
    """50 layers of weight and bias with long names, with numbers that are all finite, or none."""
    folder = tmp_path / f"deep-{finite}"
    folder.mkdir()
    lines: list[dict] = []
    for number in range(1, 61):
        names = [f"blocks.{k}.attention.projection.{part}" for k in range(50) for part in ("weight", "bias")]
        norms = {n: 10.0 ** (-number - i / 10) if finite else None for i, n in enumerate(names)}
        health = {
            n: {"grad_norm": v, "weight_norm": v, "update_ratio": v, "bad": int(not finite)} for n, v in norms.items()
        }
        value = 1.0 / number if finite else None
        units = {f"blocks.{k}": {"dead": value, "saturated": value} for k in range(50)}
        lines += [{**step(number, value), "accuracy": value, "seconds": value}]
        lines += [
            {"step": number, "health": health, "units": units, "noise_scale": value, "seconds": {"compute": [value]}}
        ]
    write(folder, *lines, {"epoch": 0, "step": 60, "epoch_loss": value, "validation_loss": value})
    return folder


def test_a_deep_network_has_a_row_for_each_weight_with_both_ends_of_its_name(tmp_path: Path) -> None:
    text = page([read_run(deep_run(tmp_path, finite=True))])
    assert "50 biases are left out of these charts" in text
    labels = re.findall(r'text-anchor="end">(blocks\.\d+\.[^<]*…[^<]*weight)<title>', text)
    assert len(labels) == 3 * 50
    assert len(set(labels)) == 50
    assert len(text) < 4e6


def test_a_run_of_nans_says_so_in_every_chart(tmp_path: Path) -> None:
    text = page([read_run(deep_run(tmp_path, finite=False))])
    assert "the loss was not finite in 60 of 60 steps, first in step 1" in text
    assert "none of 61 values is finite" in text
    assert text.count("no value is finite and more than 0") == 3
    assert "not finite</td>" in text


@pytest.mark.parametrize("which", ["one", "two", "deep", "nan"])
def test_a_browser_lays_everything_out_without_a_complaint(
    which: str, chromium: str, run_dir: Path, tmp_path: Path
) -> None:
    runs = {
        "one": lambda: [run_dir],
        "two": lambda: [run_dir, other_run(tmp_path)],
        "deep": lambda: [deep_run(tmp_path, finite=True)],
        "nan": lambda: [deep_run(tmp_path, finite=False), deep_run(tmp_path, finite=True)],
    }[which]()
    text = page([read_run(run) for run in runs])
    target = tmp_path / "report.html"
    target.write_text(text.replace("</body>", MEASURE + "</body>"), encoding="utf-8")
    answer = browse(chromium, tmp_path, target, "--dump-dom")
    seen = json.loads(html.unescape(re.search(r"<title>(\{.*?\})</title>", answer.stdout)[1]))
    assert console(answer) == []
    assert seen["charts"] == text.count("<svg")
    assert (seen["empty"], seen["clipped"], seen["overlapping"], seen["wide"]) == (0, [], [], 0)


def test_the_picture_shows_the_curves_and_the_heat_map(chromium: str, run_dir: Path, tmp_path: Path) -> None:
    from matplotlib import image

    target, picture = tmp_path / "report.html", tmp_path / "report.png"
    target.write_text(page([read_run(run_dir)]), encoding="utf-8")
    answer = browse(chromium, tmp_path, target, f"--screenshot={picture}")
    assert console(answer) == []
    pixels = np.rint(image.imread(picture)[..., :3] * 255).astype(int)
    assert pixels.shape == (2400, 1280, 3)
    for colour, least in (((37, 99, 201), 200), ((253, 231, 37), 1000), ((68, 1, 84), 1000), ((198, 40, 40), 1000)):
        near = (abs(pixels - colour).max(axis=-1) <= 2).sum()  # training curve, both ends of the heat map, not finite
        assert near > least, colour
    assert math.isclose((pixels == 255).all(axis=-1).mean(), 0.6, abs_tol=0.35)  # a page, neither empty nor black


def test_what_the_console_says_would_be_seen(chromium: str, tmp_path: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    target = tmp_path / "bad.html"
    target.write_text("<!DOCTYPE html><title>x</title><script>nowhere();</script>")
    assert len(console(browse(chromium, tmp_path, target, "--dump-dom"))) == 1
