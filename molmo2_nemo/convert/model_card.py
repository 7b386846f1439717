"""README.md of an exported folder: what the run's own files say of the model, and what they do not say."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.convert.folders import MODEL_FILE, ORIGIN_FILE
from molmo2_nemo.convert.json_files import is_present, parse_object
from molmo2_nemo.convert.names import Format
from molmo2_nemo.errors import UserError
from molmo2_nemo.model.config import Molmo2Config
from molmo2_nemo.rundir.card import stage_card
from molmo2_nemo.rundir.config_file import run_of_checkpoint
from molmo2_nemo.rundir.paths import CHECKPOINTS
from molmo2_nemo.rundir.progress import StageProgress, read_stage
from molmo2_nemo.settings.run import RunConfig, StageConfig

CARD_FILE = "README.md"
UNKNOWN = "unknown"
HEAD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- molmo2
---
"""
LOAD = """\
With transformers 5 (5.24.0 was tried), without `trust_remote_code`:

```python
import transformers
from PIL import Image

folder = "."  # this one
processor = transformers.AutoProcessor.from_pretrained(folder)
model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
picture = {"type": "image", "image": Image.open("cat.jpg")}
content = [picture, {"type": "text", "text": "Which animal is this?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True,
                                       add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

transformers chooses a video's frames otherwise than training: hand it frames and times (`do_sample_frames=False`), as
molmo2_nemo's adapters for lmms-eval and VLMEvalKit do.
"""


def model_card(checkpoint: Path, model_config: Molmo2Config, target: Format, stored: str) -> str:
    """The text of the card.

    Args:
        checkpoint: what was exported.
        stored: the type of the weights, such as bfloat16.
    """
    try:
        chain = stages_of(checkpoint)
        cards, damaged = [stage_card(stage) for stage in chain], ""
    except UserError as error:  # the weights are whole: no reason to keep them from being exported
        chain, cards, damaged = [], [], f"stages, data, settings and scores: {error}"
    base, note = base_of(chain[0].config.init_from if chain and chain[0].config else None, checkpoint)
    title = f"# Molmo2 {model_config.name}" + (f", after stage {chain[-1].name}" if chain else "")
    parts = [HEAD, title, "", *model_lines(model_config, target, stored, base), "", "## How to load it", "", LOAD]
    if chain:
        parts += ["## Training", "", *training(chain, cards), "", "## Data", "", *data(cards), ""]
        parts += ["## Settings", "", *settings(chain), "", "## Scores", "", *scores(cards), ""]
    parts += ["## Not known", "", *not_known(chain, cards, [damaged or no_run(chain, checkpoint), note])]
    return "\n".join(parts) + "\n"


def stages_of(checkpoint: Path) -> list[StageProgress]:
    """The stages that led to a checkpoint, first to last, each from its own files; empty where it lies in no run."""
    found: list[StageProgress] = []
    folder = run_of_checkpoint(checkpoint)
    while folder is not None and folder.resolve() not in [stage.folder for stage in found]:
        stage = read_stage(folder.resolve(), 0.0)
        found.insert(0, stage)
        folder = stage_before(stage)
    return found


def stage_before(stage: StageProgress) -> Path | None:
    """The stage that a stage began from: where its settings say, or beside it under that name if the run was moved."""
    began = stage.config.init_from if stage.config else None
    if began is None:
        return None
    path = Path(began)
    beside = stage.folder.parent.joinpath(*path.parts[-3:]) if path.parent.name == CHECKPOINTS else path
    return next((run_of_checkpoint(place) for place in (path, beside) if place.is_dir()), None)


def base_of(began: str | None, checkpoint: Path) -> tuple[str | None, str]:
    """What the first stage, or a checkpoint outside a run, began from, by the names that were written down; and what is
    to be said where that is not known.

    Args:
        began: the first stage's `init_from`.
    """
    folder = Path(began) if began else checkpoint
    if is_present(folder / ORIGIN_FILE):
        origin = parse_object((folder / ORIGIN_FILE).read_bytes(), str(folder / ORIGIN_FILE))
        return " and ".join(Path(str(origin.get(part, UNKNOWN))).name for part in ("llm", "vit")), ""
    if is_present(folder / MODEL_FILE):
        return f"an imported Molmo2 ({folder.name})", ""
    if began:
        why = "it names no base model" if folder.is_dir() else "it is not there any more"
        return None, f"the base model: training began from {began}, and {why}"
    return None, "the base model: the settings name none, so the weights may have been drawn at random"


def no_run(chain: Sequence[StageProgress], checkpoint: Path) -> str:
    """What is to be said of a checkpoint outside a run."""
    where = f"{checkpoint.name} lies in no run's folder (no config.yaml above it)"
    return "" if chain else f"stages, data, settings and scores: {where}"


