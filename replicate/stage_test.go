package replicate

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// kernels is a tree with boot entries of both types, each of which takes about 440 KB.
func kernels(versions ...string) map[string]string {
	t := map[string]string{"loader/loader.conf": "timeout 3\n", "EFI/BOOT/BOOTX64.EFI": fixtures.AsProgram("boot loader")}
	for _, v := range versions {
		t["tok/"+v+"/linux"] = strings.Repeat(v, 440_000/len(v))
		t["loader/entries/tok-"+v+".conf"] = "title Linux\nversion " + v + "\nlinux /tok/" + v + "/linux\n"
	}
	return t
}

var stageSelect = Selection{Select: []string{"loader", "EFI", "tok"}}

// stageVolume has room for three kernels, not for four.
func stageVolume(t *testing.T, tree map[string]string) *blockdev.Mem {
	t.Helper()
	m := newVolume(t, geometry{"FAT12", fatdriver.FAT12, 1_700_000 / 4096 * 4096, 512, 2, 2})
	if res := syncMem(t, newMemSource(tree), m, Options{Selection: stageSelect}); res.Err != nil {
		t.Fatal(res.Err)
	}
	return m
}

// TestMakesRoom updates a target that has no room for old and new kernels at once.
func TestMakesRoom(t *testing.T) {
	old := kernels("5.1", "5.2", "5.3")
	t.Run("the oldest goes first", func(t *testing.T) {
		m := stageVolume(t, old)
		want := kernels("5.2", "5.3", "5.4")
		before := bytes.Clone(m.Bytes())
		dry := syncMem(t, newMemSource(want), m, Options{Selection: stageSelect, DryRun: true})
		if dry.Err != nil || dry.Outcome != Differs || !bytes.Equal(before, m.Bytes()) {
			t.Fatal(dry.Outcome, dry.Err)
		}
		res := syncMem(t, newMemSource(want), m, Options{Selection: stageSelect})
		if res.Err != nil || res.Outcome != Synced {
			t.Fatal(res.Outcome, res.Err)
		}
		for _, s := range []Summary{dry.Summary, res.Summary} {
			var early []string
			for _, c := range s.Early {
				early = append(early, c.Path)
			}
			if !slices.Equal(early, []string{"loader/entries/tok-5.1.conf", "tok/5.1/linux"}) {
				t.Error("removed first:", early)
			}
		}
		if !reflect.DeepEqual(dry.Summary, res.Summary) || len(res.Summary.Commits) == 0 {
			t.Errorf("the dry run said %+v, it was %+v", dry.Summary, res.Summary)
		}
		judge(t, m, 2, want)
		fsck(t, m)
	})
	t.Run("the booted one stays", func(t *testing.T) {
		m := stageVolume(t, old)
		want := kernels("5.2", "5.3", "5.4")
		before := bytes.Clone(m.Bytes())
		for _, o := range []Options{{BootedEntry: "tok-5.1.conf"}, {DefaultEntry: "tok-5.1.conf"}, {DefaultEntry: "tok-5.1*"}} {
			o.Selection = stageSelect
			res := syncMem(t, newMemSource(want), m, o)
			if !errors.Is(res.Err, fatdriver.ErrNoSpace) || res.Outcome != Refused {
				t.Fatal(res.Outcome, res.Err)
			}
			if !bytes.Equal(before, m.Bytes()) {
				t.Fatal("it was written to")
			}
		}
	})
	t.Run("the default of loader.conf stays", func(t *testing.T) {
		tree := maps.Clone(old)
		tree["loader/loader.conf"] = "default tok-5.1.conf\n"
		m := stageVolume(t, tree)
		res := syncMem(t, newMemSource(kernels("5.2", "5.3", "5.4")), m, Options{Selection: stageSelect})
		if !errors.Is(res.Err, fatdriver.ErrNoSpace) {
			t.Fatal(res.Outcome, res.Err)
		}
	})
	t.Run("not enough all the same", func(t *testing.T) {
		m := stageVolume(t, old)
		before := bytes.Clone(m.Bytes())
		res := syncMem(t, newMemSource(kernels("5.4", "5.5", "5.6")), m, Options{Selection: stageSelect})
		if !errors.Is(res.Err, fatdriver.ErrNoSpace) || res.Outcome != Refused || !bytes.Equal(before, m.Bytes()) {
			t.Fatal(res.Outcome, res.Err)
		}
	})
	t.Run("a member", func(t *testing.T) {
		a, b := newMember(t, "a", guidA, geometries[2]), &aMember{name: "b", guid: guidB, dev: stageVolume(t, old)}
		load := func(tree map[string]string) {
			t.Helper()
			if res := syncMem(t, newMemSource(tree), a.dev, Options{Selection: stageSelect, Force: true}); res.Err != nil {
				t.Fatal(res.Err)
			}
		}
		o := Options{Selection: stageSelect}
		load(old)
		if res, err := a.sync(t, o, b); err != nil || res[0].Err != nil {
			t.Fatal(err, res[0].Err)
		}
		load(kernels("5.2", "5.3", "5.4"))
		// The power goes after the first transaction: the target is behind then, and no stranger.
		cut := bytes.Clone(b.dev.Bytes())
		writes := 0
		for n := 0; ; n++ {
			copy(b.dev.Bytes(), cut)
			left := n
			vol, _ := scanned(t, a.dev)
			src, err := OpenVolumeSource("a", vol)
			if err != nil {
				t.Fatal(err)
			}
			o := Options{Selection: stageSelect, Member: true, SourceGUID: guidA, Save: func(context.Context, []byte) error { return nil }}
			target := b.target()
			target.Dev = &stopping{b.dev, &left}
			res, err := Sync(context.Background(), src, []*Target{target}, o)
			if err == nil && res[0].Err == nil {
				break
			}
			writes++
			if errors.Is(res[0].Err, ErrRefused) {
				t.Fatalf("after %d writes: %v", n, res[0].Err)
			}
			res, err = Sync(context.Background(), src, []*Target{b.target()}, o)
			if err != nil || res[0].Err != nil || res[0].Outcome != Synced && res[0].Outcome != InSync {
				t.Fatalf("after %d writes: %v %v %s", n, err, res[0].Err, res[0].Outcome)
			}
		}
		if writes < 20 {
			t.Error("only", writes, "writes")
		}
	})
}

