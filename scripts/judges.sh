#!/bin/sh
# Installs the programs that judge what the tests write, and unpacks a Linux kernel for the virtual machine that reads
# it, where that is possible. Without them the tests that need one are skipped by name, so nothing here is fatal.
# What is there already is not looked for again: a second run takes no time and no network.
cd "$(dirname "$0")/.." || exit 0
linux=out/judges/linux

missing=
for pair in fsck.fat:dosfstools mcopy:mtools sgdisk:gdisk sfdisk:fdisk strace:strace zstd:zstd cpio:cpio mkfs.exfat:exfatprogs mount.exfat-fuse:exfat-fuse \
	qemu-system-x86_64:qemu-system-x86 shellcheck:shellcheck busybox:busybox \
	mmdebstrap:mmdebstrap systemd-analyze:systemd groff:groff-base efibootmgr:efibootmgr; do
	PATH=$PATH:/usr/sbin:/sbin command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
test -e /usr/share/OVMF/OVMF_CODE_4M.fd || missing="$missing ovmf"
test -e /usr/lib/systemd/boot/efi/systemd-bootx64.efi || missing="$missing systemd-boot-efi"

if [ -z "$missing" ] && [ -e $linux/vmlinuz ]; then
	exit 0
fi
if ! command -v apt-get >/dev/null; then
	missing="$missing linux"
	echo "judges that are not installed:$missing"
	exit 0
fi

# Of the kernel's package only what the virtual machine needs: the kernel and a handful of modules. busybox-static is
# unpacked too, not installed, because it would push out another busybox.
unpack_linux() (
	package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: \(linux-image-.*-amd64\)$/\1/p' | head -n 1)
	test -n "$package" && rm -rf "$linux.new" && mkdir -p "$linux.new/tmp" && cd "$linux.new/tmp" || return 1
	# Sandbox: the user that apt downloads as cannot write here.
	timeout 120 apt-get -qq -o APT::Sandbox::User=root -o Acquire::Retries=1 download "$package" busybox-static || return 1
	for deb in *.deb; do
		# tar fails for the patterns that belong to the other package; what counts is what is there afterwards.
		dpkg-deb --fsys-tarfile "$deb" | tar -x --wildcards './boot/vmlinuz-*' '*/kernel/drivers/virtio/virtio*.ko' \
			'*/kernel/drivers/block/virtio_blk.ko' '*/kernel/fs/fat/*.ko' '*/kernel/fs/nls/nls_cp437.ko' \
			'*/kernel/fs/nls/nls_ascii.ko' './bin/busybox' 2>/dev/null
	done
	find . -name '*.ko' -exec mv {} .. \;
	mv bin/busybox .. && mv boot/vmlinuz-* ../vmlinuz && cd .. && rm -rf tmp && echo "$package" >package || return 1
	# Whole or not at all: a half unpacked kernel would not be looked at again.
	cd .. && rm -rf linux && mv linux.new linux
)

root=
test "$(id -u)" != 0 || root=yes
export DEBIAN_FRONTEND=noninteractive
updated=
update() {
	test -n "$root" && test -z "$updated" && updated=yes && timeout 60 apt-get -qq -o Acquire::Retries=1 update >/dev/null 2>&1
}

if [ -n "$missing" ] && [ -n "$root" ]; then
	update
	# shellcheck disable=SC2086 # a list of words
	timeout 180 apt-get -qq install --no-install-recommends $missing >/dev/null 2>&1 && missing=
fi
if [ ! -e $linux/vmlinuz ]; then
	# The lists may be there already; a package that they name may be gone from the archive.
	unpack_linux >/dev/null 2>&1 || { update && unpack_linux >/dev/null 2>&1; } || missing="$missing linux"
fi
test -z "$missing" || echo "judges that are not installed:$missing"
