package replicate

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/fixtures"
)

// seeded makes a volume of systemd-boot with a random seed; nil makes none.
func seeded(t testing.TB, g geometry, seed []byte, attr byte) *blockdev.Mem {
	t.Helper()
	m := newVolume(t, g)
	files := []File{
		{Path: "loader/loader.conf", Content: []byte("timeout 3\n")},
		{Path: "loader/entries/a.conf", Content: []byte("title a\n")},
		{Path: "EFI/systemd/systemd-bootx64.efi", Content: bytesOf("MZ", 1000)},
	}
	if seed != nil {
		files = append(files, File{Path: SeedPath, Content: seed, Meta: fatdriver.Meta{Attr: attr}})
	}
	putMem(t, m, Options{}, files...)
	return m
}

func reseed(t testing.TB, dev blockdev.Device, o SeedOptions) SeedResult {
	t.Helper()
	res, err := RandomSeed(context.Background(), &Target{Name: "b.img", Dev: dev}, o)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// random32 is a source of randomness that is none.
func random32() io.Reader { return strings.NewReader(strings.Repeat("R", 32)) }

// wantSeed is SHA-256(le64(32) || R… || le64(len(old)) || old), put together by hand.
func wantSeed(old []byte) []byte {
	in := append([]byte{32, 0, 0, 0, 0, 0, 0, 0}, bytes.Repeat([]byte("R"), 32)...)
	in = append(in, byte(len(old)), byte(len(old)>>8), 0, 0, 0, 0, 0, 0)
	sum := sha256.Sum256(append(in, old...))
	return sum[:]
}

// TestNewSeed has a value that sha256sum(1) worked out:
//
//	(printf '\040\0\0\0\0\0\0\0'; printf 'R%.0s' {1..32}; printf '\003\0\0\0\0\0\0\0abc') | sha256sum
func TestNewSeed(t *testing.T) {
	have, err := newSeed(random32(), []byte("abc"))
	if err != nil || hex.EncodeToString(have) != "0187630dbb1cbe184dfd8da35fbdbe69af46c5f1df6bf8c79046566a55dcd921" {
		t.Errorf("%x, %v", have, err)
	}
	if a, err := newSeed(nil, nil); err != nil || len(a) != 32 {
		t.Error(a, err)
	} else if b, err := newSeed(nil, nil); err != nil || bytes.Equal(a, b) {
		t.Error(b, err)
	}
	if _, err := newSeed(strings.NewReader("short"), nil); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(err)
	}
}

// TestRandomSeedInPlace wants one write, to the clusters of the file alone.
func TestRandomSeedInPlace(t *testing.T) {
	for _, g := range geometries {
		for _, size := range []int{32, 33, 512, 5000, maxSeed} {
			old := bytes.Repeat([]byte("old seed"), maxSeed/8)[:size]
			m := seeded(t, g, old, 0)
			before := bytes.Clone(m.Bytes())
			_, tree := scanned(t, m)
			vol := tree.Volume().Geometry()
			n := tree.Lookup(SeedPath)
			var allowed []fixtures.Extent
			for _, r := range n.Runs {
				allowed = append(allowed, fixtures.Extent{Off: vol.ClusterOff(r.First), Len: int64(r.Count) * int64(vol.ClusterSize)})
			}
			// What lies behind the file in its last sector is nobody's business.
			slack := allowed[len(allowed)-1].Off + allowed[len(allowed)-1].Len - 1
			if size%vol.ClusterSize != 0 {
				before[slack], m.Bytes()[slack] = 0x5A, 0x5A
			}
			ro := blockdev.NewReadOnly(m)
			if res := reseed(t, ro, SeedOptions{Random: random32(), DryRun: true}); res.Outcome != Refreshed || !bytes.Equal(before, m.Bytes()) {
				t.Fatalf("%s, %d bytes: dry run: %+v", g.name, size, res)
			}
			c := blockdev.NewCounting(m)
			if res := reseed(t, c, SeedOptions{Random: random32()}); res.Outcome != Refreshed || res.Recovered != nil {
				t.Fatalf("%s, %d bytes: %+v", g.name, size, res)
			}
			if n := c.Counts(); n.Flushes != 1 || n.BytesWritten >= int64(size+vol.SectorSize) || size <= vol.ClusterSize && n.Writes != 1 {
				t.Errorf("%s, %d bytes: %+v", g.name, size, n)
			}
			fixtures.DiffWithin(t, before, m.Bytes(), g.sector, allowed...)
			have, err := readFiles(m, 0)
			if err != nil {
				t.Fatal(err)
			}
			want := append(wantSeed(old), make([]byte, size-32)...)
			if have[SeedPath] != string(want) {
				t.Errorf("%s, %d bytes: %x", g.name, size, have[SeedPath])
			}
			if size%vol.ClusterSize != 0 && m.Bytes()[slack] != 0x5A {
				t.Errorf("%s, %d bytes: a byte behind the file was changed", g.name, size)
			}
		}
	}
}

