"""Random answers and what the published evaluation scores them, for tests/evaluation/test_official_text.py.

    python tests/evaluation/official/text_scorers.py CHECKOUT

writes text_scorers.json.gz beside this file. CHECKOUT is a checkout of allenai/molmo2; what its olmo/eval/evaluators.py
imports must be installed. Where the published code draws an option by chance, the score is null.
"""

from __future__ import annotations

import gzip
import json
import random
import string
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = 600  # of each scorer
OUT = Path(__file__).parent / "text_scorers.json.gz"
Case = tuple[str, list[Any], dict[str, float | None]]  # prediction, references, name -> published score

WORDS = """cat dog two none one ten zero a the an seventeen clockwise counter-clockwise Paris New York isnt couldnt've
couldntve yall'd've somebody'd its Im dont red, blue 10:30 $5.00 3.5 3,500 1,000 12% 0.12 U.S. U.S.A. mr. naïve Straße
yes Yes. no No, not nothing PM AM noon up/down (left) [right] {x} =7 e5 1e3 -4 +4 .5 5. 50 % nan inf Bear Dog A B
""".split()


def spoken(rng: random.Random, most: int = 5) -> str:
    """Words with odd spaces and marks between them."""
    words = [rng.choice(WORDS) for _ in range(rng.randint(0, most))]
    text = "".join(word + rng.choice([" ", " ", " ", " ", "  ", ", ", ". ", "-", "\t", "! "]) for word in words)
    return text if rng.random() < 0.3 else text.strip()


def contracted(rng: random.Random) -> tuple[str, str]:
    """A contraction of the published table, as it is and as it becomes, each as an answer."""
    from olmo.eval.vqa import contractions

    lacking = rng.choice(sorted(contractions))
    return f"{lacking} {rng.choice(WORDS)}", f"{contractions[lacking]} {rng.choice(WORDS)}"


def edited(rng: random.Random, text: str) -> str:
    """A text with up to three characters changed, or another case, or marks around it."""
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        place = rng.randint(0, len(text))
        text = text[:place] + rng.choice(string.ascii_letters + " .,'") + text[place + rng.choice([0, 1]) :]
    return rng.choice([str, str, str.lower, str.upper, str.title, lambda t: f"{t}.", lambda t: f" {t} "])(text)


def wrapped(rng: random.Random, text: str) -> str:
    """An answer as a model may give it: with words before, on several lines, ..."""
    other = spoken(rng)
    forms = ["{0}"] * 8 + ["Answer: {0}", "{1}\nAnswer: {0}", "Answer: {0} Answer: {1}", "{0}\n{1}", "{1}\n{0}\n{0}"]
    forms += [
        "The answer is {0}",
        "so it could be {1} = {0}.",
        "so {0}",
        "{1} thus {0}",
        "a final {0}",
        "it is so {0}",
        "{0} ({1})",
        "answer: {0}",
    ]
    return rng.choice(forms).format(text, other)


def number(rng: random.Random) -> str:
    if rng.random() < 0.05:
        return rng.choice(["nan", "inf", "1_000", "٣", "-inf", "NaN"])
    value = rng.choice([0, 1, 2, 5, 10, 20, 37, 100, 250, 1000, 2010]) * rng.choice([1, 1, 1, 0.1, 0.01, -1])
    return rng.choice(["{:g}", "{:g}", "{:.1f}", "{:.2f}", "{:g}%", "{:,}", "{:e}", "${:g}"]).format(value)


def near_number(rng: random.Random, text: str) -> str:
    """A number about 5 % off a text, if it is one."""
    try:
        value = float(text.rstrip("%")) * rng.choice([1, 1.05, 0.95, 1.049, 1.051, 0.94, 1.2, 0.01])
    except ValueError:
        return edited(rng, text)
    return rng.choice(["{:g}", "{:.3f}", "{:g}%", "{:,}", "about {:g}", "{:g} apples"]).format(value)


