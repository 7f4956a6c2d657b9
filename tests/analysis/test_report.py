"""A report of a run or a model: its text, and the data files beside it."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from diffusion_moe import DiT
from diffusion_moe.analysis.figure_notes import sampling_note
from diffusion_moe.analysis.findings import class_choice, distinct_names, gather_findings
from diffusion_moe.analysis.losses import Curves
from diffusion_moe.analysis.plot_compute import mosaic, tile_centres
from diffusion_moe.analysis.run import PANELS, panels
from diffusion_moe.analysis.style import LINES, column_names, readable_on, shorten
from diffusion_moe.analysis.tables import TABLES
from diffusion_moe.cli import main
from diffusion_moe.sampling.source import read_source

from .conftest import KINDS

REPORTED = ["ec", "diffmoe", "dense", "class-free", "jit"]
QUICK = ["--num_samples=20", "--steps=4"]
EVERYWHERE = {"loss", "loss_by_time"}
EXPERTS = {"balance", "places", "coactivation", "similarity"}
CHANGING = {"experts", "classes", "frequency", "guidance"}
"""Where the number of tokens an expert is fixed, there is nothing to see in these."""
LOGGED = {"loss_levels"}
"""There if the run logged it."""
SHOWN = {
    "tc": EVERYWHERE | EXPERTS | CHANGING | {"hard_to_easy"},
    "dsmoe": EVERYWHERE | EXPERTS | CHANGING | {"hard_to_easy"},
    "ec": EVERYWHERE | EXPERTS | {"hard_to_easy", "maps"},
    "diffmoe": EVERYWHERE | EXPERTS | CHANGING | {"hard_to_easy", "maps", "capacity"},
    "dense": EVERYWHERE,
}


class Page(HTMLParser):
    """Tags of a page, each opened and closed in order, and its visible text."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.figures = [], [], "", {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "figure":
            self.figures[dict(attributes)["id"]] = ""
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
            if "figcaption" in self.open:
                self.figures[next(reversed(self.figures))] += data


def gathered(folder, compare=(), **settings):
    """What a report would be made of."""
    source = read_source(folder)
    return gather_findings(source, replace(source.settings, **{"num_samples": 20, "steps": 4} | settings), compare)


