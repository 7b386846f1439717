"""Image sets that people fetch: rows of their files -> samples."""

import io

import numpy as np
import pytest
from PIL import Image

from data_prep.lettering import draw_letters
from data_prep.sources.base import File, Lettered
from molmo2_nemo.errors import DataError
from tests.support.source_rows import conversations, only, prepare, reasons


def test_doc_qa():
    row = {
        "questionId": 337,
        "question": "what is the date?",
        "question_types": ["handwritten"],
        "image": "documents/xnbl0037_1.png",
        "docId": 279,
        "answers": ["1/8/93", "1/8/93", ""],
        "data_split": "train",
    }
    samples, skips = prepare("doc_qa", [row, {**row, "questionId": 338, "data_split": "val"}])
    sample = only(samples)
    assert sample.key == "337" and list(sample.images) == [File("documents/xnbl0037_1.png")]
    assert conversations(sample) == [[("doc_qa: what is the date?", "1/8/93")]]
    assert reasons(skips) == {"338": "of another split"}


def test_info_qa():
    row = {"questionId": 1, "question": "How much?", "image_local_name": "20471.jpeg", "answers": ["10%"]}
    sample = only(prepare("info_qa", [row])[0])
    assert list(sample.images) == [File("images/20471.jpeg")]
    assert sample.annotations == [{"style": "info_qa", "question": "How much?", "answers": ["10%"]}]


def test_scene_text_holds_out_the_published_questions():
    """Oracle: ids in the order of NumPy's legacy shuffle with the published seed; the first of them are held out."""
    rows = [
        {"question_id": i, "question": "What word?", "file_path": f"coco-text/{i}.jpg", "answers": ["stop", "STOP"]}
        for i in range(29, -1, -1)
    ]
    samples, skips = prepare("st_qa", rows)
    ids = np.arange(30)
    np.random.RandomState(63069).shuffle(ids)
    assert list(reasons(skips)) == [str(i) for i in ids[:3]] and {s.reason for s in skips} == {
        "held out for validation"
    }
    assert {sample.key for sample in samples} == {str(i) for i in ids[3:]}
    assert list(samples[0].images) == [File(f"coco-text/{samples[0].key}.jpg")]


def ai2d_row(question, options, answer, image=5, letters=False, number=0):
    return {
        "__key__": question,
        "__table__": f"questions/{image}.png.json",
        "questionId": f"{image}.png-{number}",
        "abcLabel": letters,
        "answerTexts": options,
        "correctAnswer": answer,
    }


def letter_rows(image=5):
    return [
        {
            "__key__": f"T{i}",
            "__table__": f"annotations/{image}.png.json",
            "rectangle": [[10 * i, 5], [10 * i + 8, 15]],
            "replacementText": "ABC"[i],
            "value": "word",
        }
        for i in range(3)
    ]


def ai2d(rows, test_ids=()):
    tables = {
        "annotations/*.json": letter_rows(),
        "ai2d_test_ids.csv": [{"image_id": str(i)} for i in test_ids],
    }
    return prepare("ai2_diagram_v2_mix_transparent", rows, tables=tables)


def test_ai2d_plain_question():
    samples, skips = ai2d([ai2d_row("Who eats grass?", ["cow", "{}", "fox", "cow"], 3)])
    sample = only(samples)
    assert not skips and list(sample.images) == [File("images/5.png")]
    assert sample.annotations == [
        {"style": "ai2_diagram", "question": "Who eats grass?", "options": ["cow", "fox"], "answer_idx": 0}
    ]


def test_ai2d_letters_are_drawn_both_ways():
    rows = [
        ai2d_row("Which is the leaf?", ["a", "b", "C", "none"], 1, letters=True),
        ai2d_row("What is A?", ["root", "stem", "b"], 0, letters=True, number=1),
    ]
    samples, skips = ai2d(rows)
    boxes = tuple(("ABC"[i], 10.0 * i, 5.0, 10.0 * i + 8, 15.0) for i in range(3))
    assert not skips and [sample.key for sample in samples] == [
        *("5.png-0", "5.png-0_transparent", "5.png-1", "5.png-1_transparent")
    ]
    assert samples[0].images == [Lettered(File("images/5.png"), boxes)]
    assert samples[1].images == [Lettered(File("images/5.png"), boxes, beside=True)]
    named, other = samples[0].annotations[0], samples[2].annotations[0]
    assert named == {
        "style": "ai2_diagram_no_letter",
        "question": "Which is the leaf?",
        "options": ["A", "B", "C", "none"],
        "answer_idx": 1,
        "unlabelled_options": True,
    }
    assert other["style"] == "ai2_diagram" and "unlabelled_options" not in other
    standard = "Which is the leaf?\nOnly return the correct answer option.\nA\nB\nC\nnone"
    turns = [conversations(samples[0], seed=seed)[0][0] for seed in range(30)]
    assert (standard, "B") in turns


