package fatdriver

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
)

// ErrChanged is returned when the volume is not as the plan found it, or the medium does not hold what was written.
var ErrChanged = errors.New("the volume is not as it should be")

// spoolSize is how much is gathered before a write: neighbouring small files and directories go out together.
const spoolSize = 1 << 20

// Tx carries out a plan. Its methods are the steps of the protocol; the caller brings them into order, puts the flushes
// and the journal between them, and can stop after any of them. After an error nothing more may be written to the
// volume by this transaction; Release and the rest of recovery tidy up.
type Tx struct {
	p *Plan
	v *Volume

	spoolOff int64
	spool    []byte
}

// Begin starts a transaction. Nothing is written yet.
func (p *Plan) Begin() *Tx { return &Tx{p: p, v: p.tree.vol} }

// write gathers data that goes to off.
func (tx *Tx) write(b []byte, off int64) error {
	if len(tx.spool) > 0 && (off != tx.spoolOff+int64(len(tx.spool)) || len(tx.spool)+len(b) > spoolSize) {
		if err := tx.Sync(); err != nil {
			return err
		}
	}
	if len(tx.spool) == 0 {
		if len(b) >= spoolSize/2 {
			return tx.put(b, off)
		}
		tx.spoolOff = off
	}
	tx.spool = append(tx.spool, b...)
	return nil
}

func (tx *Tx) put(b []byte, off int64) error {
	if _, err := tx.v.dev.WriteAt(b, off); err != nil {
		return fmt.Errorf("cannot write %d bytes at offset 0x%x: %w", len(b), off, err)
	}
	return nil
}

// Sync hands to the device what was gathered. It is no barrier.
func (tx *Tx) Sync() error {
	if len(tx.spool) == 0 {
		return nil
	}
	b := tx.spool
	tx.spool = tx.spool[:0]
	return tx.put(b, tx.spoolOff)
}

// Flush is the barrier: it returns when all that was written before is on stable storage.
func (tx *Tx) Flush() error {
	if err := tx.Sync(); err != nil {
		return err
	}
	return tx.v.dev.Flush()
}

// FileWriter takes the content of one new file. Close checks that it got exactly Size bytes.
type FileWriter struct {
	tx   *Tx
	f    *NewFile
	run  int
	at   int64 // byte position in the run
	left int64
	h    summer
}

// File begins the content of a file of the plan. One file is written at a time.
func (tx *Tx) File(f *NewFile) *FileWriter {
	return &FileWriter{tx: tx, f: f, left: f.Want.Size}
}

// Write implements io.Writer.
func (w *FileWriter) Write(p []byte) (int, error) {
	if int64(len(p)) > w.left {
		return 0, fmt.Errorf("cannot write %s: the source is larger than the %d bytes it had", w.f.Want.Name, w.f.Want.Size)
	}
	w.left -= int64(len(p))
	return len(p), w.raw(p)
}

// raw writes bytes into the clusters of the file, and remembers them for reading back.
func (w *FileWriter) raw(p []byte) error {
	w.h.add(p)
	g := &w.tx.v.geo
	for len(p) > 0 {
		r := w.f.Runs[w.run]
		size := int64(r.Count) * int64(g.ClusterSize)
		k := min(int64(len(p)), size-w.at)
		if err := w.tx.write(p[:k], g.ClusterOff(r.First)+w.at); err != nil {
			return err
		}
		p = p[k:]
		if w.at += k; w.at == size {
			w.run, w.at = w.run+1, 0
		}
	}
	return nil
}

// Close pads the last cluster with zeros, so that nothing of what lay there before stays in the file's slack.
func (w *FileWriter) Close() error {
	if w.left != 0 {
		return fmt.Errorf("cannot write %s: the source ended %d bytes early", w.f.Want.Name, w.left)
	}
	if rest := int(w.f.Want.Size % int64(w.tx.v.geo.ClusterSize)); rest != 0 {
		if err := w.raw(make([]byte, w.tx.v.geo.ClusterSize-rest)); err != nil {
			return err
		}
	}
	w.f.sum = w.h.sum()
	return nil
}