OPTIONS = """a cat|a dog|Bear in a den|clockwise|counter-clockwise|A|B|the person walks to the door|1/2|3: four|yes|no
|it is B or C|none of the above|up|upwards|D.|Both|a|b""".replace("\n", "").split("|")


def options(rng: random.Random, least: int = 2, most: int = 6) -> list[str]:
    return rng.sample(OPTIONS, rng.randint(least, most))


def chosen(rng: random.Random, texts: list[str]) -> str:
    """An answer that names one of the options, or two, or none."""
    i, j = rng.randrange(len(texts)), rng.randrange(len(texts))
    a, b = string.ascii_uppercase[i], string.ascii_uppercase[j]
    forms = ["{a}", "{a}", "{a}.", "({a})", "{a})", "{a}:", "{a}. {x}", "({a}) {x}", "{a}: {x}", "{x}", "{a} or {b}"]
    forms += ["({a}) not {b}.", "The answer is {a}", "The best answer is {a}. {x}", "Best option: {a}", "Answer: {a}"]
    forms += [
        "The correct option is {a}",
        "I think that it must be {x} of all",
        "{a}, {b}, {x}",
        "It is {a} in my view",
    ]
    forms += [
        "neither {x} nor the other one but {y}",
        "{c}",
        "{c}. {x}",
        "",
        "no idea",
        "Option: {a}",
        "'{a}'",
        "{a}\n{b}",
    ]
    forms += [
        "{a}. or {b})",
        "{b}: or {a}.",
        "{a}) but {b}:",
        "{b} as in {a}:",
        "({a}), {b}. {x}",
        "{a}: {x}, {b}) {y}",
    ]
    forms += ["I do not know what to say here", "Answer is {a}", "first {a}. then {b}) and ({a})", "{x}\n{y}\n{x}"]
    text = rng.choice(forms).format(a=a, b=b, c=a.lower(), x=texts[i], y=texts[j])
    return edited(rng, text) if rng.random() < 0.2 else text


def choice(texts: list[str], place: int, **more: Any) -> dict[str, Any]:
    return {"option": string.ascii_uppercase[place], "options": texts, **more}


class Words:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens: Any) -> str:
        return "".join(map(chr, tokens))


def called(evaluator: Any, prediction: str, metadata: dict[str, Any]) -> dict[str, Any]:
    """What an evaluator returns for one example; its metrics as numbers."""
    import numpy as np

    tokens = np.array([ord(character) for character in prediction], dtype=np.int64)
    given = {"predictions": [tokens], "prompts": [tokens], "predictions_text": [prediction], "prompts_text": [""]}
    found = evaluator([metadata], given, Words())
    return {k: (v.compute().item() if v.weight > 0 else None) if hasattr(v, "compute") else v for k, v in found.items()}


class Drawn(Exception):
    """The published code draws by chance."""


def without_chance(*modules: types.ModuleType) -> None:
    def draw(*_: Any) -> None:
        raise Drawn

    for module in modules:
        module.random = types.SimpleNamespace(choice=draw)  # type: ignore[attr-defined]


def or_drawn(score: Callable[[], Any]) -> float | None:
    try:
        return float(score())
    except Drawn:
        return None


def text_cases(rng: random.Random, ev: Any) -> dict[str, list[Case]]:
    """Cases of the scorers whose references are texts."""
    kinds = {"plain_match": "em", "anls": "ansl", "relaxed_accuracy": "relaxed_correctness"}
    kinds |= {
        "scifi_accuracy": "scifi_relaxed_correctness",
        "vqa_accuracy": "vqa_score",
        "aokvqa_accuracy": "a_okvqa_score",
    }
    cases: dict[str, list[Case]] = {}
    for name, metric in kinds.items():
        humans = name in ("vqa_accuracy", "aokvqa_accuracy")
        for _ in range(CASES):
            if name in ("relaxed_accuracy", "scifi_accuracy") and rng.random() < 0.7:
                answers = [number(rng) for _ in range(rng.randint(1, 2))]
                prediction = wrapped(rng, near_number(rng, rng.choice(answers)))
            else:
                pool = [spoken(rng) for _ in range(3)] if humans else [spoken(rng), spoken(rng, 3)]
                if name == "vqa_accuracy" and rng.random() < 0.5:
                    pool = [text.split()[0] for text in contracted(rng)]
                answers = [edited(rng, rng.choice(pool)) for _ in range(10 if humans else rng.randint(1, 3))]
                if name == "scifi_accuracy" and rng.random() < 0.3:
                    answers = ["[" + ", ".join(pool) + "]"]
                prediction = wrapped(rng, edited(rng, rng.choice([*answers, spoken(rng)])))
            try:
                score = called(ev.VqaEval([metric]), prediction, {"answers": answers})[metric]
            except ZeroDivisionError:
                continue  # both texts are empty
            cases.setdefault(name, []).append((prediction, answers, {"value": score}))
    return cases


