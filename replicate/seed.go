package replicate

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"time"

	"espmirror/fatdriver"
)

// SeedPath is where systemd-boot looks for the random seed of the ESP that it was started from.
const SeedPath = "loader/random-seed"

const (
	seedSize = 32       // bytes of a seed that is written, and the fewest that systemd-boot takes (random-seed.c, RANDOM_MAX_SIZE_MIN)
	maxSeed  = 32 << 10 // bytes, the most that it takes (RANDOM_MAX_SIZE_MAX)
)

// The outcomes of renewing a seed, besides Failed and Refused.
const (
	Refreshed Outcome = "refreshed"  // the seed that was there was replaced by one that depends on it
	Created   Outcome = "created"    // there was none that systemd-boot would take
	LeftAlone Outcome = "left alone" // the reason says why
)

// SeedOptions say how a seed is renewed.
type SeedOptions struct {
	// Random is where the new randomness comes from. nil is getrandom(2), which early in a boot waits until the kernel has
	// collected enough.
	Random io.Reader
	Create bool // make the file where systemd-boot does not seem to be the boot loader, too
	DryRun bool // write nothing; the device may be read-only
	Log    *slog.Logger
}

// SeedResult is what happened to the seed of one volume.
type SeedResult struct {
	Target    string
	Outcome   Outcome
	Reason    string    // why it was left alone
	Recovered *Recovery // what was finished or rolled back first, nil when there was nothing
	Err       error
}

// newSeed mixes fresh randomness with the volume's own old seed: SHA-256 over the length of each and its bytes. So the seed
// is good if either of the two is, and it is not what any other volume has. bootctl does the same and writes the lengths as
// size_t (systemd, bootctl-random-seed.c, sha256_process_bytes_and_size), which is 64 bits, little endian, on the machines
// that matter; as nobody ever computes a seed a second time, it would not matter if it were not.
func newSeed(random io.Reader, old []byte) ([]byte, error) {
	if random == nil {
		random = rand.Reader
	}
	fresh := make([]byte, seedSize)
	if _, err := io.ReadFull(random, fresh); err != nil {
		return nil, fmt.Errorf("cannot get randomness: %w", err)
	}
	h := sha256.New()
	for _, b := range [][]byte{fresh, old} {
		var n [8]byte
		binary.LittleEndian.PutUint64(n[:], uint64(len(b)))
		h.Write(n[:])
		h.Write(b)
	}
	return h.Sum(nil), nil
}

const (
	noSystemdBoot = "there is no systemd-boot on it"
	readOnlySeed  = "the file is marked read-only"
)

// RandomSeed gives one volume a new random seed, which depends on the old one of the same volume and on no other. A seed
// that systemd-boot takes is rewritten where it is, as systemd-boot itself does it (random-seed.c): the first 32 bytes, zeros
// behind them, the size as it was. That is one write to the file's clusters. A power cut within it leaves bytes of both, which
// are a seed too, and nothing else of the volume can be touched. A file that is too short or too large is written anew by a
// transaction, and so is one that is missing where systemd-boot is installed (EFI/systemd or loader/loader.conf is there). A
// file that is marked read-only is not changed, which newer versions of systemd-boot respect as well.
//
// An interrupted run is finished first, as Sync does it. The error is that of the result.
func RandomSeed(ctx context.Context, t *Target, o SeedOptions) (SeedResult, error) {
	out := SeedResult{Target: t.Name}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	res := Result{Target: t.Name}
	r := &run{opt: Options{DryRun: o.DryRun, Log: o.Log}, log: o.Log}
	s := newSide(t, &res, r.opt)
	if err := ctx.Err(); err != nil {
		s.fail(err)
	} else {
		r.open(s)
	}
	var err error
	if res.Err == nil {
		out.Outcome, out.Reason, err = renewSeed(ctx, s, o)
	}
	s.fail(err)
	out.Recovered = res.Recovered
	if res.Err != nil {
		out.Outcome, out.Err = res.Outcome, fmt.Errorf("cannot renew the random seed of %s: %w", t.Name, res.Err)
	}
	return out, out.Err
}

// renewSeed renews the seed of a target that was recovered and scanned. In a dry run its device is an overlay.
func renewSeed(ctx context.Context, s *side, o SeedOptions) (Outcome, string, error) {
	n := lookup(s.tree.Root, SeedPath)
	switch {
	case n == nil && !o.Create && !hasSystemdBoot(s.tree):
		return LeftAlone, noSystemdBoot, nil
	case n == nil:
		return Created, "", putSeed(ctx, s, nil, o)
	case n.IsDir():
		return "", "", fmt.Errorf("%w: %s is a directory", ErrRefused, n.Path())
	case n.Entry.Attr()&fatdriver.AttrReadOnly != 0:
		return LeftAlone, readOnlySeed, nil
	}
	if size := n.Size(); size < seedSize || size > maxSeed {
		old, err := readSeed(s.tree, n)
		if err != nil {
			return "", "", err
		}
		return Created, "", putSeed(ctx, s, old, o)
	}
	return Refreshed, "", rewriteSeed(ctx, s, n, o)
}

// hasSystemdBoot says whether a volume looks as if systemd-boot starts from it.
func hasSystemdBoot(tree *fatdriver.Tree) bool {
	dir, conf := lookup(tree.Root, "EFI/systemd"), lookup(tree.Root, "loader/loader.conf")
	return dir != nil && dir.IsDir() || conf != nil && !conf.IsDir()
}