// WriteDirs writes the new directories, which nothing refers to yet.
func (tx *Tx) WriteDirs() error {
	for _, d := range tx.p.dirs {
		if err := tx.scatter(d.runs, d.image); err != nil {
			return err
		}
	}
	return nil
}

func (tx *Tx) scatter(runs []Run, b []byte) error {
	g := &tx.v.geo
	for _, r := range runs {
		k := int(r.Count) * g.ClusterSize
		if err := tx.write(b[:k], g.ClusterOff(r.First)); err != nil {
			return err
		}
		b = b[k:]
	}
	return nil
}

// WriteFAT enters the new chains into every FAT copy, and makes the free count unknown: from here on to Finish it
// would be wrong.
func (tx *Tx) WriteFAT() error {
	if err := tx.Sync(); err != nil {
		return err
	}
	if _, err := tx.v.linkChains(tx.p.chains, false); err != nil {
		return err
	}
	return tx.v.setFree(fsiUnknown)
}

// setFree writes the free count of FSInfo, where there is one and it says something else.
func (v *Volume) setFree(n uint32) error {
	b, err := v.fsinfo()
	if err != nil || b == nil || binary.LittleEndian.Uint32(b[fsiFree:]) == n {
		return err
	}
	binary.LittleEndian.PutUint32(b[fsiFree:], n)
	return v.putFSInfo(b)
}

func (v *Volume) putFSInfo(b []byte) error {
	if _, err := v.dev.WriteAt(b, v.geo.FSInfoOff); err != nil {
		return fmt.Errorf("cannot write FSInfo at offset 0x%x: %w", v.geo.FSInfoOff, err)
	}
	return nil
}

// ReadBack reads from the medium what the build wrote and compares: file content by its hash, directories, the entries
// of the new chains in every FAT copy, and the commit sectors, which must still be the old ones. progress may be nil.
func (tx *Tx) ReadBack(progress func(bytes int64)) error {
	if err := tx.v.dev.Invalidate(); err != nil {
		return fmt.Errorf("cannot drop caches: %w", err)
	}
	g := &tx.v.geo
	buf := make([]byte, spoolSize)
	for _, f := range tx.p.Files {
		sum, err := tx.v.hashRuns(f.Runs, buf, progress)
		if err != nil {
			return err
		}
		if sum != f.sum && len(f.Runs) > 0 {
			return fmt.Errorf("%w: %s reads back with other content from offset 0x%x", ErrChanged, f.Want.Name, g.ClusterOff(firstOf(f.Runs)))
		}
	}
	for _, d := range tx.p.dirs {
		sum, err := tx.v.hashRuns(d.runs, buf, progress)
		if err != nil {
			return err
		}
		if sum != sumOf(d.image) {
			return fmt.Errorf("%w: directory %s reads back with other content from offset 0x%x", ErrChanged, d.path, g.ClusterOff(firstOf(d.runs)))
		}
	}
	for n := 0; n < g.NumFATs; n++ {
		t := newTable(tx.v.dev, g, n)
		for _, s := range tx.p.chains {
			for i := uint32(0); i < s.Count; i++ {
				c := s.First + Cluster(i)
				want := uint32(c) + 1
				if i+1 == s.Count {
					want = s.next
				}
				have, err := t.get(c)
				if err != nil {
					return err
				}
				if have != want {
					return fmt.Errorf("%w: FAT copy %d reads back with 0x%x for cluster %d, want 0x%x", ErrChanged, n, have, c, want)
				}
			}
		}
	}
	first := map[int64]bool{}
	for i, b := range tx.p.Blocks {
		if first[b.Off] {
			continue
		}
		first[b.Off] = true
		if err := tx.expect(i, b.Old, "before the commit"); err != nil {
			return err
		}
	}
	return nil
}

