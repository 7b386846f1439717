#!/usr/bin/env bash
# Builds the Dockerfile for real and runs the tiny model in the result, where there is neither Docker nor an NGC image:
# Debian's buildah, on bases made here that hold what NVIDIA's images hold (bases/*.txt). As root.
#   tests/container/build_and_run.sh [FOLDER]     FOLDER: scratch space, about 25 GB, removed at the end; with KEEP=1 it
#                                                 stays, and the next call takes the bases from there
#   BASES="26.08" tests/container/build_and_run.sh    one of them;  DEMO=0: build and check, without the demo
# Needs: apt install buildah debootstrap; a Python 3.12 that Debian 12 can run (python3.12 on PATH, pyenv's, or
# PYTHON312=...). Takes half an hour or more: torch for Python 3.12 comes with CUDA's libraries, also for the CPU.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=${1:-$(mktemp -d)}
export BUILDAH_ISOLATION=chroot PIP_DISABLE_PIP_VERSION_CHECK=1
storage=(--root "$work/storage" --runroot "$work/run")
[ -z "${STORAGE_DRIVER:-}" ] || storage+=(--storage-driver "$STORAGE_DRIVER") # vfs where the kernel lets no overlay in
site=usr/local/lib/python3.12/site-packages
runtime=libssl3,libffi8,libsqlite3-0,libbz2-1.0,liblzma5,libreadline8,libncursesw6,libexpat1,libuuid1,zlib1g

fail() { echo "build_and_run: $*" >&2; exit 1; }
b() { buildah "${storage[@]}" "$@"; }
start() { b from "$1" | tee -a "$work/rooms"; } # a container, which goes at the end whatever happens
say() { echo "== $* ($((SECONDS)) s, $(du -shx "$work" 2> /dev/null | cut -f1))"; }
have() { b inspect --type image "localhost/$1" > /dev/null 2>&1; }

[ "$(id -u)" = 0 ] || fail "run it as root"
for program in buildah debootstrap; do command -v $program > /dev/null || fail "$program is missing: apt install $program"; done
for python in "${PYTHON312:-}" python3.12 "$HOME"/.pyenv/versions/3.12*/bin/python; do
    "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null && break
done
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2> /dev/null \
    || fail "no Python 3.12 found (all NGC images of this line have it); name one in PYTHON312"
mkdir -p "$work"
exec 8> "$work/lock"
flock -n 8 || fail "$work is in use by another run"
: > "$work/rooms"
trap 'xargs -r buildah "${storage[@]}" rm < "$work/rooms" > /dev/null 2>&1 || true; [ -n "${KEEP:-}" ] || rm -rf "$work"' EXIT

into() { "$python" -m pip install -qq --no-compile --target "$@"; }