def model_lines(config: Molmo2Config, target: Format, stored: str, base: str | None) -> list[str]:
    text, vision = config.text, config.vision
    return [
        f"- base model: {base or UNKNOWN}",
        f"- language model: {text.num_layers} layers of width {text.hidden_size:,}, {text.num_heads} heads "
        f"({text.num_kv_heads} of keys and values), vocabulary {text.vocab_size:,}, {text.max_position:,} positions",
        f"- vision encoder: {vision.num_layers} blocks of width {vision.hidden_size:,}, patches of "
        f"{vision.patch_size} pixels, {vision.grid} x {vision.grid} of a crop",
        f"- weights: {stored}, in the {target} format; exported by molmo2_nemo (`molmo2 convert export`)",
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table; None is unknown."""

    def line(cells: Sequence[Any]) -> str:
        shown = (UNKNOWN if cell is None else str(cell).replace("|", "\\|") for cell in cells)
        return f"| {' | '.join(shown)} |"

    return [line(columns), line(["---"] * len(columns)), *map(line, rows)]


def number(value: Any, form: str = ",") -> str | None:
    return None if value is None else format(value, form)


def training(chain: Sequence[StageProgress], cards: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for stage, card in zip(chain, cards, strict=True):
        loss, cfg = card.get("loss") or {}, stage.config or RunConfig()
        steps = card.get("steps") or f"{stage.step:,} of {stage.max_steps:,}, not finished"
        size, batch = cfg.data.packing.sequence_length, cfg.stage.global_batch_size
        lengths = [one.sequence_length for one in cfg.data.lengths if one.share > 0] or [size]
        packs = " or ".join(f"{batch * size // length} x {length:,}" for length in lengths)
        losses = [number(loss.get(name), ".4g") for name in ("first", "last")]
        rows.append([stage.name, number(steps, ""), packs, card.get("layout"), number(card.get("tokens")), *losses])
    columns = ("stage", "steps", "packs x tokens per step", "layout", "tokens", "first loss", "last loss")
    return table(columns, rows)


def data(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    rows = []
    for card in cards:
        for name, one in (card.get("data") or {}).get("sources", {}).items():
            share = number(one["share"], ".2%")
            rows.append(
                [card["stage"], name, share, number(one["examples"]), number(one["records"]), one["fingerprint"]]
            )
    return table(("stage", "data set", "share", "examples read", "records", "fingerprint"), rows)


def settings(chain: Sequence[StageProgress]) -> list[str]:
    rows = []
    for stage in chain:
        if (cfg := stage.config) is None:
            continue
        rates = " / ".join(f"{getattr(cfg.stage.optim, part).lr:g}" for part in ("vit", "connector", "llm"))
        lora = lora_words(cfg.stage)
        image, video = cfg.data.image, cfg.data.video
        rows.append([stage.name, rates, cfg.cluster.precision, lora, image.max_crops, video.max_frames, video.max_fps])
    columns = ("stage", "learning rates (vision / connector / language)", "precision", "LoRA", "tiles", "frames")
    return table((*columns, "frames per second"), rows)


def lora_words(stage: StageConfig) -> str:
    """The adapters of a stage, and what is trained whole beside them at which rate."""
    if not stage.lora.rank:
        return "none"
    beside = " and ".join(stage.lora.beside)
    return f"rank {stage.lora.rank}" + (f", {beside} at {stage.optim.beside_adapters.lr:g}" if beside else "")


def scores(cards: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for each scorer of each task, with the number of its answers; where a task's questions have several, one
    over all of them."""
    rows = []
    for card in cards:
        for checkpoint, tasks in (card.get("scores") or {}).items():
            for task, one in tasks.items():
                limit, answers = one["settings"].get("limit"), one.get("answers", {})
                name = f"{task}, at most {limit:,} items" if limit else task
                found = [(scorer, score, answers.get(scorer)) for scorer, score in one["scores"].items()]
                found += [("all questions", one["score"], one["questions"])] if one.get("mixed") else []
                for scorer, score, count in found:
                    of = f"{one['questions'] if count is None else count:,}"
                    rows.append([card["stage"], checkpoint, name, scorer, f"{score:.4g}", of, one["failed"]])
    if not rows:
        return ["No scores lie in the run's folder; `molmo2 evaluate` writes them there."]
    return table(("stage", "checkpoint", "task", "scorer", "score", "answers", "failed"), rows)


def not_known(
    chain: Sequence[StageProgress], cards: Sequence[Mapping[str, Any]], notes: Sequence[str]
) -> Iterator[str]:
    yield "- licence, intended use and known failures: the run's files say nothing of them"
    yield from (f"- {note}" for note in notes if note)
    for card in cards:
        if card.get("unknown"):
            yield f"- of stage {card['stage']}: {', '.join(card['unknown'])}"
        elif card["state"] != "finished":
            yield f"- what came of stage {card['stage']}: it is not finished"
