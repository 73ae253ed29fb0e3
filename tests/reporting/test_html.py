"""report.html as a file: whole, self-contained, readable by contrast, and deaf to what names would have it do."""

from __future__ import annotations

import html
import json
import math
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from rocket.evaluation import Evaluation, Score
from rocket.reporting.html import Shades, finite, render_report
from rocket.reporting.layout import Cell, Tower
from rocket.usage import Usage

VOID = {"meta", "link", "input", "br"}
HOSTILE = "a.0.\"'><img src=x onerror=alert(1)></script><script>alert(2)</script>{{ 7 * 7 }}"


class Page(HTMLParser):
    """Elements, their attributes and their text; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(text)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_a_run(summary):
    text = render_report(summary)
    page = Page(text)
    assert text.startswith('<!doctype html>\n<html lang="en">')
    identifiers = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    plan = summary.plan
    for value in (plan.size.parameters, plan.parameters):
        assert f"{value:,}" in text
    (before,), (after,) = summary.original.perplexities.values(), summary.compressed.perplexities.values()
    cells = page.text["td"]
    assert f"{before:.2f}" in cells
    assert f"{after:.2f}" in cells
    assert f"{plan.cost:.4f}" in cells
    assert f"{math.log(after / before):.4f}" in cells
    assert set(summary.usages) <= set(page.text["th"])
    buttons = page.all("button")
    assert [layer for button in buttons for layer in json.loads(button["data-layers"])] == list(plan.choices)
    assert all(re.match(r"block \d, .*% removed, cost", button["aria-label"]) for button in buttons)
    assert "removed_ratios:" in html.unescape(page.text["pre"][0])


def test_every_profiled_option_is_in_it(summary):
    layers = data_of(render_report(summary))["layers"]
    assert list(layers) == list(summary.plan.choices)
    for profile in summary.planner.profiles:
        found = layers[profile.layer]
        points = [(form, *point) for form, options in found["options"].items() for point in options]
        expected = [
            (option.form, 100 - 100 * option.parameters / profile.parameters, option.cost) for option in profile.options
        ]
        assert len(points) == len(expected)
        for point, wanted in zip(sorted(points), sorted(expected), strict=True):
            assert point == (wanted[0], pytest.approx(wanted[1], abs=0.006), pytest.approx(wanted[2], rel=1e-3))
        assert tuple(found["chosen"]) in points


def test_nothing_is_loaded(summary):
    text = render_report(summary)
    page = Page(text)
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    for _, attributes in page.elements:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert re.match(r"(data:|#|$)", attributes.get(name) or ""), attributes
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", text)
    addresses = set(re.findall(r"https?://[^\"'\s)]+", text))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not a place


@pytest.mark.parametrize("cost", ["loss", "weight"])
def test_names_are_only_text(invent, cost):
    evaluation = Evaluation({HOSTILE: 10.0}, {}, {HOSTILE: [Score(HOSTILE, 1.0)]})
    hostile = invent([HOSTILE], model=HOSTILE, cost=cost, original=evaluation, compressed=evaluation)
    text = render_report(hostile)
    page = Page(text)
    assert page.all("img") == []
    assert len(page.all("script")) == 2
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert "".join(page.text["h1"]) == HOSTILE
    assert list(data_of(text)["layers"]) == [HOSTILE]
    (button,) = page.all("button")
    assert json.loads(button["data-layers"]) == [HOSTILE]


def test_a_healed_model_is_shown_beside_the_compressed_one(invent):
    measured = [
        Evaluation({"text": perplexity}, {}, {"s": [Score("score", perplexity)]}) for perplexity in (10, 20, 15)
    ]
    text = render_report(invent(["a.0.x"], original=measured[0], compressed=measured[1], healed=measured[2]))
    page = Page(text)
    assert f"{math.log(1.5):.4f}" in page.text["td"]
    assert "and healed by a short fine-tune at fixed sparsity" in text
    assert "without training" not in text
    losses, scores = data_of(text)["charts"]
    assert [series["name"] for series in losses["series"] if not series["line"]] == ["measured, text", "healed, text"]
    assert scores["series"][-1] == {"name": "healed", "points": [[50.0, 15, None, None]], "line": False}
    assert "without training" in render_report(invent(["a.0.x"], original=measured[0], compressed=measured[1]))


def test_numbers_that_json_does_not_know(invent):
    evaluation = Evaluation({"t": math.inf}, {}, {"s": [Score("score", math.nan)]})
    text = render_report(invent(["a.0.x", "a.0.y"], original=evaluation, compressed=evaluation))
    data_of(text)
    assert finite({"a": [1.0, math.inf, (math.nan, "x")]}) == {"a": [1.0, None, [None, "x"]]}


def test_energy_is_shown_with_its_method(invent):
    summary = invent(["a.0.x"])
    assert "Energy was not taken" in render_report(summary)
    usage = Usage(1.0, 1.0, energy_kwh=0.0125, co2_kg=0.004, energy_source="CPU and memory estimated")
    summary.usages["compress"] = usage
    cells = Page(render_report(summary)).text["td"]
    assert "12.5" in cells
    assert "4" in cells
    assert "off by a factor of two" in render_report(summary)


def test_shades():
    def cell(removed: float, cost: float) -> Cell:
        return Cell(("a",), {"sparse": 1}, removed, cost)

    tower = Tower("", ["0"], ["x", "y"], {("0", "x"): cell(0.0, 0.0), ("0", "y"): cell(0.5, 1.0)})
    shades = Shades([tower])
    assert [shades.removed(cell(ratio, 0)) for ratio in (0.0, 0.1, 0.3, 0.301, 0.7, 0.95)] == [0, 1, 3, 4, 7, 8]
    assert [shades.cost(cell(0, cost)) for cost in (0.0, 1.0, 0.31, 0.1, 1e-3, 1e-9)] == [0, 8, 6, 6, 2, 1]


def palettes() -> dict[str, dict[str, str]]:
    """The style sheet's colours, in the light and in the dark."""
    css = files("rocket.reporting").joinpath("templates", "report.css").read_text()
    light, dark = (
        dict(re.findall(r"(--[\w-]+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    )
    assert light.keys() == dark.keys()
    return {"light": light, "dark": dark}


def contrast(first: str, second: str) -> float:
    """WCAG 2.2's contrast ratio."""

    def luminance(color: str) -> float:
        channels = (int(color[index : index + 2], 16) / 255 for index in (1, 3, 5))
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    """4.5 for text, 3 for what is drawn (WCAG AA)."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    colors = palettes()[scheme]
    for page in ("--page", "--card"):
        for text in ("--ink", "--soft"):
            assert contrast(colors[text], colors[page]) >= 4.5, (text, page)
        for drawn in ("--focus", *(f"--s{number}" for number in range(6))):
            assert contrast(colors[drawn], colors[page]) >= 3, (drawn, page)
    for step in range(9):
        text = "--on-h5" if step == 5 else "--on-pale" if step < 5 else "--on-strong"
        assert contrast(colors[text], colors[f"--h{step}"]) >= 4.5, step
