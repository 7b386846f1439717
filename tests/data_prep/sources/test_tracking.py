"""Rows of the tracking sets in their published schema -> samples. One schema, 36 sources."""

import pytest

from data_prep.sources import tracking
from data_prep.sources.base import File, FirstOf, Frames, HubFile
from tests.support.source_rows import conversations, only, prepare, reasons

HEAD = [(138, 148), (165, 130), (190, 125), (192, 105)]  # of the rabbit in the film, every half second
ROW = {
    "id": "q1",
    "video": "05ce",
    "fps": 6,
    "sampling_fps": 2,
    "width": 480,
    "height": 270,
    "expression": "head of the rabbit",
    "mask_id": ["7"],
    "obj_id": [0],
    "frame_trajectories": [
        {
            "frame": 3 * i,
            "time": 0.5 * i,
            "points": [
                {"id": 7, "point": [float(x), float(y)], "occluded": i == 1},
                {"id": 9, "point": [1.0, 1.0], "occluded": False},  # of another object
            ],
        }
        for i, (x, y) in enumerate(HEAD)
    ][::-1],
}
CLIP_ROW = {**ROW, "video_dataset": "mose", "clip": "05ce_0", "start_frame": 12, "end_frame": 40}
NAMES = [source.name for source in tracking.SOURCES]


def row_for(name: str) -> dict:
    return CLIP_ROW if name.startswith("molmo2_video") else ROW


def style_of(name: str) -> str:
    if name.endswith("single_point_track"):
        return "video_single_point_track_per_frame"
    return "video_point_ground_start_end" if name.endswith("ground") else "video_point_track_per_frame"


def test_all_sets_of_the_mixture():
    several = {"mevis", "lv_vis", "vicas", "revos", "burst"}
    expected = {f"{name}_{task}" for name in several for task in ("track", "ground", "single_point_track")}
    expected |= {f"{name}_track" for name in ("ref_yt_vos", "ref_davis17", "yt_vis", "moca")} | {"moca_ground"}
    expected |= {"molmo2_video_track", "molmo2_video_track_ground", "molmo2_video_single_point_track"}
    single = "webuav got10k vasttrack trackingnet lvosv1 lvosv2 lasot uwcot webuot latot tnl2k tnllt".split()
    assert set(NAMES) == expected | {f"{name}_single_point_track" for name in single}
    configs = {source.name: source.origin.configs for source in tracking.SOURCES}
    assert configs["tnllt_single_point_track"] == ("tnnlt",) and configs["vicas_ground"] == ("ground",)
    assert configs["lasot_single_point_track"] == ("lasot",)


@pytest.mark.parametrize("name", NAMES)
def test_row(name):
    sample = only(prepare(name, [row_for(name)], tables={"video_original_fps.json": []})[0])
    assert sample.key == "q1-2fps" and sample.clip is None
    assert sample.sampling == {"frame_sample_mode": "fps", "candidate_sampling_fps": [1, 2, 3, 6]}
    (annotation,) = sample.annotations
    assert annotation["style"] == style_of(name) and annotation["label"] == "head of the rabbit"
    assert (annotation["sampling_fps"], annotation["width"], annotation["height"]) == (2, 480, 270)
    assert [frame["time"] for frame in annotation["points"]] == [0.0, 0.5, 1.0, 1.5]
    assert annotation["points"][1] == {
        "frame": 3,
        "time": 0.5,
        "points": {"0": {"point": [165.0, 130.0], "occluded": True}},
    }


def test_what_the_model_answers():
    """Six frames per second over 5 s are more than 8 frames: one per second remains, and the rest is not asked for."""
    said = {}
    for name in ("molmo2_video_track", "molmo2_video_track_ground", "molmo2_video_single_point_track"):
        ((question, answer),) = only([conversations(only(prepare(name, [CLIP_ROW])[0]))])[0]
        said[name] = answer
        assert "head of the rabbit" in question
    assert said["molmo2_video_track"] == '<tracks coords="0.0 1 288 548;1.0 1 396 463">head of the rabbit</tracks>'
    assert said["molmo2_video_track_ground"] == said["molmo2_video_track"]
    assert said["molmo2_video_single_point_track"] == '<tracks coords="1.0 1 396 463">head of the rabbit</tracks>'


def test_rates():
    assert tracking.sampling_rates(6) == [1, 2, 3, 6] and tracking.sampling_rates(30) == [1, 2, 3, 5, 6, 10]
    assert tracking.sampling_rates(0.5) == [] and tracking.sampling_rates(4.9) == [1, 2, 4]


