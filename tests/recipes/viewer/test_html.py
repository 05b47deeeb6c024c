"""HTML lanes: every text is drawn, everything is escaped."""

from html.parser import HTMLParser

from hypothesis import given, settings

from tests.support.rollouts import FORKED
from tests.support.trajectories import tag_soups, trajectories
from tw_core import parse, render
from tw_recipes.viewer import page, trajectory_html


class _Reader(HTMLParser):
    """Text and balance of a page."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.lanes = [], "", 0

    def handle_starttag(self, tag, attrs):
        self.lanes += ("class", "lane") in attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(html):
    reader = _Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def test_threads_are_lanes_with_their_plans():
    found = read(trajectory_html(FORKED, title="a < b", stats={"T": 12, "eta": 0.123456}))
    assert found.lanes == 2
    for piece in ("a < b", "T 12", "eta 0.123", "left", "two by two is four", "So \\boxed{7}."):
        assert piece in found.text


def test_nothing_of_a_model_is_markup():
    evil = "<script>alert(1)</script><img src=x onerror=y>"
    html = page(evil, [trajectory_html(evil + FORKED.replace("three", evil).replace("left", evil), title=evil)])
    assert "<script" not in html
    assert "<img" not in html
    assert read(html).text.count("alert(1)") == 6  # two titles of the page, heading, text, plan, thread


@settings(max_examples=40)
@given(tag_soups)
def test_any_text_gives_balanced_html(text):
    read(page("x", [trajectory_html(text)]))


@settings(max_examples=40)
@given(trajectories())
def test_every_thread_is_a_lane(trajectory):
    text = render(trajectory)
    count = sum(1 for _ in _threads(parse(text)))
    assert read(trajectory_html(text)).lanes == count


def _threads(element):
    for block in element.blocks:
        for thread in block.threads:
            yield thread
            yield from _threads(thread)


def test_prompt_and_problems_stand_above_the_response():
    html = trajectory_html("plain", prompt="what is <b>?", problems=["character 3: <Thread>"], below="<p>below</p>")
    found = read(html)
    assert found.text.index("what is <b>?") < found.text.index("character 3: <Thread>") < found.text.index("plain")
    assert html.endswith("<p>below</p></details>")
