package main

import (
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"espmirror/fixtures"
	"espmirror/fixtures/vm"
)

// scenarios are all, in the order of the table.
var scenarios = []scenario{
	{"a", "two disks, the second behind", "initramfs-tools", func(s *scene) { twoDisks(s, small) }},
	{"a-systemd", "the whole system, /efi mounted, a kernel update", "initramfs-tools", wholeSystem},
	{"b", "as a, with dracut", "dracut", func(s *scene) { twoDisks(s, small) }},
	{"b-systemd", "as a-systemd, with dracut", "dracut", wholeSystem},
	{"c", "power cuts in a sync, then a boot from the second disk", "initramfs-tools", powerCuts},
	{"d", "first disk removed; it comes back stale", "initramfs-tools", removed},
	{"boot-entry", "a boot entry for the second disk, and a boot by it", "initramfs-tools", registered},
	{"e", "first disk with 4096-byte sectors, second with FAT16", "initramfs-tools", otherLayouts},
	{"f", "second disk absent, or late", "initramfs-tools", absent},
	{"f-systemd", "second disk plugged into the running system", "dracut", plugged},
	{"share", "the share of a boot where nothing changed", "initramfs-tools", share},
	{"control", "as a, with espmirror=no on the kernel's command line", "initramfs-tools", control},
}

// show is what a script usually asks for.
const show = `
section cmdline cat /proc/cmdline
section status espmirror status
`

// followHint runs sync and then the command of its hint that overwrites nothing that is newer, as an administrator would.
const followHint = `
section sync espmirror sync
tr '` + "`" + `' '\n' </run/section | grep '^espmirror sync --primary' | head -n 1 >/run/hint
section hint cat /run/hint
section follow sh /run/hint
section status espmirror status
`

// twoDisks boots twice. The second disk is behind: the first boot brings it up to date before anything is mounted, and
// the second one writes nothing.
func twoDisks(s *scene, options string) {
	a := s.disk("alpha", diskOptions{}, s.version("v1", "initrd", options))
	b := s.disk("bravo", diskOptions{}, nil)
	s.join(a, b)
	s.same(a, b)
	s.update(a, "v1", "v2", options)
	s.differ(a, b)

	boot := s.boot(start{disks: []*disk{a, b}, script: show})
	s.need(boot.version() == "v2", "%q was booted", boot.version())
	s.beforeMounts(boot)
	s.same(a, b)
	s.prove(true, "the second disk gets the new kernel in the initramfs")

	before := hash(s, b)
	boot = s.boot(start{disks: []*disk{a, b}, script: show})
	s.beforeMounts(boot)
	s.same(a, b)
	s.prove(hash(s, b) == before, "a boot where nothing changed does not change a bit of it")
}

// control is what the others would look like without espmirror: a must fail, or it would show nothing.
func control(s *scene) {
	err := func() (err error) {
		defer func() {
			if p := recover(); p != nil {
				f, ok := p.(failure)
				if !ok {
					panic(p)
				}
				err = f.error
			}
		}()
		twoDisks(s, small+" espmirror=no")
		return nil
	}()
	s.proved = nil
	s.need(err != nil, "scenario a passes without espmirror")
	first, _, _ := strings.Cut(err.Error(), "\n")
	s.prove(strings.Contains(first, "verify"), "the second disk stays behind, and the scenario fails")
}

// beforeMounts proves from the kernel's log that espmirror had ended before init began, and that nobody had mounted an
// ESP until then.
func (s *scene) beforeMounts(b *boot) {
	done, root := b.ended(), b.moment("EXT4-fs (")
	s.need(done > 0, "the kernel's log has no closing line of espmirror")
	s.need(root > 0, "the kernel's log does not say when the root filesystem was mounted")
	s.prove(done < root, "it ends before the first filesystem is mounted")
	up := b.uptime()
	s.need(up > 0, "the guest does not say when init began")
	s.prove(done <= up, "it ends in the initramfs")
	if _, ok := b.parts["init"]; ok { // a whole system may have mounted it since
		s.prove(!strings.Contains(b.parts["mounts"].text, " vfat ") && !strings.Contains(b.parts["modules"].text, "vfat "),
			"with no FAT mounted and no vfat module loaded until then")
	}
}

