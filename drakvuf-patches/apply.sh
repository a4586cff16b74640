#!/bin/sh
# Applies the patches beside this script to a tree of what they are for, all or none.
#
# It goes by what lies beside it: `upstream`, the name and the commit of the project; `blobs`, what git calls the contents
# of each file there that is patched, or "new"; and the patches, *.patch, in the order of their names.
set -eu

here=$(cd "$(dirname "$0")" && pwd -P)
self=$(basename "$0")

usage() {
    cat <<USAGE
Usage: $self [--check | --revert] TREE

Applies the patches in $here
to TREE: a checkout or an export of $name, commit
$commit. All are applied, or none.

  --check   only say whether they can be applied
  --revert  take them out again
  --help    show this

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

# git in the tree, and in no repository around it.
git_in_tree() {
    (
        unset GIT_DIR GIT_WORK_TREE GIT_INDEX_FILE GIT_PREFIX
        GIT_CEILING_DIRECTORIES=$(dirname "$tree")
        export GIT_CEILING_DIRECTORIES
        cd "$tree"
        exec git -c core.autocrlf=false -c core.safecrlf=false "$@"
    )
}

# Whatever the user has configured for patches.
git_apply() {
    git_in_tree apply --unidiff-zero --whitespace=nowarn --no-ignore-whitespace "$@"
}

# All patches as one, to be checked: by itself, one that changes what another has added does not fit the tree.
check() {
    cat "$here"/*.patch | git_apply --check "$@" -
}

# Whether the tree has the patches.
is_patched() {
    check --reverse 2>/dev/null
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
            found=$(git_in_tree hash-object --no-filters -- "$path")
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
tree=$(cd "$1" && pwd -P)

# The last one first, for taking them out.
set --
for patch in "$here"/*.patch; do
    [ -r "$patch" ] || refuse "there is no patch that can be read in $here"
    set -- "$patch" "$@"
done

if [ "$action" = revert ]; then
    is_patched ||
        refuse "$tree does not have these patches, or lines of theirs have been changed since; nothing was changed"
    for patch in "$@"; do
        git_apply --reverse "$patch" || refuse "git could not take $patch out of $tree"
    done
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
for patch in "$here"/*.patch; do
    git_apply "$patch" || refuse "git could not apply $patch to $tree"
done
printf '%s: %s has the patches now\n' "$self" "$tree"
