#!/bin/sh
# Applies patches to a tree of what they are for, all or none.
#
# HYPERBP_PATCHES is their directory; without it, that of this script. It has `upstream`, the name and the commit of the
# project; `blobs`, what git calls the contents of each file there that is patched, or "new"; and the patches, *.patch, in
# the order of their names.
#
# The work is done in a copy of the files that are patched, in the directory `.hyperbp-patches` of the tree. The result is
# moved into place file by file, and the old files are kept until the last one is there: if that fails, or if the script
# is killed, they are put back.
set -eu
# With it, `cd` may go elsewhere and says where it went.
unset CDPATH

here=${HYPERBP_PATCHES:-$(cd -- "$(dirname -- "$0")" && pwd -P)}
self=$(basename -- "$0")

usage() {
    cat <<USAGE
Usage: $self [--check | --revert] TREE

Applies the patches in $here
to TREE: a checkout or an export of $name, commit
$commit. All are applied, or none.

  --check   only say whether they can be applied
  --revert  take them out again
  --help    show this
  --        what follows is the tree, even if it begins with a dash

Exit status: 0 done, 1 refused and nothing changed, 2 wrong usage.
USAGE
}

refuse() {
    printf '%s: %s\n' "$self" "$*" >&2
    exit 1
}

wrong_usage() {
    printf '%s: %s (--help tells more)\n' "$self" "$*" >&2
    exit 2
}

# git in a directory, and in no repository: in one, `git apply` passes over what is not below the directory.
git_in() {
    (
        unset GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX
        GIT_DIR=/dev/null
        export GIT_DIR
        cd -- "$1"
        shift
        exec git -c core.autocrlf=false -c core.safecrlf=false "$@"
    )
}

# Whatever the user has configured for patches.
git_apply() {
    directory=$1
    shift
    git_in "$directory" apply --unidiff-zero --whitespace=nowarn --no-ignore-whitespace "$@"
}