// stopping is a device that takes some writes, and then none.
type stopping struct {
	blockdev.Device
	left *int
}

func (d *stopping) WriteAt(p []byte, off int64) (int, error) {
	if *d.left--; *d.left < 0 {
		return 0, errors.New("the plug was pulled")
	}
	return d.Device.WriteAt(p, off)
}

// TestStagedCuts cuts the power in every epoch of a run with two transactions.
func TestStagedCuts(t *testing.T) {
	g := geometry{"FAT12", fatdriver.FAT12, 1_700_000 / 4096 * 4096, 512, 2, 2}
	m := stageVolume(t, kernels("5.1", "5.2", "5.3"))
	c := record1(t, g, bytes.Clone(m.Bytes()), newMemSource(kernels("5.2", "5.3", "5.4")), Options{Selection: stageSelect})
	// The entry goes, then its file: with that the first transaction ends.
	if c.between = 2; c.last <= c.between {
		t.Fatal(c.last, "trees")
	}
	if err := c.explore(c.rec, 1<<12, 20); err != nil {
		t.Fatal(err)
	}
}

func earlyPaths(res Result) []string {
	var out []string
	for _, c := range res.Summary.Early {
		out = append(out, c.Path)
	}
	return out
}

func loadTree(t *testing.T, m *blockdev.Mem, tree map[string]string) {
	t.Helper()
	if res := syncMem(t, newMemSource(tree), m, Options{Selection: stageSelect, Force: true}); res.Err != nil {
		t.Fatal(res.Err)
	}
}