def choice_cases(rng: random.Random, ev: Any) -> dict[str, list[Case]]:
    """Cases of the scorers whose references hold all options."""
    cases: dict[str, list[Case]] = {}
    for _ in range(CASES):
        texts, unlabelled = options(rng), rng.random() < 0.3
        place, prediction = rng.randrange(len(texts)), chosen(rng, texts)
        letter = string.ascii_uppercase[place]
        names = texts if unlabelled else list(string.ascii_uppercase[: len(texts)])
        if len({name.lower() for name in names}) == len(names):  # published code refuses others
            score = called(
                ev.VqaEval(["mc"]), prediction, {"option_names": names, "answer_idx": place, "answer": letter}
            )
            more = {"unlabelled": True} if unlabelled else {}
            cases.setdefault("nearest_option", []).append(
                (prediction, [choice(texts, place, **more)], {"value": score["mc"]})
            )

        def add(name: str, metadata: dict, metric: str, texts=texts, place=place, prediction=prediction) -> None:
            score = or_drawn(lambda: called(ev.VqaEval([metric]), prediction, metadata)[metric])
            cases.setdefault(name, []).append((prediction, [choice(texts, place)], {"value": score}))

        metadata = {"options": texts, "answer_idx": place, "answer": letter}
        add("option_start", metadata, "em_start")
        add("parsed_choice", metadata, "muir_bench_mc")
        add("mmmu", metadata | {"question_type": "multiple-choice"}, "mmmu_score")
        five = options(rng, 5, 5)
        five_place, five_text = rng.randrange(5), chosen(rng, five)
        metadata = {"options": five, "answer_idx": five_place, "answer": string.ascii_uppercase[five_place]}
        add("nextqa", metadata, "nextqa_mc", five, five_place, five_text)
        add("egoschema", metadata, "ego_schema_mc", five, five_place, five_text)
        four = options(rng, 4, 4)
        four_place, four_text = rng.randrange(4), chosen(rng, four)
        metadata = {"options": four, "answer_idx": four_place, "answer": string.ascii_uppercase[four_place]}
        add("perception_test", metadata, "perception_test_mc", four, four_place, four_text)
        add(
            "realworldqa",
            metadata | {"question_type": "multiple_choice"},
            "real_world_qa_score",
            four,
            four_place,
            four_text,
        )
        more = {"duration": "short", "sub_category": "Law", "task_type": "OCR Problems"}
        score = called(ev.VideoMMEEval(), four_text, metadata | more)["all"]
        cases.setdefault("videomme", []).append((four_text, [choice(four, four_place)], {"of answered": score}))
        more = {"duration_group": 15, "question_category": "SSS", "sample_difficulty": "easy"}
        metadata = {"options": five, "answer": string.ascii_uppercase[five_place], **more}
        score = or_drawn(
            lambda metadata=metadata, text=five_text: called(ev.LongVideoBenchEval(), text, metadata)["all"]
        )
        cases.setdefault("longvideobench", []).append((five_text, [choice(five, five_place)], {"value": score}))
    return cases


