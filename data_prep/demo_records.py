"""Annotations of the demo's images and film clip, in the form of a user's own JSONL (data_prep/sources/own.py).

Every statement was written while looking at the image or clip. Points are percent of width and height; the track's are
pixels of the 480 x 270 clip. Captions are short because the tiny model has to learn them by heart in minutes.
"""

from __future__ import annotations

from typing import Any

Entry = dict[str, Any]


def qa(question: str, answer: str) -> Entry:
    return {"style": "user_qa", "question": question, "answer": answer}


def choice(question: str, options: list[str], answer: int) -> Entry:
    return {"style": "a_okvqa_mc", "question": question, "options": options, "answer_idx": answer}


def points(label: str, where: list[list[float]], style: str = "pointing") -> Entry:
    return {"style": style, "label": label, "points": where, "point_scale": 100}


CAPTIONS = {
    "astronaut": "A smiling astronaut in an orange space suit holds a black helmet.",
    "cat": "A tabby cat with green eyes looks past the camera.",
    "coffee": "A white cup of coffee stands on a red saucer with a spoon.",
    "coins": "Four rows of old silver coins lie on a dark grey background.",
    "rocket": "A white rocket stands on its launch pad under a dark blue sky.",
    "horse": "The black silhouette of a standing horse on a white background.",
    "temple": "A tall temple tower with green roofs rises above trees and a lake.",
    "flower": "A round orange flower with many petals in front of dark green leaves.",
    "hopper": "An officer in a dark uniform and glasses stands before a flag.",
    "cameraman": "A man in a dark coat looks through a camera on a tripod.",
}

TREES: dict[str, list[Entry]] = {
    "astronaut": [
        qa("What color is the space suit?", "orange"),
        choice("What does she hold in her arm?", ["a camera", "a helmet", "a book", "a cat"], 1),
        points("helmet", [[76.7, 84.0]]),
    ],
    "cat": [
        qa("Which animal is this?", "a cat"),
        points("eyes", [[37.8, 36.8], [71.3, 45.1]], "point_count"),
        points("nose", [[59.1, 80.5]]),
    ],
    "coffee": [
        qa("What is in the cup?", "coffee"),
        choice("What color is the saucer?", ["blue", "green", "red"], 2),
        points("spoon", [[61.0, 70.4]]),
    ],
    "coins": [
        qa("How many coins are in each row?", "six"),
        points(
            "coins in the top row",
            [[11.5, 17.9], [26.2, 18.5], [40.5, 16.8], [56.3, 16.9], [71.9, 17.4], [87.2, 14.4]],
            "point_count",
        ),
    ],
    "rocket": [
        qa("What stands in the middle?", "a rocket"),
        points("rocket", [[50.2, 70.5]]),
        points("thin towers beside the rocket", [[30.3, 65.0], [70.6, 65.0]], "point_count"),
    ],
    "horse": [
        qa("Does the horse look to the left or to the right?", "to the right"),
        points("head of the horse", [[90.9, 20.2]]),
    ],
    "temple": [
        qa("What color are the roofs of the tower?", "green and orange"),
        points("tower", [[32.0, 42.0]]),
        choice("What lies behind the trees?", ["a desert", "a lake"], 1),
    ],
    "flower": [
        qa("What color is the flower?", "orange"),
        points("flowers", [[48.9, 51.7], [58.4, 95.0]], "point_count"),
    ],
    "hopper": [
        qa("What does the officer wear on the nose?", "glasses"),
        points("name tag", [[24.3, 83.5]]),
        points("cats", [], "point_count"),
    ],
    "cameraman": [
        qa("Is the picture in color?", "No, it is black and white."),
        points("camera", [[56.7, 31.5]]),
        choice("What carries the camera?", ["a table", "a tripod", "a car"], 1),
    ],
}

SEVERAL: list[Entry] = [
    {
        "key": "several-cat-horse",
        "images": ["cat.jpg", "horse.jpg"],
        "annotations": [
            qa("Which animals are in the two pictures?", "A cat is in the first and a horse in the second."),
            {
                "style": "multi_image_pointing",
                "label": "nose of the cat",
                "points": [[[59.1, 80.5]], []],
                "point_scale": 100,
            },
        ],
    },
    {
        "key": "several-people",
        "images": ["hopper.jpg", "coffee.jpg", "astronaut.jpg"],
        "annotations": [
            qa("In which pictures is a person?", "In the first and the third."),
            {
                "style": "multi_image_pointing",
                "label": "faces",
                "points": [[[51.0, 38.0]], [], [[44.3, 24.0]]],
                "point_scale": 100,
            },
        ],
    },
    {
        "key": "several-colors",
        "images": ["flower.jpg", "cameraman.jpg"],
        "annotations": [qa("Which picture is black and white?", "The second picture.")],
    },
]

