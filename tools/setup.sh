#!/usr/bin/env bash
# Sets mmkd up in .venv of this checkout: the pinned stack of requirements.txt, mmcv with its
# compiled ops, and mmkd itself. Safe to call again: what is already there is kept.
#
#   tools/setup.sh [STAMP]     STAMP is written at the end, and only if everything was verified
#
#   MMKD_STACK=onedl           the fork of requirements-onedl.txt instead of MMDetection's own stack,
#                              in .venv-onedl
#   MMKD_PYTHON=python3.12     the interpreter the environment is made from (default: the first of
#                              python3.11, python3.12 and python3 that fits)
#   MAX_JOBS=4                 compilers at a time for mmcv (default: by cores and memory)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

STAMP=${1:-}
STACK=${MMKD_STACK:-upstream}
case $STACK in
    upstream) VENV=.venv MMCV=mmcv ;;
    onedl) VENV=.venv-onedl MMCV=onedl-mmcv ;;
    *)
        echo "[setup] MMKD_STACK=$STACK: the stacks are upstream and onedl" >&2
        exit 1
        ;;
esac
PY=$VENV/bin/python
LOG=$VENV/setup.log
MMCV_TIME="4 to 9 minutes on 2 cores that do nothing else"

say() { printf '[setup] %s\n' "$*"; }
die() {
    printf '\n[setup] %s\n' "$1" >&2
    shift
    if (($#)); then printf '        %s\n' "$@" >&2; fi
    exit 1
}
requirements() { # the pins of this stack
    if [[ $STACK == upstream ]]; then
        cat requirements.txt
    else
        grep -vE '^(mmengine|mmcv|mmdet)==' requirements.txt
        cat requirements-onedl.txt
    fi
}
pins() { # pins NAME...: their lines in the requirements
    local name
    for name in "$@"; do
        requirements | grep -E "^$name==" || die "requirements.txt does not pin $name."
    done
}
clock() { printf '%d min %02d s' $(($1 / 60)) $(($1 % 60)); }

# ---- what has to be on the machine ----------------------------------------------------------

fits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; }

find_python() {
    local name
    for name in ${MMKD_PYTHON:-python3.11 python3.12 python3}; do
        if fits "$name"; then
            echo "$name"
            return
        fi
    done
}

check_machine() { # names everything that is missing at once, before anything is downloaded
    local missing=() packages=() library cxx=${CXX:-g++}
    BASE_PYTHON=$(find_python)
    if [[ -z $BASE_PYTHON ]]; then
        if [[ -n ${MMKD_PYTHON:-} ]]; then
            die "MMKD_PYTHON=$MMKD_PYTHON is no Python 3.11 or 3.12:" \
                "$("$MMKD_PYTHON" --version 2>&1 || echo 'it does not start')" \
                "The versions in requirements.txt exist for 3.11 (tested) and 3.12; name one of these."
        fi
        missing+=("Python 3.11 or 3.12 (found: $(python3 --version 2>/dev/null || echo none))")
        packages+=(python3 python3-venv python3-dev)
    else
        if ! "$BASE_PYTHON" -c 'import venv, ensurepip' 2>/dev/null; then
            missing+=("the venv and ensurepip modules of $BASE_PYTHON")
            packages+=(python3-venv)
        fi
        if ! "$BASE_PYTHON" -c 'import os, sys, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(not os.path.exists(header))'; then
            missing+=("the header Python.h of $BASE_PYTHON (building mmcv)")
            packages+=(python3-dev)
        fi
        while read -r library package what; do
            if ! "$BASE_PYTHON" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$library" 2>/dev/null; then
                missing+=("the shared library $library ($what)")
                packages+=("$package")
            fi
        done <<'LIBRARIES'
libGL.so.1 libgl1 OpenCV's wheel loads it
libgthread-2.0.so.0 libglib2.0-0 OpenCV's wheel loads it
libglib-2.0.so.0 libglib2.0-0 OpenCV's wheel loads it
libxcb.so.1 libxcb1 OpenCV's wheel loads it
libz.so.1 zlib1g wheels load it
libstdc++.so.6 libstdc++6 PyTorch loads it
LIBRARIES
    fi
    # It has to compile, not only to be there: g++ without the C library's headers is common.
    if ! echo $'#include <vector>\n#include <cmath>\nint main() { return 0; }' |
        "$cxx" -std=c++17 -x c++ -fsyntax-only - 2>/dev/null; then
        missing+=("a working C++ compiler ($cxx; building mmcv)")
        packages+=(g++ libc6-dev)
    fi
    if ((${#missing[@]})); then
        local unique
        unique=$(printf '%s\n' "${packages[@]}" | sort -u | tr '\n' ' ')
        die "This machine lacks:" "${missing[@]/#/- }" "" \
            "On Debian: apt-get install ${unique% }" "Then call make again."
    fi
}

# ---- one step, visibly alive ----------------------------------------------------------------

CHILD=
trap 'if [[ -n $CHILD ]]; then kill -- "-$CHILD" 2>/dev/null || true; fi' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

step() { # step TITLE COMMAND...: output goes to the log; a line of life every 30 s; stops on failure
    local title=$1 start=$SECONDS mark rc=0 files next=30
    shift
    say "$title ..."
    mark=$(($(wc -c <"$LOG") + 1))
    printf '\n==== %s: %s\n' "$title" "$*" >>"$LOG"
    setsid "$@" >>"$LOG" 2>&1 & # a group of its own, so that Ctrl-C ends the compilers too
    CHILD=$!
    while kill -0 "$CHILD" 2>/dev/null; do
        sleep 0.2
        if ((SECONDS - start >= next)); then
            next=$((next + 30))
            # ninja's own count of compiled files, where this step compiles
            files=$(tail -c "+$mark" "$LOG" | grep -oE '\[[0-9]+/[0-9]+\]' | tail -1 || true)
            say "    still at it: $(clock $((SECONDS - start)))${files:+, files compiled $files}"
        fi
    done
    wait "$CHILD" || rc=$?
    CHILD=
    if ((rc)); then
        tail -c "+$mark" "$LOG" | tail -n 30 | cut -c -300 >&2
        die "$title: failed (exit status $rc) after $(clock $((SECONDS - start)))." \
            "The end of its output is above, all of it in $LOG." \
            "If a download failed: check the network or pip's proxy settings, then call make again;" \
            "what is already installed is kept."
    fi
    say "    done in $(clock $((SECONDS - start)))"
}

PIP=("$PY" -m pip --no-input --disable-pip-version-check)

# ---- mmcv -----------------------------------------------------------------------------------

mmcv_version() {
    "$PY" -c 'from importlib.metadata import version; print(version("'$MMCV'"))' 2>/dev/null || true
}

# Loads the compiled ops alone (mmcv/__init__ wants mmengine, which may not be there yet). An
# mmcv built for another PyTorch fails here as well.
ops_work() {
    "$PY" - <<'PYTHON'
import importlib.machinery
import importlib.util
import pathlib
import sys

import torch  # the ops link against its libraries

folder = pathlib.Path(importlib.util.find_spec("mmcv").origin).parent
files = [folder / f"_ext{end}" for end in importlib.machinery.EXTENSION_SUFFIXES]
file = next((f for f in files if f.exists()), None)
if file is None:
    sys.exit(f"{folder} holds no compiled _ext: this mmcv was built without its ops")
spec = importlib.util.spec_from_file_location("mmcv._ext", file)
ext = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ext)
for name in ("nms", "roi_align_forward"):
    if not hasattr(ext, name):
        sys.exit(f"{file} lacks the op {name}")
if torch.cuda.is_available() and "not available" in ext.get_compiling_cuda_version():
    sys.exit(f"{file} was built without CUDA, but torch sees a GPU")
PYTHON
}

jobs() { # compilers at a time: a core each, and 1.5 GB each of what memory is free
    local cores free limit
    cores=$(nproc)
    free=$(awk '/^MemAvailable:/ {print int($2 / 1024)}' /proc/meminfo)
    limit=$(cat /sys/fs/cgroup/memory.max 2>/dev/null || echo max)
    if [[ $limit =~ ^[0-9]+$ ]] && ((limit / 1048576 < free)); then free=$((limit / 1048576)); fi
    local n=$((free / 1500))
    if ((n > cores)); then n=$cores; fi
    if ((n < 1)); then n=1; fi
    echo "$n"
}

install_mmcv() {
    local pin again=()
    pin=$(pins $MMCV)
    if [[ $(mmcv_version) == "${pin#*==}" ]]; then
        if ops_work >>"$LOG" 2>&1; then return; fi
        say "the mmcv in $VENV has no working ops: it is replaced"
        again=(--force-reinstall --no-binary $MMCV)
        "${PIP[@]}" cache remove $MMCV >>"$LOG" 2>&1 || true # or pip would install the same wheel again
    fi
    if "$PY" -W ignore -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null &&
        ! "$PY" -c 'import sys; from torch.utils.cpp_extension import CUDA_HOME; sys.exit(not CUDA_HOME)'; then
        die "PyTorch sees a GPU, but there is no CUDA compiler (nvcc) to build mmcv's ops with." \
            "Install the CUDA toolkit of PyTorch's version (or set CUDA_HOME to it), or use a stack" \
            "that is already installed: pip install -e . in its environment."
    fi
    export MAX_JOBS=${MAX_JOBS:-$(jobs)}
    say "mmcv's ops are now compiled once ($MAX_JOBS at a time): $MMCV_TIME;"
    say "seconds if pip has kept the wheel of an earlier build"
    # Without build isolation: an isolated build sees no torch and silently leaves the ops out.
    # -O3 has to be said (CFLAGS replaces the default flags), -g0 halves time and memory.
    CFLAGS="-O3 -DNDEBUG -g0 -w" MMCV_WITH_OPS=1 step "$pin" \
        "${PIP[@]}" install -v --no-build-isolation --no-deps "${again[@]}" "$pin"
    if ops_work >>"$LOG" 2>&1; then return; fi
    if ((${#again[@]} == 0)); then # a wheel from pip's cache, built elsewhere without ops
        install_mmcv
        return
    fi
    tail -n 3 "$LOG" >&2
    die "mmcv was built, but its ops do not load (see above; the whole build is in $LOG)." \
        "Nothing can be trained with it. Remove $VENV and call make again."
}

# ---- all of it ------------------------------------------------------------------------------

exec 9<"${BASH_SOURCE[0]}" # two makes at once would install into each other
if ! flock -n 9; then
    say "another set-up of this checkout is running: waiting for it"
    flock 9
fi
if [[ -n $STAMP && -e $STAMP ]]; then exit 0; fi

check_machine
say "Setting mmkd up in $PWD/$VENV with $("$BASE_PYTHON" --version): the first time about 5 to 10"
say "minutes on 2 cores, most of it compiling mmcv; later calls of make skip all this."
SECONDS=0
WANTED=$("$BASE_PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [[ -x $PY ]] && "$PY" -c '' 2>/dev/null &&
    ! "$PY" -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != sys.argv[1])' "$WANTED"; then
    die "$VENV was made with $("$PY" --version), and the interpreter to use is $BASE_PYTHON ($WANTED)." \
        "Remove it (rm -r $VENV) or name its interpreter (make PYTHON=python3.xx), then call make again."
fi
if ! "$PY" -m pip --version >/dev/null 2>&1; then
    "$BASE_PYTHON" -m venv --clear $VENV || die "$BASE_PYTHON -m venv $VENV failed (see above)."
fi
: >"$LOG"
BUILD=$(pins setuptools wheel ninja psutil packaging)
TORCH=$(pins torch)
# shellcheck disable=SC2086 # one word a pin
step "pip and build tools" "${PIP[@]}" install --upgrade "pip==26.3" $BUILD
step "PyTorch ($TORCH)" "${PIP[@]}" install "$TORCH"
install_mmcv
FILE=requirements.txt
if [[ $STACK != upstream ]]; then
    FILE=$VENV/requirements.txt
    requirements >"$FILE"
fi
step "everything else in $FILE" "${PIP[@]}" install -r "$FILE"
step "mmkd itself" "${PIP[@]}" install --no-deps --no-build-isolation --editable .
step "checking that mmcv's ops, mmdet and mmkd are there" "$PY" -c '
import importlib.metadata

import mmcv.ops
import mmdet
import torch

boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
_, kept = mmcv.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), iou_threshold=0.5)
assert kept.tolist() == [0, 2], kept
importlib.metadata.version("mmkd")
'
if [[ -n $STAMP ]]; then
    rm -f "$VENV"/.mmkd-setup-*
    touch "$STAMP"
fi
say "set-up done in $(clock $SECONDS)"