# Debian 12 with one Python of this machine in /usr/local, without what is installed there beside pip.
#   make_debian NAME PYTHON
make_debian() {
    local base root home version
    base=$(start scratch)
    root=$(b mount "$base")
    debootstrap --variant=minbase --include=ca-certificates,$runtime bookworm "$root" > "$work/debootstrap.log" \
        || fail "debootstrap: $(tail -n 3 "$work/debootstrap.log")"
    home=$("$2" -c 'import sys; print(sys.base_prefix)')
    version=$("$2" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    mkdir -p "$root/usr/local/lib/$version/site-packages"
    cp -a "$home"/lib/libpython3* "$root/usr/local/lib/" 2> /dev/null || true # where it is built as a shared library
    tar -C "$home" -c --exclude=site-packages --exclude=test --exclude=__pycache__ --exclude='*.a' "bin/$version" "lib/$version" \
        | tar -C "$root/usr/local" -x
    "$2" -c 'import pathlib, pip; from importlib.metadata import distribution
print(pathlib.Path(pip.__file__).parent, distribution("pip")._path, sep="\n")' \
        | xargs -I{} cp -r {} "$root/usr/local/lib/$version/site-packages/"
    ln -s "$version" "$root/usr/local/bin/python"
    ldconfig -r "$root"
    rm -rf "$root"/var/cache/apt/archives/*.deb
    b umount "$base" > /dev/null
    b commit --quiet --rm "$base" "localhost/$1" > /dev/null
}

# The heavy layer that the bases share. cuDNN's engines (1 GB) are not needed to import torch.
make_torch() {
    local base root
    base=$(start localhost/molmo2-debian)
    root=$(b mount "$base")
    into "$root/$site" "$("$python" requirements/overlay.py --pins 3.12 | grep '^torch==')"
    rm -rf "$root/$site"/nvidia/cudnn/lib/libcudnn_{engines,heuristic,adv,cnn}*
    b umount "$base" > /dev/null
    b commit --quiet --rm "$base" localhost/molmo2-torch > /dev/null
}

# An image as bases/NAME.txt describes it.
make_base() {
    local base root list=tests/container/bases/$1.txt
    sed -n 's/^- //p' "$list" > "$work/without"
    grep '^[A-Za-z]' "$list" > "$work/packages"
    if grep -q '^@pins' "$list"; then
        "$python" requirements/overlay.py --pins 3.12 > "$work/pins"
        sed 's/==.*//' "$work/packages" "$work/without" | sed 's/.*/^&==/' > "$work/replaced"
        grep -v -i -f "$work/replaced" "$work/pins" >> "$work/packages"
    fi
    base=$(start localhost/molmo2-torch)
    root=$(b mount "$base")
    forget "$root/$site" < "$work/packages"
    into "$root/$site" --no-deps --upgrade --requirement "$work/packages"
    if grep -q -x pip "$work/without"; then rm -rf "$root/$site"/pip "$root/$site"/pip-*.dist-info; fi
    b umount "$base" > /dev/null
    b commit --quiet --rm "$base" "localhost/molmo2-base:$1" > /dev/null
}

# Removes the metadata of packages about to be replaced: pip's --target leaves that of the other version behind.
forget() {
    "$python" -c 'import re, shutil, sys
from importlib.metadata import distributions
plain = lambda name: re.sub("[-_.]+", "-", name).lower()
names = {plain(line.split("==")[0]) for line in sys.stdin}
for found in distributions(path=[sys.argv[1]]):
    if plain(found.metadata["Name"]) in names:
        shutil.rmtree(found._path)' "$1"
}

# The Dockerfile, with this machine's way to the package index: pip's settings and the certificates.
#   built BASE TAG
built() {
    local certificates=/etc/ssl/certs/ca-certificates.crt
    { echo "[global]"; echo "cert = $certificates"; "$python" -m pip config list | tr -d "'" \
        | sed -n -E 's/^(global\.|:env:\.)(index-url|proxy|timeout|trusted-host)=/\2 = /p'; } > "$work/pip.conf"
    b bud --layers=false --format docker --build-arg BASE_IMAGE="localhost/$1" --tag "$2" --file Dockerfile \
        --volume "$work/pip.conf:/etc/pip.conf:ro" --volume "$certificates:$certificates:ro" .
}
listed() { b run "$1" -- python -c 'from importlib.metadata import distributions
print(*sorted({d.metadata["Name"] + "==" + d.version for d in distributions()}), sep="\n")'; }

# The Dockerfile refuses a base, and says this.
#   refused IMAGE WORDS
refused() {
    if built "$1" localhost/wrong > "$work/wrong.log" 2>&1; then fail "$1 was built"; fi
    grep -q -F "$2" "$work/wrong.log" || fail "$1 was refused for another reason: $(tail -n 5 "$work/wrong.log")"
    grep '^overlay: ' "$work/wrong.log"
}

demo() { # ROOM COMMAND
    [ "${DEMO:-1}" = 1 ] || return 0
    b run "$1" -- "$2" demo parallel=single stage.max_steps=4 stage.global_batch_size=2 stage.micro_batch_size=1
    b run "$1" -- test -f demo/hf/model.safetensors
}

# One image: built, looked at, run.
try() {
    local base room
    say "$1: base"
    have "molmo2-base:$1" || make_base "$1"
    base=$(start "localhost/molmo2-base:$1")
    listed "$base" > "$work/before"
    say "$1: the Dockerfile"
    built "molmo2-base:$1" "localhost/molmo2_nemo:$1" > "$work/build.log" 2>&1 || fail "$1: $(tail -n 40 "$work/build.log")"
    grep '^overlay: ' "$work/build.log"
    b inspect --type image --format '{{.Docker.Config.User}} {{.Docker.Config.Healthcheck.Test}}' "localhost/molmo2_nemo:$1" > "$work/config"
    grep -q '^10001 \[CMD molmo2 doctor\]$' "$work/config" || fail "user or health check are not as the Dockerfile says"
    room=$(start "localhost/molmo2_nemo:$1")
    [ "$(b run "$room" -- id -u)" = 10001 ] || fail "the container runs as root"
    say "$1: what other programs see is as it was"
    listed "$room" > "$work/after"
    if diff "$work/before" "$work/after" | grep '^<'; then fail "$1: packages of the image have changed"; fi
    diff "$work/before" "$work/after" | grep '^>' || true
    [ "$(imported "$base")" = "$(imported "$room")" ] || fail "$1: import transformers gives another one"
    say "$1: the health check"
    b run "$room" -- molmo2 doctor
    say "$1: the tiny demo, shortened"
    demo "$room" molmo2
    b rm "$base" "$room" > /dev/null
    [ -n "${KEEP:-}" ] || b rmi "localhost/molmo2_nemo:$1" > /dev/null
}
imported() { b run "$1" -- python -c 'import transformers; print(transformers.__version__, transformers.__file__)' 2> /dev/null; }

# A machine without a network that has torch and numpy: the archive is unpacked there.
try_bare() {
    local room root
    say "bare: base"
    have molmo2-base:bare || make_base bare
    say "bare: the archive"
    "$python" requirements/overlay.py --archive "$work/overlay.tar.gz"
    room=$(start localhost/molmo2-base:bare)
    root=$(b mount "$room")
    tar -C "$root/opt" -xzf "$work/overlay.tar.gz"
    say "bare: doctor and demo"
    b run "$room" -- /opt/molmo2-overlay/bin/molmo2 doctor
    b config --workingdir /tmp "$room"
    demo "$room" /opt/molmo2-overlay/bin/molmo2
    b rm "$room" > /dev/null
}

# Bases that cannot work, each refused with what is there and what is needed.
try_wrong() {
    local base root
    say "refused: no torch"
    refused molmo2-debian "no torch is here"
    say "refused: Megatron-core 0.15"
    base=$(start localhost/molmo2-torch)
    root=$(b mount "$base")
    into "$root/$site" --no-deps megatron-core==0.15.3 numpy==1.26.4
    b umount "$base" > /dev/null
    b commit --quiet --rm "$base" localhost/molmo2-wrong > /dev/null
    refused molmo2-wrong "megatron-core 0.15.3 is here"
    if [ -n "$other" ]; then
        say "refused: Python 3.10"
        have molmo2-debian310 || make_debian molmo2-debian310 "$other"
        refused molmo2-debian310 "Python 3.10 is here"
    fi
}

other=$(for candidate in "${PYTHON310:-}" python3.10 "$HOME"/.pyenv/versions/3.10*/bin/python; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 10))' 2> /dev/null && echo "$candidate" && break
done || true)
say "Debian 12 and Python 3.12"
have molmo2-debian || make_debian molmo2-debian "$python"
say "torch"
have molmo2-torch || make_torch
for name in ${BASES-26.02 26.04 26.08}; do try "$name"; done
if [ "${BARE:-1}" = 1 ]; then try_bare; fi
if [ "${WRONG:-1}" = 1 ]; then try_wrong; fi
say "done"
