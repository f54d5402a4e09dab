#!/bin/sh
# Makes the guest that the tests in scripts/vm boot: Debian in a tree, with a package of espmirror installed in it, and
# an initial RAM disk made there.
#
#   scripts/vm-tree.sh KIND DEB       KIND is initramfs-tools or dracut
#
# In out/judges/vm/KIND: root.img (ext4), vmlinuz, initrd, initrd.plain (made before the package was installed),
# systemd-bootx64.efi, install.log, facts. Debian itself is kept in out/judges/vm/KIND.base and made again only when the
# list of packages changes; the rest when the package or this script does. It needs root, mmdebstrap and a mirror; exit
# status 77 says that one of them is missing.
set -eu
cd "$(dirname "$0")/.."
kind=$1
deb=$2
dir=out/judges/vm/$kind
base=$dir.base
# That of this machine, which has the other releases too; none is mmdebstrap's own choice.
# shellcheck disable=SC2016 # for apt
mirror=${ESPMIRROR_VM_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | grep -v security | head -n 1)}

packages=linux-image-cloud-amd64,systemd-sysv,udev,kmod,zstd,systemd-boot
case $kind in
initramfs-tools) suite=bookworm packages=$packages,initramfs-tools ;;
# Another release: another kernel, another systemd.
dracut) suite=trixie packages=$packages,dracut,systemd-boot-efi ;;
*)
	echo "there is no kind $kind" >&2
	exit 64
	;;
esac

missing() {
	echo "cannot make a guest: $*" >&2
	exit 77
}
test "$(id -u)" = 0 || missing "it needs root"
PATH=$PATH:/usr/sbin:/sbin
for tool in mmdebstrap mkfs.ext4 unshare chroot flock; do
	command -v $tool >/dev/null || missing "$tool: not installed"
done

# in_tree TREE COMMAND...: runs a command in a tree, with the mounts that it expects, which go when it ends.
in_tree() {
	# shellcheck disable=SC2016 # for the inner shell
	DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 unshare --mount --propagation private sh -c '
		for d in proc dev; do mount --rbind /$d "$0/$d" || exit 1; done
		exec chroot "$0" "$@"' "$@"
}

# One at a time.
mkdir -p "$(dirname "$base")"
exec 9>"$base.lock"
flock 9

key="$suite $packages"
if [ "$(cat "$base.key" 2>/dev/null)" != "$key" ]; then
	rm -rf "$base" "$base.key"
	# Documentation would only make the image larger. Weaker compression of the initial RAM disk: it is made anew often.
	# shellcheck disable=SC2016 # for the shell of the hook
	timeout 300 mmdebstrap --quiet --mode=root --variant=minbase --include="$packages" \
		--aptopt='Acquire::Check-Valid-Until "false"' --aptopt='Acquire::Retries "2"' \
		--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
		--dpkgopt='path-exclude=/usr/share/locale/*' \
		--essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d" && echo COMPRESSLEVEL=1 >"$1/etc/initramfs-tools/conf.d/vm"' \
		"$suite" "$base" ${mirror:+"$mirror"} >"$base.log" 2>&1 || {
		tail -n 5 "$base.log" >&2
		rm -rf "$base"
		missing "mmdebstrap could not make Debian $suite${mirror:+ from $mirror}"
	}
	echo "$key" >"$base.key"
fi

key=$(cat "$base.key" "$deb" scripts/vm-tree.sh scripts/vm/guest/* | sha256sum)
test "$(cat "$dir/key" 2>/dev/null)" != "$key" || exit 0
rm -rf "$dir" "$dir.tree"
mkdir -p "$dir"
cp -a "$base" "$dir.tree"
tree=$dir.tree

mkdir -p "$tree/vm"
install -m 755 scripts/vm/guest/init scripts/vm/guest/run "$tree/vm"
install -m 644 scripts/vm/guest/vm.service "$tree/etc/systemd/system"
mkdir -p "$tree/etc/systemd/system/multi-user.target.wants" "$tree/efi"
ln -sf ../vm.service "$tree/etc/systemd/system/multi-user.target.wants"
ln -sf /lib/systemd/system/multi-user.target "$tree/etc/systemd/system/default.target"
# /efi is the ESP of the first disk of the scenarios. Where that disk is away, nothing waits for it.
cat >"$tree/etc/fstab" <<EOF
LABEL=vmroot / ext4 defaults 0 0
PARTUUID=4f5a1b20-0000-4000-8000-000000000061 /efi vfat umask=0077,nofail,x-systemd.automount,x-systemd.device-timeout=5s 0 0
EOF
echo guest >"$tree/etc/hostname"
echo 0123456789abcdef0123456789abcdef >"$tree/etc/machine-id"

# The initial RAM disk of the kernel's package, without ours, and its uncompressed size: the sum of its files.
kernel=$(cd "$tree/lib/modules" && echo *)
initrd=/boot/initrd.img-$kernel
unpacked() {
	case $kind in
	initramfs-tools) in_tree "$tree" sh -c "rm -rf /tmp/rd && unmkinitramfs $initrd /tmp/rd" ;;
	dracut) in_tree "$tree" sh -c "rm -rf /tmp/rd && mkdir /tmp/rd && cd /tmp/rd && lsinitrd --unpack $initrd" ;;
	esac >/dev/null 2>&1
	find "$tree/tmp/rd" -type f -printf '%s\n' | awk '{ n += $1 } END { print n }'
	rm -rf "$tree/tmp/rd"
}
make_initrd() {
	case $kind in
	initramfs-tools) in_tree "$tree" update-initramfs -u ;;
	dracut) in_tree "$tree" dracut --force --no-hostonly "$initrd" "$kernel" ;;
	esac
}
make_initrd >"$dir/install.log" 2>&1
cp "$tree$initrd" "$dir/initrd.plain"
plain=$(unpacked)

# The package, as an administrator installs it. It has to bring itself into the initial RAM disk.
cp "$deb" "$tree/tmp/espmirror.deb"
in_tree "$tree" dpkg -i /tmp/espmirror.deb >>"$dir/install.log" 2>&1 || {
	tail -n 20 "$dir/install.log" >&2
	exit 1
}
rm "$tree/tmp/espmirror.deb"
with=$(unpacked)

cp "$tree$initrd" "$dir/initrd"
cp "$tree/boot/vmlinuz-$kernel" "$dir/vmlinuz"
cp "$tree/usr/lib/systemd/boot/efi/systemd-bootx64.efi" "$dir"
# shellcheck disable=SC2016 # for dpkg-query
version() { in_tree "$tree" dpkg-query -W -f '${Version}' "$1"; }
cat >"$dir/facts" <<EOF
kernel $kernel
debian $(cat "$tree/etc/debian_version")
systemd $(version systemd)
$kind $(version "$kind")
initrd-plain $plain
initrd-with $with
EOF
# Room for what the guest writes. No journal: the image is thrown away with each guest.
mkfs.ext4 -q -F -O ^has_journal -L vmroot -d "$tree" "$dir/root.img" 900M
rm -rf "$tree"
echo "$key" >"$dir/key"