// hash is that of the whole disk.
func hash(s *scene, d *disk) [32]byte {
	f, err := os.Open(d.path)
	s.must(err)
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	s.must(err)
	return [32]byte(h.Sum(nil))
}

// settled waits until systemd has started all that it starts.
const settled = "systemctl is-system-running --wait >/dev/null\n"

// wholeSystem boots to the end: systemd mounts the primary with Linux's vfat, and a kernel is installed while it is.
func wholeSystem(s *scene) {
	a := s.disk("alpha", diskOptions{}, s.version("v1", "initrd", systemd))
	b := s.disk("bravo", diskOptions{}, nil)
	s.join(a, b)
	boot := s.boot(start{disks: []*disk{a, b}, script: settled + `
section failed systemctl --failed --no-legend --plain
section units systemctl list-units --all --no-legend --plain 'espmirror*'
section results systemctl show --property=Id,Result,ActiveState,ConditionResult 'espmirror*'
section blame systemd-analyze blame
section time systemd-analyze time
section journal journalctl -b --no-pager -o short-monotonic -t espmirror -t systemd -u 'espmirror*'
section entries ls /efi/loader/entries
section mount grep ' /efi .* vfat ' /proc/self/mountinfo
section before espmirror status
kernel=$(uname -r)
section install kernel-install add "$kernel" /boot/vmlinuz-"$kernel" /boot/initrd.img-"$kernel"
section installed ls /efi/loader/entries
# What the hooks left to a service has its time.
for i in 1 2 3 4 5 6 7 8 9 10; do
	espmirror status >/dev/null 2>&1 && break
	sleep 3
done
section verify espmirror verify
section after espmirror status
section still systemctl --failed --no-legend --plain
sync
umount /efi 2>/dev/null
`})
	s.beforeMounts(boot)
	p := boot.parts
	s.prove(p["failed"].text == "" && p["still"].text == "", "no unit has failed")
	s.need(strings.Contains(p["units"].text, "espmirror"), "no unit of espmirror is known: %q", p["units"].text)
	s.prove(p["mount"].code == 0, "Linux's vfat has the primary at /efi")
	s.need(p["install"].code == 0, "kernel-install: exit status %d: %s", p["install"].code, p["install"].text)
	added := strings.Count(p["installed"].text, "\n") - strings.Count(p["entries"].text, "\n")
	s.need(added == 1, "kernel-install has added %d entries: %q, %q", added, p["entries"].text, p["installed"].text)
	s.need(p["verify"].code == 0, "verify after the kernel was installed: exit status %d: %s", p["verify"].code, p["verify"].text)
	s.same(a, b)
	s.prove(true, "kernel-install's hook brings the new kernel to the second disk, the primary being mounted")
	s.note("systemd-analyze: %s", strings.Join(strings.Fields(p["time"].text), " "))
	for line := range strings.Lines(p["blame"].text) {
		if strings.Contains(line, "espmirror") {
			s.note("systemd-analyze blame: %s", strings.Join(strings.Fields(line), " "))
		}
	}
}