// readSeed reads what there is of a seed, up to the most that means anything.
func readSeed(tree *fatdriver.Tree, n *fatdriver.Node) ([]byte, error) {
	if n.Size() == 0 {
		return nil, nil
	}
	f, err := tree.Open(n)
	if err != nil {
		return nil, err
	}
	old, err := io.ReadAll(io.LimitReader(f, maxSeed))
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", n.Path(), err)
	}
	return old, nil
}

// seedFile is the file that a new seed makes.
func seedFile(seed []byte) File {
	now := time.Now().UTC()
	return File{SeedPath, seed, fatdriver.Meta{Attr: fatdriver.AttrArchive, Created: now, Modified: now, Accessed: now}}
}

// putSeed writes the seed as a new file.
func putSeed(ctx context.Context, s *side, old []byte, o SeedOptions) error {
	seed, err := newSeed(o.Random, old)
	if err != nil {
		return err
	}
	t := *s.t
	t.Dev = s.dev
	res, err := Put(ctx, &t, []File{seedFile(seed)}, Options{Log: o.Log})
	if err == nil && res.Outcome != Synced {
		return fmt.Errorf("internal error: a new seed is %q", res.Outcome)
	}
	return err
}

// rewriteSeed writes the seed over the one that is there.
func rewriteSeed(ctx context.Context, s *side, n *fatdriver.Node, o SeedOptions) error {
	g := s.vol.Geometry()
	cs := int64(g.ClusterSize)
	// The file's clusters, and nothing else of the volume. A device of the file's own size could not be written in whole
	// sectors.
	dev, _, err := s.vol.ChainDevice(n.Runs[0].First, (n.Size()+cs-1)/cs*cs)
	if err != nil {
		return err
	}
	unit := int64(min(g.SectorSize, s.dev.SectorSize()))
	buf := make([]byte, (n.Size()+unit-1)/unit*unit)
	if _, err := dev.ReadAt(buf, 0); err != nil {
		return fmt.Errorf("cannot read %s: %w", n.Path(), err)
	}
	seed, err := newSeed(o.Random, buf[:n.Size()])
	if err != nil {
		return err
	}
	copy(buf, seed)
	clear(buf[len(seed):n.Size()]) // an old seed must not come back; what lies behind the file is not ours
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := dev.WriteAt(buf, 0); err != nil {
		return fmt.Errorf("cannot write %s: %w", n.Path(), err)
	}
	// The seed must be on the medium before somebody counts on the old one being gone.
	if err := dev.Flush(); err != nil {
		return fmt.Errorf("cannot write %s: %w", n.Path(), err)
	}
	if err := s.dev.Invalidate(); err != nil {
		return fmt.Errorf("cannot drop caches: %w", err)
	}
	back := make([]byte, len(buf))
	if _, err := dev.ReadAt(back, 0); err != nil {
		return fmt.Errorf("cannot read %s back: %w", n.Path(), err)
	}
	if !bytes.Equal(back, buf) {
		return fmt.Errorf("%w: %s reads back with other content from offset 0x%x", fatdriver.ErrChanged, n.Path(), g.ClusterOff(n.Runs[0].First))
	}
	return nil
}

// RandomSeedDir is RandomSeed for a volume that is mounted on dir. The file is written under another name and renamed, as
// bootctl does it: see PutDir.
func RandomSeedDir(ctx context.Context, dir string, o SeedOptions) (SeedResult, error) {
	out := SeedResult{Target: dir}
	out.Outcome, out.Reason, out.Err = renewSeedDir(ctx, dir, o)
	if out.Err != nil {
		out.Outcome = Failed
		if errors.Is(out.Err, ErrRefused) {
			out.Outcome = Refused
		}
		out.Err = fmt.Errorf("cannot renew the random seed of %s: %w", dir, out.Err)
	}
	return out, out.Err
}

func renewSeedDir(ctx context.Context, dir string, o SeedOptions) (Outcome, string, error) {
	if err := ctx.Err(); err != nil {
		return "", "", err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", "", err
	}
	defer root.Close()
	outcome := Refreshed
	var old []byte
	name, err := findBelow(root, SeedPath)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		outcome = Created
		_, noDir := findBelow(root, "EFI/systemd")
		_, noConf := findBelow(root, "loader/loader.conf")
		if !o.Create && noDir != nil && noConf != nil {
			return LeftAlone, noSystemdBoot, nil
		}
	case err != nil:
		return "", "", err
	default:
		info, err := root.Lstat(name)
		if err != nil {
			return "", "", err
		}
		if !info.Mode().IsRegular() {
			return "", "", fmt.Errorf("%w: %s is not a file", ErrRefused, filepath.Join(dir, name))
		}
		if info.Mode()&0o200 == 0 {
			return LeftAlone, readOnlySeed, nil
		}
		f, err := root.Open(name)
		if err != nil {
			return "", "", err
		}
		old, err = io.ReadAll(io.LimitReader(f, maxSeed))
		f.Close()
		if err != nil {
			return "", "", err
		}
		if info.Size() < seedSize || info.Size() > maxSeed {
			outcome = Created
		}
	}
	seed, err := newSeed(o.Random, old)
	if err != nil || o.DryRun {
		return outcome, "", err
	}
	return outcome, "", PutDir(dir, []File{seedFile(seed)})
}

// findBelow finds a path as FAT finds it, without regard to case. It returns fs.ErrNotExist when there is none.
func findBelow(root *os.Root, p string) (string, error) {
	at := "."
	for _, part := range fatdriver.SplitPath(p) {
		d, err := root.Open(at)
		if err != nil {
			return "", err
		}
		entries, err := d.ReadDir(-1)
		d.Close()
		if err != nil {
			return "", err
		}
		at = path.Join(at, inDir(entries, part))
		if _, err := root.Lstat(at); err != nil {
			return "", err
		}
	}
	return at, nil
}
