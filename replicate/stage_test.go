package replicate

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

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