// powerCuts kills the machine at random moments of a sync and boots from the disk that it wrote to.
func powerCuts(s *scene) {
	rng := rand.New(rand.NewPCG(rand.Uint64(), 0))
	tally := map[string]int{}
	a0 := s.disk("alpha", diskOptions{}, s.version("v1", "initrd", small))
	b0 := s.disk("bravo", diskOptions{}, nil)
	s.join(a0, b0)
	s.update(a0, "v1", "v2", small)
	kept := map[*disk]string{}
	for _, d := range []*disk{a0, b0} {
		kept[d] = d.path + ".kept"
		s.mustTool("cp", "--sparse=always", d.path, kept[d])
	}
	tail := 6 * time.Second // what follows the data, at most; shortened when a machine was faster than the cut
	for i := range s.cuts {
		for d, from := range kept {
			s.mustTool("cp", "--sparse=always", from, d.path)
		}
		a, b := a0, b0
		r := s.start(start{disks: []*disk{a, b}, script: show, slow: true})
		// The moment is counted in what has been written, for a virtual machine's seconds are of any length. The end of
		// the run writes little and does the most: every other cut is made behind the data.
		s.must(r.WaitFor("Mounting root file system"))
		clean, begin := written(s, b), time.Now()
		target, late := rng.Int64N(payloadSize), i%2 == 1
		if late {
			target = payloadSize - 64<<10
		}
		for written(s, b)-clean < target && time.Since(begin) < 3*time.Minute && !r.Shows(" early: ") {
			time.Sleep(2 * time.Millisecond)
		}
		if late {
			time.Sleep(time.Duration(rng.Int64N(int64(tail))))
		}
		if cut := s.cut(r); cut.ended() > 0 {
			tally["cut after the run had ended"]++
			tail = tail * 2 / 3
		}
		found := s.fsck(b)
		s.must(found.Err(fixtures.AllowCrash))

		boot := s.boot(start{disks: []*disk{a, b}, from: 1, script: followHint})
		s.beforeMounts(boot)
		s.sound(b)
		switch v := boot.version(); v {
		case "v1":
			// The old tree. What was booted is older than the first disk, and must not overwrite it.
			tally["rolled back"]++
			s.need(boot.parts["sync"].code == 6 && boot.parts["hint"].text != "", "sync from the older disk: exit status %d, hint %q: %s",
				boot.parts["sync"].code, boot.parts["hint"].text, boot.parts["sync"].text)
			s.need(boot.parts["follow"].code == 0, "%s: exit status %d: %s", boot.parts["hint"].text, boot.parts["follow"].code, boot.parts["follow"].text)
			s.need(boot.parts["status"].code == 0, "status: exit status %d: %s", boot.parts["status"].code, boot.parts["status"].text)
		case "v2":
			tally["rolled forward, or done"]++
			s.need(boot.parts["sync"].code == 0, "sync from the newer disk: exit status %d: %s", boot.parts["sync"].code, boot.parts["sync"].text)
		default:
			s.need(false, "%q was booted", v)
		}
		if boot.says("recovered 1") {
			tally["with something to recover"]++
		}
		for _, line := range boot.said() {
			if m := decision.FindStringSubmatch(line); m != nil {
				tally["recovery: "+m[1]]++
			}
		}
		s.same(a, b)
		_, isNew := s.files(a)[machineID+"/v2/payload"]
		s.need(isNew, "after all, the first disk has the old kernel")
	}
	s.prove(true, fmt.Sprintf("%d cuts: firmware, boot loader and kernel start from the second disk after each", s.cuts))
	for _, k := range slices.Sorted(maps.Keys(tally)) {
		s.note("%d of them %s", tally[k], k)
	}
	s.need(tally["rolled back"] > 0 && tally["with something to recover"] > 0, "no cut hit the sync: %v", tally)
	s.prove(true, "recovery in the initramfs, then the older disk is refused as a source, and the command of the hint brings both into sync")
}

// decision is in what recovery says of a transaction that a cut left unfinished.
var decision = regexp.MustCompile(`decision="?([a-z ]+)[")]`)

// written is how much of the disk's file is no hole; it grows as the machine writes to free space.
func written(s *scene, d *disk) int64 {
	n, err := allocated(d.path)
	s.must(err)
	return n
}

