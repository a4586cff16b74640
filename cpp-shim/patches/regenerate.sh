#!/bin/sh
# Writes the patches and the list of blobs in HYPERBP_PATCHES, or beside this script, anew, from a repository in which each
# commit after the upstream one is a patch: its message becomes the patch's head. Refuses a commit that does more than to
# add lines.
set -eu
# With it, `cd` may go elsewhere and says where it went.
unset CDPATH

here=${HYPERBP_PATCHES:-$(cd -- "$(dirname -- "$0")" && pwd -P)}
self=$(basename -- "$0")

refuse() {
    printf '%s: %s\n' "$self" "$*" >&2
    exit 1
}

[ $# -eq 1 ] || {
    printf 'Usage: %s REPOSITORY\n' "$self" >&2
    exit 2
}

name=$(sed -n 's/^name //p' "$here/upstream")
upstream=$(sed -n 's/^commit //p' "$here/upstream")
commits=$(git -C "$1" rev-list --reverse "$upstream..HEAD") || refuse "$1 is no repository with commit $upstream"
[ -n "$commits" ] || refuse "there is no commit after $upstream in $1"

for commit in $commits; do
    removed=$(git -C "$1" diff --numstat "$commit^" "$commit" | awk '$2 != 0 { print $3 }')
    [ -z "$removed" ] || refuse "$commit removes or changes lines of $removed: patches only add"
done

rm -f "$here"/*.patch
number=0
for commit in $commits; do
    number=$((number + 1))
    # What its subject says before the colon.
    topic=$(git -C "$1" log -1 --format=%s "$commit" | sed 's/:.*//' | tr '[:upper:]' '[:lower:]' | tr -cs '[:alnum:]' -)
    {
        git -C "$1" log -1 --format=%B "$commit" | sed -e '$d'
        printf '\nFor %s %s.\nOnly adds lines. Under the licence of %s.\n\n' "$name" "$upstream" "$name"
        # The text after the second @@ would be theirs.
        git -C "$1" -c core.quotePath=false diff --unified=0 --no-color --no-ext-diff --no-renames --full-index \
            --src-prefix=a/ --dst-prefix=b/ "$commit^" "$commit" | sed 's/^\(@@ [^@]* @@\).*/\1/'
    } >"$here/$(printf '%04d' "$number")-${topic%-}.patch"
done

{
    printf '# What the patches touch, as it is in %s %s: its blob there, and its path.\n' "$name" "$upstream"
    git -C "$1" -c core.quotePath=false diff --name-only --no-renames "$upstream" HEAD | while read -r path; do
        blob=$(git -C "$1" rev-parse --verify --quiet "$upstream:$path") || blob=new
        printf '%s %s\n' "$blob" "$path"
    done
} >"$here/blobs"