// TestRandomSeedOwn has no volume take another's seed, whatever the randomness and whatever they had in common.
func TestRandomSeedOwn(t *testing.T) {
	old := bytesOf("golden master image, copied often", 1)
	a, b := seeded(t, geometries[2], old, 0), seeded(t, geometries[2], old, 0)
	read := func(m *blockdev.Mem) string {
		files, err := readFiles(m, 0)
		if err != nil {
			t.Fatal(err)
		}
		return files[SeedPath]
	}
	for _, m := range []*blockdev.Mem{a, b} {
		reseed(t, m, SeedOptions{})
	}
	x, y := read(a), read(b)
	if x == y || x == string(old) || y == string(old) {
		t.Errorf("%x %x", x, y)
	}
	// A random source that repeats itself makes no equal seeds of different ones.
	for _, m := range []*blockdev.Mem{a, b} {
		reseed(t, m, SeedOptions{Random: random32()})
	}
	if x, y := read(a), read(b); x == y {
		t.Errorf("%x %x", x, y)
	}
}

// TestRandomSeedCases are the files that are not rewritten in place.
func TestRandomSeedCases(t *testing.T) {
	for name, c := range map[string]struct {
		old     []byte
		attr    byte
		o       SeedOptions
		outcome Outcome
		reason  string
	}{
		"missing":   {nil, 0, SeedOptions{}, Created, ""},
		"empty":     {[]byte{}, 0, SeedOptions{}, Created, ""},
		"short":     {bytesOf("s", 31), 0, SeedOptions{}, Created, ""},
		"large":     {bytesOf("s", maxSeed+1), 0, SeedOptions{}, Created, ""},
		"read-only": {bytesOf("s", 32), fatdriver.AttrReadOnly, SeedOptions{}, LeftAlone, readOnlySeed},
	} {
		for _, g := range putGeometries {
			m := seeded(t, g, c.old, c.attr)
			before, err := readFiles(m, 0)
			if err != nil {
				t.Fatal(err)
			}
			image := bytes.Clone(m.Bytes())
			c.o.Random, c.o.DryRun = random32(), true
			if res := reseed(t, blockdev.NewReadOnly(m), c.o); res.Outcome != c.outcome || res.Reason != c.reason || !bytes.Equal(image, m.Bytes()) {
				t.Fatalf("%s: dry run: %+v", name, res)
			}
			c.o.Random, c.o.DryRun = random32(), false
			if res := reseed(t, m, c.o); res.Outcome != c.outcome || res.Reason != c.reason {
				t.Fatalf("%s: %+v", name, res)
			}
			if c.outcome == LeftAlone {
				if !bytes.Equal(image, m.Bytes()) {
					t.Errorf("%s: the volume was written to", name)
				}
				continue
			}
			before[SeedPath] = string(wantSeed(c.old[:min(len(c.old), maxSeed)]))
			have, err := readFiles(m, g.fats-1)
			if err != nil {
				t.Fatal(err)
			}
			delete(have, journalPath)
			delete(before, journalPath)
			if fmt.Sprint(have) != fmt.Sprint(before) {
				t.Errorf("%s: have %q, want %q", name, have, before)
			}
			fsck(t, m)
		}
	}
}

