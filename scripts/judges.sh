#!/bin/sh
# Installs the programs that judge what the tests write, where that is possible. Without them the tests that need one
# are skipped by name, so nothing here is fatal.
missing=
for pair in fsck.fat:dosfstools mcopy:mtools sgdisk:gdisk zstd:zstd mkfs.exfat:exfatprogs; do
	PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
test -n "$missing" || exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	export DEBIAN_FRONTEND=noninteractive
	# shellcheck disable=SC2086 # a list of words
	timeout 180 sh -c 'apt-get -qq -o Acquire::Retries=1 update && apt-get -qq install --no-install-recommends "$@"' sh $missing >/dev/null 2>&1 && exit 0
fi
echo "judges that are not installed:$missing"
