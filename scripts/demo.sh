#!/bin/sh
# The demonstration: two disks, three generations of boot files, one power cut. No root, no mounts, no other tool.
# usage: scripts/demo.sh ESPMIRROR    from the top of the source tree
set -eu

bin=$1
out=${DEMO_OUT:-out/demo}
go=${GO:-go}
rm -rf "$out"
mkdir -p "$out"
CGO_ENABLED=0 $go build -trimpath -o "$out/" ./fixtures/mkdisk ./fixtures/powercut
cp "$bin" "$out/espmirror"
cd "$out"
unset SYSTEMD_ESP_PATH SYSTEMD_RELAX_ESP_CHECKS SYSTEMD_LOG_LEVEL
PATH=$PWD:$PATH

title() { printf '\n== %s\n' "$*"; }

# say prints a command and runs it.
say() {
	printf '$ %s\n' "$*"
	"$@"
}

# want STATUS COMMAND... does the same, and insists on an exit status other than 0.
want() {
	status=$1 got=0
	shift
	printf '$ %s\n' "$*"
	"$@" || got=$?
	printf '(exit status %s)\n' "$got"
	test "$got" = "$status" || { echo "demo: expected exit status $status" >&2; exit 1; }
}

title "Two disks, each with an EFI System Partition of its own"
mkdisk disk -size 160M -fat 32 -spc 1 -serial A11C-E001 -label PRIMARY primary.img
mkdisk disk -size 128M -fat 16 -spc 4 -serial B0B0-0002 -label SECOND -guid b0b00000-7c3d-4e8f-9a06-b1c2d3e4f501 \
	-part-guid b0b00000-7c3d-4e8f-9a06-b1c2d3e4f502 -second 16M secondary.img
for n in 1 2 3; do mkdisk tree -generation "$n" "generation$n"; done
mkdisk tree -layout windows windows
# The secondary has an operating system of its own, which must stay.
espmirror sync -q --primary windows --select EFI/Microsoft --target secondary.img
# The primary gets its boot files as from an image builder: out of a directory.
espmirror sync -q --primary generation1 --target primary.img
say espmirror list primary.img secondary.img

title "First run"
say espmirror sync -q --primary primary.img --target secondary.img
say espmirror verify --primary primary.img --target secondary.img

title "A kernel update on the primary, second run"
espmirror sync -q --primary generation2 --target primary.img
want 4 espmirror status --primary primary.img --target secondary.img
say espmirror sync --primary primary.img --target secondary.img
say espmirror sync -q --primary primary.img --target secondary.img
say espmirror ls secondary.img loader/entries

title "Another kernel update; the power fails in the third run"
espmirror sync -q --primary generation3 --target primary.img
say powercut -at commit -commit 2 -seed 1 primary.img secondary.img

title "What firmware would find on the secondary now, nothing repaired yet"
espmirror extract -q --to found secondary.img
say mkdisk compare generation2 generation3 found
say espmirror ls secondary.img loader/entries
want 5 espmirror status --primary primary.img --target secondary.img

title "Recovery"
say espmirror recover secondary.img
say espmirror check secondary.img
say espmirror status --primary primary.img --target secondary.img
rm -rf found
espmirror extract -q --to found secondary.img
say mkdisk compare generation2 generation3 found

title "The secondary's own files were never touched"
diff -r windows/EFI/Microsoft found/EFI/Microsoft
say espmirror ls -R secondary.img EFI/Microsoft
say espmirror list secondary.img
echo
echo "All of it is in $out."
