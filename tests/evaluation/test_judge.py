"""Caption F1 by a judge: a server that the test starts answers by rule, and badly in every way that servers do."""

from __future__ import annotations

import threading
import time

import pytest

from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.chat import KEY, Chat, Patience, endpoint
from molmo2_nemo.evaluation.judge import UNANSWERED, Judge
from molmo2_nemo.evaluation.measure import Item, json_object
from tests.support.judge_server import Handler, Server

REFERENCE = "a dog runs. a boat is red. it rains."
QUICK = Patience(timeout=5, wait=0.01, tries=3)


def items(*captions: str) -> list[Item]:
    return [Item(f"record {i}", "Describe it.", text, [REFERENCE]) for i, text in enumerate(captions)]


def test_recall_precision_and_f1(server, tmp_path):
    judge = Judge(server.url, "tiny", tmp_path, QUICK)
    found = judge.score("caption_f1", items("a dog runs. a cat sits.", "it snows.", "", REFERENCE))
    first = found["record 0"]
    assert first.details == {
        **{"recall": pytest.approx(1 / 3), "precision": 0.5, "statements": 2},
        **{"missed": ["a boat is red", "it rains"], "unsupported": ["a cat sits"]},
    }
    assert [found[f"record {i}"].value for i in range(4)] == pytest.approx([0.4, 0, 0, 1])
    assert judge.said("caption_f1", 4) == []
    assert {request["path"] for request in server.requests} == {"/v1/chat/completions"}
    assert {(request["model"], request["temperature"]) for request in server.requests} == {("tiny", 0)}


def test_a_rerun_asks_nothing_twice(server, tmp_path):
    captions = items("a dog runs. a cat sits.", "it rains.", "it rains.")
    first = Judge(server.url, "tiny", tmp_path, QUICK).score("caption_f1", captions)
    # the reference's statements are asked for once; of each of the two captions, its statements and both verdicts
    assert len(server.requests) == 1 + 2 * 3
    again = Judge(server.url, "tiny", tmp_path, QUICK)
    assert again.score("caption_f1", captions) == first and again.asked == 0 and len(server.requests) == 7
    with (tmp_path / "judge.jsonl").open("a") as file:
        file.write('{"asked": "cut o')  # a process that was killed
    more = Judge(server.url, "tiny", tmp_path, QUICK)
    assert more.score("caption_f1", [*captions, *items("a boat is red.")][::-1])["record 0"] is not None
    assert more.asked == 3
    Judge(server.url, "another", tmp_path, QUICK).score("caption_f1", captions[:1])
    assert len(server.requests) == 7 + 3 + 4


def test_known_statements_are_not_asked_for(server, tmp_path):
    reference = {"text": REFERENCE, "statements": ["a dog runs", "a bird sings"]}
    judge = Judge(server.url, "tiny", tmp_path, QUICK)
    found = judge.score("caption_f1", [Item("a", "", "a dog runs. it rains.", [reference])])["a"]
    assert found.details["recall"] == 0.5 and found.details["precision"] == 1 and judge.asked == 3


@pytest.mark.parametrize(
    "faults",
    [
        [(429, "slow down")],
        [(500, "oops"), (503, "")],
        [(200, "not JSON"), (200, '{"choices": []}')],
        [(200, "[" * 100_000)],
        [lambda handler: handler.say("I would rather not.")],
        [lambda handler: handler.say('{"statements": "one"}')],
        [lambda handler: handler.connection.close()],
    ],
    ids=["429", "500", "no protocol", "too deep", "refusal", "wrong form", "closed"],
)
def test_what_passes_is_asked_again(faults, server, tmp_path):
    server.faults = list(faults)
    judge = Judge(server.url, "tiny", tmp_path, QUICK)
    assert judge.score("caption_f1", items("a dog runs."))["record 0"].value == 0.5
    assert len(server.requests) == 4 + len(faults) and not server.faults
    assert not judge.said("caption_f1", 1)
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 4  # what was of no use is not kept


def test_a_server_says_how_long_to_wait(server, tmp_path):
    """It says not at all: the test would last for hours if that were not read."""
    server.faults = [lambda handler: handler.reply(429, "", Retry_After="0")]
    judge = Judge(server.url, "tiny", tmp_path, Patience(wait=10_000, longest_wait=10_000))
    assert judge.score("caption_f1", items("a dog runs."))["record 0"].value == 0.5


