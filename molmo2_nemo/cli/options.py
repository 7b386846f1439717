"""Options that several verbs have, and checks of their values before anything expensive begins."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from molmo2_nemo.errors import UserError, blocking_file, of_setting
from molmo2_nemo.settings.hydra_keys import KINDS

if TYPE_CHECKING:
    from molmo2_nemo.evaluation.judge import Judge
    from molmo2_nemo.inference.prompt import Shown
    from molmo2_nemo.inference.sampling import Sampling
    from molmo2_nemo.settings.run import ParallelConfig

NOT_DRY = "--dry-run prints sbatch scripts: it needs cluster=slurm; for a local run, --cfg job prints its configuration"


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verbs that compose a run, named as Hydra names its own."""
    parser.add_argument(
        "--cfg",
        "-c",
        choices=["job", "hydra", "all"],
        help="print the configuration that would run, what Hydra composed it of, or both, and stop",
    )
    parser.add_argument("--package", "-p", metavar="KEY", help="with --cfg: this part of it, such as stage.optim")
    parser.add_argument("--resolve", "-r", action="store_true", help="with --cfg hydra: interpolations resolved")
    parser.add_argument(
        "--info",
        "-i",
        nargs="?",
        const="all",
        metavar="WHAT",
        help=f"print what Hydra says of its composition, and stop: {', '.join(KINDS)}",
    )
    add_config_dir_arguments(parser)


def add_config_dir_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where a configuration comes from."""
    parser.add_argument(
        "--config-dir", "-cd", metavar="DIR", help="folder of your own configurations, laid out like conf/"
    )
    parser.add_argument(
        "--config-name",
        "-cn",
        metavar="NAME",
        help="file that composition starts from, NAME.yaml in --config-dir (default: config, the one shipped)",
    )


def add_multirun_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the option of the verbs that run sweeps."""
    parser.add_argument(
        "--multirun",
        "-m",
        action="store_true",
        help="a run for each combination of values: key=a,b key=range(1,4) key=choice(x,y); folders output_dir/0, /1",
    )


def check_config_arguments(args: argparse.Namespace) -> None:
    """Puts a setting that came behind --info, which may stand alone, to the others.

    Raises:
        UserError: an option of --cfg without it.
    """
    if not args.cfg and (args.package or args.resolve):
        raise UserError(f"{'--package' if args.package else '--resolve'} belongs to --cfg")
    if args.info is not None and "=" in args.info:
        args.overrides.append(args.info)
        args.info = "all"


def shown_instead(args: argparse.Namespace, overrides: Mapping[str, Sequence[str]]) -> bool:
    """Prints what --cfg hydra, --cfg all or --info ask for, of each stage; whether they do.

    Args:
        overrides: of each stage, as for `compose`.

    Raises:
        UserError: settings that cannot be composed, or a KEY that there is not.
    """
    from molmo2_nemo.settings.compose import compose
    from molmo2_nemo.settings.hydra_view import hydra_yaml, info, part_of
    from molmo2_nemo.settings.schema import to_dict

    if not args.cfg and not args.info:
        return False
    where = (args.config_dir, args.config_name)
    shown = []
    for own in overrides.values():
        if args.info:
            info(args.info, own, *where)
            continue
        text = ""
        if args.cfg in ("hydra", "all"):
            text += hydra_yaml(own, *where, package=args.package if args.cfg == "hydra" else None, resolve=args.resolve)
        if args.cfg in ("job", "all"):
            text += part_of(to_dict(compose(own, *where)), args.package)
        shown.append(text)
    print("---\n".join(shown), end="")
    return True


def add_submit_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the verbs that submit jobs with cluster=slurm."""
    parser.add_argument("--dry-run", action="store_true", help="cluster=slurm: print the sbatch scripts, and stop")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say for which run's settings records are checked."""
    parser.add_argument(
        "--for",
        dest="for_run",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="check records as this run will read them, for example --for recipe=8b stage=long (default: the published "
        "limits of stage sft)",
    )
    parser.add_argument(
        "--truncated", choices=("load", "skip"), help="a picture cut off or damaged inside: --for data.image.truncated"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="folder of your own configurations for --for, like conf/")


