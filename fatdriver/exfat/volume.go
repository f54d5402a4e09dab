// Package exfat reads exFAT volumes without mounting them, as a source of files: byte for byte, or with a clear error.
// Nothing is ever written; no firmware has to read exFAT, so it is never a target.
//
// Open validates the boot region, Scan walks the whole tree and says everything that is wrong with it, Tree.Open reads a
// file and Tree.FS gives the tree as an io/fs.FS. The section numbers in this package are those of Microsoft's "exFAT file
// system specification", revision 1.00.
//
//	sector 0          main boot sector: where everything is                     3.1
//	       1…8, 9, 10 boot code, parameters for the medium, reserved            3.2, 3.3
//	       11         checksum over sectors 0…10                                3.4
//	       12…23      the same again: the backup boot region
//	FatOffset         one FAT, or two on a TexFAT volume, of 32-bit entries     4.1
//	ClusterHeapOffset clusters 2…ClusterCount+1                                 5.1
//
// The root directory has the entries of the allocation bitmap, the up-case table and the label besides files. A file is a
// set of 32-byte entries under one checksum:
//
//	85 attributes, times          7.4
//	C0 size, first cluster, flag "NoFatChain: contiguous, the FAT does not say"   7.6
//	C1 15 UTF-16 units of the name, up to 17 times                                7.7
//	E0, E1 what a vendor adds, which readers may skip                             7.8, 7.9
package exfat

import (
	"errors"
	"fmt"
	"io"

	"espmirror/blockdev"
)

var (
	// ErrNotExFAT is returned by Open when the device does not hold an exFAT volume, or one whose boot regions both
	// cannot be used.
	ErrNotExFAT = errors.New("not an exFAT volume")

	// ErrDamaged is returned when the tree of a volume is damaged; its Findings say where.
	ErrDamaged = errors.New("the exFAT filesystem is damaged")
)

// Volume is an open exFAT volume. It is safe for use by several goroutines.
type Volume struct {
	dev  blockdev.Device
	geo  Geometry
	note string // what is wrong with the main boot region, when the backup was used
}

// Open reads the boot regions of the volume that begins at the start of dev: the main one or, if that cannot be used, its
// backup. It returns ErrNotExFAT, with the place and the value, when there is no volume.
func Open(dev blockdev.Device) (*Volume, error) {
	geo, note, err := readGeometry(dev)
	if err != nil {
		return nil, err
	}
	return &Volume{dev, geo, note}, nil
}

// Geometry returns what the boot region says.
func (v *Volume) Geometry() Geometry { return v.geo }

// Device returns the device under the volume.
func (v *Volume) Device() blockdev.Device { return v.dev }

// UUID is the volume serial number as udev and fstab write it, ABCD-1234.
func (v *Volume) UUID() string {
	return fmt.Sprintf("%04X-%04X", v.geo.Serial>>16, v.geo.Serial&0xFFFF)
}

// read reads len(p) bytes at off, which is inside the volume: on a device that is larger, nothing behind it counts.
func (v *Volume) read(p []byte, off int64) error {
	if err := blockdev.CheckRange(off, len(p), v.geo.size()); err != nil {
		return fmt.Errorf("internal error: %w", err)
	}
	if _, err := v.dev.ReadAt(p, off); err != nil {
		return fmt.Errorf("cannot read %d bytes at offset 0x%x: %w", len(p), off, err)
	}
	return nil
}

// run is a range of adjacent clusters.
type run struct{ first, n uint32 }

// runReader reads the bytes of some clusters. It implements io.ReaderAt.
type runReader struct {
	v     *Volume
	runs  []run
	base  []int64 // byte position at which each run begins
	size  int64   // bytes; at most what the runs hold
	valid int64   // bytes from here to size were never written, and read as zero (7.6.5)
}

func (v *Volume) newRunReader(runs []run, size, valid int64) *runReader {
	r := &runReader{v: v, runs: runs, base: make([]int64, len(runs)), size: size, valid: valid}
	var at int64
	for i, run := range runs {
		r.base[i] = at
		at += int64(run.n) * v.geo.clusterSize()
	}
	return r
}

// ReadAt implements io.ReaderAt. Each run of adjacent clusters is one read of the device.
func (r *runReader) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= r.size {
		return 0, io.EOF
	}
	var end error
	if int64(len(p)) > r.size-off {
		p, end = p[:r.size-off], io.EOF
	}
	n := 0
	for len(p) > 0 {
		if off >= r.valid {
			clear(p)
			return n + len(p), end
		}
		i := r.runAt(off)
		within := off - r.base[i]
		k := min(int64(len(p)), int64(r.runs[i].n)*r.v.geo.clusterSize()-within, r.valid-off)
		if err := r.v.read(p[:k], r.v.geo.offset(r.runs[i].first)+within); err != nil {
			return n, err
		}
		p, off, n = p[k:], off+k, n+int(k)
	}
	return n, end
}

// runAt is the index of the run that holds the byte at off.
func (r *runReader) runAt(off int64) int {
	lo, hi := 0, len(r.base)
	for hi-lo > 1 {
		if mid := int(uint(lo+hi) >> 1); r.base[mid] <= off {
			lo = mid
		} else {
			hi = mid
		}
	}
	return lo
}
