#!/usr/bin/env bash
# Execute a Dockerfile step by step without an engine, in a clean folder that stands for the image's root:
#
#   tests/docker_steps.sh Dockerfile                  # a temporary folder, removed at the end
#   tests/docker_steps.sh --root DIR Dockerfile.ldm   # DIR is empty or new, and stays
#   tests/docker_steps.sh --system --root / FILE      # on a throw-away machine, as root: runs the steps of the system kind too, and obeys USER
#
# COPY takes what git tracks, as it lies in the working tree. RUN and CMD run here, with this machine's python3 (PYTHON=python3.11 names another) and
# HOME in the folder; steps of the system kind (apt-get, useradd, install --owner ...) are printed as skipped. ENV values that are absolute paths are moved
# into the folder. The first step that fails ends it, with its line. An instruction or a form that is not understood is an error, never passed over.
set -euo pipefail

die() { echo "error: $*" >&2; exit 2; }

checkout=$(git -C "$(dirname "$(realpath "$0")")" rev-parse --show-toplevel) || die "COPY takes what git tracks, and this is no git checkout"
system=no root=
while [[ ${1-} == --* ]]; do
    case $1 in
        --system) system=yes; shift ;;
        --root) root=${2-}; [[ $root ]] || die "--root needs a folder"; shift 2 ;;
        *) die "unknown flag $1; there are --system and --root DIR" ;;
    esac
done
[[ $# == 1 && -f $1 ]] || die "pass one Dockerfile: tests/docker_steps.sh [--system] [--root DIR] FILE"
file=$1

if [[ -z $root ]]; then
    root=$(mktemp -d)
    trap 'rm -rf "$root"' EXIT
elif [[ $root != / ]]; then
    mkdir -p "$root"
    root=$(realpath "$root")
    [[ -z $(ls -A "$root") ]] || die "$root is not empty; pass a new folder"
fi
root=${root%/}
folder=/ command= user=
[[ $system == no || $(id -u) == 0 ]] || die "--system makes users and installs packages: run it as root, on a machine to throw away"
unset PYTHONPATH VIRTUAL_ENV

fail() { # status
    echo "$file, line $number: failed with $1: $step" >&2
    exit "$1"
}

run() { # words of a command
    echo "--> $*"
    local as=()
    if [[ $user ]]; then as=(setpriv --reuid "$user" --regid "$user" --clear-groups); fi
    (cd "$root$folder" && HOME=$root$folder "${as[@]}" "$@") || fail $?
}

copy() { # owner (may be empty), sources, target
    local owner=$1 sources=("${@:2:$#-2}") target=$root${!#} source
    [[ ${!#} == /* ]] || target=$root${folder%/}/${!#}
    for source in "${sources[@]}"; do
        local tracked=()
        if [[ -d $checkout/$source ]]; then # its content goes into the target
            mkdir -p "$target"
            mapfile -d '' tracked < <(git -C "$checkout/$source" ls-files -z)
            ((${#tracked[@]})) || die "$file, line $number: git tracks nothing in $source"
            printf '%s\0' "${tracked[@]}" | tar -C "$checkout/$source" --null -T - -c | tar -C "$target" -x || fail $?
            if [[ $owner ]]; then chown -R "$owner:$owner" "$target" || fail $?; fi
        else
            mapfile -d '' tracked < <(git -C "$checkout" ls-files -z -- ":(glob)$source")
            ((${#tracked[@]})) || die "$file, line $number: git tracks no $source"
            if [[ $target == */ ]]; then mkdir -p "$target"; else mkdir -p "$(dirname "$target")"; fi
            (cd "$checkout" && cp -p -- "${tracked[@]}" "$target") || fail $?
            if [[ $owner && -d $target ]]; then tracked=("${tracked[@]##*/}") && (cd "$target" && chown "$owner:$owner" -- "${tracked[@]}") || fail $?
            elif [[ $owner ]]; then chown "$owner:$owner" "$target" || fail $?; fi
        fi
    done
}

words_of() { # JSON array of words -> array `words`; anything else is for a shell
    if [[ $1 == \[* ]]; then
        local packed
        packed=$(python3 -c 'import json, sys; print("\n".join(json.loads(sys.argv[1])))' "$1") || fail 2
        mapfile -t words <<<"$packed"
    else
        words=(sh -c "$1")
    fi
}

execute() { # one instruction, its continued lines joined
    local name=${step%% *} rest=${step#* } words word
    [[ $rest != "$step" ]] || die "$file, line $number: $name says nothing"
    echo "[line $number] $step"
    case $name in
        FROM) [[ $rest != *" "* ]] || die "$file, line $number: only a plain FROM IMAGE is understood"
              ((++stages == 1)) || die "$file, line $number: only one stage is understood" ;;
        USER) [[ $rest =~ ^[0-9]+$ ]] || die "$file, line $number: only a user's number is understood"
              if [[ $system == yes ]]; then user=$rest; fi ;;
        WORKDIR) [[ $rest == /* ]] && folder=$rest || folder=${folder%/}/$rest
                 mkdir -p "$root$folder" ;;
        ENV) read -ra words <<<"$rest"
             for word in "${words[@]}"; do
                 [[ $word == *=* && $word != *[\"\'\$\\]* ]] || die "$file, line $number: only ENV NAME=VALUE without quotes and variables is understood"
                 if [[ $word == *=/* ]]; then word=${word%%=*}=$root${word#*=}; fi
                 export "${word?}"
             done ;;
        COPY) read -ra words <<<"$rest"
              local owner=
              while [[ ${words[0]-} == --chown=* ]]; do
                  if [[ $system == yes ]]; then owner=${words[0]#*=}; fi
                  words=("${words[@]:1}")
              done
              [[ ${#words[@]} -ge 2 && $rest != *[\"\[]* && ${words[0]} != --* ]] || die "$file, line $number: only COPY [--chown=USER] SOURCE ... TARGET is understood"
              copy "$owner" "${words[@]}" ;;
        VOLUME) words_of "$rest"
                for word in "${words[@]}"; do mkdir -p "$root$word"; done ;;
        RUN) if [[ $system == no && $rest =~ (^|[[:space:]])(apt-get|useradd|userdel|groupadd|chown|--owner)([[:space:]]|$) ]]; then
                 echo "--> skipped: a step of the system kind"
             else
                 words_of "$rest"
                 run "${words[@]}"
             fi ;;
        CMD) command=$rest command_number=$number ;;
        *) die "$file, line $number: $name is not understood" ;;
    esac
}

stages=0 count=0 step=
while IFS= read -r line || [[ $line ]]; do
    count=$((count + 1))
    if [[ $line =~ ^[[:space:]]*(#|$) ]]; then continue; fi # comments stand between continued lines too
    [[ $step ]] || number=$count
    line="${line#"${line%%[![:space:]]*}"}"
    if [[ $line == *\\ ]]; then
        step+=${line%\\}
        continue
    fi
    step+=$line
    ((stages)) || [[ $step == FROM\ * ]] || die "$file, line $number: the first instruction must be FROM"
    execute </dev/null
    step=
done <"$file"
[[ -z $step ]] || die "$file ends in the middle of an instruction"
((stages)) || die "$file has no FROM"

if [[ $command ]]; then
    number=$command_number step="CMD $command"
    echo "[line $number] $step"
    words_of "$command"
    run "${words[@]}"
fi
echo "$file: every step succeeded"
