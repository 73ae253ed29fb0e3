"""report.html in a real browser: it draws, answers clicks and keys, says nothing on the console, asks for nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator

import pytest

from rocket.evaluation import Evaluation, Score
from rocket.reporting.html import render_report

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens a report and, in the end, looks for complaints and requests. Keywords as of a browser context."""
    complaints: list[str] = []
    requests: list[str] = []

    def open_page(text: str, **options: object) -> sync_api.Page:
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        page = browser.new_context(**options).new_page()
        page.set_default_timeout(5000)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        requests.remove(path.as_uri())
        return page

    yield open_page
    assert complaints == []
    assert requests == []


def test_the_watch_notices(browser, visit, tmp_path):
    """That nothing was noticed elsewhere means something only if this is."""
    seen: list[str] = []
    page = browser.new_page()
    page.on("console", lambda message: seen.append(message.text))
    page.on("request", lambda request: seen.append(request.url))
    path = tmp_path / "page.html"
    path.write_text("<img src='missing.png'><script>console.error('trouble')</script>")
    page.goto(path.as_uri())
    assert "trouble" in seen
    assert path.with_name("missing.png").as_uri() in seen


def test_charts_are_drawn(visit, summary):
    page = visit(render_report(summary), viewport={"width": 1280, "height": 900})
    (figure,) = page.locator("#charts figure").all()
    assert figure.locator("figcaption").inner_text() == "Predicted and measured"
    assert "loss increase" in figure.locator("svg[role=img]").get_attribute("aria-label")
    assert figure.locator("svg[role=img] path.curve").count() == 3
    assert figure.locator(".legend li").count() == 5
    measured = figure.locator("svg[role=img] path.mark title")
    sizes = [title.rpartition(": ")[2].split(" ")[0] for title in measured.all_text_contents()]
    assert sorted(sizes) == sorted(f"{100 * size.plan.removed_ratio:.3g}" for size in summary.sizes)
    assert "NaN" not in page.content()


def test_a_click_on_a_layer_shows_its_curve(visit, summary):
    page = visit(render_report(summary), viewport={"width": 1280, "height": 900})
    layer = "model.layers.1.self_attn.o_proj"
    cell = page.get_by_role("button", name="block 1, self_attn.o_proj")
    cell.click()
    assert page.locator("#panel-title").inner_text() == layer
    assert cell.get_attribute("aria-pressed") == "true"
    assert page.locator(".map .cell[aria-pressed=true]").count() == 1
    profile = next(profile for profile in summary.planner.profiles if profile.layer == layer)
    forms = {option.form for option in profile.options} - {"dense"}
    assert set(page.locator("#panel .legend li").all_inner_texts()) == forms
    marks = page.locator("#panel-chart circle.mark title")
    assert marks.count() == sum(option.form != "dense" for option in profile.options)
    choice = summary.plan.choices[layer]
    assert f"becomes {choice.form}" in page.locator("#panel-facts").inner_text()
    assert page.locator("#panel-chart .ring").count() == 1
    page.locator("#panel summary").click()
    assert page.locator("#panel tbody tr").count() == marks.count()


def test_the_costliest_layer_is_there_at_first(visit, summary):
    page = visit(render_report(summary))
    choices = summary.plan.choices
    assert page.locator("#panel-title").inner_text() == max(choices, key=lambda layer: choices[layer].cost)


def test_keyboard(visit, summary):
    """One Tab stop for the whole map, arrows within, Enter chooses; focus is seen and told."""
    page = visit(render_report(summary), viewport={"width": 1280, "height": 900})
    page.locator("[name=shade]").first.focus()
    page.keyboard.press("Tab")
    focused = "document.activeElement.getAttribute('aria-label')"
    assert page.evaluate(focused).startswith("block 0, self_attn.q_proj: ")
    assert page.locator("#tip").inner_text() == page.evaluate("document.activeElement.dataset.about")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key, place in {"ArrowRight": "block 0, self_attn.k_proj", "ArrowDown": "block 1, self_attn.k_proj"}.items():
        page.keyboard.press(key)
        assert page.evaluate(focused).startswith(f"{place}: ")
    page.keyboard.press("ArrowDown")  # there is nothing below
    page.keyboard.press("Enter")
    assert page.locator("#panel-title").inner_text() == "model.layers.1.self_attn.k_proj"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.map')") is None


