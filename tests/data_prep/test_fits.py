"""What prepare says of texts that do not fit, against what the real builder cuts of the same records, and estimates
against counts made with the vocabulary of Qwen."""

import json
import random

import numpy as np
import pytest

from data_prep.estimate import text_cost
from data_prep.fits import too_long
from data_prep.noticed import COARSE, noticed
from data_prep.text_length import estimated
from molmo2_nemo.cli.main import main
from molmo2_nemo.data.build import ExampleBuilder
from molmo2_nemo.data.check import View
from molmo2_nemo.data.config import DataConfig, PackingConfig, VideoConfig
from molmo2_nemo.data.manifest import MANIFEST, read_head
from molmo2_nemo.data.prompts import PromptFormatter, VisualContext
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.tokenizer import Molmo2Tokenizer
from molmo2_nemo.data.video.sampling import TimeSampler

EMOJI = "".join(chr(random.Random(0).randint(0x1F300, 0x1F64F)) for _ in range(570))
CHINESE = "今天天气很好，我们去公园散步。图片中有一只猫坐在窗台上，旁边放着一盆绿色的植物。"
THAI = "วันนี้อากาศดีมาก เราไปเดินเล่นที่สวนสาธารณะ ในภาพมีแมวนั่งอยู่บนขอบหน้าต่าง "
CODE = "    for place, turns in found.items():\n        assert place is not None, (place, len(turns))\n"
LONG = {"digits": "0123456789" * 130, "chinese": CHINESE * 35, "emoji": EMOJI, "thai": THAI * 30, "code": CODE * 40}
QWEN = {  # text -> tokens with the vocabulary of Qwen
    "0123456789" * 130: 1300,
    CHINESE * 35: 945,
    "Сегодня хорошая погода, мы пошли гулять в парк. На картинке кошка сидит на подоконнике.": 34,
    "आज मौसम बहुत अच्छा है, हम पार्क में टहलने गए। तस्वीर में एक बिल्ली खिड़की पर बैठी है।": 82,
    "오늘은 날씨가 좋아서 공원을 산책했습니다. 사진에는 창가에 앉아 있는 고양이가 있습니다.": 33,
    "Tänään on kaunis sää, kävimme kävelyllä puistossa. Kuvassa kissa istuu ikkunalaudalla vihreän kasvin "
    "vieressä.": 44,
    "Heute ist das Wetter schön, wir sind im Park spazieren gegangen.": 19,
}


@pytest.mark.parametrize("said, tokens", QWEN.items(), ids=range(len(QWEN)))
def test_estimates_hold_what_a_published_tokenizer_counts(said, tokens):
    length = estimated(said)
    assert tokens <= length.most <= 2.5 * tokens and 0.6 * tokens <= length.likely <= 1.3 * tokens


def test_points_are_estimated_as_they_are_written():
    said = "".join(f"{i} {7 * i:03d} 500 " for i in range(1, 10))
    assert estimated(said).likely == estimated(said).most == 9 * (1 + 1 + 3 + 1 + 3) + 8


@pytest.mark.parametrize("name", LONG)
def test_a_runs_tokenizer_counts_exactly(name):
    """Around the very length at which training begins to cut. A conversation has no drawn wording."""
    data = {"annotations": [{"style": "user_qa", "messages": ["q", LONG[name]]}]}
    record = parse_record("s:k", {"json": json.dumps(data).encode()})
    builder = ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"))
    length = builder.plan(record, np.random.default_rng(0)).num_tokens
    for limit in (length - 1, length, length + 1):
        config = DataConfig(packing=PackingConfig(sequence_length=limit))
        cut = builder.plan(record, np.random.default_rng(0), max_tokens=limit).info["tokens_cut"]
        assert too_long(record, View(), config) == ({"tokens_cut": ""} if cut else {})
        assert cut == max(length - limit, 0)
    unknown = DataConfig(tokenizer="", packing=PackingConfig(sequence_length=400))
    assert set(too_long(record, View(), unknown)) == {"tokens_cut"}


