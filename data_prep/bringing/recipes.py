"""Lists and commands for videos that this project does not fetch itself: a bucket whose reader pays, and YouTube."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from molmo2_nemo.errors import DataError
from molmo2_nemo.files import write_text

GCS = "storage.googleapis.com"
PROJECT = "YOUR-PROJECT"


def bucket_objects(
    mapping: Path, ids: Sequence[str], *, two_fps: bool = False
) -> tuple[dict[str, list[str]], list[str]]:
    """Where the videos of these ids are.

    Args:
        mapping: youtube_id_to_urls_mapping.json of the data set: id -> {"gcp_url", "youtube_url"}.
        two_fps: the copies at 2 frames per second, FOLDER-2fps/ID_2fps.mp4.
    Returns: folder below the target -> gs:// addresses (the folder is "" for whole videos), and ids without one.
    Raises:
        DataError: the file is not such a mapping.
    """
    try:
        known = json.loads(mapping.read_text())
    except ValueError as error:
        raise DataError(f"{mapping} is not JSON: {error}") from None
    if not isinstance(known, dict):
        raise DataError(f"{mapping} holds no JSON object of video ids")
    objects: dict[str, list[str]] = {}
    unknown = []
    for name in ids:
        entry = known.get(name)
        url = urlsplit(entry.get("gcp_url") or "" if isinstance(entry, dict) else "")
        bucket, _, path = unquote(url.path).lstrip("/").partition("/")
        if url.netloc != GCS or not path:
            unknown.append(name)
            continue
        top = path.split("/")[0]
        folder, path = (f"{top}-2fps", f"{top}-2fps/{name}_2fps.mp4") if two_fps else ("", path)
        objects.setdefault(folder, []).append(f"gs://{bucket}/{path}")
    return objects, unknown


def bucket_commands(objects: dict[str, list[str]], lists: Path, target: Path, project: str | None) -> list[str]:
    """Write the lists of addresses, and return the commands that copy them; whoever runs them pays."""
    commands = []
    for folder, addresses in sorted(objects.items()):
        place = target / folder if folder else target
        path = lists.with_name(f"{lists.name}{'.' + folder if folder else ''}.gs.txt")
        write_text(path, "".join(f"{address}\n" for address in addresses))
        copy = ["gcloud", "storage", "cp", "--no-clobber", f"--billing-project={project or PROJECT}"]
        commands.append(
            f"mkdir -p {shlex.quote(str(place))} && "
            f"{shlex.join([*copy, '--read-paths-from-stdin', f'{place}/'])} < {shlex.quote(str(path))}"
        )
    return commands


def youtube_command(ids: Sequence[str], lists: Path, target: Path) -> str:
    """Write the addresses of videos, and return the yt-dlp command that fetches them slowly and remembers what it has.

    Ids may begin with a dash, so whole addresses are written.
    """
    path = lists.with_name(f"{lists.name}.youtube.txt")
    write_text(path, "".join(f"https://www.youtube.com/watch?v={name}\n" for name in ids))
    words = ["yt-dlp", "--ignore-errors", "--batch-file", str(path)]
    words += ["--download-archive", str(lists.with_name(f"{lists.name}.youtube-done.txt"))]
    words += ["--format", "bv*[height<=720]+ba/b[height<=720]/b", "--merge-output-format", "mp4"]
    words += ["--sleep-requests", "1", "--min-sleep-interval", "2", "--max-sleep-interval", "8", "--retries", "10"]
    return shlex.join([*words, "--output", f"{target}/%(id)s.%(ext)s"])