def test_pauses():
    chat = Chat("http://127.0.0.1:9/v1", "m")
    assert [chat.pause(number, None) for number in (0, 1, 2, 9)] == [1, 2, 4, 60]
    assert [chat.pause(3, asked) for asked in (0.0, 7.0, 3600.0)] == [0, 7, 60]


def test_failures_are_counted_and_the_rest_stands(server, tmp_path):
    server.faults = [(500, "oops")] * 3
    judge = Judge(server.url, "tiny", tmp_path, Patience(at_once=1, tries=3, wait=0.01))
    found = judge.score("caption_f1", items("a dog runs.", "it rains."))
    assert found["record 0"] is None and found["record 1"].value == 0.5
    (said,) = judge.said("caption_f1", 2)
    assert said == (
        "caption_f1: the judge did not judge 1 of 2 answers, so the figure is over the other 1 (1: status 500 (oops))"
    )


def test_a_page_of_a_web_server_is_not_quoted(server, tmp_path):
    server.faults = [(502, "<html><head><title>502 Bad Gateway</title></head></html>")] * 3
    judge = Judge(server.url, "tiny", tmp_path, QUICK)
    assert judge.score("caption_f1", items("a dog runs.")) == {"record 0": None}
    assert "so there is no figure (1: status 502)" in judge.said("caption_f1", 1)[0]


def test_replies_without_use(server, tmp_path):
    server.faults = [lambda handler: handler.say('{"verdicts": [true]}')] * 2
    judge = Judge(server.url, "tiny", tmp_path, QUICK)
    assert judge.score("caption_f1", items("a dog runs.")) == {"record 0": None}
    (said,) = judge.said("caption_f1", 1)
    assert "so there is no figure (1: a reply that is not of the form asked for: '{\"verdicts\": [true]}')" in said


def test_a_judge_that_never_answers_is_given_up(server, tmp_path):
    server.faults = [(503, "busy")] * 1000
    judge = Judge(server.url, "tiny", tmp_path, Patience(at_once=1, tries=2, wait=0.01))
    found = judge.score("caption_f1", items(*(f"caption {i}." for i in range(50))))
    assert set(found.values()) == {None} and len(found) == 50
    assert len(server.requests) == 2 * UNANSWERED
    (said,) = judge.said("caption_f1", 50)
    assert f"{50 - UNANSWERED}: not asked, since the judge did not answer before" in said and "5: status 503" in said


def test_failures_that_are_not_in_a_row_end_nothing(server, tmp_path):
    few = UNANSWERED - 1
    server.faults = [(500, "")] * few + [None] * 4 + [(500, "")] * few  # an answered caption has four questions
    judge = Judge(server.url, "tiny", tmp_path, Patience(at_once=1, tries=1))
    found = list(judge.score("caption_f1", items(*(f"caption {i}." for i in range(2 * few + 2)))).values())
    assert [score is not None for score in found] == [False] * few + [True] + [False] * few + [True]