def open_cases(rng: random.Random, ev: Any) -> dict[str, list[Case]]:
    """Cases of MMMU's and RealWorldQA's open questions, of MathVista and VSI-Bench."""
    from olmo.eval import vqa

    cases: dict[str, list[Case]] = {"mmmu": [], "realworldqa": [], "mathvista": [], "vsi_bench": []}
    for _ in range(CASES):
        answers = [rng.choice([number, spoken])(rng) for _ in range(rng.randint(1, 2))]
        prediction = wrapped(rng, near_number(rng, rng.choice(answers)))
        score = called(ev.VqaEval(["mmmu_score"]), prediction, {"answers": answers, "question_type": "open"})
        cases["mmmu"].append((prediction, answers, {"value": score["mmmu_score"]}))
        prediction = wrapped(rng, edited(rng, answers[0]))
        metadata = {"answer": answers[0], "question_type": "short"}
        score = called(ev.VqaEval(["real_world_qa_score"]), prediction, metadata)
        cases["realworldqa"].append((prediction, answers[:1], {"value": score["real_world_qa_score"]}))
        cases["mathvista"].append(mathvista_case(rng, vqa))
        value = rng.choice([0.5, 1, 2, 3, 7, 12.5, 100])
        prediction = wrapped(rng, near_number(rng, f"{value:g}") if rng.random() < 0.8 else spoken(rng))
        metadata = {"answer": f"{value:g}", "question_type": "object_counting"}
        score = called(ev.VSIBenchEval(), prediction, metadata)["object_counting_MRA"]
        cases["vsi_bench"].append((prediction, [{"number": value, "kind": "object_counting"}], {"value": score}))
        texts = options(rng, 2, 4)
        place, prediction = rng.randrange(len(texts)), chosen(rng, texts)
        metadata = {"answer": string.ascii_uppercase[place], "options": texts, "question_type": "route_planning"}
        score = called(ev.VSIBenchEval(), prediction, metadata)["route_planning_accuracy"]
        cases["vsi_bench"].append((prediction, [choice(texts, place, kind="route_planning")], {"value": score}))
    return cases


def mathvista_case(rng: random.Random, vqa: Any) -> Case:
    kind = rng.choice(["choice", "choice", "integer", "float", "float", "text", "list"])
    texts, precision = options(rng, 2, 5), rng.choice([1, 2])
    value = rng.choice([1, 2, 14, 1.2, 0.75, 100])
    answer = {
        "choice": rng.choice(texts),
        "integer": f"{int(value)}",
        "float": str(round(float(value), precision)),
    }.get(kind, rng.choice(["[1, 2]", "a cat", "7 o'clock"]))
    prediction = chosen(rng, texts) if kind == "choice" else wrapped(rng, near_number(rng, answer))
    metadata = {"example_id": "1", "choices": texts, "answer": answer, "query": "", "precision": precision}
    metadata |= {"question_type": "multi_choice" if kind == "choice" else "free_form"}
    metadata |= {"answer_type": "text" if kind == "choice" else kind}
    score = vqa.math_vista_score(prediction.strip(), metadata, "", use_api=False)
    further = {"choice": {"options": texts}, "float": {"precision": precision}}.get(kind, {})
    return prediction, [{"answer": answer, "type": kind, **further}], {"value": float(score)}