def run_settings(args: argparse.Namespace) -> Any:
    """The data settings (DataConfig) that `add_run_arguments` name, without the mixture; no tokenizer without a run.

    Raises:
        UserError: a word that is no setting, or an unknown one; a tokenizer that is here and cannot be read.
    """
    from data_prep.run_limits import only_limits
    from molmo2_nemo.data.config import DataConfig

    for word in args.for_run:
        if "=" not in word:
            raise UserError(f"--for {word}: settings are written key=value; other words go before --for")
    config = DataConfig(tokenizer="")
    if args.for_run:
        from data_prep.text_length import tokenizer_at
        from molmo2_nemo.settings.compose import compose

        config = compose(args.for_run, args.config_dir).data
        tokenizer_at(config.tokenizer)
    elif args.config_dir:
        raise UserError("--config-dir belongs to --for")
    if args.truncated:
        config.image.truncated = args.truncated
    return only_limits(config)


def add_sampling_arguments(parser: argparse.ArgumentParser, longest: int | None = 128) -> None:
    """Adds the options that say how answers are drawn.

    Args:
        longest: answer, unless --max-new-tokens says otherwise; None: each task has its own.
    """
    usual = "the task's" if longest is None else longest
    parser.add_argument(
        "--max-new-tokens", type=int, default=longest, metavar="N", help=f"longest answer (default: {usual})"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="draw tokens; 0: always the most probable (default)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="draw among the most probable tokens that make up P"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end an answer before this text (may be repeated)"
    )


def sampling_of(args: argparse.Namespace) -> Sampling:
    """How answers are drawn, as `add_sampling_arguments` says.

    Raises:
        UserError: a number out of range; names the option.
    """
    from molmo2_nemo.inference.sampling import Sampling

    return Sampling(args.max_new_tokens or 1, args.temperature, args.top_p, args.seed, tuple(args.stop))


def add_shown_arguments(parser: argparse.ArgumentParser, *, passes: bool = False) -> None:
    """Adds the options that replace, for answers only, how much of the media the run shows.

    Args:
        passes: --frames takes several numbers, as text, for a pass each.
    """
    if passes:
        frames: dict[str, Any] = {"metavar": "N[,N]", "help": "most frames of a video, one pass each"}
    else:
        frames = {"type": int, "metavar": "N", "help": "most frames of a video"}
    frames["help"] += " (default: the run's)"
    parser.add_argument("--frames", **frames)
    parser.add_argument("--fps", type=float, metavar="N", help="most frames per second of a video (default: the run's)")
    parser.add_argument("--max-crops", type=int, metavar="N", help="most tiles of an image (default: the run's)")
    parser.add_argument("--high-res", action="store_true", help="tiles of an image as in training's high resolution")
    parser.add_argument(
        "--beyond-range", action="store_true", help="let films have positions that the model was not made for"
    )


def shown_of(args: argparse.Namespace) -> Shown:
    """How much of the media is shown, as `add_shown_arguments` says.

    Raises:
        UserError: a number out of range; names the option.
    """
    from molmo2_nemo.inference.prompt import Shown

    return Shown(args.frames, args.fps, args.max_crops, args.high_res)


