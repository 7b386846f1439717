"""A run's verification card: what its own files say of how it came about and what came of it, as JSON.

Nothing is worked out again or guessed: what no file says is null, and its name stands under `unknown`. Equal files give
equal cards. docs/running.md has the fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from molmo2_nemo.errors import UserError
from molmo2_nemo.rundir import paths
from molmo2_nemo.rundir.checkpoint_manifest import MANIFEST
from molmo2_nemo.rundir.progress import StageProgress, read_run
from molmo2_nemo.rundir.results import COUNTS, read_results
from molmo2_nemo.settings.schema import to_yaml

FORMAT, VERSION = "molmo2-run-card", 1
CARD = "card.json"  # in the run's folder
CODE = ("command", "commit", "modified", "versions")  # of attempt.json


def run_card(path: str | Path) -> dict[str, Any]:
    """The card of a run's folder, or of one stage's.

    Raises:
        UserError: no run's folder, none of its stages is finished, or a file of it is damaged.
    """
    stages = read_run(path)
    if not any(stage.summary for stage in stages):
        raise UserError(
            f"{path}: no stage is finished, and a card says what came of one; molmo2 status {path} shows how far it is"
        )
    name = Path(path).resolve().name
    return {"format": FORMAT, "version": VERSION, "run": name, "stages": [stage_card(stage) for stage in stages]}


def stage_card(stage: StageProgress) -> dict[str, Any]:
    """The card of one stage; of one that is not finished, its name and state only."""
    if stage.summary is None or stage.config is None:
        return {"stage": stage.name, "state": "not finished"}
    cfg, summary, code = stage.config, stage.summary, stage.attempt.get("code") or {}
    card = {
        "stage": stage.name,
        "state": "finished",
        **{name: code.get(name) for name in CODE},
        "model": cfg.model.preset,
        "init_from": cfg.init_from,
        "settings_sha256": hashlib.sha256(to_yaml(cfg).encode()).hexdigest(),
        "seed": cfg.seed,
        "layout": summary.get("layout"),
        "data": data_card(stage),
        "steps": summary.get("steps"),
        "tokens": summary.get("tokens"),
        "loss": loss_digest(stage.steps),
        "speed": speed(stage.steps),
        "skipped_steps": stage.skipped_steps,
        "skipped_records": summary.get("skipped"),
        "validation": stage.validation[-1]["losses"] if stage.validation else None,
        "checkpoint": checkpoint_card(Path(summary["checkpoint"])),
        "scores": scores(stage.folder),
        "groups": {key: stage.evaluations[-1].get(key) for key in ("step", "groups")} if stage.evaluations else None,
    }
    return card | {"unknown": sorted(unknown(card))}


def unknown(card: Mapping[str, Any], above: str = "") -> Iterable[str]:
    """The dotted names of what is null."""
    for name, value in card.items():
        if value is None:
            yield f"{above}{name}"
        elif isinstance(value, Mapping):
            yield from unknown(value, f"{above}{name}.")


def data_card(stage: StageProgress) -> dict[str, Any]:
    """`seed`, `templates_sha256`, and of each data set its path, rate as set, share of the examples, how many were
    read, its records and the fingerprint of its manifest."""
    assert stage.config is not None and stage.summary is not None
    data, identity = stage.config.data, stage.summary.get("data") or {}
    counts, known = stage.summary.get("by_source") or {}, identity.get("sources") or {}
    found = {}
    for name, source in sorted(data.sources.items()):
        fingerprint, records, share = known.get(name) or (None, None, None)
        read = (counts.get(name) or {}).get("examples", {}).get("count")
        found[name] = {
            "path": source.path,
            "rate": source.rate,
            "share": share,
            "examples": read,
            "records": records,
            "fingerprint": fingerprint,
        }
    said = {"seed": identity.get("seed", data.seed), "sources": found}
    return said | ({"templates_sha256": data.text.templates_sha256} if data.text.templates_sha256 else {})


def loss_digest(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The loss curve in short: `sha256` of one line `STEP LOSS` for each logged step, the loss as JSON writes it (null
    where there was none), and the first, last and smallest loss."""
    lines = "".join(f"{step['step']} {json.dumps(step.get('loss'))}\n" for step in steps)
    losses = [step["loss"] for step in steps if step.get("loss") is not None]
    return {
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "steps": len(steps),
        "first": losses[0] if losses else None,
        "last": losses[-1] if losses else None,
        "min": min(losses, default=None),
    }


def speed(steps: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Over all logged steps: tokens per second, MFU and TFLOP/s of a process, the latter two by mask area and weighted
    with the steps' seconds. MFU is unknown where the peak of a device is, as on a CPU."""
    seconds = sum(step["seconds"] for step in steps)
    found: dict[str, float | None] = {
        "tokens_per_second": sum(step["tokens"] for step in steps) / seconds if seconds else None
    }
    for ours, name in (("mfu_by_mask_area", "mfu"), ("tflops_by_mask_area", "tflops")):
        known = [(step[name], step["seconds"]) for step in steps if step.get(name) is not None]
        total = sum(weight for _, weight in known)
        found[ours] = sum(value * weight for value, weight in known) / total if total else None
    return found


def checkpoint_card(folder: Path) -> dict[str, Any]:
    """The final checkpoint's name, and the SHA-256 of its manifest, which has that of every file."""
    manifest = folder / MANIFEST
    known = hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None
    return {"name": folder.name, "manifest_sha256": known}


def scores(folder: Path) -> dict[str, dict[str, Any]] | None:
    """Checkpoint -> task -> what `molmo2 evaluate` found, as far as a table shows it, with the settings that were not
    left as they are (null in the file); None where nothing was scored. Without `score`, `mixed` and `answers` where a
    file is older than these.

    Raises:
        UserError: a file of results is damaged.
    """
    found: dict[str, dict[str, Any]] = {}
    for place in sorted((folder / paths.EVALUATION).glob("*/")):
        for name, result in read_results(place).items():
            scorers = {scorer: values["score"] for scorer, values in result["scores"].items()}
            answers = {scorer: values.get("answers") for scorer, values in result["scores"].items()}
            newer = {"score": result.get("score"), "mixed": result.get("mixed"), "answers": answers}
            kept = {key: result.get(key) for key in ("group", *COUNTS)}
            settings = {key: value for key, value in result["settings"].items() if value is not None}
            whole = {} if None in (*newer.values(), *answers.values()) else newer
            found.setdefault(place.name, {})[name] = {"scores": scorers, **whole, **kept, "settings": settings}
    return found or None
