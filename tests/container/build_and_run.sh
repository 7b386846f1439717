#!/usr/bin/env bash
# Builds the Dockerfile for real and runs the tiny model in the result, where there is neither Docker nor an NGC image:
# Debian's buildah, on a base image made here from debootstrap's Debian 12 (Python 3.11) and the CPU pins. As root.
#   tests/container/build_and_run.sh [FOLDER]     FOLDER: scratch space, about 10 GB, removed at the end; with KEEP=1 it
#                                                 stays, and the next call takes the base image from there
# Needs: apt install buildah debootstrap; a Python 3.11 with pip (PYTHON=...). Takes minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=${1:-$(mktemp -d)}
python=${PYTHON:-$(command -v python3.11 || command -v python3)}
export BUILDAH_ISOLATION=chroot
storage=(--root "$work/storage" --runroot "$work/run")
[ -z "${STORAGE_DRIVER:-}" ] || storage+=(--storage-driver "$STORAGE_DRIVER") # vfs where the kernel lets no overlay in
site=usr/local/lib/python3.11/dist-packages

fail() { echo "build_and_run: $*" >&2; exit 1; }
b() { buildah "${storage[@]}" "$@"; }
say() { echo "== $* ($((SECONDS)) s, $(du -sh "$work" 2> /dev/null | cut -f1))"; }

[ "$(id -u)" = 0 ] || fail "run it as root"
for program in buildah debootstrap; do command -v $program > /dev/null || fail "$program is missing: apt install $program"; done
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || fail "$python is not Python 3.11; set PYTHON"
mkdir -p "$work"
trap 'b rm --all > /dev/null 2>&1 || true; [ -n "${KEEP:-}" ] || rm -rf "$work"' EXIT

make_base() {
    local base root
    base=$(b from scratch)
    root=$(b mount "$base")
    debootstrap --variant=minbase --include=python3,ca-certificates bookworm "$root" > "$work/debootstrap.log" \
        || fail "debootstrap: $(tail -n 3 "$work/debootstrap.log")"
    "$python" -m pip install -qq --disable-pip-version-check --no-deps --no-compile --target "$root/$site" \
        --requirement requirements/cpu.txt "pip==$("$python" -m pip --version | cut -d' ' -f2)"
    ln -s ../../bin/python3 "$root/usr/local/bin/python"
    rm -rf "$root"/var/cache/apt/archives/*.deb
    b umount "$base" > /dev/null
    b commit --quiet --rm "$base" localhost/molmo2-base > /dev/null
}

say "base image: Debian 12 and the CPU pins"
b inspect --type image localhost/molmo2-base > /dev/null 2>&1 || make_base

say "the Dockerfile"
b bud --quiet --layers=false --format docker --build-arg BASE_IMAGE=localhost/molmo2-base \
    --tag localhost/molmo2_nemo --file Dockerfile .

say "what it is"
b inspect --type image --format '{{.Docker.Config.User}} {{.Docker.Config.Healthcheck.Test}}' localhost/molmo2_nemo \
    | tee "$work/config"
grep -q '^10001 \[CMD molmo2 doctor\]$' "$work/config" || fail "user or health check are not as the Dockerfile says"
box=$(b from localhost/molmo2_nemo)
[ "$(b run "$box" -- id -u)" = 10001 ] || fail "the container runs as root"

say "the health check"
b run "$box" -- molmo2 doctor

say "a wrong base image is refused"
printf 'FROM localhost/molmo2_nemo\nUSER 0\nRUN rm -rf /%s/nemo_toolkit-*.dist-info\nRUN molmo2 doctor\n' "$site" > "$work/wrong"
if b bud --layers=false --file "$work/wrong" "$work/run" > "$work/wrong.log" 2>&1; then fail "it was built"; fi
grep -q 'missing: nemo-toolkit' "$work/wrong.log" || fail "refused for another reason: $(tail -n 5 "$work/wrong.log")"

say "the tiny demo, shortened"
b run "$box" -- molmo2 demo parallel=single stage.max_steps=4 stage.global_batch_size=2 stage.micro_batch_size=1
b run "$box" -- test -f demo/hf/model.safetensors
say "done"