def test_left_out():
    hidden = [
        {**frame, "points": [{**p, "occluded": True} for p in frame["points"]]} for frame in ROW["frame_trajectories"]
    ]
    rows = [
        {**ROW, "id": "a", "sampling_fps": 4},
        {**ROW, "id": "b", "fps": 0.5},
        {**ROW, "id": "c", "frame_trajectories": hidden},
        {**ROW, "id": "d", "fps": None},
        {**ROW, "id": 5, "frame_trajectories": []},
        {**ROW, "id": "e", "sampling_fps": 1},
        {**ROW, "id": "e", "sampling_fps": 1},
    ]
    samples, skips = prepare("mevis_track", rows)
    assert [s.key for s in samples] == ["c-2fps", "d-2fps", "5-2fps", "e-1fps", "e-1fps~2"]
    assert "points" not in samples[2].annotations[0]
    assert only(only(conversations(samples[2])))[1] == "There are none."
    assert reasons(skips) == {
        "a-4fps": "fps is no multiple of sampling_fps",
        "b-2fps": "no whole rate divides the video's",
    }
    samples, skips = prepare("mevis_single_point_track", rows[2:5])
    assert [s.key for s in samples] == ["d-2fps"] and set(reasons(skips).values()) == {"no visible point to start from"}


def test_videos_or_frames():
    media = only(prepare("mevis_track", [ROW])[0]).video
    assert media == FirstOf(
        File("MeViS/train/videos/05ce", "train/videos/05ce"), Frames("MeViS/MeViS_release/train/JPEGImages/05ce", 6.0)
    )
    media = only(prepare("vasttrack_single_point_track", [{**ROW, "video": "Cat-12"}])[0]).video
    assert media.media[1] == Frames("VastTrack/train/Cat/Cat-12/imgs", 6.0)
    assert only(prepare("uwcot_single_point_track", [{**ROW, "video": "a/a"}])[0]).video == File(
        "UW-COT220/UW-COT220/a/a", "UW-COT220/a/a"
    )


def test_frames_at_their_own_rate_are_thinned():
    """Frames of BURST and ViCaS are used only where their rate is known."""
    rates = {"video_original_fps.json": [{"video": "05ce", "value": 30}]}
    media = only(prepare("burst_track", [ROW], tables=rates)[0]).video
    assert media.media[1] == Frames("TAO-Amodal/frames/train/05ce", 6.0, step=5)
    media = only(prepare("burst_track", [{**ROW, "video": "other"}], tables=rates)[0]).video
    assert media == File("TAO-Amodal/train/videos/other", "train/videos/other")


@pytest.mark.parametrize(
    "source, clip, folder",
    [
        ("mose", "05ce_0", "MOSE/MOSE_release/train/JPEGImages/05ce"),
        ("mot2020", "05ce", "MOT20/MOT15/train/05ce/img1"),
        ("APTv2", "05ce_0", "APTv2/APTv2/data/05ce"),
        ("animaltrack", "05ce_0", None),
    ],
)
def test_clips_of_molmo2(source, clip, folder):
    media = only(prepare("molmo2_video_track", [{**CLIP_ROW, "video_dataset": source, "clip": clip}])[0]).video
    if folder is None:
        assert media == File("animaltrack/videos_all/05ce_0", "animaltrack/05ce_0")
        return
    frames = Frames(folder, 6.0) if clip == "05ce" else Frames(folder, 6.0, 12, 40)
    assert media.media[1] == frames and media.media[0].paths[0].endswith(f"/{clip}")


def test_unknown_source_of_clips():
    samples, skips = prepare("molmo2_video_track", [{**CLIP_ROW, "video_dataset": "mars"}])
    assert not samples and reasons(skips) == {"q1-2fps": "unknown video source"}


def test_tracks_of_molmopoint():
    """Their paths are those of the published classes."""
    row = {**ROW, "video_source": "youtube", "video_path": "part/05ce.webm"}
    rows = [row, {**row, "id": "m", "video_source": "MammalNet"}, {**row, "id": "x", "video_source": "moon"}]
    samples, skips = prepare("molmo_point_track_any", rows)
    assert [s.video for s in samples] == [
        File("youtube-cc/part/05ce.webm", "youtube-cc/05ce"),
        File("MammalNet/trimmed_video/05ce"),
    ]
    assert reasons(skips) == {"x-2fps": "unknown video source"}
    sample = only(prepare("molmo_point_track_syn", [{**ROW, "video": "static-camera/run/a"}])[0])
    assert sample.video.media[0] == File("MolmoPoint-TrackSyn/static-camera/run/a")
    assert sample.video.media[1].archive == HubFile("allenai/MolmoPoint-TrackSyn", "synthetic_tracks.tar")
    assert only(conversations(samples[0])) == only(conversations(sample))