def analyze(folder, output, *options):
    assert main(["analyze", str(folder), "--output", str(output), *QUICK, *options]) == 0
    return Page((output / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report_of(run_of, tmp_path_factory):
    reports = {}

    def report(kind):
        if kind not in reports:
            output = tmp_path_factory.mktemp("reports") / kind
            reports[kind] = output, analyze(run_of(kind), output)
        return reports[kind]

    return report


@pytest.mark.parametrize("kind", REPORTED)
def test_every_figure_is_there_in_every_form_and_not_blank(report_of, kind):
    output, page = report_of(kind)
    figures = set(page.figures)
    assert figures >= SHOWN.get(kind, EVERYWHERE | EXPERTS)
    assert figures <= set(PANELS)
    assert kind not in SHOWN or figures - SHOWN[kind] <= LOGGED
    assert {path.stem for path in output.glob("*.png")} == {path.stem for path in output.glob("*.svg")} == figures
    for name in figures:
        picture = np.array(Image.open(output / f"{name}.png").convert("L"))
        assert picture.std() > 3
        # On white paper, to the edge.
        assert picture[0].min() > 250
        assert "<text" in (output / f"{name}.svg").read_text()


@pytest.mark.parametrize("kind", REPORTED)
def test_every_figure_says_how_it_came_about(report_of, kind):
    _, page = report_of(kind)
    for name, caption in page.figures.items():
        if name in ("loss", "balance", "loss_levels"):
            assert "16 images a step, seed 0" in caption
        elif name == "loss_by_time":
            assert (
                "256 held-out images of digits" in caption and "(seed 0)" in caption and "4 training steps" in caption
            )
        else:
            assert "averaged weights (decay 0.995) after 4 training steps" in caption
            assert name == "similarity" or ("4 steps" in caption and "guidance" in caption and "seed 0" in caption)
            assert name in ("similarity", "maps") or "20 images" in caption
    assert ("no routers: every feed-forward layer is dense" in page.text) == (kind == "dense")


@pytest.mark.parametrize("kind", REPORTED)
def test_the_page_needs_nothing_from_elsewhere(report_of, kind):
    output, page = report_of(kind)
    text = (output / "report.html").read_text(encoding="utf-8")
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "xlink:href", "srcset"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, value)
        assert not any(name.startswith("on") for name in attributes)
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "@import" not in text
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used <= set(ids)


@pytest.mark.parametrize("kind", ["tc", "dsmoe", "ddpm"])
def test_other_rules_have_their_figures_too(run_of, kind):
    sections = panels(gathered(run_of(kind)))
    some = [panel for panels in sections.values() for panel in panels]
    assert {panel.name for panel in some if panel.figure is not None} - LOGGED == SHOWN["dsmoe"]
    captions = {panel.name: panel.caption for panel in some}
    router = "tc" if kind == "tc" else "dsmoe"
    assert f"With {router} routing a token gets 2 experts at every time, in every layer" in captions["capacity"]


def test_where_there_is_nothing_to_see_the_page_says_why(report_of):
    _, page = report_of("ec")
    assert "With ec routing all experts of a layer serve as many tokens" in page.text
    _, page = report_of("class-free")
    assert "sampled without guidance" in page.text
    assert "The model has no classes to compare." in page.text


def rows(output, name):
    return parquet.read_table(output / "data" / f"{name}.parquet")


@pytest.mark.parametrize("kind", [kind for kind in REPORTED if kind != "dense"])
def test_the_data_are_counts_that_agree_with_each_other(report_of, kind):
    output, page = report_of(kind)
    assert {path.stem for path in (output / "data").iterdir()} == set(TABLES)
    routing = rows(output, "routing").to_pandas()
    conditional = routing[routing["class"] >= 0] if kind != "class-free" else routing
    tokens = 19 if kind == "jit" else 16
    per_cell = conditional.groupby(["layer", "t", "class"]).agg(served=("served", "sum"), tokens=("tokens", "first"))
    assert per_cell["tokens"].sum() == 20 * 4 * tokens
    capacity = per_cell["served"].sum() / per_cell["tokens"].sum()
    assert f"{capacity:.3f}" in page.text
    if kind in ("tc", "dsmoe", "ec", "jit", "ddpm"):
        np.testing.assert_array_equal(per_cell["served"], 2 * per_cell["tokens"])
    np.testing.assert_allclose(sorted(routing["t"].unique()), [0, 0.25, 0.5, 0.75])
    served = routing.groupby(["layer", "expert"])["served"].sum()
    pairs = rows(output, "pairs").to_pandas()
    own = pairs[pairs["expert"] == pairs["other"]].set_index(["layer", "expert"])["tokens"]
    np.testing.assert_array_equal(served.sort_index(), own.sort_index())
    if kind != "jit":
        places = rows(output, "places").to_pandas().groupby(["layer", "expert"])["served"].sum()
        np.testing.assert_array_equal(served.sort_index(), places.sort_index())
    held_out = rows(output, "held_out").to_pandas()
    assert len(held_out) == 256 * 10 and (held_out["loss"] > 0).all()
    curves = rows(output, "curves").to_pandas()
    np.testing.assert_array_equal(curves["step"], [1, 2, 3, 4])


def test_the_data_say_how_they_were_made(report_of):
    output, _ = report_of("diffmoe")
    about = json.loads(rows(output, "routing").schema.metadata[b"diffusion_moe"])
    assert about["origin"] == {"training_steps": 4, "ema_decay": 0.995}
    assert about["model"]["router"] == "diffmoe"
    sampling = about["sampling"]
    assert (sampling["num_samples"], sampling["steps"], sampling["guidance_scale"], sampling["seed"]) == (20, 4, 1.5, 0)
    routing = rows(output, "routing").to_pandas()
    # Counted by the hooks and by the generator, with and without class.
    tokens = routing.drop_duplicates(["layer", "t", "class"])["tokens"].sum()
    assert routing["served"].sum() / tokens == pytest.approx(sampling["average_capacity"])


def test_the_same_run_gives_the_same_bytes_and_old_figures_go(run_of, report_of, tmp_path):
    output, _ = report_of("ec")
    for name in ("capacity.png", "capacity.svg", "mine.png"):
        (tmp_path / name).write_text("of another report")
    analyze(run_of("ec"), tmp_path)
    assert (tmp_path / "mine.png").read_text() == "of another report"
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} - {"mine.png"}
    assert files == {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    for name in files:
        assert (tmp_path / name).read_bytes() == (output / name).read_bytes(), name


def test_runs_are_compared_on_the_same_images_and_noise(run_of):
    found = gathered(run_of("dsmoe"), [run_of("dense"), run_of("dsmoe")])
    own, dense, again = found.held_out
    assert [run.run for run in found.held_out] == ["dsmoe", "dense", "dsmoe (2)"]
    np.testing.assert_array_equal(own.loss_IS, again.loss_IS)
    assert np.abs(own.loss_IS - dense.loss_IS).max() > 1e-3
    assert [curves.run for curves in found.curves] == ["dsmoe", "dense", "dsmoe (2)"]
    by_name = {panel.name: panel for panel in panels(found)["Training"]}
    assert len(by_name["loss"].figure.axes[0].get_lines()) == 6
    assert "dense: 4 training steps" in by_name["loss_by_time"].caption


def test_load_and_loss_levels_are_plotted_where_they_are_logged(run_of):
    found, steps = gathered(run_of("dense")), np.arange(5)
    curves = Curves("run", "about", steps, steps + 1.0, steps, np.ones((5, 2)), np.empty((5, 0)))
    assert "loss_levels" not in {panel.name for panel in panels(replace(found, curves=[curves]))["Training"]}
    curves = curves._replace(loss_WS=np.ones((5, 3)))
    by_name = {panel.name: panel.figure for panel in panels(replace(found, curves=[curves]))["Training"]}
    labels = [text.get_text() for text in by_name["loss_levels"].axes[0].get_legend().get_texts()]
    assert labels == ["t from 0 to 0.33", "t from 0.33 to 0.67", "t from 0.67 to 1"]


@pytest.mark.parametrize(
    ("kind", "other", "expected"),
    [
        ("dsmoe", "ddpm", "model.process ddpm"),
        ("dsmoe", "jit", "diffusion.loss x"),
        ("dsmoe", "bounded", "diffusion.loss_min_gap 0.4"),
        ("dsmoe", "class-free", "model.num_classes 0"),
        ("dsmoe", "nothing", "there is no folder"),
    ],
)
def test_runs_that_do_not_compare_are_refused(run_of, tmp_path, capsys, kind, other, expected):
    path = run_of(other) if other in KINDS else tmp_path / "nothing"
    assert main(["analyze", str(run_of(kind)), f"--output={tmp_path / 'out'}", f"--compare={path}"]) == 2
    err = capsys.readouterr().err
    assert expected in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_mistakes_are_one_line_and_write_nothing(run_of, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    folder = str(run_of("dsmoe"))
    for options, expected in (
        (["--solver=ddim"], "choose euler or heun"),
        (["--threshold_scale=0.5"], "routers have thresholds"),
        (["--num_samples=0"], "num_samples is 0"),
        ([f"--output={tmp_path / 'file'}"], "which is a file; give a folder"),
        (["--outptu=x"], "did you mean --output"),
    ):
        assert main(["analyze", folder, "--output", str(tmp_path / "out"), *QUICK, *options]) == 2
        err = capsys.readouterr().err
        assert expected in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert main(["analyze", str(run_of("dsmoe") / "model"), f"--compare={folder}"]) == 2
    assert "is not a run and has no loss" in capsys.readouterr().err


def test_a_model_folder_has_routing_but_no_curves(run_of):
    found = gathered(run_of("diffmoe") / "model")
    assert found.missing == ("This folder is not a run: it has no training curves and no data.",)
    sections = panels(found)
    assert list(sections) == ["Compute", "Experts"]
    shown = {panel.name for some in sections.values() for panel in some if panel.figure is not None}
    assert shown == SHOWN["diffmoe"] - EVERYWHERE - {"balance"}


def test_a_run_that_lost_its_data_and_its_log_still_has_a_report(run_of, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(run_of("dsmoe"), run)
    recipe = (run / "recipe.yaml").read_text().replace("kind: digits\n  path: null", "kind: folder\n  path: /gone")
    (run / "recipe.yaml").write_text(recipe)
    (run / "metrics.jsonl").unlink()
    found = gathered(run)
    assert "because the data cannot be read" in found.missing[0] and "/gone" in found.missing[0]
    captions = {panel.name: panel.caption for panel in panels(found)["Training"]}
    assert captions["loss"].startswith("No training loss was logged")
    assert captions["loss_by_time"] == found.missing[0]


def test_names_of_classes_are_shown_as_they_are(run_of, tmp_path):
    """Also where they look like HTML or formulas, or are of other scripts."""
    names = ["<b>&", "$x^2$", "naïve", "日本", "a very long name of a class, and another"] + [str(i) for i in range(5)]
    (tmp_path / "names.txt").write_text("\n".join(names), encoding="utf-8")
    pipeline = tmp_path / "pipeline"
    command = ["convert", str(run_of("dsmoe")), "--output", str(pipeline), "--class_names", str(tmp_path / "names.txt")]
    assert main(command) == 0
    page = analyze(pipeline, tmp_path / "report")
    for name in ("<b>&", "$x^2$", "naïve", "日本", "a very long nam…"):
        assert name in page.text


def test_a_vae_that_is_gone_costs_the_pictures_only(run_of):
    source = replace(read_source(run_of("diffmoe")), vae="/no/such/vae")
    found = gather_findings(source, replace(source.settings, num_samples=5, steps=2))
    assert "the VAE cannot be loaded: " in found.missing[0] and "/no/such/vae" in found.missing[0]
    assert found.sampling.examples.pictures is not None  # pixels need no VAE
    assert {panel.name: panel for panel in panels(found)["Compute"]}["maps"].figure is not None


def test_sampling_options_are_heeded(run_of):
    options = {"guidance_scale": 1.0, "seed": 7, "threshold_scale": 0.5, "solver": "heun"}
    found = gathered(run_of("diffmoe"), **options)
    note = sampling_note(found, found.sampling)
    assert all(part in note for part in ("heun", "no guidance", "seed 7", "thresholds times 0.5"))
    assert found.sampling.null_served_LSE is None
    usual = gathered(run_of("diffmoe"), guidance_scale=1.0, seed=7).sampling
    assert found.sampling.about["average_capacity"] > usual.about["average_capacity"]


def test_groups_of_images_add_up(run_of):
    sampling = gathered(run_of("diffmoe")).sampling
    counts, groups = sampling.counts, sampling.groups
    np.testing.assert_array_equal(groups.served_RS.sum(0), counts.served_LSK.sum((0, 2)))
    np.testing.assert_array_equal(groups.tokens_RK.sum(0), counts.tokens_LSK.sum((0, 1)))
    assert len(groups.served_RS) == 5
    everything = counts.served_LSKE.sum() + sampling.null_served_LSE.sum()
    tokens = counts.tokens_LSK.sum() + sampling.null_tokens_LS.sum()
    assert everything / tokens == pytest.approx(sampling.about["average_capacity"])
    assert sampling.evaluations == 20 * 4 * 2


def test_names_of_runs_tell_them_apart():
    assert distinct_names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert distinct_names([Path("/a/x"), Path("/b/x"), Path("/a/x")]) == ["a/x", "b/x", "a/x (2)"]


def test_fewer_images_than_classes_are_of_classes_far_apart():
    assert class_choice(3, 1001).tolist() == [0, 500, 1000]
    assert class_choice(5, 2).tolist() == [0, 1, 0, 1, 0]
    assert class_choice(5, 0) is None


def test_mosaics_keep_their_tiles_apart():
    tiles = np.arange(2 * 3 * 4).reshape(2, 3, 2, 2, 1)
    picture = mosaic(tiles)[..., 0]
    assert picture.shape == (5, 8)
    np.testing.assert_array_equal(picture[3:5, 3:5], tiles[1, 1, :, :, 0])
    assert np.isnan(picture[2]).all() and np.isnan(picture[:, 5]).all()
    np.testing.assert_array_equal(tile_centres(2, 3), [0.5, 3.5, 6.5])


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))


def test_curves_can_be_seen_on_light_and_dark_paper():
    """WCAG's contrast of graphics, at least 3 to 1."""
    for color in LINES:
        for paper in ("#ffffff", "#15181c", "#1c2026", "#f6f7f9"):
            high, low = sorted((luminance(color), luminance(paper)), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= 3


def test_numbers_in_cells_can_be_read():
    assert [readable_on(color) for color in ((1, 1, 0), (0.27, 0, 0.33), (0.5, 0.5, 0.5))] == [
        "#000000",
        "#ffffff",
        "#000000",
    ]


def test_names_are_shortened():
    assert shorten("golden retriever, dog") == "golden retriever"
    assert shorten("a" * 20) == "a" * 15 + "…"


def test_of_many_columns_some_are_named_and_long_names_are_upright():
    many = column_names([f"class {i}" for i in range(100)])
    assert many.short == [f"class {i}" for i in range(0, 100, 13)] and many.positions == range(0, 100, 13)
    assert (many.angle, column_names(["a", "b"]).angle) == (90, 0)
    assert column_names(["abc"] * 9).height == pytest.approx(0.21) and column_names(["a"]).height == 0


def test_the_panels_named_are_all_there_are(report_of):
    seen = set()
    for kind in REPORTED:
        seen |= {attributes["id"] for tag, attributes in report_of(kind)[1].tags if tag == "figure"}
        seen |= {a["id"] for tag, a in report_of(kind)[1].tags if tag == "div" and a.get("class") == "absent"}
    assert seen | LOGGED == set(PANELS)


DOCS = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")


def test_the_page_of_docs_explains_every_table_and_figure():
    assert all(f"`{name}`" in DOCS for name in (*TABLES, *PANELS))


def test_the_code_of_the_docs_runs(report_of, tmp_path, monkeypatch, capsys):
    data, recording = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    (tmp_path / "runs" / "digits").mkdir(parents=True)
    (tmp_path / "runs" / "digits" / "figures").symlink_to(report_of("ec")[0])
    monkeypatch.chdir(tmp_path)
    exec(data, {})
    assert capsys.readouterr().out.count("2.0\n") == 4
    model = DiT(sample_size=8, in_channels=1, hidden_size=32, depth=2, num_heads=2, num_classes=10, num_experts=4)
    names = {"model": model, "x": torch.randn(2, 1, 8, 8), "t": torch.rand(2), "class_labels": torch.tensor([3, 7])}
    exec(recording, names)
    assert names["served"].sum() == 2 * names["tokens"].sum() == 2 * 2 * 16
    assert names["where"].sum() == names["compute"].sum() == 64 and names["images"].sum() == 2