def test_a_server_here_is_asked_without_a_proxy(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens
    judge = Judge(server.url, "tiny", tmp_path, Patience(tries=1))
    assert judge.score("caption_f1", items("a dog runs."))["record 0"] is not None


@pytest.mark.parametrize("status", [301, 307, 401, 404])
def test_a_server_that_refuses_is_asked_once(status, server, tmp_path):
    elsewhere = f"{server.url}/elsewhere"
    server.faults = [lambda handler: handler.reply(status, "no", Location=elsewhere)]
    judge = Judge(server.url, "tiny", tmp_path, Patience(at_once=1))
    assert set(judge.score("caption_f1", items("one.", "two.")).values()) == {None}
    assert len(server.requests) == 1
    assert f"status {status} (no)" in judge.said("caption_f1", 2)[0]


def test_no_server(tmp_path):
    silent = Server()
    silent.server_close()  # its port is free
    judge = Judge(silent.url, "tiny", tmp_path, Patience(tries=2, wait=0.01))
    assert judge.score("caption_f1", items("one."))["record 0"] is None
    assert "Connection refused" in judge.said("caption_f1", 1)[0]


def slow(handler: Handler) -> None:
    time.sleep(1)


def drips(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(20):
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("fault", [slow, drips])
def test_a_reply_has_its_time(fault, server, tmp_path):
    server.faults = [fault]
    judge = Judge(server.url, "tiny", tmp_path, Patience(timeout=0.3, tries=1))
    assert judge.score("caption_f1", items("one."))["record 0"] is None
    assert "no answer within 0.3 s" in judge.said("caption_f1", 1)[0]


def test_as_many_at_once_as_allowed(server, tmp_path):
    together = threading.Barrier(3)

    def waits(handler: Handler) -> None:
        together.wait(60)
        handler.reply(429, "", Retry_After="0")

    server.faults = [waits] * 3  # each is answered when three are there
    judge = Judge(server.url, "tiny", tmp_path, Patience(at_once=3))
    found = judge.score("caption_f1", items(*(f"caption {i}." for i in range(12))))
    assert None not in found.values() and server.busiest == 3


def test_the_key_goes_to_the_server_and_nowhere_else(server, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, "secret\n")
    Judge(server.url, "tiny", tmp_path, QUICK).score("caption_f1", items("a dog runs."))
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}
    assert "secret" not in (tmp_path / "judge.jsonl").read_text()
    monkeypatch.delenv(KEY)
    Judge(server.url, "tiny", tmp_path / "b", QUICK).score("caption_f1", items("a dog runs."))
    assert "Authorization" not in server.headers[-1]


@pytest.mark.parametrize(
    ("url", "model", "expected"),
    [
        ("localhost:8000/v1", "m", "'localhost:8000/v1' is not the judge's URL"),
        ("file:///etc/passwd", "m", "is not the judge's URL"),
        ("https://me:key@host/v1", "m", f"into the environment variable {KEY}"),
        ("http://host/v1", " ", "model has no name"),
        ("http://[host/v1", "m", "is not the judge's URL"),
        ("http://host:port/v1", "m", "is not the judge's URL"),
        ("http://host/ v1", "m", "is not the judge's URL"),
        ("http://höst/v1", "m", "is not the judge's URL"),
    ],
)
def test_addresses_that_are_none(url, model, expected, tmp_path):
    with pytest.raises(UserError) as error:
        Judge(url, model, tmp_path)
    assert expected in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["two words", "clé"])
def test_a_key_that_no_header_can_hold(key, tmp_path, monkeypatch):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(UserError, match=KEY) as error:
        Judge("http://127.0.0.1:9/v1", "m", tmp_path)
    assert key not in str(error.value)


@pytest.mark.parametrize("given", ["http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions"])
def test_an_address_may_be_whole(given):
    assert endpoint(given) == "http://h:1/v1/chat/completions"


@pytest.mark.parametrize(
    ("references", "expected"),
    [
        ([], "no reference"),
        ([" "], "the reference is blank"),
        ([{"points": []}], "expected a text"),
        ([{"text": "a", "statements": [1]}], "statements is [1]"),
    ],
)
def test_references_that_a_judge_cannot_compare_with(references, expected, server, tmp_path):
    judge = Judge(server.url, "m", tmp_path, QUICK)
    assert judge.score("caption_f1", [Item("record 7", "", "a", references)]) == {"record 7": None}
    assert expected in judge.said("caption_f1", 1)[0] and not server.requests


def test_lines_of_answered_questions_get_the_judges_scores(server, tmp_path):
    asked = {"question": "?", "references": [REFERENCE]}
    texts = [("a", "a dog runs."), ("b", ""), ("c", "it snows."), ("c", "it snows.")]  # keys need not differ
    lines = [asked | {"key": k, "answer": text, "scores": {"caption_recall": {"value": 0}}} for k, text in texts]
    lines.append(asked | {"key": "d", "answer": "5", "scores": {"counting": {"value": 1}}})
    server.faults = [(404, "gone")]
    judge = Judge(server.url, "m", tmp_path, Patience(at_once=1))
    (said,) = judge.score_lines(lines)  # the first is refused, the others are then not asked
    assert "did not judge 4 of 4" in said and all("caption_f1" not in line["scores"] for line in lines)
    assert Judge(server.url, "m", tmp_path, QUICK).score_lines(lines) == []
    assert [line["scores"].get("caption_f1", {}).get("value") for line in lines] == [0.5, 0, 0, 0, None]
    assert lines[0]["scores"]["caption_recall"] == {"value": 0}


def test_unknown_figures(tmp_path):
    with pytest.raises(UserError, match="a judge has no figure 'caption_f2'; did you mean 'caption_f1'"):
        Judge("http://127.0.0.1:9/v1", "m", tmp_path).score("caption_f2", [])


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"a": 1}', {"a": 1}),
        ('So: {not json} {"a": {"b": 2}} {"c": 1}', {"a": {"b": 2}}),
        ("none", None),
        ("[1]", None),
        ("{", None),
        ('{"a":' * 5000, None),
    ],
)
def test_an_object_in_a_reply(reply, expected):
    assert json_object(reply) == expected
