"""The plot of speed-up: every number of ranks is on it, in characters and as an SVG file."""

from xml.etree import ElementTree

from distprop.chart import as_svg, as_text

FALLING = [(1, 1.0), (2, 0.25), (4, 0.5), (8, 1.0), (16, 2.0)]


def test_the_text_shows_the_ideal_and_the_predicted_line() -> None:
    lines = as_text(FALLING, width=78).splitlines()
    assert max(map(len, lines)) <= 78
    by_label = {line[:7].strip(): line[9:] for line in lines[:-2]}
    assert list(by_label) == ["16", "8", "4", "2", "1", "0.5", "0.25"]
    assert by_label["16"].rstrip().endswith(".")
    assert by_label["2"].endswith("*")
    assert "*" in by_label["0.25"]
    assert "*" not in by_label["4"]
    assert lines[-1].split() == ["1", "2", "4", "8", "16"]


def test_labels_of_many_ranks_stay_apart() -> None:
    axis = as_text([(2**power, 2.0**power) for power in range(13)], width=70).splitlines()[-1]
    assert axis.split() == [str(2**power) for power in range(13)]


def test_the_drawing_is_xml_with_a_point_for_each_number_of_ranks_inside_its_frame() -> None:
    drawing = ElementTree.fromstring(as_svg("a < b & c", FALLING))
    name = "{http://www.w3.org/2000/svg}"
    circles = drawing.findall(f"{name}circle")
    assert len(circles) == 5
    assert all(0 < float(c.get("cx", "")) < 720 and 0 < float(c.get("cy", "")) < 400 for c in circles)
    heights = [float(circle.get("cy", "")) for circle in circles]
    assert heights[1] > heights[2] > heights[3] == heights[0] > heights[4]  # downwards in SVG
    assert "a < b & c" in [text.text for text in drawing.iter(f"{name}text")]