// removed takes the first disk away, updates the system without it, and brings it back.
func removed(s *scene) {
	a := s.disk("alpha", diskOptions{}, s.version("v1", "initrd", small))
	b := s.disk("bravo", diskOptions{}, nil)
	s.join(a, b)
	vars := filepath.Join(s.dir, "kept-vars.fd")
	boot := s.boot(start{disks: []*disk{a, b}, from: -1, vars: vars, script: show})
	s.need(boot.parts["status"].code == 0, "status: %s", boot.parts["status"].text)

	boot = s.boot(start{disks: []*disk{b}, from: -1, vars: vars, script: show + "section wait espmirror wait --timeout 1s\n"})
	s.prove(boot.version() == "v1", "without the first disk, firmware takes EFI/BOOT/BOOTX64.EFI of the second")
	s.need(boot.parts["status"].code == 3, "status without the first disk: exit status %d: %s", boot.parts["status"].code, boot.parts["status"].text)
	s.update(b, "v1", "v2", small)

	boot = s.boot(start{disks: []*disk{a, b}, script: followHint})
	s.need(boot.version() == "v1", "%q was booted", boot.version())
	s.need(boot.says("refused 1") && boot.says("`espmirror sync "), "no hint in the kernel's log")
	s.prove(boot.parts["done"].code == 0, "back again, it is known to be stale: refused with a hint, and the boot goes on")
	s.need(boot.parts["sync"].code == 6, "sync from the stale disk: exit status %d: %s", boot.parts["sync"].code, boot.parts["sync"].text)
	s.need(boot.parts["follow"].code == 0, "%s: exit status %d: %s", boot.parts["hint"].text, boot.parts["follow"].code, boot.parts["follow"].text)
	s.same(a, b)
	_, isNew := s.files(a)[machineID+"/v2/payload"]
	s.prove(isNew, "the command of the hint, `"+strings.TrimSpace(boot.parts["hint"].text)+"`, brings it up to date")
	boot = s.boot(start{disks: []*disk{a, b}, script: show})
	s.prove(boot.version() == "v2" && boot.parts["status"].code == 0, "and it boots the new kernel")
}

// registered makes a boot entry for a new member in the variables of the firmware, and has the firmware start it.
func registered(s *scene) {
	a := s.disk("alpha", diskOptions{}, s.version("v1", "initrd", small))
	b := s.disk("bravo", diskOptions{}, nil)
	vars := filepath.Join(s.dir, "entry-vars.fd")
	boot := s.boot(start{disks: []*disk{a, b}, from: -1, vars: vars, script: `
cd /sys/firmware/efi/efivars
global=8be4df61-93ca-11d2-aa0d-00e098032b8c
section order od -An -v -tx2 -j4 -w1024 BootOrder-$global
section add espmirror add --register PARTUUID=` + b.guid + `
section again espmirror add --register PARTUUID=` + b.guid + `
number=$(sed -n 's/^boot entry Boot\(....\) .*/\1/p' /run/section)
section status espmirror status
section ordered od -An -v -tx2 -j4 -w1024 BootOrder-$global
# Once, as the firmware's boot menu would.
printf "\\007\\000\\000\\000\\$(printf %03o 0x$number)\\000" >BootNext-$global
section next od -An -v -tx2 -j4 BootNext-$global
section name echo "$number"
`})
	p := boot.parts
	s.need(p["add"].code == 0 && strings.Contains(p["add"].text, ": created\n"), "add --register: exit status %d: %s", p["add"].code, p["add"].text)
	s.need(p["again"].code == 0 && strings.Contains(p["again"].text, ": there\n"), "add --register again: exit status %d: %s", p["again"].code, p["again"].text)
	number := strings.ToLower(strings.TrimSpace(p["name"].text))
	before, after := strings.Fields(p["order"].text), strings.Fields(p["ordered"].text)
	s.need(len(before) > 0 && slices.Equal(append(before, number), after), "the order was %q, and is %q; the entry is %s", before, after, number)
	s.need(strings.Contains(p["status"].text, "Boot"+strings.ToUpper(number)+"  in sync"), "status: %s", p["status"].text)
	s.prove(true, "add --register makes a boot entry behind all others, once, and status shows it")
	s.need(strings.TrimSpace(p["next"].text) == number, "BootNext is %q", p["next"].text)
	s.same(a, b)

	boot = s.boot(start{disks: []*disk{a, b}, from: -1, vars: vars, script: `
section current od -An -v -tx2 -j4 /sys/firmware/efi/efivars/BootCurrent-8be4df61-93ca-11d2-aa0d-00e098032b8c
section status espmirror status
section json espmirror status --json=short
`})
	p = boot.parts
	s.need(strings.TrimSpace(p["current"].text) == number, "BootCurrent is %q, and the entry %s", p["current"].text, number)
	s.need(p["status"].code == 0 && strings.Contains(p["status"].text, "Boot"+strings.ToUpper(number)+"  ok"), "status: exit status %d: %s", p["status"].code, p["status"].text)
	s.need(strings.Contains(p["json"].text, `"role":"primary"`) && strings.Index(p["json"].text, b.guid) < strings.Index(p["json"].text, a.guid), "%s is not the primary: %s", b.name, p["json"].text)
	s.prove(boot.version() == "v1", "firmware starts the second disk by it, and that is the primary then")
}