// Many entries that only the source has.
func TestManyEntries(t *testing.T) {
	m := newVolume(t, geometries[4])
	tree := func(v string, n int) map[string]string {
		out := withFiles(nil)
		for i := range n {
			out[fmt.Sprintf("loader/entries/%s-%d.conf", v, i)] = "linux /EFI/BOOT/BOOTX64.EFI\n"
		}
		return out
	}
	took := map[int]time.Duration{}
	for _, n := range []int{50, 100, 200} {
		syncMem(t, newMemSource(tree("old", n)), m, Options{Selection: testSelect})
		start := time.Now()
		if res := syncMem(t, newMemSource(tree("new", n)), m, Options{Selection: testSelect, DryRun: true}); res.Err != nil {
			t.Fatal(res.Err)
		}
		took[n] = time.Since(start)
	}
	if took[200] > 20*took[50] {
		t.Errorf("the time grows with the third power: %v", took)
	}
}

// The first transaction must not take a boot loader away, which an entry names besides, and which is to be replaced.
func TestStagedKeepsBootLoader(t *testing.T) {
	old := kernels("5.1", "5.2", "5.3")
	old["loader/entries/again.conf"] = "title chain\nversion 0\nefi /EFI/BOOT/BOOTX64.EFI\n"
	m := stageVolume(t, old)
	now := kernels("5.2", "5.3", "5.4")
	now["EFI/BOOT/BOOTX64.EFI"] = fixtures.AsProgram("another boot loader")
	res := syncMem(t, newMemSource(now), m, Options{Selection: stageSelect, DryRun: true})
	if res.Err != nil {
		t.Fatal(res.Err)
	}
	if early := earlyPaths(res); slices.Contains(early, "EFI/BOOT/BOOTX64.EFI") {
		t.Error("between the transactions there is no boot loader:", early)
	}
}

// sizedUKI is an image that systemd-boot lists, with as many bytes as its text.
func sizedUKI(version string, size int) string {
	le := binary.LittleEndian
	const lfanew, opt = 0x80, 0x70
	b := make([]byte, 0x400)
	copy(b, "MZ")
	le.PutUint32(b[0x3C:], lfanew)
	copy(b[lfanew:], "PE\x00\x00")
	le.PutUint16(b[lfanew+4:], 0x8664)
	le.PutUint16(b[lfanew+6:], 4)
	le.PutUint16(b[lfanew+0x14:], opt)
	o := b[lfanew+0x18:]
	le.PutUint16(o, 0x20B)
	le.PutUint32(o[0x3C:], 0x400)
	le.PutUint16(o[0x44:], 10)
	for i, s := range [][2]string{
		{".osrel", "ID=tok\nPRETTY_NAME=\"Linux " + version + "\"\nVERSION_ID=" + version + "\n"},
		{".linux", strings.Repeat(version, size/len(version))},
		{".profile", "ID=main\n"}, {".profile", "ID=rescue\n"},
	} {
		h := o[opt+40*i:]
		copy(h[:8], s[0])
		for _, at := range []int{8, 16} {
			le.PutUint32(h[at:], uint32(len(s[1])))
		}
		le.PutUint32(h[20:], uint32(len(b)))
		b = append(b, s[1]...)
		o = b[lfanew+0x18:]
	}
	return string(b)
}

// A UKI of several profiles was booted by one of them: LoaderEntrySelected is "5.1.efi@rescue".
func TestStagedBootedProfile(t *testing.T) {
	tree := func(versions ...string) map[string]string {
		t := map[string]string{"loader/loader.conf": "timeout 3\n", "EFI/BOOT/BOOTX64.EFI": fixtures.AsProgram("boot loader")}
		for _, v := range versions {
			t["EFI/Linux/"+v+".efi"] = sizedUKI(v, 438_000)
		}
		return t
	}
	for booted, goes := range map[string]bool{"": true, "5.1.efi": false, "5.1.efi@rescue": false} {
		m := stageVolume(t, tree("5.1", "5.2", "5.3"))
		res := syncMem(t, newMemSource(tree("5.2", "5.3", "5.4")), m, Options{Selection: stageSelect, DryRun: true, BootedEntry: booted})
		if early := earlyPaths(res); slices.Contains(early, "EFI/Linux/5.1.efi") != goes {
			t.Errorf("booted %q: first goes %q (%v)", booted, early, res.Err)
		}
	}
}

