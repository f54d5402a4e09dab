package fatdriver

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"espmirror/blockdev"
	"espmirror/fatdriver/internal/tree"
)

// Report is what Check found out about a volume.
type Report struct {
	Geometry     Geometry
	Label        string // from the root directory, else from the boot sector; "" when there is none
	UUID         string // the serial as ABCD-1234, "" when there is none
	Files        int
	Dirs         int   // without the root
	UsedClusters int64 // allocated, lost ones included, those marked bad not
	FreeClusters int64
	BadClusters  int64 // marked bad in the FAT
	LostClusters int64 // allocated, but part of no file or directory
	Findings     []Finding
}

// Worst is the highest severity among the findings; ok is false when there is none.
func (r *Report) Worst() (s Severity, ok bool) {
	for _, f := range r.Findings {
		s, ok = max(s, f.Severity), true
	}
	return s, ok
}

// Damage returns ErrDamaged with the first finding of that severity, or nil.
func (r *Report) Damage() error { return tree.Damaged(r.Findings, ErrDamaged) }

// ClusterBytes is the number of bytes in n clusters of the volume.
func (r *Report) ClusterBytes(n int64) int64 { return n * int64(r.Geometry.ClusterSize) }

func (r *Report) note(s Severity, path string, c Cluster, off int64, format string, a ...any) {
	if len(r.Findings) < maxFindings {
		r.Findings = append(r.Findings, Finding{Severity: s, Path: path, Cluster: uint32(c), Off: off, Msg: fmt.Sprintf(format, a...)})
	}
}

// Check reads every structure of the volume, and says everything that is unusual or wrong: about the boot sector and
// its backup, FSInfo, the FAT copies and the tree. The error is for a medium that cannot be read; a volume that claims
// more than its device holds is a finding, and what then lies outside is left out of the figures.
//
// Besides the tree it needs two bits of memory a cluster.
func (v *Volume) Check() (*Report, error) {
	r := &Report{Geometry: v.geo, Label: v.bootLabel(), UUID: v.UUID()}
	v.checkBoot(r)
	if err := v.checkBackupBoot(r); err != nil {
		return nil, err
	}
	t, err := v.Scan()
	switch {
	case err == nil:
		r.Label = t.Label
		r.Files, r.Dirs = t.count()
		r.Findings = append(r.Findings, t.Findings...)
		v.checkLabels(r, t)
	case v.geo.Size() > v.dev.Size() && errors.Is(err, blockdev.ErrOutOfRange):
		// Beyond the end of the device there is nothing to read. Without a tree no cluster can be called lost.
		r.note(Damage, "/", 0, -1, "the tree cannot be read: %v", err)
	default:
		return nil, err
	}
	if err := v.checkFAT(r, t); err != nil {
		return nil, err
	}
	return r, nil
}

// count gives the number of files and of directories, without the root.
func (t *Tree) count() (files, dirs int) {
	todo := []*Node{t.Root}
	for len(todo) > 0 {
		n := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, c := range n.Children {
			if !c.IsDir() {
				files++
				continue
			}
			dirs++
			todo = append(todo, c)
		}
	}
	return files, dirs
}

// checkBoot looks at the geometry and the other fields of the boot sector.
func (v *Volume) checkBoot(r *Report) {
	g := v.geo
	if v.boot[offSignature] != 0x55 || v.boot[offSignature+1] != 0xAA {
		// EDK2 and Linux do not look at it; a BIOS does.
		r.note(Note, "", 0, offSignature, "the boot sector ends in %02x %02x, want 55 aa", v.boot[offSignature], v.boot[offSignature+1])
	}
	dirty := int64(offFlags16)
	if g.Type == FAT32 {
		dirty = offFlags32
	}
	if g.Dirty {
		r.note(Warning, "", 0, dirty, "the boot sector's dirty bit is set: the volume was not unmounted")
	}
	if v.boot[dirty]&2 != 0 {
		r.note(Note, "", 0, dirty, "the boot sector asks for a surface test")
	}
	if !g.HasSerial {
		off := int64(offBootSig16)
		if g.Type == FAT32 {
			off = offBootSig32
		}
		r.note(Note, "", 0, off, "the boot sector has no serial: its extended signature is 0x%02x, want 0x29", v.boot[off])
	}
	if g.Type == FAT32 {
		for _, f := range []struct {
			off  int64
			what string
		}{{offFSInfo32, "FSInfo sector"}, {offBkBootSec32, "backup boot sector"}} {
			switch s := binary.LittleEndian.Uint16(v.boot[f.off:]); {
			case s == 0 || s == 0xFFFF:
				r.note(Note, "", 0, f.off, "the volume has no %s", f.what)
			case int(s) >= g.ReservedSectors:
				r.note(Warning, "", 0, f.off, "the %s is %d, outside the %d reserved sectors", f.what, s, g.ReservedSectors)
			}
		}
	}
	if g.Size() > v.dev.Size() {
		r.note(Damage, "", 0, offTotSec16, "the volume claims 0x%x bytes, the device has 0x%x", g.Size(), v.dev.Size())
	}
	if need := int64(g.Clusters) + 2; g.fatEntries() < need {
		r.note(Damage, "", 0, offFATSz16, "a FAT has room for %d entries, %d clusters need %d", g.fatEntries(), g.Clusters, need)
	}
	// The two above are told already; ask for what else keeps the volume from being written.
	rest := g
	rest.FATSize = max(g.FATSize, (int64(g.Clusters)+2)*4)
	if why := rest.targetProblem(rest.Size(), v.dev.SectorSize()); why != "" {
		r.note(Warning, "", 0, 0, "the volume can be read, but is no target: %s", why)
	}
}