// hashRuns works out the checksum of the clusters of runs.
func (v *Volume) hashRuns(runs []Run, buf []byte, progress func(int64)) (checksum, error) {
	var h summer
	for _, r := range runs {
		off, n := v.geo.ClusterOff(r.First), int64(r.Count)*int64(v.geo.ClusterSize)
		for n > 0 {
			k := min(n, int64(len(buf)))
			if _, err := v.dev.ReadAt(buf[:k], off); err != nil {
				return 0, fmt.Errorf("cannot read back at offset 0x%x: %w", off, err)
			}
			h.add(buf[:k])
			off, n = off+k, n-k
			if progress != nil {
				progress(k)
			}
		}
	}
	return h.sum(), nil
}

// checksum is what tells content apart here: CRC-32C and CRC-32 of the same bytes, one in each half. It finds accidents, a
// device that lies or another system that writes, and no adversary, who could rewrite the journal as well. SHA-256 takes
// longer than the writing itself.
type checksum uint64

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// summer works out a checksum piece by piece.
type summer struct{ c, i uint32 }

func (s *summer) add(p []byte) {
	s.c = crc32.Update(s.c, castagnoli, p)
	s.i = crc32.Update(s.i, crc32.IEEETable, p)
}

func (s *summer) sum() checksum { return checksum(s.c)<<32 | checksum(s.i) }

func sumOf(b []byte) checksum {
	var s summer
	s.add(b)
	return s.sum()
}

// expect compares the sector of block i on the medium.
func (tx *Tx) expect(i int, want []byte, when string) error {
	b := tx.p.Blocks[i]
	have := make([]byte, len(want))
	if _, err := tx.v.dev.ReadAt(have, b.Off); err != nil {
		return fmt.Errorf("cannot read commit sector at offset 0x%x: %w", b.Off, err)
	}
	if !bytes.Equal(have, want) {
		return fmt.Errorf("%w: commit sector at offset 0x%x has other content %s", ErrChanged, b.Off, when)
	}
	return nil
}

// Commit writes block i. The caller flushes, and then calls Committed.
func (tx *Tx) Commit(i int) error {
	if err := tx.expect(i, tx.p.Blocks[i].Old, "before the commit"); err != nil {
		return err
	}
	defer tx.v.fat.drop() // an extension commits in the FAT
	return tx.put(tx.p.Blocks[i].New, tx.p.Blocks[i].Off)
}

// Committed reads block i back from the medium.
func (tx *Tx) Committed(i int) error {
	if err := tx.v.dev.Invalidate(); err != nil {
		return fmt.Errorf("cannot drop caches: %w", err)
	}
	return tx.expect(i, tx.p.Blocks[i].New, "after the commit")
}

// Frees says whether Free has anything to do.
func (tx *Tx) Frees() bool { return len(tx.p.freeRuns) > 0 }

// Free releases what only the old tree used, in every FAT copy.
func (tx *Tx) Free() error {
	_, _, err := tx.v.freeRuns(tx.p.freeRuns, false)
	return err
}

// Finish writes the true free count.
func (tx *Tx) Finish() error {
	return tx.v.setFree(uint32(tx.p.FreeAfter()))
}

// FreeAfter is the number of free clusters when all is done.
func (p *Plan) FreeAfter() int64 {
	return p.freeTotal - clustersIn(p.allocRuns) + clustersIn(p.freeRuns)
}

// FreeBefore is the number of clusters that were free when the plan was made and can be allocated.
func (p *Plan) FreeBefore() int64 { return p.freeTotal }

// Alloc lists the clusters that the plan allocates, ascending. The result must not be changed.
func (p *Plan) Alloc() []Run { return p.allocRuns }

// Freed lists the clusters that the plan frees after the last commit, ascending. The result must not be changed.
func (p *Plan) Freed() []Run { return p.freeRuns }

