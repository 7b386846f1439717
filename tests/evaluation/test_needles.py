"""Needles: where they lie in a film, as the reader finds them, and what is asked about them."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data_prep.needles import build_needles, needle_records
from molmo2_nemo.data.config import VideoConfig
from molmo2_nemo.data.record import parse_record
from molmo2_nemo.data.shards import ShardDataset
from molmo2_nemo.data.video.read import plan_video, read_video
from molmo2_nemo.errors import UserError
from molmo2_nemo.evaluation.needles.haystack import FILLERS
from molmo2_nemo.evaluation.needles.needle import TEXT_KIND, WORDS, Needle, Place, chance
from molmo2_nemo.evaluation.needles.pictures import ANSWERS, COLOURS, GROUNDS, QUESTIONS, SIDE, NeedlePicture
from tests.support.films import film


def off(frames: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """Mean difference of each frame [C, SIDE, SIDE, 3] from a picture, in grey levels [C]."""
    return np.abs(frames.astype(float) - picture).mean((1, 2, 3))


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("frames", "shown"), [(3, 8), (16, 16), (40, 128), (50, 12), (200, 16)])
def test_the_reader_samples_the_needle(frames, shown, depth):
    """The film goes through the decoder; exactly the sampled frames that the place names look like the picture."""
    video = VideoConfig(max_frames=shown)
    needle = Needle(7, frames, depth)
    read = read_video(needle.film(video), video, side=SIDE)
    place = needle.place(video)
    assert len(read.frames) == place.of == min(frames, shown)
    found = np.flatnonzero(off(read.frames, needle.picture.pixels()) < 12)
    # The end of a film is sampled, too: a film that is shown whole shows its last frame twice
    last = [place.of - 1] if frames <= shown and place.sampled == place.of - 2 else []
    assert found.tolist() == sorted({place.sampled, *last})


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 3.0])
def test_a_haystack_of_n_frames_is_n_sampled_frames(fps):
    for frames in (3, 17, 128):
        video = VideoConfig(max_frames=frames, max_fps=fps)
        plan = plan_video(Needle(1, frames, 0.5).film(video), video)
        assert len(plan.times) == frames
        assert plan.fps == pytest.approx(fps, rel=0.01)
        assert np.diff(plan.numbers).tolist() == [1] * (frames - 2) + [0]


def test_depth_runs_from_the_first_frame_to_the_last():
    places = [Place.at(depth, 101, VideoConfig(max_frames=101)).sampled for depth in np.linspace(0, 1, 11)]
    assert places[0] == 0 and places[-1] == 99
    assert places == sorted(set(places))


def test_a_haystack_shows_no_other_needle():
    video = VideoConfig(max_frames=300)
    needle = Needle(3, 300, 0.5)
    frames = read_video(needle.film(video), video, side=SIDE).frames
    frames = np.delete(frames, needle.place(video).sampled, 0)
    closest = [off(frames, NeedlePicture.drawn(np.random.default_rng(i)).pixels()).min() for i in range(30)]
    assert min(closest) > 25


def test_the_same_seed_makes_the_same_bytes_and_another_seed_others():
    video = VideoConfig(max_frames=20)
    one, same, other = Needle(5, 20, 0.4, 0.2), Needle(5, 20, 0.4, 0.2), Needle(6, 20, 0.4, 0.2)
    assert one.film(video) == same.film(video) and one.subtitles(video) == same.subtitles(video)
    assert one.film(video) != other.film(video)


def test_depth_moves_the_needle_and_changes_nothing_else():
    video = VideoConfig(max_frames=20)
    early, late = (read_video(Needle(5, 20, d).film(video), video, side=SIDE).frames for d in (0.1, 0.9))
    where = [Needle(5, 20, d).place(video).sampled for d in (0.1, 0.9)]
    others = [i for i in range(20) if i not in where]
    assert np.abs(early[others].astype(int) - late[others]).mean() < 3  # two encodings of the same scenes
    assert Needle(5, 20, 0.1).picture == Needle(5, 20, 0.9).picture


def test_pictures_differ_wherever_an_answer_does():
    base = dict.fromkeys(QUESTIONS, "red")
    for kind in QUESTIONS:
        pixels = [NeedlePicture(base | {kind: answer}).pixels().astype(int) for answer in ANSWERS]
        apart = [np.abs(a - b).mean() for i, a in enumerate(pixels) for b in pixels[:i]]
        assert min(apart) > 1, kind


def test_each_colour_is_where_its_question_says():
    middle = {"picture": (63, 63), "black": (21, 63), "white": (63, 21), "grey": (63, 105), "cyan": (105, 63)}
    for seed in range(20):
        picture = NeedlePicture.drawn(np.random.default_rng(seed))
        pixels = picture.pixels()
        for kind, place in middle.items():
            assert tuple(pixels[place]) == COLOURS[picture.colours[kind]]
            assert kind == "picture" or tuple(pixels[place[0] - 20, place[1] - 20]) == GROUNDS[kind][1]


def test_answers_are_uniform_and_differ():
    drawn = [Needle(i, 8, 0.5, 0.5) for i in range(2000)]
    for kind, answers in {TEXT_KIND: WORDS, **dict.fromkeys(QUESTIONS, ANSWERS)}.items():
        counts = Counter(needle.questions()[kind][1] for needle in drawn)
        assert set(counts) == set(answers)
        expected = len(drawn) * chance(kind)
        assert all(0.6 * expected < n < 1.5 * expected for n in counts.values()), counts
    assert all(len(set(needle.picture.colours.values())) == len(QUESTIONS) == 5 for needle in drawn)
    assert not any(word in line.lower() for word in WORDS for line in FILLERS)


@pytest.mark.parametrize(("frames", "shown"), [(8, 8), (64, 64), (400, 16)])
@pytest.mark.parametrize("depth", [0.0, 0.45, 1.0])
def test_the_sentence_is_among_the_lines_near_a_sampled_frame(frames, shown, depth):
    from molmo2_nemo.data.record import Subtitle
    from molmo2_nemo.data.video.tokens import subtitles_shown

    video = VideoConfig(max_frames=shown)
    needle = Needle(11, frames, 0.5, text_depth=depth)
    lines = [Subtitle(*line) for line in needle.subtitles(video)]
    times = plan_video(needle.film(video), video).times
    seen = subtitles_shown(lines, times, "frame_1")
    assert [line.text for line in seen].count(f"The secret word is {needle.word}.") == 1
    assert needle.questions()[TEXT_KIND][1] == needle.word


def test_a_film_of_ones_own_is_repeated():
    from tests.support import films

    own = film(10, size=(SIDE, SIDE), bframes=0)
    video = VideoConfig(max_frames=40)
    needle = Needle(2, 40, 0.5)
    read = read_video(needle.film(video, own), video, side=SIDE)
    want = [n % 10 for n in range(39)]
    got = films.numbers(read.frames)[:39]
    where = needle.place(video).sampled
    assert got[:where] + got[where + 1 :] == want[:where] + want[where + 1 :]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Place.at(0.5, 2, VideoConfig()), "at least 3"),
        (lambda: Place.at(1.5, 30, VideoConfig()), "depth 1.5"),
        (lambda: Needle(1, 30, 0.5).film(VideoConfig(), b"no film"), "cannot be read"),
    ],
)
def test_what_cannot_be_is_said(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_training_shards_hold_what_needles_ask(tmp_path):
    build_needles(tmp_path / "shards", 6, (4, 9), seed=3, subtitles=0.5)
    data = ShardDataset(tmp_path / "shards", "needle")
    assert len(data) == 6
    lengths, said = set(), set()
    for number in range(6):
        record = parse_record(*data.read(number))
        asked = [a.content.question for a in record.annotations]
        assert asked[:5] == list(QUESTIONS.values())
        assert (len(asked) == 6) == bool(record.subtitles)
        lengths.add(len(plan_video(record.video, VideoConfig()).times))
        said.add(bool(record.subtitles))
    assert lengths == {4, 9} and said == {True, False}


def test_records_are_those_of_the_seed():
    one, same, other = (list(needle_records(3, [3, 5], seed, 0.5)) for seed in (1, 1, 2))
    assert one == same
    assert [members["mp4"] for _, members in one] != [members["mp4"] for _, members in other]


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    from data_prep.needles import main

    assert main([str(tmp_path / "out"), "--share", "0.001"]) == 0
    assert sorted(folder.name for folder in (tmp_path / "out").iterdir()) == ["long", "pretrain", "sft"]
    assert main([str(tmp_path / "out"), "--share", "0.001"]) == 1
    assert "exists already" in capsys.readouterr().err
