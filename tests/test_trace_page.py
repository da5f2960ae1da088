"""The page tells the text, step by step, whatever bytes the tokens are of, and asks nothing of other places."""

from html.parser import HTMLParser

import pytest

from modeling_speculator import SpeculationStatistics
from modeling_speculator.measuring.trace_page import TracedText, render
from modeling_speculator.tracing import TracedStep


PROMPT, CONTINUATION = "if a <b>", " &é日\n\tend"


class Bytes:
    """A tokenizer whose tokens are bytes, so that characters are cut into pieces."""

    def decode(self, ids, **kwargs):
        return bytes(ids).decode(errors="replace")

    def convert_ids_to_tokens(self, token):
        return f"<{token}>"


class Spans(HTMLParser):
    """Text of the elements of each class, without what lies in those of class `draft` inside of them."""

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.attributes = [], {}, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "br"):
            self.open.append((dict(attrs).get("class") or tag).split())
            for name in self.open[-1]:
                self.found.setdefault(name, []).append("")

    def handle_endtag(self, tag):
        self.open.pop()

    def handle_data(self, data):
        innermost = max((at for at, names in enumerate(self.open) if "draft" in names), default=0)
        for names in self.open[innermost:]:
            for name in names:
                self.found[name][-1] += data


def traced():
    """In steps of a draft of two tokens at the second, which is a branch of its own, and of none in the end."""
    tokens, steps = list(CONTINUATION.encode()), []
    at = 1
    while at + 3 < len(tokens):
        right, wrong = tokens[at], (tokens[at] + 1) % 128
        steps.append(
            TracedStep(
                tokens=(tokens[at - 1], right, wrong, 60, 61),
                parents=(0, 0, 0, 1, 1),
                depths=(0, 1, 1, 2, 2),
                probabilities=(0.0, 0.875, 0.0625, 0.01, 0.02),
                ranks=(1, 1, 2, 9, 8),
                accepted=(1,),
                emitted=tuple(tokens[at : at + 2]),
            )
        )
        at += 2
    nothing = {"parents": (0,), "depths": (0,), "probabilities": (0.0,), "ranks": (1,), "accepted": ()}
    for last in range(at, len(tokens)):
        steps.append(TracedStep(tokens=(tokens[last - 1],), **nothing, emitted=(tokens[last],)))
    statistics = SpeculationStatistics(
        emitted_per_step=tuple(len(step.emitted) for step in steps),
        candidates_per_step=(3,) * len(steps),
        drafted_tokens=sum(len(step.tokens) - 1 for step in steps),
        n_predict=2,
        trace=tuple(steps),
    )
    return TracedText(list(PROMPT.encode()), tokens, statistics)


def test_the_text_is_told_by_steps():
    text = traced()
    page = Spans(render([text], Bytes(), {"base model": "org/<model>"}))
    shown = CONTINUATION.replace("\n", "↵\n")
    assert page.found["prompt"] == [PROMPT]
    assert page.found["text"][0] == PROMPT + shown
    assert "".join(page.found["step"]) == shown[1:]
    assert len(page.found["step"]) == len(text.speculation.trace)
    assert "org/<model>" in page.found["dd"]
    accepted = [name for tag, key, name in page.attributes if key == "title" and name.startswith("drafted")]
    assert len(accepted) == sum(len(step.accepted) for step in text.speculation.trace)
    assert set(accepted) == {"drafted at position 1: probability 0.875, rank 1"}


def test_the_tree_of_a_step():
    found = Spans(render([traced()], Bytes(), {})).found
    right, wrong = CONTINUATION[1], chr(ord(CONTINUATION[1]) + 1)
    # The likelier child first; what a line shares with the one above stands only there.
    expected = [f"{right} 0.875, rank 1", "= 0.020, rank 8", "", "< 0.010, rank 9", f"{wrong} 0.062, rank 2"]
    assert found["node"][:5] == expected
    assert len(found["branch"]) == 3 * sum(len(step.tokens) > 1 for step in traced().speculation.trace)


def test_figures_and_positions():
    found = Spans(render([traced()] * 2, Bytes(), {})).found
    statistics = traced().speculation
    assert found["figure"][0].startswith(f"{statistics.tokens_per_step:.2f}")
    assert found["figure"][1].startswith(str(2 * statistics.steps))
    share = statistics.accepted_per_position[0]
    assert f"{100 * share:.0f} %" in found["positions"][0] and f"{100 * (1 - share):.0f} %" in found["positions"][0]
    assert [heading[:7] for heading in found["h2"]] == ["Text 1:", "Text 2:"]


def test_the_page_is_self_contained():
    page = render([traced()], Bytes(), {})
    assert not {key for _, key, _ in Spans(page).attributes} & {"src", "href", "onload"}
    assert "<script" not in page and "url(" not in page and "@import" not in page


def test_a_text_without_a_trace_is_refused():
    text = TracedText([1], [2], SpeculationStatistics((1,), (3,), 3, 2))
    with pytest.raises(ValueError, match="trace_speculation=True"):
        render([text], Bytes(), {})
