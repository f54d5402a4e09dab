#!/bin/sh
# kill -9 of `espmirror sync` at N random moments (200) on loop devices; fsck.fat and mtools judge what is left.
# usage: scripts/kill-test.sh [N]    as root, from the top of the source tree
set -eu
if [ "$(id -u)" != 0 ]; then
	echo "kill-test: loop devices need root" >&2
	exit 1
fi
ESPMIRROR_KILL_ROUNDS=${1:-200} exec "${GO:-go}" test -count=1 -timeout 1h -v -run '^TestKill$' ./scripts/killtest