func TestRandomSeedLeftAlone(t *testing.T) {
	// No systemd-boot: not even a journal is made.
	m := newVolume(t, geometries[2])
	image := bytes.Clone(m.Bytes())
	if res := reseed(t, m, SeedOptions{}); res.Outcome != LeftAlone || res.Reason != noSystemdBoot || !bytes.Equal(image, m.Bytes()) {
		t.Errorf("%+v", res)
	}
	if res := reseed(t, m, SeedOptions{Create: true}); res.Outcome != Created {
		t.Errorf("%+v", res)
	}
	fsck(t, m)
	// Refused, and not written to: a directory, damage, no FAT.
	dir := newVolume(t, geometries[2])
	putMem(t, dir, Options{}, File{Path: SeedPath + "/x", Content: []byte("x")})
	bad := seeded(t, geometries[2], bytesOf("s", 32), 0)
	v, tree := scanned(t, bad)
	g := v.Geometry()
	copy(bad.Bytes()[g.ClusterOff(tree.Lookup("EFI").Runs[0].First):], "\xE5\xE5\xE5\xE5")
	bad.Bytes()[g.RootOff+64+26] = 0xF0
	bad.Bytes()[g.RootOff+64+27] = 0xFF
	for name, m := range map[string]*blockdev.Mem{"directory": dir, "damaged": bad, "empty": blockdev.NewMem(make([]byte, 1<<20), 512)} {
		image := bytes.Clone(m.Bytes())
		res, err := RandomSeed(context.Background(), &Target{Name: "b.img", Dev: m}, SeedOptions{Create: true})
		if err == nil || res.Err == nil || res.Outcome != Refused || !strings.Contains(err.Error(), "b.img") {
			t.Errorf("%s: %+v", name, res)
		}
		if !bytes.Equal(image, m.Bytes()) {
			t.Errorf("%s: written to", name)
		}
	}
	// Stopped, or without randomness: not written to either.
	for _, old := range [][]byte{nil, bytesOf("s", 32)} {
		m := seeded(t, geometries[2], old, 0)
		image := bytes.Clone(m.Bytes())
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if _, err := RandomSeed(ctx, &Target{Name: "b.img", Dev: m}, SeedOptions{}); !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
		if _, err := RandomSeed(context.Background(), &Target{Name: "b.img", Dev: m}, SeedOptions{Random: strings.NewReader("few")}); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error(err)
		}
		if !bytes.Equal(image, m.Bytes()) {
			t.Error("written to")
		}
	}
}

// afterSeed judges a volume of which a run that renewed the seed was cut or failed: the seed is the old one, the new one, or
// bytes of both, and all other files are as they were.
func afterSeed(v fixtures.Volume, fats int, before map[string]string, seed []byte) error {
	for n := range fats {
		have, err := readFiles(v, n)
		if err != nil {
			return fmt.Errorf("FAT copy %d: %w", n, err)
		}
		now, was := have[SeedPath], before[SeedPath]
		fresh := string(seed) + strings.Repeat("\x00", max(0, len(was)-len(seed)))
		if len(now) != len(was) {
			fresh = string(seed)
		}
		ok := now == fresh
		if len(now) == len(was) {
			ok = true
			for i := range now {
				ok = ok && (now[i] == was[i] || i < len(fresh) && now[i] == fresh[i])
			}
		}
		if !ok {
			return fmt.Errorf("FAT copy %d: the seed is %q", n, now)
		}
		for p, c := range before {
			if p != SeedPath && p != journalPath && have[p] != c {
				return fmt.Errorf("FAT copy %d: %s is %q", n, p, have[p])
			}
		}
	}
	return nil
}

var seedSizes = []int{-1, 0, 31, 32, 2000}

func seedOf(n int) []byte {
	if n < 0 {
		return nil
	}
	return bytes.Repeat([]byte("seed of "), n/8+1)[:n]
}