def test_ai2d_splits():
    """Test images go, and of the others those that the published builder holds out (here one of ten)."""
    rows = [ai2d_row("Who?", ["a", "b"], 0, image=i) for i in range(12)]
    samples, skips = ai2d(rows, test_ids=(3, 11))
    images = np.array([i for i in range(12) if i not in (3, 11)])
    np.random.RandomState(5961).shuffle(images)
    assert reasons(skips) == {
        "3.png-0": "image of the test split",
        "11.png-0": "image of the test split",
        f"{images[0]}.png-0": "held out for validation",
    }
    assert len(samples) == 9


def test_ai2d_questions_that_cannot_be_used():
    rows = [
        ai2d_row("No answer?", ["a", "{}"], 1),
        ai2d_row("Outside?", ["a"], 4, number=1),
        ai2d_row("Letters?", ["A", "B"], 0, image=6, letters=True),
    ]
    samples, skips = ai2d(rows)
    assert not samples
    assert reasons(skips) == {
        "5.png-0": "no such option",
        "5.png-1": "no such option",
        "6.png-0": "no boxes for letters",
    }


@pytest.mark.parametrize("beside", [False, True])
def test_letters_on_a_picture(beside):
    white = io.BytesIO()
    Image.new("P", (120, 90), 0).save(white, "PNG")
    boxes = [("A", 40.0, 30.0, 70.0, 60.0), ("B", 5.0, 80.0, 30.0, 80.0)]
    drawn = draw_letters(white.getvalue(), boxes, beside=beside)
    assert drawn == draw_letters(white.getvalue(), boxes, beside=beside)
    with Image.open(io.BytesIO(drawn)) as opened:
        pixels = np.asarray(opened).astype(int)
    assert pixels.shape == (90, 120, 3)
    inside = pixels[58, 68]
    assert list(inside) == ([12, 124, 127] if beside else [25, 249, 255])
    assert (pixels[80:, :] == 0).all(), "a box without height is left out"
    if beside:
        assert (pixels[20:32, 28:38] == 255).all(axis=-1).any(), "a white ground, above and left of the box"
    else:
        letter = np.argwhere((pixels[31:60, 41:70] == 0).all(axis=-1))
        assert len(letter) and abs(letter.mean(axis=0) - 14.5).max() < 3, "a black letter in the middle"


def test_letters_want_a_picture():
    with pytest.raises(DataError, match="cannot read image"):
        draw_letters(b"no picture", [])


def test_tables():
    row = {"__key__": "17", "question": "How many?", "choices": None, "answer": "1,250", "split": "train"}
    samples, skips = prepare("tabwmp_da", [row, {**row, "__key__": "18", "split": "dev", "choices": ["a", "b"]}])
    assert list(only(samples).images) == [File("tables/17.png")]
    assert conversations(only(samples)) == [[("tabwmp_da: How many?", "1,250")]]
    assert reasons(skips) == {"18": "of another split"}


def test_dv_qa():
    rows = [
        {"image": "bar_train_1.png", "question": "Sum?", "answer": 5, "question_id": 1, "answer_bbox": [1, 2]},
        {"image": "bar_train_2.png", "question": "Title?", "answer": "Sales", "question_id": 2, "answer_bbox": []},
        {"image": "bar_train_1.png", "question": "Label?", "answer": None, "question_id": 3, "answer_bbox": []},
    ]
    samples, skips = prepare("dv_qa", rows)
    assert [(list(s.images), [a["answer"] for a in s.annotations]) for s in samples] == [
        ([File("images/bar_train_1.png")], ["5"]),
        ([File("images/bar_train_2.png")], ["Sales"]),
    ]
    assert reasons(skips) == {"bar_train_1.png#1": "empty answer"}


def test_figure_qa_answers_are_digits():
    rows = [
        {"image_index": 3, "question_string": "Is Blue the minimum?", "answer": 0, "question_id": 0},
        {"image_index": 3, "question_string": "Is Red the roughest?", "answer": 1, "question_id": 1},
    ]
    sample = only(prepare("figure_qa", rows)[0])
    assert list(sample.images) == [File("png/3.png")]
    assert {turn for (turn,) in conversations(sample)} == {
        ("figure_qa: Is Blue the minimum?", "0"),
        ("figure_qa: Is Red the roughest?", "1"),
    }


def test_plot_qa_answers_are_written_as_python_does():
    answers = [2.5, 7, "Yes", ["Mali", 3]]
    rows = [{"image_index": 0, "question_string": f"q{i}", "answer": a} for i, a in enumerate(answers)]
    sample = only(prepare("plot_qa", rows)[0])
    assert [a["answer"] for a in sample.annotations] == ["2.5", "7", "Yes", "['Mali', 3]"]
    assert list(sample.images) == [File("png/0.png")]