// otherLayouts has disks that are not alike.
func otherLayouts(s *scene) {
	a := s.disk("alpha", diskOptions{sector: 4096, bus: vm.NVMe}, s.version("v1", "initrd", small))
	b := s.disk("bravo", diskOptions{fat: 16, bus: vm.SCSI}, nil)
	s.join(a, b)
	s.update(a, "v1", "v2", small)
	boot := s.boot(start{disks: []*disk{a, b}, script: show})
	s.need(boot.version() == "v2", "%q was booted", boot.version())
	s.beforeMounts(boot)
	s.same(a, b)
	s.prove(true, "from FAT32 with 4096-byte sectors on NVMe to FAT16 on SCSI")

	s.update(b, "v2", "v3", small)
	boot = s.boot(start{disks: []*disk{a, b}, from: 1, script: show})
	s.need(boot.version() == "v3", "%q was booted", boot.version())
	s.same(a, b)
	s.prove(true, "and back, booted from the FAT16 disk")
}

// budget is how long an initramfs may wait for disks, in seconds; slack is what a busy host adds to the wait.
const (
	budget = 2.0
	slack  = 1.0
)

// absent boots without the second disk, and plugs it in while the machine runs.
func absent(s *scene) {
	a := s.disk("alpha", diskOptions{}, s.version("v1", "initrd", small))
	b := s.disk("bravo", diskOptions{}, nil)
	s.join(a, b)
	both := s.boot(start{disks: []*disk{a, b}, script: show})
	alone := s.boot(start{disks: []*disk{a}, script: show})
	s.beforeMounts(alone)
	s.note("init began at %.1f s with both disks, at %.1f s without the second", both.uptime(), alone.uptime())
	// Not the difference of the boots: what else the host has to do changes that by seconds.
	waited := alone.waited()
	s.prove(waited >= budget*0.9 && waited <= budget+slack, fmt.Sprintf("it waits for a disk that is away for its budget of %g s, and no longer", budget))
	with, _ := both.early()
	took, _ := alone.early()
	s.need(took-waited <= with+slack, "espmirror took %.3f s without the second disk, %.3f s of it waiting, and %.3f s with it", took, waited, with)
	s.need(alone.parts["status"].code == 3, "status: exit status %d: %s", alone.parts["status"].code, alone.parts["status"].text)

	s.update(a, "v1", "v2", small+" espmirror.timeout=60s")
	r := s.start(start{disks: []*disk{a}, unplugged: []*disk{b}, script: show})
	s.must(r.WaitFor("Mounting root file system"))
	time.Sleep(2 * time.Second)
	s.must(r.Plug(len(r.Drives) - 1))
	late := s.wait(r)
	s.need(late.version() == "v2", "%q was booted", late.version())
	took, _ = late.early()
	s.need(took < 50, "espmirror took %.3f s: it waited on after the disk had come", took)
	s.same(a, b)
	s.prove(true, "a disk that is plugged in while the initramfs waits is synced in the same boot")

	s.update(a, "v2", "v3", small+" espmirror=no")
	r = s.start(start{disks: []*disk{a}, unplugged: []*disk{b}, script: `
echo "guest: ready for the disk" >/dev/kmsg
section wait espmirror wait --timeout 60s
section sync espmirror sync
` + show})
	s.must(r.WaitFor("guest: ready for the disk"))
	time.Sleep(time.Second)
	s.must(r.Plug(len(r.Drives) - 1))
	late = s.wait(r)
	s.need(late.version() == "v3" && late.parts["wait"].code == 0 && late.parts["sync"].code == 0, "%s booted; wait: exit status %d: %s; sync: %d: %s",
		late.version(), late.parts["wait"].code, late.parts["wait"].text, late.parts["sync"].code, late.parts["sync"].text)
	s.same(a, b)
	s.prove(true, "so is one for which the running system waits")
}