def other_cases(rng: random.Random, ev: Any) -> dict[str, list[Case]]:
    """Cases of clocks, TempCompass, and single questions of those judged together."""
    from olmo.eval import temp_compass_utils

    cases: dict[str, list[Case]] = {
        "clock": [],
        "tempcompass": [],
        "videohallucer": [],
        "vinoground": [],
        "temporalbench": [],
    }
    for _ in range(2 * CASES):
        cases["clock"] += clock_case(rng, ev)
    for _ in range(CASES):
        task = rng.choice(["multi-choice", "yes_no", "caption_matching"])
        texts = options(rng, 2, 4)
        answer = rng.choice(["yes", "no"]) if task == "yes_no" else f"{rng.choice('ABCD')}. {rng.choice(texts)}"
        prediction = rng.choice([answer, chosen(rng, texts), spoken(rng)])
        metadata = {"task": task, "question": "", "answer": answer}
        score = temp_compass_utils.temp_compass_score(prediction.strip(), metadata, "", use_api=False)
        cases["tempcompass"].append((prediction, [{"task": task, "answer": answer}], {"value": score}))
        prediction, answer = spoken(rng), rng.choice(["yes", "no", "Yes", "No "])
        metadata = {"answer": answer, "question_group_id": "temporal-1"}
        score = called(ev.VideoHallucerEval(), prediction, metadata)["m_b_acc_all"]
        cases["videohallucer"].append((prediction, [{"answer": answer, "group": "temporal-1"}], {"value": score}))
        answer, prediction = rng.choice("AB"), chosen(rng, texts)
        score = called(ev.VinogroundEval(), prediction, {"answer": answer, "qtype": "textscore", "id": "3_pos"})[
            "text"
        ][0]
        cases["vinoground"].append(
            (prediction, [{"answer": answer, "id": "3", "kind": "text"}], {"value": float(score)})
        )
        place = rng.randrange(len(texts))
        metadata = {
            "option_names": string.ascii_uppercase[: len(texts)],
            "answer_idx": place,
            "type": "qa",
            "video": "1",
        }
        score = called(ev.TemporalBenchEval(), prediction, metadata)["score"][0]
        cases["temporalbench"].append((prediction, [choice(texts, place, group="qa-1")], {"value": float(score)}))
    return cases


def clock_case(rng: random.Random, ev: Any) -> list[Case]:
    bench = rng.random() < 0.5
    hour, minute, second = (
        rng.randrange(24),
        rng.randrange(61 if bench else 60),
        rng.choice([-1, -1, rng.randrange(60)]),
    )
    if bench:
        hour = rng.choice([hour % 12, 12])
    if rng.random() < 0.1:
        hour, minute, second = -1, -1, -1
    ours = [hour % 12 if rng.random() < 0.5 else hour, minute, max(second, 0)]
    for place in range(3):
        if rng.random() < 0.4:
            ours[place] = max(0, ours[place] + rng.choice([-11, -3, -2, -1, 1, 2, 3, 4, 59, -59, 11, 12]))
    texts = ["{0}:{1:02d}", "{0}:{1:02d}:{2:02d}", "The time is {0}:{1:02d}", "The time is {0}:{1:02d}:{2:02d} PM"]
    texts += [
        "{0}:{1:02d} AM.",
        "{0} : {1} : {2}",
        "{0} o'clock",
        "cannot be read",
        "{0}:{1:02d} PM",
        "it:is",
        "{0}:",
        "",
    ]
    prediction = rng.choice([*texts[:5], *texts]).format(*ours)
    metadata = {"hour": hour, "minute": minute, "second": second}
    try:
        found = called(ev.ClockEval(is_test=bench), prediction, metadata)
    except UnboundLocalError:
        return []  # the benchmark's code fails on responses without a time
    names = {"overall_exact": "value", "overall_close": "close", "hour_correct": "hour", "minute_correct": "minute"}
    names |= {"second_correct": "second", "minute_close": "minute close", "second_close": "second close"}
    scores = {names[key]: value for key, value in found.items() if key in names and value is not None}
    return [(prediction, [metadata | ({"bench": True} if bench else {})], scores)]


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    import torch.distributed as dist
    from olmo.eval import evaluators, mmmu_eval_utils, vqa

    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29876", rank=0, world_size=1)  # VideoHallucer gathers
    evaluators.get_openai_key = lambda: ""
    without_chance(evaluators, mmmu_eval_utils, vqa)
    rng = random.Random(17)
    cases: dict[str, list[Case]] = {}
    for make in (text_cases, choice_cases, open_cases, other_cases):
        for name, found in make(rng, evaluators).items():
            cases.setdefault(name, []).extend(found)
    data = json.dumps(cases, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
    OUT.write_bytes(gzip.compress(data, mtime=0))
    print({name: len(found) for name, found in cases.items()}, OUT.stat().st_size)


if __name__ == "__main__":
    main()