// TestRandomSeedFaults fails every operation in turn.
func TestRandomSeedFaults(t *testing.T) {
	for _, g := range putGeometries {
		for _, size := range seedSizes {
			t.Run(fmt.Sprint(g.name, size), func(t *testing.T) {
				t.Parallel()
				m := seeded(t, g, seedOf(size), 0)
				before, err := readFiles(m, 0)
				if err != nil {
					t.Fatal(err)
				}
				for _, kind := range faults {
					for k := 0; ; k += kind.step(g) {
						d := &failing{Recorder: fixtures.NewRecorder(fixtures.Image(m.Bytes()), g.sector), fault: kind, k: k}
						res, err := RandomSeed(context.Background(), &Target{Name: "bad", Dev: d}, SeedOptions{Random: random32()})
						at := fmt.Sprintf("%s %d: %+v", kind.name, k, res)
						if !d.fired {
							if err != nil {
								t.Fatal(at)
							}
							break
						}
						if err == nil && kind.kind != blockdev.OpRead || err != nil && (res.Outcome != Failed || kind.kind != blockdev.OpRead && !errors.Is(err, kind.err)) {
							t.Fatal(at)
						}
						if d.after > 0 {
							t.Fatalf("%s: %d writes or flushes after a failed flush", at, d.after)
						}
						if err := afterSeed(d.State, g.fats, before, wantSeed(seedOf(size))); err != nil {
							t.Fatalf("%s: %v", at, err)
						}
						if size < seedSize {
							continue
						}
						// In place nothing but the file's content can be half done: there is nothing to recover.
						if pending, err := Pending(&Target{Name: "bad", Dev: d.State}); pending || err != nil {
							t.Fatalf("%s: %v, %v", at, pending, err)
						}
					}
				}
			})
		}
	}
}

// TestRandomSeedPowerCut judges the states of a cut at any moment.
func TestRandomSeedPowerCut(t *testing.T) {
	for _, g := range putGeometries {
		for _, size := range seedSizes {
			t.Run(fmt.Sprint(g.name, size), func(t *testing.T) {
				t.Parallel()
				m := seeded(t, g, seedOf(size), 0)
				before, err := readFiles(m, 0)
				if err != nil {
					t.Fatal(err)
				}
				r := fixtures.NewRecorder(fixtures.Image(m.Bytes()), g.sector)
				reseed(t, r, SeedOptions{Random: random32()})
				c := &crashRun{g: g, rec: r.Recording()}
				stats, err := c.rec.Explore(fixtures.CrashOptions{Limit: 200, Random: 20, Seed: 1}, func(s *fixtures.State) error {
					if err := afterSeed(s, g.fats, before, wantSeed(seedOf(size))); err != nil {
						return err
					}
					// The next run finishes what was begun, and gives the volume a seed.
					if _, err := RandomSeed(context.Background(), &Target{Name: "b.img", Dev: s}, SeedOptions{}); err != nil {
						return err
					}
					have, err := readFiles(s, 0)
					if err == nil && len(have[SeedPath]) < seedSize {
						err = fmt.Errorf("the seed has %d bytes", len(have[SeedPath]))
					}
					if err != nil {
						return err
					}
					tree, err := fixtures.ReadStrict(s, s.Size(), 0)
					if err != nil {
						return err
					}
					lost, err := tree.Lost()
					if err == nil && len(lost) > 0 {
						err = fmt.Errorf("lost clusters %v", lost)
					}
					return err
				})
				if err != nil {
					t.Fatal(err)
				}
				fixtures.Count("states", stats.States)
			})
		}
	}
}

// TestRandomSeedReadBack has a device that says it wrote.
func TestRandomSeedReadBack(t *testing.T) {
	g := geometries[2]
	m := seeded(t, g, bytesOf("s", 32), 0)
	v, tree := scanned(t, m)
	geo := v.Geometry()
	at := geo.ClusterOff(tree.Lookup(SeedPath).Runs[0].First)
	d := &fixtures.Losing{Recorder: fixtures.NewRecorder(fixtures.Image(m.Bytes()), g.sector), Lose: func(off int64) bool { return off == at }}
	res, err := RandomSeed(context.Background(), &Target{Name: "b.img", Dev: d}, SeedOptions{})
	if !errors.Is(err, fatdriver.ErrChanged) || res.Outcome != Failed || !strings.Contains(err.Error(), fmt.Sprintf("0x%x", at)) {
		t.Errorf("%+v", res)
	}
}