@pytest.mark.parametrize("sizes", [(300, 300), (150, 20, 300), (10, 10, 500)])
def test_branches_are_dropped_in_some_order(sizes):
    tree = [{"style": "user_qa", "messages": ["q " * 5, "word " * size]} for size in sizes]
    record = parse_record("s:k", {"json": json.dumps({"annotations": tree}).encode()})
    builder = ExampleBuilder(DataConfig(), Molmo2Tokenizer.load("tiny"))
    length = builder.plan(record, np.random.default_rng(0)).num_tokens
    for limit in range(length - 700, length + 10, 47):
        if limit < 100:
            continue
        found = too_long(record, View(), DataConfig(packing=PackingConfig(sequence_length=limit)))
        seen = [builder.plan(record, np.random.default_rng(s), max_tokens=limit).info for s in range(25)]
        dropped, cut = any(i["branches_dropped"] for i in seen), any(i["tokens_cut"] for i in seen)
        assert ("branches_dropped" in found) == dropped and (found == {}) == (not dropped and not cut), limit


def track(step, until, **more):
    times = [round(i * step, 6) for i in range(int(until / step))]
    points = [{"time": time, "points": {"0": {"point": [10, 10]}}} for time in times]
    whole = {"style": "video_point_track_per_frame", "label": "car", "width": 64, "height": 48, "points": points}
    return whole | {"snap": 0.25} | more


@pytest.mark.parametrize("step, until", [(1 / 60, 10), (0.1, 660), (0.04, 10), (1, 3600)])
def test_tracks_count_the_frames_that_are_shown(step, until):
    """Not each tracked frame: the estimate is near the tokens of the answer that training writes."""
    from molmo2_nemo.data.annotation_json import read_annotation

    fields = track(step, until)
    times = TimeSampler.of(VideoConfig(), {}, 25)(until)
    context = VisualContext(video_size=(64, 48), frame_times=times)
    (turn,) = PromptFormatter(DataConfig().text).conversation(
        read_annotation(fields, 0, True), context, np.random.default_rng(0)
    )
    assert text_cost([[fields]], (), times) == pytest.approx(estimated(turn.user + turn.answer).likely, rel=0.2, abs=30)


@pytest.mark.parametrize("snap, said", [(0.25, True), (0.5, False), (0.0, False)])
def test_tracks_that_are_coarser_than_snap_are_said(snap, said):
    """One position a second in a film of which a frame about every five seconds is shown."""
    data = {"video": "mp4", "annotations": [track(1, 660, snap=snap)]}
    record = parse_record("s:k", {"json": json.dumps(data).encode(), "mp4": b"film"})
    view = View(video_size=(64, 48), duration=660.0, fps=25.0)
    assert (COARSE in noticed(record, data, view, set(), DataConfig())) == said
    dense = {"video": "mp4", "annotations": [track(0.2, 660, snap=snap)]}
    record = parse_record("s:k", {"json": json.dumps(dense).encode(), "mp4": b"film"})
    assert COARSE not in noticed(record, dense, view, set(), DataConfig())


def test_prepare_counts_with_the_tokenizer_of_the_run_asked_for(tmp_path, capsys):
    lines = [{"key": name, "question": "q", "answer": answer} for name, answer in LONG.items()]
    lines.append({"key": "short", "question": "q", "answer": "a cat"})
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = [str(tmp_path / "my.jsonl"), "--workers", "0", "--for", "recipe=tiny", "stage=sft"]
    assert main(["prepare", "--out", str(tmp_path / "counted"), *run]) == 0
    assert "counted with the tokenizer tiny" in capsys.readouterr().out
    notes = read_head(tmp_path / "counted" / "my" / MANIFEST)["notes"]
    found = {text: note for text, note in notes.items() if "beyond a sequence" in text}
    assert found == {"tokens beyond a sequence, cut off (data.packing.sequence_length=768)": [5, "digits"]}
    assert main(["prepare", "--out", str(tmp_path / "unknown"), *run, "data.tokenizer=nowhere"]) == 0
    assert "by estimate (there is no tokenizer at nowhere)" in capsys.readouterr().out
    notes = read_head(tmp_path / "unknown" / "my" / MANIFEST)["notes"]
    found = {text: note for text, note in notes.items() if "beyond a sequence" in text}
    assert sum(count for count, _ in found.values()) == 5 and all("estimate" in text for text in found)