def test_hover_and_shading(visit, summary):
    page = visit(render_report(summary), viewport={"width": 1280, "height": 900})
    costliest = page.locator(".map .c8").first
    costliest.hover()
    assert "% removed, cost" in page.locator("#tip").inner_text()
    background = "element => getComputedStyle(element).backgroundColor"
    before = costliest.evaluate(background)
    page.get_by_role("radio", name="loss increase, nats a token").check()
    assert costliest.evaluate(background) == "rgb(10, 58, 105)" != before


def test_experts_share_a_cell(visit, invent):
    experts = [f"layers.0.experts.{number}.up" for number in range(4)]
    page = visit(render_report(invent(["layers.0.q", *experts])))
    page.get_by_role("button", name="block 0, experts").click()
    assert page.locator("#panel-title").inner_text() == experts[0]
    page.get_by_label("layer", exact=True).select_option(experts[1])
    assert page.locator("#panel-title").inner_text() == experts[1]
    assert "becomes sparse: 50 % removed, cost 0.25" in page.locator("#panel-facts").inner_text()
    page.get_by_role("button", name="block 0, q:").click()
    assert page.locator("#panel-pick").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_down_only(visit, summary, scheme):
    page = visit(render_report(summary), viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.locator(".map .cell").last.click()
    assert page.locator("#panel-title").is_visible()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 23, 30)"
    assert dark == (scheme == "dark")


def test_print(visit, summary, tmp_path):
    """On paper: light, with the config, without what only a screen can do."""
    page = visit(render_report(summary), color_scheme="dark")
    assert page.locator("#config pre").is_hidden()
    assert page.pdf(path=tmp_path / "report.pdf", format="A4").startswith(b"%PDF")
    page.emulate_media(media="print")
    assert page.locator("#config pre").is_visible()
    assert page.locator("#charts svg[role=img]").is_visible()
    assert page.locator(".switch").is_hidden()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_scripts_the_figures_are_there(visit, summary):
    page = visit(render_report(summary), java_script_enabled=False)
    assert f"{summary.plan.parameters:,}" in page.locator(".tiles").inner_text()
    assert page.locator(".map .cell").count() == len(summary.plan.choices)
    assert page.get_by_text("The charts are drawn by a script").is_visible()


def test_hostile_names(visit, invent):
    name = "a.0.\"'><img src=https://example.com/x onerror=alert(1)></script><script>alert(2)</script>"
    evaluation = Evaluation({name: 10.0}, {}, {name: [Score(name, 1.0)]})
    page = visit(render_report(invent([name, "a.0.y"], model=name, original=evaluation, compressed=evaluation)))
    page.locator(".map .cell").first.click()
    assert page.locator("#panel-title").inner_text() == name
    assert page.locator("img").count() == 0
    assert page.title().startswith(name)


def test_nothing_could_be_loaded(browser, visit, summary):
    """The page's own policy stops a request that its data would smuggle in."""
    page = browser.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.set_content(render_report(summary).replace("<main", "<img src='https://example.com/x.png'><main"))
    page.wait_for_timeout(100)
    assert any("Content Security Policy" in text for text in refused)


def test_scores_that_are_not_finite(visit, invent):
    scores = {"clips": [Score("word error rate", 3.0, 2.0, 4.0)]}
    summary = invent(
        ["a.0.x"], original=Evaluation({"t": float("inf")}, {}, scores), compressed=Evaluation({"t": 1.0}, {}, scores)
    )
    page = visit(render_report(summary))
    assert page.locator("#charts figcaption").all_inner_texts() == ["Predicted and measured", "word error rate, clips"]
    assert json.loads(page.locator("#data").text_content())["charts"]