// TestRandomSeedRecovers renews the seed of a volume that a cut left in the middle of a sync.
func TestRandomSeedRecovers(t *testing.T) {
	g := geometries[2]
	m := seeded(t, g, bytesOf("s", 32), 0)
	r := fixtures.NewRecorder(fixtures.Image(m.Bytes()), g.sector)
	putMem(t, r, Options{}, File{Path: "EFI/x/y", Content: bytesOf("y", 3000)})
	rec := r.Recording()
	recovered := 0
	for i, op := range rec.Ops {
		if !op.Flush {
			continue
		}
		s, err := (&fixtures.Recording{Base: rec.Base, Sector: rec.Sector, Ops: rec.Ops[:i+1]}).After()
		if err != nil {
			t.Fatal(err)
		}
		res := reseed(t, s, SeedOptions{})
		if res.Outcome != Refreshed {
			t.Fatalf("%+v", res)
		}
		if res.Recovered.Changed() {
			recovered++
		}
		if pending, err := Pending(&Target{Name: "b.img", Dev: s}); pending || err != nil {
			t.Fatal(pending, err)
		}
	}
	if recovered == 0 {
		t.Error("there was nothing to recover")
	}
}

func TestRandomSeedDir(t *testing.T) {
	ctx := context.Background()
	dir := writeFiles(t, map[string]string{"LOADER/Random-Seed": "abc", "EFI/x": "x"})
	file := filepath.Join(dir, "LOADER/Random-Seed")
	renew := func(o SeedOptions) SeedResult {
		t.Helper()
		res, err := RandomSeedDir(ctx, dir, o)
		if (err == nil) != (res.Err == nil) {
			t.Fatal(err, res.Err)
		}
		return res
	}
	read := func() string {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if res := renew(SeedOptions{Random: random32(), DryRun: true}); res.Outcome != Created || read() != "abc" {
		t.Errorf("%+v, %q", res, read())
	}
	if res := renew(SeedOptions{Random: random32()}); res.Outcome != Created || read() != string(wantSeed([]byte("abc"))) {
		t.Errorf("%+v, %x", res, read())
	}
	old := read()
	if res := renew(SeedOptions{Random: random32()}); res.Outcome != Refreshed || read() != string(wantSeed([]byte(old))) {
		t.Errorf("%+v, %x", res, read())
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Error(info.Mode(), err)
	}
	if len(listing(t, dir)) != 5 {
		t.Errorf("%q", listing(t, dir))
	}
	old = read()
	if err := os.Chmod(file, 0o400); err != nil {
		t.Fatal(err)
	}
	if res := renew(SeedOptions{}); res.Outcome != LeftAlone || res.Reason != readOnlySeed || read() != old {
		t.Errorf("%+v", res)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if res := renew(SeedOptions{}); res.Outcome != LeftAlone || res.Reason != noSystemdBoot {
		t.Errorf("%+v", res)
	}
	file = filepath.Join(dir, "LOADER/random-seed")
	if err := os.WriteFile(filepath.Join(dir, "LOADER/loader.conf"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if res := renew(SeedOptions{Random: random32()}); res.Outcome != Created || read() != string(wantSeed(nil)) {
		t.Errorf("%+v", res)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("loader.conf", file); err != nil {
		t.Fatal(err)
	}
	if res := renew(SeedOptions{}); res.Outcome != Refused || !strings.Contains(res.Err.Error(), "is not a file") {
		t.Errorf("%+v", res)
	}
	if res, err := RandomSeedDir(ctx, filepath.Join(dir, "none"), SeedOptions{}); err == nil || res.Outcome != Failed {
		t.Errorf("%+v", res)
	}
}
