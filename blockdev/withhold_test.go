package blockdev

import (
	"bytes"
	"errors"
	"testing"
	"unsafe"
)

// TestWithhold: readers see the first sector, the device gets it last, between two flushes.
func TestWithhold(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		mem := NewMem(make([]byte, 64<<10), sector)
		var ops []Op
		w, err := Withhold(NewFaulty(mem, func(op Op) error { ops = append(ops, Op{Kind: op.Kind, Off: op.Off}); return nil }))
		if err != nil {
			t.Fatal(err)
		}
		data := bytes.Repeat([]byte{7}, 3*sector)
		if n, err := w.WriteAt(data, 10); n != len(data) || err != nil {
			t.Fatal(n, err)
		}
		got := make([]byte, len(data))
		if n, err := w.ReadAt(got, 10); n != len(got) || err != nil || !bytes.Equal(got, data) {
			t.Fatal(n, err)
		}
		if !Zero(mem.Bytes()[:sector]) || mem.Bytes()[sector] != 7 {
			t.Fatal("the first sector went to the device, or the second did not")
		}
		ops = nil
		for range 2 {
			if err := w.Release(); err != nil {
				t.Fatal(err)
			}
		}
		if len(ops) != 3 || ops[0].Kind != OpFlush || ops[1].Kind != OpWrite || ops[1].Off != 0 || ops[2].Kind != OpFlush {
			t.Error(ops)
		}
		if mem.Bytes()[9] != 0 || mem.Bytes()[10] != 7 {
			t.Error("the first sector is not on the device")
		}
		if _, err := w.WriteAt([]byte{9}, 0); err != nil || mem.Bytes()[0] != 9 {
			t.Error("a write after the release did not go through")
		}
		if _, err := w.ReadAt(got[:1], 0); err != nil || got[0] != 9 {
			t.Error("a read does not see it")
		}
		_, err = w.WriteAt(data, 64<<10-1)
		wantErr(t, err, ErrOutOfRange)
		_, err = w.ReadAt(data, -1)
		wantErr(t, err, ErrOutOfRange)
	}
	_, err := Withhold(NewMem(make([]byte, 512), 4096))
	wantErr(t, err, ErrOutOfRange)
}

// TestWithholdFails: an error at any step of the release is an error, and a failed flush keeps the sector back.
func TestWithholdFails(t *testing.T) {
	boom := errors.New("boom")
	for n := range 3 {
		mem := NewMem(make([]byte, 4096), 512)
		count := 0
		w, err := Withhold(NewFaulty(mem, func(Op) error {
			if count++; count == n+1 {
				return boom
			}
			return nil
		}))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.WriteAt([]byte{1}, 0); err != nil {
			t.Fatal(err)
		}
		wantErr(t, w.Release(), boom)
		if on := mem.Bytes()[0] != 0; on != (n == 2) {
			t.Errorf("step %d: the sector is on the device: %v", n, on)
		}
	}
}

func TestSparse(t *testing.T) {
	mem := NewMem(make([]byte, 64<<10), 512)
	var writes []Op
	d := Sparse(NewFaulty(mem, func(op Op) error {
		if op.Kind == OpWrite {
			writes = append(writes, Op{Off: op.Off, Data: bytes.Clone(op.Data)})
		}
		return nil
	}))
	put := func(b []byte, off int64, want ...int64) {
		t.Helper()
		writes = nil
		if n, err := d.WriteAt(b, off); n != len(b) || err != nil {
			t.Fatal(n, err)
		}
		if !bytes.Equal(mem.Bytes()[off:off+int64(len(b))], b) {
			t.Error("the device does not hold what was written")
		}
		var got []int64
		for _, w := range writes {
			got = append(got, w.Off, int64(len(w.Data)))
		}
		if len(got) != len(want) {
			t.Fatalf("writes %v, want %v", got, want)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("writes %v, want %v", got, want)
			}
		}
	}
	put(make([]byte, 20<<10), 100)
	b := make([]byte, 20<<10)
	b[9000] = 1
	put(b, 0, 8192, 4096)
	put(b, 0, 8192, 4096)
	put(make([]byte, 20<<10), 0, 8192, 4096)
	b = bytes.Repeat([]byte{1}, 5000)
	put(b, 4000, 4000, 5000)
	put(make([]byte, 100), 4050, 4050, 100)
	_, err := d.WriteAt(b, 63<<10)
	wantErr(t, err, ErrOutOfRange)
}

func TestBlank(t *testing.T) {
	d := Blank(8192, 4096)
	b := []byte{1, 2, 3}
	if n, err := d.ReadAt(b, 8189); n != 3 || err != nil || !Zero(b) {
		t.Error(n, err, b)
	}
	_, err := d.ReadAt(b, 8190)
	wantErr(t, err, ErrOutOfRange)
	_, err = d.WriteAt(b, 0)
	wantErr(t, err, ErrReadOnly)
	if d.Size() != 8192 || d.SectorSize() != 4096 || d.PhysicalSectorSize() != 4096 || d.Flush() != nil || d.Invalidate() != nil {
		t.Error("wrong device")
	}
	o := NewOverlay(d)
	if _, err := o.WriteAt([]byte{5}, 0); err != nil {
		t.Error(err)
	}
}

// TestPartitionStructures: Linux, include/uapi/linux/blkpg.h.
func TestPartitionStructures(t *testing.T) {
	var p blkpgPartition
	var a blkpgArg
	if unsafe.Sizeof(p) != 152 || unsafe.Offsetof(p.number) != 16 || unsafe.Sizeof(a) != 24 || unsafe.Offsetof(a.data) != 16 {
		t.Error(unsafe.Sizeof(p), unsafe.Offsetof(p.number), unsafe.Sizeof(a), unsafe.Offsetof(a.data))
	}
}

func TestLoopPartitions(t *testing.T) {
	path := image(t, 8<<20)
	node := loop(t, path)
	id, err := Identify(node)
	if err != nil {
		t.Fatal(err)
	}
	var s System
	disk, err := s.BlockByNum(id.Dev)
	if err != nil {
		t.Fatal(err)
	}
	if err := Discard(node, 0, 1<<20); err != nil && !errors.Is(err, errors.ErrUnsupported) {
		t.Error(err)
	}
	part, err := s.AddPartition(disk, 2, 1<<20, 2<<20)
	if err != nil {
		// The kernel must not know a partition that has no node.
		blocks, berr := s.Blocks()
		for _, b := range blocks {
			if b.Disk == disk.Name {
				t.Errorf("the kernel still has %s (%v)", b.Name, berr)
			}
		}
		t.Skip("no partition nodes here:", err)
	}
	d := mustOpen(t, part, ReadWrite)
	if d.Size() != 2<<20 {
		t.Error(d.Size())
	}
	_ = d.Close()
	if again, err := s.AddPartition(disk, 2, 1<<20, 2<<20); err != nil || again != part {
		t.Error(again, err)
	}
	_, err = s.AddPartition(disk, 2, 1<<20, 1<<20)
	wantErr(t, err, ErrBusy)
	if err := s.ForgetPartitions(disk); err != nil {
		t.Fatal(err)
	}
}