// objects are the new directories and files, and the directories that they replace, by ascending first cluster, with the
// checksums of their clusters.
func (tx *Tx) objects() (firsts []Cluster, sums map[Cluster]checksum) {
	sums = map[Cluster]checksum{}
	for _, d := range tx.p.dirs {
		sums[firstOf(d.runs)] = sumOf(d.image)
	}
	for _, f := range tx.p.Files {
		if len(f.Runs) > 0 {
			sums[firstOf(f.Runs)] = f.sum
		}
	}
	for c, sum := range tx.p.gone {
		sums[c] = sum
	}
	for c := range sums {
		firsts = append(firsts, c)
	}
	slices.Sort(firsts)
	return firsts, sums
}

// Objects lists the first clusters of the new directories and files, and of the directories that they replace, as
// ascending runs: what Digest is made of.
func (p *Plan) Objects() []Run {
	firsts, _ := p.Begin().objects()
	var runs []Run
	for _, c := range firsts {
		runs = appendCluster(runs, c)
	}
	return runs
}

// Digest is a hash over the checksums of all new directories and files, once they are written, and of the directories
// that they replace, which stay as they are until the last commit. DigestOf works out the
// same from the medium alone.
func (tx *Tx) Digest() [32]byte {
	h := sha256.New()
	firsts, sums := tx.objects()
	for _, c := range firsts {
		h.Write(binary.LittleEndian.AppendUint64(nil, uint64(sums[c])))
	}
	var sum [32]byte
	h.Sum(sum[:0])
	return sum
}

// DigestOf follows the chains that begin at the given clusters and hashes their content. An error means that a chain is
// not whole, or that the medium cannot be read.
func (v *Volume) DigestOf(objects []Run) ([32]byte, error) {
	var sum [32]byte
	h := sha256.New()
	buf := make([]byte, pageSize)
	used := newBitmap(&v.geo)
	for _, o := range objects {
		for i := uint32(0); i < o.Count; i++ {
			runs, err := v.chain(o.First+Cluster(i), int64(v.geo.Clusters), used)
			if err != nil {
				return sum, err
			}
			one, err := v.hashRuns(runs, buf, nil)
			if err != nil {
				return sum, err
			}
			h.Write(binary.LittleEndian.AppendUint64(nil, uint64(one)))
		}
	}
	h.Sum(sum[:0])
	return sum, nil
}

// Cost is what a plan writes, in bytes, by the place it goes to; the journal is not in it.
type Cost struct {
	Data, Dirs, FAT, FSInfo, Commits int64
	Flushes                          int // barriers of the transaction itself
}

// Total is the number of bytes written.
func (c Cost) Total() int64 { return c.Data + c.Dirs + c.FAT + c.FSInfo + c.Commits }

// Cost works out what the plan will write.
func (p *Plan) Cost() (Cost, error) {
	var c Cost
	cs := int64(p.tree.vol.geo.ClusterSize)
	for _, f := range p.Files {
		c.Data += clustersIn(f.Runs) * cs
	}
	for _, d := range p.dirs {
		c.Dirs += int64(len(d.image))
	}
	link, err := p.tree.vol.linkChains(p.chains, true)
	if err != nil {
		return c, err
	}
	free, extra, err := p.tree.vol.freeRuns(p.freeRuns, true)
	if err != nil {
		return c, err
	}
	c.FAT = link + free
	for _, b := range p.Blocks {
		c.Commits += int64(len(b.New))
	}
	info, err := p.tree.vol.fsinfo()
	if err != nil {
		return c, err
	}
	if info != nil {
		if binary.LittleEndian.Uint32(info[fsiFree:]) != fsiUnknown {
			c.FSInfo += int64(len(info))
		}
		c.FSInfo += int64(len(info))
	}
	c.Flushes = 2 + len(p.Blocks) + extra
	if len(p.freeRuns) > 0 {
		c.Flushes++
	}
	return c, nil
}
