#!/bin/bash
# dracut module: `espmirror early` in the initrd.

# Whether this machine boots through EFI is not asked: images are built in chroots and on other machines, and in the
# initrd the program finds out by itself.
check() {
	require_binaries @LIBDIR@/espmirror-initrd || return 1
	return 0
}

depends() {
	return 0
}

# A host-only image has the drivers of all disks that are in use on this machine, any other has all, and no driver of a
# file system on disks is needed. But which ESP was booted stands in an EFI variable, and what shows these is a module in
# Debian's kernels.
installkernel() {
	hostonly='' instmods efivarfs
}

install() {
	inst_simple @LIBDIR@/espmirror-initrd @SBINDIR@/espmirror
	# shellcheck disable=SC2154 # dracut sets moddir, initdir, systemdsystemunitdir and SYSTEMCTL
	if dracut_module_included systemd; then
		# The unit is right in every initrd with systemd, whether dracut's own hooks run in it (dracut-systemd) or not.
		inst_simple @UNITDIR@/espmirror-initrd.service "$systemdsystemunitdir/espmirror-initrd.service"
		mkdir -p "$initdir$systemdsystemunitdir/initrd.target.wants"
		ln -sfn ../espmirror-initrd.service "$initdir$systemdsystemunitdir/initrd.target.wants/espmirror-initrd.service"
	else
		inst_script @LIBDIR@/initrd-run
		# After 10-resume.sh: a hibernated system that is about to wake up has its own view of the ESPs in memory.
		inst_hook pre-mount 20 "$moddir/espmirror.sh"
	fi
}