// maxListed bounds how many places of one kind are listed one by one.
const maxListed = 16

// checkBackupBoot compares the boot sector with its backup, byte for byte as fsck.fat does: the dirty bit counts too.
func (v *Volume) checkBackupBoot(r *Report) error {
	off := v.geo.BackupBootOff
	if off < 0 || off+512 > v.dev.Size() {
		return nil
	}
	b := make([]byte, 512)
	if _, err := v.dev.ReadAt(b, off); err != nil {
		return fmt.Errorf("cannot read backup boot sector at offset 0x%x: %w", off, err)
	}
	var diff []string
	n := 0
	for i := range b {
		if b[i] == v.boot[i] {
			continue
		}
		if n++; n <= maxListed {
			diff = append(diff, fmt.Sprintf("0x%x: %02x/%02x", i, v.boot[i], b[i]))
		}
	}
	if n > 0 {
		if n > maxListed {
			diff = append(diff, "…")
		}
		r.note(Warning, "", 0, off, "the backup boot sector differs from the first in %d bytes (offset: first/backup): %s", n, strings.Join(diff, ", "))
	}
	return nil
}

// checkLabels compares the label of the root directory, which systems show, with the boot sector's.
func (v *Volume) checkLabels(r *Report, t *Tree) {
	root := ""
	if l := t.Root.labels; len(l) > 0 {
		root = labelText(l[0].Group[:11])
		if len(l) > 1 {
			r.note(Note, "/", 0, -1, "the root directory has %d volume labels", len(l))
		}
	}
	if boot := v.bootLabel(); boot != root {
		r.note(Note, "", 0, -1, "the boot sector's label is %q, the root directory's %q", boot, root)
	}
}

// scanChunk is the unit of a pass over a FAT. It is a multiple of three bytes, so that no FAT12 entry lies across two
// units, and of every sector size.
const scanChunk = 3 * 64 << 10

// readable is the number of bytes of FAT copy n that are on the device, and the first cluster whose entry is not in them
// (or not on the volume).
func (v *Volume) readable(n int) (size, end int64) {
	size = max(0, min(v.geo.FATSize, v.dev.Size()-v.geo.FATOff-int64(n)*v.geo.FATSize))
	return size, min(int64(v.geo.Clusters)+2, size*8/int64(v.geo.Type))
}

// eachEntry calls f for the clusters 2… of FAT copy n in order, as far as the copy and the device reach, with the bytes
// read a unit at a time. It returns the first cluster that it did not reach.
func (v *Volume) eachEntry(n int, f func(c Cluster, e uint32)) (Cluster, error) {
	t := v.geo.Type
	off := v.geo.FATOff + int64(n)*v.geo.FATSize
	size, end := v.readable(n)
	buf := make([]byte, scanChunk)
	per := int64(scanChunk) * 8 / int64(t)
	for first := int64(0); first < end; first += per {
		at := first * int64(t) / 8
		b := buf[:min(scanChunk, size-at)]
		if _, err := v.dev.ReadAt(b, off+at); err != nil {
			return 0, &ioError{fmt.Errorf("cannot read FAT at offset 0x%x: %w", firstUnreadable(v.dev, b, off+at, v.geo.block()), err)}
		}
		for c := max(first, 2); c < min(first+per, end); c++ {
			// A unit begins with an even cluster, so the cluster's parity is that of its place in the unit.
			o, _ := entryOffset(t, Cluster(c-first))
			f(Cluster(c), decodeEntry(t, Cluster(c), b[o:]))
		}
	}
	return Cluster(max(end, 2)), nil
}

// FreeBytes is the number of bytes in free clusters, counted in the FAT: FSInfo is only a hint.
func (v *Volume) FreeBytes() (int64, error) {
	var free int64
	end, err := v.eachEntry(v.activeFAT(), func(_ Cluster, e uint32) {
		if e == entryFree {
			free++
		}
	})
	switch {
	case err != nil:
		return 0, err
	case end <= v.geo.MaxCluster():
		return 0, fmt.Errorf("cannot count free clusters: %w: the FAT cannot be read from cluster %d on", ErrDamaged, end)
	}
	return free * int64(v.geo.ClusterSize), nil
}