// A kept type 1 entry names a UKI, which is in the menu by itself too.
func TestStagedUKIOfEntry(t *testing.T) {
	tree := func(versions ...string) map[string]string {
		t := map[string]string{"loader/loader.conf": "timeout 3\n", "EFI/BOOT/BOOTX64.EFI": fixtures.AsProgram("boot loader")}
		for _, v := range versions {
			t["EFI/Linux/"+v+".efi"] = fixtures.AsProgram(strings.Repeat(v, 440_000/len(v)))
		}
		return t
	}
	old := tree("5.1", "5.2", "5.3")
	old["loader/entries/mine.conf"] = "title mine\nsort-key a\nuki /EFI/Linux/5.1.efi\n"
	m := stageVolume(t, old)
	res := syncMem(t, newMemSource(tree("5.2", "5.3", "5.4")), m, Options{Selection: stageSelect, DryRun: true, BootedEntry: "mine.conf"})
	if early := earlyPaths(res); slices.Contains(early, "EFI/Linux/5.1.efi") && !slices.Contains(early, "loader/entries/mine.conf") {
		t.Error("the booted entry stays, and what it starts goes first:", early)
	}
}

// What is kept does not start: its kernel is missing, or it is for another machine.
func TestStagedKeepsDeadEntry(t *testing.T) {
	for name, dead := range map[string]map[string]string{
		"kernel missing":       {"loader/entries/tok-9.conf": "title dead\nversion 9\nlinux /tok/9/linux\n"},
		"another architecture": {"loader/entries/tok-9.conf": "title arm\narchitecture aa64\nversion 9\nlinux /tok/9/arm\n", "tok/9/arm": "arm"},
	} {
		t.Run(name, func(t *testing.T) {
			m := stageVolume(t, kernels("5.1", "5.2", "5.3"))
			changes := map[string]*string{}
			for p, c := range dead {
				changes[p] = &c
			}
			(&aMember{name: "m", guid: guidB, dev: m}).edit(t, changes)
			res := syncMem(t, newMemSource(kernels("6.1")), m, Options{Selection: stageSelect, DryRun: true})
			left := 3
			for _, p := range earlyPaths(res) {
				if strings.HasPrefix(p, "loader/entries/tok-5") {
					left--
				}
			}
			t.Log(earlyPaths(res), res.Err)
			if left == 0 {
				t.Errorf("after the first transaction nothing starts: %q goes first (%v)", earlyPaths(res), res.Err)
			}
		})
	}
}

// loader.conf lies on the ESP, and its default is an entry on the XBOOTLDR partition.
func TestStagedDefaultOnXBOOTLDR(t *testing.T) {
	boot := stageVolume(t, kernels("5.1", "5.2", "5.3"))
	esp := newVolume(t, geometries[2])
	conf := map[string]string{"loader/loader.conf": "default tok-5.1.conf\n", "EFI/BOOT/BOOTX64.EFI": fixtures.AsProgram("boot loader")}
	loadTree(t, esp, conf)
	o := Options{Selection: stageSelect, DryRun: true}
	res, err := SyncAll(context.Background(), []Job{
		{newMemSource(kernels("5.2", "5.3", "5.4")), []*Target{{Name: "x", Dev: boot, PartGUID: guidA, Pair: "p"}}, o},
		{newMemSource(conf), []*Target{{Name: "e", Dev: esp, PartGUID: guidB, Pair: "p"}}, o},
	})
	if err != nil {
		t.Fatal(err)
	}
	if early := earlyPaths(res[0][0]); slices.Contains(early, "loader/entries/tok-5.1.conf") {
		t.Error("the default entry goes first:", early)
	}
}