VIDEO_CAPTION = "A big grey rabbit crawls out of its burrow, stands up and yawns."
SUBTITLES = [
    {"start": 0.2, "end": 1.8, "text": "The rabbit comes out."},
    {"start": 2.8, "end": 4.2, "text": "A long yawn."},
]
# Middle of the rabbit's head, pixels of 480 x 270, every half second.
HEAD = [
    (138, 148), (165, 130), (190, 125), (192, 105), (173, 45), (168, 46),
    (172, 48), (173, 50), (172, 56), (170, 75), (169, 76),
]  # fmt: skip

VIDEO_TREE: list[Entry] = [
    {"style": "video_long_caption", "text": VIDEO_CAPTION},
    qa("Which animal is in the video?", "a rabbit"),
    {
        "style": "video_point_count",
        "label": "raised fists of the rabbit",
        "points": [[[19.6, 13.3], [42.9, 6.7]]],
        "timestamps": [2.0],
        "point_scale": 100,
    },
    {
        "style": "video_point",
        "label": "head of the rabbit",
        "points": [[[28.8, 54.8]], [[36.0, 16.7]]],
        "timestamps": [0.0, 2.0],
        "point_scale": 100,
    },
]
END_CHOICE: Entry = {
    "style": "video_multiple_choice",
    "question": "What does the rabbit do at the end of the video?",
    "options": ["It runs away.", "It puts a hand to its head.", "It sleeps."],
    "answer_idx": 1,
}


def track(frames: int) -> Entry:
    """A track of the rabbit's head at the first `frames` multiples of half a second."""
    return {
        "style": "video_point_track_per_frame",
        "label": "head of the rabbit",
        "sampling_fps": 2,
        "width": 480,
        "height": 270,
        "points": [
            {"time": 0.5 * i, "points": {"0": {"point": list(HEAD[i]), "occluded": False}}} for i in range(frames)
        ],
    }


TEXTS: list[Entry] = [
    {"key": "text-greeting", "messages": ["Hello, who are you?", "I am a tiny Molmo2, trained on a laptop."]},
    {
        "key": "text-two-turns",
        "messages": ["Name a color of the sky.", "blue", "And at night?", "black"],
    },
    {"key": "text-count", "messages": ["Count from one to five.", "one two three four five"]},
    {"key": "text-opposite", "messages": ["What is the opposite of left?", "right"]},
]


def caption(name: str) -> Entry:
    return {"style": "long_caption", "text": CAPTIONS[name]}


def pretrain() -> list[Entry]:
    """Captions, pointing and text: one annotation per record, as stage 1 has it."""
    entries: list[Entry] = []
    for name in CAPTIONS:
        entries.append({"key": f"caption-{name}", "images": [f"{name}.jpg"], "annotations": [caption(name)]})
    for name, tree in TREES.items():
        pointing = [a for a in tree if a["style"] in ("pointing", "point_count")]
        entries.append({"key": f"pointing-{name}", "images": [f"{name}.jpg"], "annotations": pointing[:1]})
    return entries + TEXTS


def _trees() -> list[Entry]:
    return [
        {"key": f"tree-{name}", "images": [f"{name}.jpg"], "annotations": [caption(name), *tree]}
        for name, tree in TREES.items()
    ]


def sft() -> list[Entry]:
    """Message trees about single images, several images together, the clip with subtitles, and text."""
    whole = {  # 3.5 s at 2 frames per second: the eight frames that the tiny stage 2 allows
        "key": "video-rabbit",
        "video": "bunny.mp4",
        "clip": [0.0, 3.5],
        "subtitles": SUBTITLES,
        "annotations": [*VIDEO_TREE, track(8)],
    }
    clip = {
        "key": "video-rabbit-start",
        "video": "bunny.mp4",
        "clip": [0.0, 1.5],
        "annotations": [qa("What does the rabbit do?", "It crawls out of its burrow.")],
    }
    return [*_trees(), *SEVERAL, whole, clip, *TEXTS]


def long() -> list[Entry]:
    """As `sft`, with the whole clip, also sampled more densely, and another record of several images."""
    whole = {
        "key": "video-rabbit",
        "video": "bunny.mp4",
        "subtitles": SUBTITLES,
        "annotations": [*VIDEO_TREE, END_CHOICE, track(len(HEAD))],
    }
    dense = {
        "key": "video-rabbit-dense",
        "video": "bunny.mp4",
        "sampling": {"max_fps": 3},
        "annotations": [{"style": "video_long_caption", "text": VIDEO_CAPTION}, END_CHOICE],
    }
    gallery = {
        "key": "several-gallery",
        "images": ["rocket.jpg", "temple.jpg", "coins.jpg"],
        "annotations": [
            qa("Which picture shows a rocket?", "The first picture."),
            qa("In which picture are coins?", "In the last."),
        ],
    }
    return [*_trees(), *SEVERAL, gallery, whole, dense, *TEXTS]