# All patches as one, to be checked: by itself, one that changes what another has added does not fit the tree.
check() {
    cat -- "$here"/*.patch | git_apply "$tree" --check "$@" -
}

# Whether the tree has the patches.
is_patched() {
    check --reverse 2>/dev/null
}

# The paths of the files that are patched, a line each.
paths() {
    while read -r blob path; do
        case $blob in '' | '#'*) continue ;; esac
        printf '%s\n' "$path"
    done <"$here/blobs"
}

exists() {
    [ -e "$1" ] || [ -L "$1" ]
}

# Runs a command for each path that is patched, and stops at the first that fails.
each() {
    paths | while read -r path; do
        "$@" "$path" || exit 1
    done
}

# Copies a file of the tree into a directory of the work, if it is there.
copy() {
    exists "$tree/$2" || return 0
    mkdir -p -- "$(dirname -- "$1/$2")" && cp -p -- "$tree/$2" "$1/$2"
}

# Removes a file of the tree, and the directories above it that are empty then.
drop() {
    rm -f -- "$tree/$1" || return 1
    above=$(dirname -- "$1")
    while [ "$above" != . ] && rmdir -- "$tree/$above" 2>/dev/null; do
        above=$(dirname -- "$above")
    done
}

# Makes a file of the tree what it is in a directory of the work. A file is replaced at once, or not at all.
place() {
    if [ -e "$1/$2" ]; then
        mkdir -p -- "$(dirname -- "$tree/$2")" && mv -f -- "$1/$2" "$tree/$2"
    else
        drop "$2"
    fi
}

# Like `place`, from the files that were kept. It can be done again if it is stopped, so it copies.
restore() {
    if [ -e "$work/old/$1" ]; then
        mkdir -p -- "$(dirname -- "$tree/$1")" && cp -p -- "$work/old/$1" "$work/back" &&
            mv -f -- "$work/back" "$tree/$1"
    else
        drop "$1"
    fi
}

# Puts back what was moved, if anything was, and removes the work.
undo() {
    trap '' HUP INT TERM
    if [ -e "$work/moving" ]; then
        each restore || refuse "cannot put the old files back into $tree: they are in $work/old; run this again"
    fi
    rm -rf -- "$work" || refuse "cannot remove $work: remove it"
}

give_up() {
    trap - EXIT
    undo
    refuse "$*; $tree is as it was"
}

# Applies the patches that are named, in this order, or takes them out with --reverse: all or none.
change() {
    reverse=
    if [ "$1" = --reverse ]; then
        reverse=$1
        shift
    fi
    mkdir -- "$work" || refuse "cannot make $work; nothing was changed"
    trap 'give_up "something failed"' EXIT
    trap 'give_up "stopped"' HUP INT TERM
    echo $$ >"$work/pid" || give_up "cannot write to $work"
    mkdir -- "$work/old" "$work/new" || give_up "cannot write to $work"
    each copy "$work/old" || give_up "cannot copy the files that are patched"
    each copy "$work/new" || give_up "cannot copy the files that are patched"
    for patch in "$@"; do
        git_apply "$work/new" ${reverse:+"$reverse"} "$patch" || give_up "git could not do $patch"
    done
    # From here on the tree changes, and what was kept is all there.
    : >"$work/moving" || give_up "cannot write to $work"
    each place "$work/new" || give_up "cannot move the files into $tree"
    if [ -z "$reverse" ]; then
        is_patched || give_up "the patches change a file that \`blobs\` does not name"
    fi
    trap '' HUP INT TERM
    # Without this file, the rest of the directory means nothing.
    rm -f -- "$work/moving" || give_up "cannot remove $work/moving"
    trap - EXIT
    rm -rf -- "$work" || refuse "all is done, but $work could not be removed: remove it"
}

# A line for each file of the tree that is not as the patches need it.
differences() {
    while read -r wanted path; do
        case $wanted in '' | '#'*) continue ;; esac
        if [ ! -e "$tree/$path" ] && [ ! -L "$tree/$path" ]; then
            found=missing
        elif [ ! -f "$tree/$path" ] || [ ! -r "$tree/$path" ]; then
            found='not a file that can be read'
        else
            found=$(git_in "$tree" hash-object --no-filters -- "$path")
        fi
        case $wanted:$found in
            "$found:$found" | new:missing) ;;
            new:*) printf '  %s: is there, and should not be\n' "$path" ;;
            *) printf '  %s: is %s, expected %s\n' "$path" "$found" "$wanted" ;;
        esac
    done <"$here/blobs"
}

for file in upstream blobs; do
    [ -r "$here/$file" ] || refuse "there is no file \`$file\` that can be read in $here"
done
name=$(sed -n 's/^name //p' "$here/upstream")
commit=$(sed -n 's/^commit //p' "$here/upstream")

action=apply
while [ $# -gt 0 ]; do
    case $1 in
        --help | -h)
            usage
            exit 0
            ;;
        --check) action=check ;;
        --revert) action=revert ;;
        --)
            shift
            break
            ;;
        -*) wrong_usage "there is no option $1" ;;
        *) break ;;
    esac
    shift
done
[ $# -eq 1 ] || wrong_usage "name one tree of $name"

command -v git >/dev/null || refuse "git is needed, and not installed"
[ -d "$1" ] || refuse "$1 is no directory"
# `cd -` would go where the shell was before.
case $1 in -*) set -- "./$1" ;; esac
tree=$(cd -- "$1" && pwd -P)
work=$tree/.hyperbp-patches
if exists "$work"; then
    pid=$(cat -- "$work/pid" 2>/dev/null) || pid=
    if [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then
        refuse "process $pid is at work on $tree; if that is another program, remove $work/pid"
    fi
    [ "$action" != check ] || refuse "this script was stopped in $tree: run it without --check"
    undo
    printf '%s: this script was stopped in %s before: it is as it was before that\n' "$self" "$tree"
fi

# The last one first, for taking them out.
set --
for patch in "$here"/*.patch; do
    [ -r "$patch" ] || refuse "there is no patch that can be read in $here"
    set -- "$patch" "$@"
done

if [ "$action" = revert ]; then
    is_patched ||
        refuse "$tree does not have these patches, or lines of theirs have been changed since; nothing was changed"
    change --reverse "$@"
    printf '%s: the patches are out of %s again\n' "$self" "$tree"
    exit 0
fi

differences=$(differences)
if [ -n "$differences" ]; then
    if is_patched; then
        refuse "$tree has these patches already (--revert takes them out)"
    fi
    refuse "$tree is not what the patches are for; nothing was changed
$differences
They are for $name, commit $commit.
In a checkout, \`git checkout $commit\` brings it; if the changes are your own, \`git stash\` puts them aside first."
fi

check || refuse "git cannot apply the patches to $tree; nothing was changed"
if [ "$action" = check ]; then
    printf '%s: the patches can be applied to %s\n' "$self" "$tree"
    exit 0
fi
change "$here"/*.patch
printf '%s: %s has the patches now\n' "$self" "$tree"