// plugged plugs the second disk into a system that has started without it: udev has to see to it.
func plugged(s *scene) {
	a := s.disk("alpha", diskOptions{}, s.version("v1", "initrd", systemd))
	b := s.disk("bravo", diskOptions{}, nil)
	s.join(a, b)
	s.update(a, "v1", "v2", systemd)
	r := s.start(start{disks: []*disk{a}, unplugged: []*disk{b}, script: settled + `
section failed systemctl --failed --no-legend --plain
run=$(systemctl show --property=InvocationID --value espmirror-sync.service)
echo "guest: ready for the disk" >/dev/kmsg
i=0
while [ $i -lt 60 ]; do
	i=$((i + 1))
	sleep 2
	state=$(systemctl show --property=ActiveState --value espmirror-sync.service)
	now=$(systemctl show --property=InvocationID --value espmirror-sync.service)
	[ "$now" = "$run" ] || [ "$state" = activating ] || break
done
section plugged systemctl show --property=Id,Result,ActiveState,ExecMainStatus espmirror-late.service espmirror-sync.service
section udev udevadm info --query=property /dev/vdc1
section journal journalctl --boot --no-pager --lines=40
section status espmirror status
sync
umount /efi 2>/dev/null
`})
	s.must(r.WaitFor("guest: ready for the disk"))
	s.must(r.Plug(len(r.Drives) - 1))
	boot := s.wait(r)
	s.need(boot.version() == "v2", "%q was booted", boot.version())
	s.need(boot.parts["status"].code == 0, "status after the disk was plugged in: exit status %d: %s; %s; %s", boot.parts["status"].code,
		boot.parts["status"].text, boot.parts["plugged"].text, boot.parts["journal"].text)
	s.same(a, b)
	s.prove(true, "a disk that is plugged in is brought up to date by udev's rule and the service, with no command")
	if failed := strings.TrimSpace(boot.parts["failed"].text); failed != "" {
		s.note("failed while the disk was away: %s", failed)
	}
}

// Limits of what the initramfs adds.
const (
	maxAdded  = 6 << 20 // bytes, uncompressed
	maxTime   = 0.150   // seconds
	shareRuns = 2
)

// share measures what espmirror adds to a boot where nothing changed.
func share(s *scene) {
	plain, with := s.g.number("initrd-plain"), s.g.number("initrd-with")
	s.note("initramfs, uncompressed: %.0f bytes without, %.0f with: %.2f MiB added", plain, with, (with-plain)/(1<<20))

	disks := map[string][]*disk{}
	for _, initrd := range []string{"initrd", "initrd.plain"} {
		name := map[string]string{"initrd": "alpha", "initrd.plain": "charlie"}[initrd]
		a := s.disk(name, diskOptions{}, s.version("v1", initrd, small))
		b := s.disk(string(name[0]+1)+"-"+name, diskOptions{}, nil)
		s.join(a, b)
		disks[initrd] = []*disk{a, b}
	}
	up, took := map[string][]float64{}, []float64{}
	for range shareRuns {
		for initrd, pair := range disks {
			boot := s.boot(start{disks: pair, counted: true})
			up[initrd] = append(up[initrd], boot.uptime())
			t, ran := boot.early()
			s.need(ran == (initrd == "initrd"), "espmirror ran: %t", ran)
			if ran {
				took = append(took, t)
			}
		}
	}
	t, without, all := median(took), median(up["initrd.plain"]), median(up["initrd"])
	s.note("the clock of these boots counts instructions, a nanosecond each, which is two or three times as slow as hardware")
	s.note("espmirror took %.3f s of the %.2f s from the start of the kernel to init: %.1f %%", t, all, 100*t/all)
	s.note("init began at %.2f s with it in the initramfs, at %.2f s without (medians of %d boots)", all, without, shareRuns)
	s.prove(t <= maxTime, fmt.Sprintf("it takes less than %g ms of a boot where nothing changed", 1000*maxTime))
	s.prove(with-plain < maxAdded, fmt.Sprintf("it adds less than %d MiB to the initramfs, uncompressed", maxAdded>>20))
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if len(v) == 0 {
		return 0
	}
	return v[len(v)/2]
}