// A partner is refused in the plan, when the other one has its journal already.
func TestRefusedPartnerWritten(t *testing.T) {
	boot := stageVolume(t, kernels("5.1", "5.2", "5.3"))
	esp := newVolume(t, geometries[2]) // no journal yet
	conf := map[string]string{"loader/loader.conf": "timeout 3\n", "EFI/BOOT/BOOTX64.EFI": fixtures.AsProgram("boot loader")}
	before := bytes.Clone(esp.Bytes())
	o := Options{Selection: stageSelect}
	res, err := SyncAll(context.Background(), []Job{
		{newMemSource(kernels("6.1", "6.2", "6.3", "6.4")), []*Target{{Name: "x", Dev: boot, PartGUID: guidA, Pair: "p"}}, o},
		{newMemSource(conf), []*Target{{Name: "e", Dev: esp, PartGUID: guidB, Pair: "p"}}, o},
	})
	if err != nil {
		t.Fatal(err)
	}
	if res[0][0].Outcome != Refused || res[1][0].Outcome != Refused || !bytes.Equal(before, esp.Bytes()) {
		t.Errorf("%s (%v) and %s (%v), and written to: %t", res[0][0].Outcome, res[0][0].Err, res[1][0].Outcome, res[1][0].Err, !bytes.Equal(before, esp.Bytes()))
	}
}

// A member is booted between the two transactions of a staged run, and replicates what it has.
func TestInterimAsSource(t *testing.T) {
	a, b, c := newMember(t, "a", guidA, geometries[2]), &aMember{name: "b", guid: guidB, dev: stageVolume(t, kernels("5.1", "5.2", "5.3"))}, newMember(t, "c", guidC, geometries[2])
	loadTree(t, a.dev, kernels("5.1", "5.2", "5.3"))
	o := Options{Selection: stageSelect}
	res, err := a.sync(t, o, b, c)
	expectResults(t, "first", res, err, Synced, Synced)
	loadTree(t, a.dev, kernels("5.2", "5.3", "5.4"))
	whole := bytes.Clone(b.dev.Bytes())
	for n := 0; n < 400; n++ {
		copy(b.dev.Bytes(), whole)
		left := n
		b.via = &stopping{b.dev, &left}
		if res, err = a.sync(t, o, b); err == nil && res[0].Err == nil {
			t.Fatal("never between")
		}
		b.via = nil
		if _, err := Recover(context.Background(), b.target(), RecoverOptions{}); err != nil {
			t.Fatal(err)
		}
		if st := b.state(t); st != nil && st.Interim != nil && b.files(t)["loader/entries/tok-5.1.conf"] == "" {
			break
		}
	}
	before := [3][]byte{bytes.Clone(a.dev.Bytes()), bytes.Clone(b.dev.Bytes()), bytes.Clone(c.dev.Bytes())}
	res, err = b.sync(t, o, c)
	var hint *Hint
	if !errors.Is(err, ErrSource) || !errors.Is(err, ErrRefused) || !errors.As(err, &hint) || !strings.Contains(hint.Text, "better primary") {
		t.Errorf("a source that was left between two transactions: %v", err)
	}
	if len(res) != 1 || res[0].Outcome != Refused || c.files(t)["loader/entries/tok-5.1.conf"] == "" || !bytes.Equal(b.dev.Bytes(), before[1]) || !bytes.Equal(c.dev.Bytes(), before[2]) {
		t.Errorf("refused, and something was written: %+v", res)
	}
	res, err = a.sync(t, o, b, c)
	expectResults(t, "from the whole one", res, err, Synced, Synced)
	if st := b.state(t); st.Interim != nil || !st.same(a.state(t)) {
		t.Errorf("b is at %+v, and a at %+v", st, a.state(t))
	}

	for i, m := range []*aMember{a, b, c} {
		copy(m.dev.Bytes(), before[i])
	}
	o.Force = true
	res, err = b.sync(t, o, c)
	expectResults(t, "forced", res, err, Synced)
	if c.files(t)["loader/entries/tok-5.1.conf"] != "" || b.state(t).Interim != nil {
		t.Error("forced, and the tree did not go to c as a generation")
	}
}

// The first transaction takes away every entry that goes, where one would make room enough.
func TestStagedTakesNoMoreThanItMust(t *testing.T) {
	m := stageVolume(t, kernels("5.1", "5.2", "5.3"))
	res := syncMem(t, newMemSource(kernels("6.1")), m, Options{Selection: stageSelect, DryRun: true})
	if early := earlyPaths(res); len(early) > 2 {
		t.Errorf("one kernel has to go for one kernel, and first goes %q (%v)", early, res.Err)
	}
}
