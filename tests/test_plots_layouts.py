"""The figure of a run's layouts: what was chosen, measured, and paid, as it is drawn."""

import pytest
from matplotlib.figure import Figure

from tvmlab import frames, plots
from tvmlab.core import InputError

SITES = [
    {
        "site": "conv0",
        "about": "conv2d 1x8x8x8 16x8x3x3 relu",
        "packing": "NCHW16c winograd2",
        "task_key": "a" * 16,
        "alternatives": [
            {"packing": "NCHW", "why_not": "NCHW is not among the blocks to try", "task_key": "", "cost_s": None},
            {"packing": "NCHW16c", "why_not": "", "task_key": "b" * 16, "cost_s": 2.5e-4},
            {"packing": "NCHW16c winograd2", "why_not": "", "task_key": "a" * 16, "cost_s": 3e-4},
        ],
    },
    {"site": "dense0", "about": "dense", "packing": "NCHW", "task_key": "", "alternatives": []},
]
TRANSFORM = {"tensor": "x", "shape": [1, 8, 8, 8], "source": "NCHW", "target": "NCHW8c", "cost_s": 5e-6}
CHOSEN = {
    "finished": True,
    "sites": SITES,
    "transforms": [TRANSFORM],
    "cost_s": 3.05e-4,
    "uniform": {"NCHW16c": 5e-4, "NCHW16c winograd2": 4e-4},
}


@pytest.fixture
def run(make_run):
    folder = make_run([("conv2d_relu", 250.0), ("dense", 200.0)])
    folder.write_json("assignment.json", CHOSEN)
    return folder


def test_what_is_drawn(run):
    ax = plots.layout_graph(run, ax=Figure().subplots())
    drawn = {
        (round(x), y, line.get_markerfacecolor() == "none")
        for line in ax.lines
        for x, y in zip(*line.get_data(), strict=True)
    }
    assert drawn == {(250, 0, False), (200, 0, True), (5, 2, False)}
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels == ["conv0  conv2d 1x8x8x8 16x8x3x3 relu", "dense0  dense", "x: NCHW → NCHW8c"]
    assert "23.8 % less than NCHW16c winograd2" in ax.get_title(loc="left")


def test_the_frame_says_why_not_and_what_it_was_chosen_by(run):
    table = frames.layouts(run)
    rows = {(row.site, row.packing): row for row in table.itertuples()}
    assert rows["conv0", "NCHW"].why_not == "NCHW is not among the blocks to try"
    assert [rows["conv0", name].decided_us for name in ("NCHW16c", "NCHW16c winograd2")] == pytest.approx([250, 300])
    assert rows["dense0", "NCHW"].chosen and table["chosen"].sum() == 2
    assert table.attrs["gain"] == pytest.approx(1 - 305 / 400)
    assert frames.layout_transforms(run)["cost_us"].tolist() == pytest.approx([5.0])


def test_nothing_to_draw_says_why(run, make_run):
    plain = make_run()
    with pytest.raises(InputError, match="in NCHW"):
        plots.layout_graph(plain)
    with pytest.raises(InputError, match="several runs"):
        other = make_run()
        other.write_json("assignment.json", CHOSEN)
        plots.layout_graph([run, other])