def add_layout_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says on how many ranks a checkpoint answers."""
    parser.add_argument(
        "--layout",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="several processes, for example --layout parallel.tensor=2 parallel.data=4 (default: one)",
    )


def checkpoint_of(args: argparse.Namespace, place: str | Path) -> Path:
    """The checkpoint that a word of the command line stands for; says on the standard error which, where the word does
    not. Ranks that this command starts are given that one: a run that still trains may have saved another by then.

    Raises:
        UserError: it stands for none.
    """
    from molmo2_nemo.rundir.summary import resolve_checkpoint

    remarks: list[str] = []
    found = resolve_checkpoint(place, remarks)
    if remarks and args.argv.count(str(place)) == 1:
        args.argv = [str(found) if word == str(place) else word for word in args.argv]
    warn_once(remarks)
    return found


def on_ranks(args: argparse.Namespace, layout: ParallelConfig, work: Callable[[], int]) -> int:
    """Does `work` here, or has this same command do it on the ranks of a layout, of which this process may be one."""
    from molmo2_nemo.launch.ranks import in_rank, is_rank, run_ranks

    count = layout.model_size * layout.data
    return run_ranks(count, args.argv) if count > 1 and not is_rank() else in_rank(work)


def warn(lines: Iterable[str]) -> None:
    """Says what the user should know of an answer, beside it: on the standard error."""
    for line in lines:
        print(f"warning: {line}", file=sys.stderr, flush=True)


def warn_once(lines: Iterable[str]) -> None:
    """As `warn`, of what every process of a command finds before its work begins: the one that was called says it, or
    the first rank where another launcher started them."""
    from molmo2_nemo.launch.ranks import is_rank
    from molmo2_nemo.launch.reports import ERROR_DIR
    from molmo2_nemo.processes import this_rank

    if not is_rank() or (ERROR_DIR not in os.environ and this_rank() == 0):
        warn(lines)


def check_numbers(args: argparse.Namespace, least: Mapping[str, float]) -> None:
    """Refuses numbers below the least one allowed; `least` maps names as in `args` to it. Options not given are None.

    Raises:
        UserError: names the option.
    """
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise UserError(f"--{name.replace('_', '-')} {value}: must be at least {low}")


def check_folder(option: str, folder: Path) -> None:
    """Refuses an output folder that cannot be made, because it or one above it is a file.

    Raises:
        UserError: names the option and that file.
    """
    file = blocking_file(folder)
    if file is not None:
        raise UserError(f"{option} {folder}: {'it' if file == folder else file} is a file; name a folder")


def check_around(option: str, folder: Path) -> None:
    """Refuses a folder that data sets are to be made in, where it cannot be made or is a data set itself.

    Raises:
        UserError: names the option and what to give.
    """
    from molmo2_nemo.data.manifest import MANIFEST

    check_folder(option, folder)
    if (folder / MANIFEST).is_file():
        raise UserError(
            f"{option} {folder}: that is a data set (it has {MANIFEST}), and another one would be made inside it; name "
            f"the folder that data sets lie in: {option} {folder.parent}"
        )


def check_writable(option: str, folder: Path) -> None:
    """Refuses an output folder in which, or in whose place, nothing can be written. Leaves nothing there.

    Raises:
        UserError: names the option and what the system says.
    """
    check_folder(option, folder)
    place = next(part for part in (folder, *folder.resolve().parents) if part.is_dir())
    with of_setting(f"{option} {folder}"), tempfile.TemporaryFile(dir=place):
        pass


def check_file(option: str, path: Path) -> None:
    """Refuses an output file that cannot be written: it is a folder, or there is none to put it into.

    Raises:
        UserError: names the option and what is in the way.
    """
    if path.is_dir():
        raise UserError(f"{option} {path}: it is a folder; name a file in it")
    file = blocking_file(path.parent)
    if file is not None:
        raise UserError(f"{option} {path}: {file} is a file, not a folder")
    if not path.parent.is_dir():
        raise UserError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        only_read = os.statvfs(path.parent).f_flag & os.ST_RDONLY
        why = "its file system may only be read" if only_read else "this user may not write it"
        raise UserError(f"{option} {path}: it cannot be written there, as {why}; name another place with {option}")


def add_judge_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options that send answers to a judge; without --judge, nothing is sent anywhere."""
    parser.add_argument(
        "--judge",
        metavar="URL",
        help="send captions and their references to this OpenAI-compatible server (such as http://localhost:8000/v1), "
        "whose model judges them; key: $MOLMO2_JUDGE_KEY (default: nothing is sent anywhere)",
    )
    parser.add_argument("--judge-model", metavar="NAME", help="the judge's name on its server")
    parser.add_argument(
        "--judge-at-once", type=int, default=4, metavar="N", help="questions to the judge at a time (default: 4)"
    )
    parser.add_argument(
        "--judge-timeout", type=float, default=120.0, metavar="S", help="seconds for a judge's reply (default: 120)"
    )


def judge_of(args: argparse.Namespace, folder: Path | None) -> Judge | None:
    """The judge that `add_judge_arguments` names; None without --judge.

    Args:
        folder: of the results, where its replies are kept.

    Raises:
        UserError: one of the two options, a URL that is none, a number out of range, or no folder.
    """
    if (args.judge is None) != (args.judge_model is None):
        raise UserError("--judge URL and --judge-model NAME belong together")
    if args.judge is None:
        return None
    from molmo2_nemo.evaluation.chat import Patience
    from molmo2_nemo.evaluation.judge import Judge

    if not args.judge_timeout > 0 or args.judge_at_once < 1:
        raise UserError("--judge-timeout must be above 0, and --judge-at-once at least 1")
    if folder is None:
        raise UserError("--judge keeps the judge's replies beside the results: say where with --out")
    return Judge(args.judge, args.judge_model, folder, Patience(args.judge_at_once, args.judge_timeout))