// checkFAT reads every entry of the active FAT, compares the copies, and sets the figures against the tree (which is
// nil when it could not be read) and FSInfo.
func (v *Volume) checkFAT(r *Report, t *Tree) error {
	if err := v.checkReserved(r); err != nil {
		return err
	}
	// A lost cluster to which no lost cluster leads is the head of a chain. The sets reach as far as the FAT that is
	// there, so that a small device cannot make us allocate for a huge one.
	part := v.geo
	_, limit := v.readable(v.activeFAT())
	part.Clusters = uint32(max(0, limit-2))
	lost, linked := newBitmap(&part), newBitmap(&part)
	firstBad := Cluster(0)
	wrong := 0
	end, err := v.eachEntry(v.activeFAT(), func(c Cluster, e uint32) {
		switch {
		case e == entryFree:
			r.FreeClusters++
			return
		case e == entryBad:
			if r.BadClusters++; firstBad == 0 {
				firstBad = c
			}
			return
		}
		r.UsedClusters++
		link := v.geo.valid(Cluster(e))
		if !link && e < entryEOC {
			if wrong++; wrong <= maxListed {
				off, _ := entryOffset(v.geo.Type, c)
				sev := Warning // nobody comes here, but fsck.fat complains
				if t != nil && t.used.has(c) {
					sev = Damage
				}
				r.note(sev, "", c, v.geo.FATOff+int64(v.activeFAT())*v.geo.FATSize+off, "its FAT entry is 0x%x, outside 2…0x%x", e, v.geo.MaxCluster())
			}
		}
		if t == nil || t.used.has(c) {
			return
		}
		lost.set(c)
		r.LostClusters++
		if link && int64(e) < limit && Cluster(e) != c {
			linked.set(Cluster(e))
		}
	})
	if err != nil {
		return err
	}
	if wrong > maxListed {
		r.note(Warning, "", 0, -1, "%d more FAT entries are outside 2…0x%x", wrong-maxListed, v.geo.MaxCluster())
	}
	if r.BadClusters > 0 {
		r.note(Note, "", firstBad, -1, "the first of %d clusters that are marked bad", r.BadClusters)
	}
	if r.LostClusters > 0 {
		chains, first := int64(0), Cluster(0)
		for w, word := range lost {
			for i := 0; word>>i != 0; i++ {
				c := Cluster(w*64 + i)
				if word&(1<<i) == 0 {
					continue
				}
				if first == 0 {
					first = c
				}
				if !linked.has(c) {
					chains++
				}
			}
		}
		// Chains that are nothing but loops have no head; where there are only such, there is at least one.
		r.note(Warning, "", first, -1, "the first of %d lost clusters (%d bytes) in %d chains, part of no file or directory",
			r.LostClusters, r.ClusterBytes(r.LostClusters), max(chains, 1))
	}
	whole := end > v.geo.MaxCluster()
	if !whole && v.geo.Size() > v.dev.Size() {
		r.note(Damage, "", end, -1, "the FAT cannot be read from here on; the figures are for the clusters before")
	}
	if err := v.compareFATs(r); err != nil {
		return err
	}
	return v.checkFSInfo(r, whole)
}

// checkReserved looks at FAT[0], which repeats the media byte, and FAT[1], whose upper bits are flags on FAT16 and FAT32
// (fatgen103, "FAT[0]" and "FAT[1]").
func (v *Volume) checkReserved(r *Report) error {
	b := make([]byte, 8)
	off := v.geo.FATOff + int64(v.activeFAT())*v.geo.FATSize
	if off+int64(len(b)) > v.dev.Size() {
		return nil
	}
	if _, err := v.dev.ReadAt(b, off); err != nil {
		return &ioError{fmt.Errorf("cannot read FAT at offset 0x%x: %w", off, err)}
	}
	le := binary.LittleEndian
	var e0, e1, ones, clean, noErr uint32
	at1 := off
	switch v.geo.Type {
	case FAT12:
		e0, e1, ones = uint32(le.Uint16(b))&0xFFF, uint32(le.Uint16(b[1:]))>>4, 0xF00
		at1++
	case FAT16:
		e0, e1, ones = uint32(le.Uint16(b)), uint32(le.Uint16(b[2:])), 0xFF00
		clean, noErr = 0x8000, 0x4000
		at1 += 2
	default:
		e0, e1, ones = le.Uint32(b)&0x0FFFFFFF, le.Uint32(b[4:])&0x0FFFFFFF, 0x0FFFFF00
		clean, noErr = 0x08000000, 0x04000000
		at1 += 4
	}
	switch {
	case byte(e0) != v.geo.Media:
		// GRUB and mtools take such a volume for something else.
		r.note(Damage, "", 0, off, "FAT[0] is 0x%x, want the media byte 0x%02x in its low bits", e0, v.geo.Media)
	case e0&ones != ones:
		// fsck.fat takes the whole copy for corrupt and gives up.
		r.note(Warning, "", 0, off, "FAT[0] is 0x%x, want 0x%x", e0, ones|uint32(v.geo.Media))
	}
	if clean != 0 && e1&clean == 0 {
		r.note(Warning, "", 0, at1, "FAT[1] is 0x%x: its clean bit is not set, the volume was not unmounted", e1)
	}
	if noErr != 0 && e1&noErr == 0 {
		r.note(Warning, "", 0, at1, "FAT[1] is 0x%x: a system met disk errors and cleared its no-error bit", e1)
	}
	return nil
}

// compareFATs sets each further copy against the active one, sector by sector. Copies that differ harm no reader that
// firmware has (it reads the first), so it is a warning; where mirroring is off they may differ.
func (v *Volume) compareFATs(r *Report) error {
	g := &v.geo
	active := v.activeFAT()
	base := g.FATOff + int64(active)*g.FATSize
	entries := min(g.FATSize, ((int64(g.Clusters)+2)*int64(g.Type)+7)/8) // bytes that hold entries
	ss := int64(g.SectorSize)
	a, b := make([]byte, scanChunk), make([]byte, scanChunk)
	for n := 0; n < g.NumFATs; n++ {
		if n == active {
			continue
		}
		off := g.FATOff + int64(n)*g.FATSize
		if max(off, base)+g.FATSize > v.dev.Size() {
			// 255 copies may be claimed; those beyond the end are told once.
			r.note(Damage, "", 0, off, "FAT copy %d lies beyond the end of the device", n)
			break
		}
		sectors, slack, first := int64(0), int64(0), int64(-1)
		for at := int64(0); at < g.FATSize; at += scanChunk {
			k := min(scanChunk, g.FATSize-at)
			for _, p := range []struct {
				buf []byte
				off int64
			}{{a[:k], base + at}, {b[:k], off + at}} {
				if _, err := v.dev.ReadAt(p.buf, p.off); err != nil {
					return &ioError{fmt.Errorf("cannot read FAT at offset 0x%x: %w", firstUnreadable(v.dev, p.buf, p.off, v.geo.block()), err)}
				}
			}
			if bytes.Equal(a[:k], b[:k]) {
				continue
			}
			for s := int64(0); s < k; s += ss {
				i := s
				for i < s+ss && a[i] == b[i] {
					i++
				}
				switch {
				case i == s+ss:
				case at+i >= entries:
					slack++
				default:
					sectors++
					if first < 0 {
						first = at + i
					}
				}
			}
		}
		sev, why := Warning, ""
		if g.Type == FAT32 && g.ExtFlags&extFlagsMirrorNo != 0 {
			sev, why = Note, " (mirroring is off)"
		}
		if sectors > 0 {
			r.note(sev, "", Cluster(first*8/int64(g.Type)), off+first, "FAT copy %d differs from copy %d in %d sectors, here first%s", n, active, sectors, why)
		}
		if slack > 0 {
			r.note(Note, "", 0, off+entries, "FAT copy %d differs from copy %d in %d sectors after the last entry", n, active, slack)
		}
	}
	return nil
}

// checkFSInfo compares FSInfo with the FAT (fatgen103, "FAT32 FSInfo Sector Structure"). whole says that the count of
// free clusters covers the whole volume.
func (v *Volume) checkFSInfo(r *Report, whole bool) error {
	off := v.geo.FSInfoOff
	if off < 0 || off+int64(v.geo.SectorSize) > v.dev.Size() {
		return nil
	}
	b, err := v.fsinfo()
	if err != nil {
		return err
	}
	if b == nil {
		r.note(Warning, "", 0, off, "the FSInfo sector has wrong signatures")
		return nil
	}
	le := binary.LittleEndian
	switch free := le.Uint32(b[fsiFree:]); {
	case free == fsiUnknown:
		r.note(Note, "", 0, off+fsiFree, "FSInfo does not know the number of free clusters")
	case whole && int64(free) != r.FreeClusters:
		r.note(Warning, "", 0, off+fsiFree, "FSInfo says %d free clusters, the FAT has %d", free, r.FreeClusters)
	}
	if next := le.Uint32(b[fsiNext:]); next != fsiUnknown && !v.geo.valid(Cluster(next)) {
		r.note(Note, "", 0, off+fsiNext, "FSInfo's next free cluster is 0x%x, outside 2…0x%x", next, v.geo.MaxCluster())
	}
	return nil
}
