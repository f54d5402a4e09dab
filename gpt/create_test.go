package gpt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"

	"espmirror/blockdev"
	"espmirror/fixtures"
)

var sectors = []int{512, 4096}

func layoutOf(size int64) []Partition {
	return []Partition{
		{Number: 1, Type: TypeESP, GUID: DeriveGUID("t", "esp"), Name: "EFI system partition", Start: 1 << 20, Size: 4 << 20},
		{Number: 3, Type: TypeXBOOTLDR, GUID: DeriveGUID("t", "boot"), Name: "𝄞 boot", Start: 5 << 20, Size: 2 << 20, Attributes: 4},
	}
}

// judged writes a device to a file and has sgdisk look at it.
func judged(t *testing.T, d blockdev.Device, want ...string) {
	t.Helper()
	if d.SectorSize() != 512 {
		return // sgdisk takes an image for a disk with sectors of 512 bytes; the loop tests have the others
	}
	b := make([]byte, d.Size())
	if _, err := d.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("sgdisk", "-v", "-p", file).CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("sgdisk is not installed")
	}
	fixtures.Count("volumes judged by sgdisk", 1)
	if err != nil || !strings.Contains(string(out), "No problems found") {
		t.Errorf("sgdisk: %v\n%s", err, out)
	}
	for _, w := range want {
		if !strings.Contains(string(out), w) {
			t.Errorf("no %q in\n%s", w, out)
		}
	}
}

func TestCreate(t *testing.T) {
	for _, sector := range sectors {
		mem := blockdev.NewMem(make([]byte, 8<<20), sector)
		disk := DeriveGUID("t", "disk")
		if err := Create(mem, disk, layoutOf(8<<20)); err != nil {
			t.Fatal(err)
		}
		table, err := Read(mem)
		if err != nil || len(table.Problems) > 0 || table.DiskGUID != disk || len(table.Partitions) != 2 {
			t.Fatal(err, table)
		}
		if p := table.Find(3); p.Name != "𝄞 boot" || p.Attributes != 4 || p.GUID != DeriveGUID("t", "boot") || p.Size != 2<<20 {
			t.Errorf("%+v", p)
		}
		judged(t, mem, "EFI system partition", strings.ToUpper(disk.String()))
		if done, err := Complete(mem); done || err != nil {
			t.Error("a sound table was completed:", err)
		}
	}
}

func TestCreateRefuses(t *testing.T) {
	for _, tc := range []struct {
		p    Partition
		want string
	}{
		{Partition{Number: 1, Start: 512, Size: 1 << 20}, "is not between"},
		{Partition{Number: 1, Start: 1 << 20, Size: 7 << 20}, "is not between"},
		{Partition{Number: 1, Start: 1 << 20, Size: 0}, "is not between"},
		{Partition{Number: 1, Start: 1<<20 + 100, Size: 1 << 20}, "sectors of 512"},
		{Partition{Number: 1, Start: 1 << 20, Size: 1 << 20, Name: strings.Repeat("𝄞", 19)}, "38 UTF-16 units"},
		{Partition{Number: 1, Start: 1 << 20, Size: 1 << 20, Name: "a\x00b"}, "without NULs"},
		{Partition{Number: 1, Start: 1 << 20, Size: 1 << 20, Name: "a\xff"}, "is not UTF-8"},
		{Partition{Number: 200, Start: 1 << 20, Size: 1 << 20}, "invalid index"},
		{Partition{Number: 3, Start: 6 << 20, Size: 1 << 20}, "overlap"},
	} {
		mem := blockdev.NewMem(make([]byte, 8<<20), 512)
		tc.p.Type, tc.p.GUID = TypeESP, DeriveGUID("t", "x")
		parts := []Partition{tc.p}
		if tc.want == "overlap" {
			parts = append(parts, tc.p)
			parts[1].Number, parts[1].GUID = 4, DeriveGUID("t", "y")
		}
		err := Create(mem, DeriveGUID("t", "disk"), parts)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%+v: %v", tc.p, err)
		}
		if !blockdev.Zero(mem.Bytes()) {
			t.Error("something was written")
		}
	}
	if err := Create(blockdev.NewMem(make([]byte, 8192), 512), uuid.Nil, layoutOf(0)); !errors.Is(err, ErrNoRoom) {
		t.Error(err)
	}
}

// torn is how the sectors of a table are torn: T1 and T2 of the fault model.
func torn(int, int64, [][]byte) fixtures.Tears { return fixtures.TearPrefix | fixtures.TearBytes }

// completed has Complete mend a state, and sees that it does so from any state that a cut in Complete leaves, too, if it is
// the turn of one of the many. judge says whether a state is sound.
func completed(s *fixtures.State, sector, turn int, judge func(blockdev.Device) error) error {
	rec := fixtures.NewRecorder(s, sector)
	if done, err := Complete(rec); err != nil || !done {
		return fmt.Errorf("completed %v: %w", done, err)
	}
	if err := judge(rec); err != nil {
		return fmt.Errorf("completed: %w", err)
	}
	if done, err := Complete(rec); err != nil || done {
		return fmt.Errorf("completed twice: %w", err)
	}
	if turn%16 != 1 {
		return nil
	}
	_, err := rec.Recording().Explore(fixtures.CrashOptions{Limit: 16, Random: 16, Tears: torn}, func(s *fixtures.State) error {
		if _, err := Complete(s); err != nil {
			return err
		}
		return judge(s)
	})
	return err
}

// TestCreateCut: after a cut between any two writes, with any subset of those of an epoch, torn or not, there is no table,
// or a whole one; and Complete makes that sound.
func TestCreateCut(t *testing.T) {
	for _, sector := range sectors {
		base := fixtures.Image(make([]byte, 8<<20))
		rec := fixtures.NewRecorder(base, sector)
		if err := Create(rec, DeriveGUID("t", "disk"), layoutOf(8<<20)); err != nil {
			t.Fatal(err)
		}
		// All that is written, but for the CHS addresses, which nobody looks at.
		table := func(d blockdev.Device) []byte {
			b := make([]byte, 2*64<<10)
			if _, err := d.ReadAt(b[:len(b)/2], 0); err != nil {
				t.Fatal(err)
			}
			if _, err := d.ReadAt(b[len(b)/2:], d.Size()-int64(len(b)/2)); err != nil {
				t.Fatal(err)
			}
			clear(mbrEntry(b, 0)[1:4])
			clear(mbrEntry(b, 0)[5:8])
			return b
		}
		want := table(rec)
		judge := func(d blockdev.Device) error {
			if !bytes.Equal(table(d), want) {
				table, err := Read(d)
				return fmt.Errorf("it is not the table that was to be made: %+v: %w", table, err)
			}
			return nil
		}
		without, with, unsound := 0, 0, 0
		_, err := rec.Recording().Explore(fixtures.CrashOptions{Limit: 64, Random: 40, Tears: torn}, func(s *fixtures.State) error {
			table, err := Read(s)
			found, rerr := Recognise(s)
			if rerr != nil {
				return rerr
			}
			if err != nil {
				without++
				if !errors.Is(err, ErrNoTable) || len(found) > 0 {
					return fmt.Errorf("no table, but %v: %w", found, err)
				}
				if dirty, err := Dirty(s, TableExtents(s.Size(), sector)...); dirty || err != nil {
					return fmt.Errorf("it seems to hold something: %w", err)
				}
				return nil
			}
			with++
			if len(table.Partitions) != 2 {
				return fmt.Errorf("%+v", table)
			}
			if judge(s) == nil {
				if done, err := Complete(s); done || err != nil {
					return fmt.Errorf("a sound table was completed: %w", err)
				}
				return nil
			}
			unsound++
			return completed(s, sector, unsound, judge)
		})
		if err != nil || without == 0 || with < 3 || unsound < 20 {
			t.Error(err, without, with, unsound)
		}
	}
}

func madeDisk(t *testing.T, sector int) []byte {
	t.Helper()
	mem := blockdev.NewMem(make([]byte, 8<<20), sector)
	if err := Create(mem, DeriveGUID("t", "disk"), layoutOf(8 << 20)[:1]); err != nil {
		t.Fatal(err)
	}
	return mem.Bytes()
}

func TestInsert(t *testing.T) {
	for _, sector := range sectors {
		data := madeDisk(t, sector)
		// What nobody defined, and the boot code in the MBR, stay.
		copy(data[100:], "boot code")
		mem := blockdev.NewMem(data, sector)
		before := bytes.Clone(data)
		table, err := Read(mem)
		if err != nil {
			t.Fatal(err)
		}
		free := FreeExtents(mem.Size(), sector, table)
		if len(free) != 1 || free[0] != (Extent{5 << 20, 2 << 20}) {
			t.Fatal(free)
		}
		p := Partition{Type: TypeXBOOTLDR, GUID: DeriveGUID("t", "new"), Name: "new", Start: 5 << 20, Size: 2 << 20}
		numbers, err := Insert(mem, table, []Partition{p})
		if err != nil || len(numbers) != 1 || numbers[0] != 2 {
			t.Fatal(numbers, err)
		}
		if table, err = Read(mem); err != nil || len(table.Problems) > 0 || len(table.Partitions) != 2 || table.Find(2).GUID != p.GUID || table.Find(2).Name != "new" {
			t.Fatalf("%+v %v", table, err)
		}
		judged(t, mem, "new", "EFI system partition")
		// Only the entry and the checksums have changed.
		n := 0
		for i := range data {
			if data[i] != before[i] {
				n++
			}
		}
		if n == 0 || n > 2*(entrySize+8) {
			t.Errorf("%d bytes have changed", n)
		}
		// The bytes are those that go-diskfs makes of the same partition.
		ref := blockdev.NewMem(make([]byte, 8<<20), sector)
		p.Number = 2
		if err := Create(ref, DeriveGUID("t", "disk"), append(layoutOf(0)[:1], p)); err != nil {
			t.Fatal(err)
		}
		copy(ref.Bytes()[100:], "boot code")
		if !bytes.Equal(ref.Bytes(), data) {
			t.Error("the table is not that which go-diskfs makes")
		}
	}
}

func TestInsertRefuses(t *testing.T) {
	p := Partition{Type: TypeESP, GUID: DeriveGUID("t", "new"), Start: 5 << 20, Size: 2 << 20}
	for name, tc := range map[string]struct {
		damage func(b []byte)
		p      func(*Partition)
		want   error
	}{
		"backup damaged":  {damage: func(b []byte) { b[len(b)-512+60]++ }, want: ErrUnsound},
		"primary damaged": {damage: func(b []byte) { b[512+60]++ }, want: ErrUnsound},
		"no MBR":          {damage: func(b []byte) { clear(b[:512]) }, want: ErrUnsound},
		"overlap":         {p: func(p *Partition) { p.Start = 4 << 20 }, want: ErrNoRoom},
		"behind the end":  {p: func(p *Partition) { p.Size = 3 << 20 }, want: ErrNoRoom},
		"in the table":    {p: func(p *Partition) { p.Start, p.Size = 512, 1024 }, want: ErrNoRoom},
		"a GUID twice":    {p: func(p *Partition) { p.GUID = DeriveGUID("t", "esp") }, want: ErrNoRoom},
		"NUL":             {p: func(p *Partition) { p.Name = "a\x00b" }, want: nil},
		"not a sector":    {p: func(p *Partition) { p.Size = 1000 }, want: ErrNoRoom},
	} {
		t.Run(name, func(t *testing.T) {
			data := madeDisk(t, 512)
			if tc.damage != nil {
				tc.damage(data)
			}
			q := p
			if tc.p != nil {
				tc.p(&q)
			}
			before := bytes.Clone(data)
			mem := blockdev.NewMem(data, 512)
			table, err := Read(mem)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Insert(mem, table, []Partition{q}); err == nil || tc.want != nil && !errors.Is(err, tc.want) {
				t.Error(err)
			}
			if !bytes.Equal(before, data) {
				t.Error("something was written")
			}
		})
	}
	// A table without a free entry.
	mem := blockdev.NewMem(make([]byte, 160<<20), 512)
	var parts []Partition
	for i := range 128 {
		parts = append(parts, Partition{Number: i + 1, Type: TypeESP, GUID: DeriveGUID("t", fmt.Sprint(i)), Start: int64(i+1) << 20, Size: 1 << 20})
	}
	if err := Create(mem, uuid.Max, parts); err != nil {
		t.Fatal(err)
	}
	table, _ := Read(mem)
	p.Start = 150 << 20
	if _, err := Insert(mem, table, []Partition{p}); !errors.Is(err, ErrNoRoom) || !strings.Contains(err.Error(), "all 128 entries") {
		t.Error(err)
	}
}

// TestInsertCut: after any cut, torn sectors among them, Read gives the old table or the new one; Complete makes it sound,
// and is done then.
func TestInsertCut(t *testing.T) {
	for _, tc := range []struct{ sector, entry int }{{512, 128}, {4096, 128}, {512, 1024}} {
		data := madeDisk(t, tc.sector)
		if tc.entry != entrySize {
			data = longerEntries(t, data, tc.entry)
		}
		rec := fixtures.NewRecorder(fixtures.Image(data), tc.sector)
		table, err := Read(rec)
		if err != nil {
			t.Fatal(err)
		}
		parts := []Partition{
			{Type: TypeXBOOTLDR, GUID: DeriveGUID("t", "b"), Start: 5 << 20, Size: 1 << 20, Name: "a name"},
			{Type: TypeESP, GUID: DeriveGUID("t", "a"), Start: 6 << 20, Size: 1 << 20},
		}
		if _, err := Insert(rec, table, parts); err != nil {
			t.Fatal(err)
		}
		seen := map[int]int{}
		unsound := 0
		_, err = rec.Recording().Explore(fixtures.CrashOptions{Limit: 64, Random: 100, Tears: torn}, func(s *fixtures.State) error {
			table, err := Read(s)
			if err != nil {
				return err
			}
			n := len(table.Partitions)
			seen[n]++
			if len(table.Problems) == 0 {
				if done, err := Complete(s); done || err != nil {
					return fmt.Errorf("a sound table was completed: %w", err)
				}
				return nil
			}
			unsound++
			return completed(s, tc.sector, unsound, func(d blockdev.Device) error {
				table, err := Read(d)
				if err != nil || len(table.Problems) > 0 || len(table.Partitions) != n {
					return fmt.Errorf("%d partitions were there: %+v: %w", n, table, err)
				}
				return nil
			})
		})
		if err != nil || seen[1] < 10 || seen[2] < 10 || seen[3] < 10 || unsound < 40 {
			t.Error(tc, err, seen, unsound)
		}
	}
}

// failsAt lets write or flush number k of a device fail, from 0, the write when some bytes of it are there. told says what it
// was, and after counts the writes and flushes behind it.
func failsAt(d blockdev.Device, k, short int) (f *blockdev.Faulty, told *string, after *int) {
	told, after = new(string), new(int)
	n := 0
	return blockdev.NewFaulty(d, func(op blockdev.Op) error {
		if op.Kind != blockdev.OpWrite && op.Kind != blockdev.OpFlush {
			return nil
		}
		if *told != "" {
			*after++
		}
		if n++; n-1 == k {
			*told = fmt.Sprintf("%s at 0x%x", op.Kind, op.Off)
			if op.Kind == blockdev.OpWrite {
				return &blockdev.ShortWriteError{N: short, Err: unix.EIO}
			}
			return unix.EIO
		}
		return nil
	}), told, after
}

// TestTableFaults lets each write and each flush of Create, Insert and Complete fail: that is told, nothing is written behind
// it, and what is left is what a cut leaves, so that Complete mends it.
func TestTableFaults(t *testing.T) {
	insert := []Partition{{Type: TypeXBOOTLDR, GUID: DeriveGUID("t", "b"), Start: 5 << 20, Size: 1 << 20}}
	create := func(d blockdev.Device) error { return Create(d, DeriveGUID("t", "disk"), layoutOf(8 << 20)[:1]) }
	add := func(d blockdev.Device) error {
		table, err := Read(d)
		if err == nil {
			_, err = Insert(d, table, insert)
		}
		return err
	}
	complete := func(d blockdev.Device) error {
		_, err := Complete(d)
		return err
	}
	// each runs do once for each operation, which it lets fail, and gives what is left.
	each := func(name string, base []byte, sector, short int, do func(blockdev.Device) error, left func(k int, b []byte)) {
		for k := 0; ; k++ {
			mem := blockdev.NewMem(bytes.Clone(base), sector)
			d, told, after := failsAt(mem, k, short)
			err := do(d)
			if *told == "" {
				if err != nil || k == 0 {
					t.Fatalf("%s: %d operations, %v", name, k, err)
				}
				return
			}
			fixtures.Count("faults", 1)
			if !errors.Is(err, unix.EIO) || *after > 0 {
				t.Errorf("%s: %s failed: %v, and %d operations behind it", name, *told, err, *after)
			}
			left(k, mem.Bytes())
		}
	}
	for _, c := range []struct{ sector, short int }{{512, 0}, {512, 150}, {4096, 0}, {4096, 150}} { // 150: in the middle of entry 2
		completions := 0
		mended := func(name string, b []byte, some bool) {
			mem := blockdev.NewMem(bytes.Clone(b), c.sector)
			if _, err := Complete(mem); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			table, err := Read(mem)
			if errors.Is(err, ErrNoTable) && !some {
				return
			}
			if err != nil || len(table.Problems) > 0 {
				t.Errorf("%s: %+v %v", name, table, err)
			}
		}
		step := func(name string, some bool) func(int, []byte) {
			return func(k int, b []byte) {
				name := fmt.Sprintf("%s, %v, operation %d", name, c, k)
				mended(name, b, some)
				if done, err := Complete(blockdev.NewMem(bytes.Clone(b), c.sector)); !done || err != nil {
					return // there is nothing to complete
				}
				completions++
				each(name+", Complete", b, c.sector, c.short, complete, func(_ int, b []byte) { mended(name+", Complete", b, some) })
			}
		}
		each("Create", make([]byte, 8<<20), c.sector, c.short, create, step("Create", false))
		each("Insert", madeDisk(t, c.sector), c.sector, c.short, add, step("Insert", true))
		if completions < 6 {
			t.Errorf("%v: %d states were completed", c, completions)
		}
	}
}

// longerEntries makes the entries of both copies of a table longer, and as many fewer.
func longerEntries(t *testing.T, data []byte, size int) []byte {
	t.Helper()
	le := binary.LittleEndian
	count := tableSize / size
	for _, at := range []int{512, len(data) - 512} {
		h := &header{raw: data[at : at+512]}
		array := data[int(le.Uint64(h.raw[offArray:]))*512:][:tableSize]
		first := bytes.Clone(array[:entrySize])
		clear(array)
		copy(array, first)
		le.PutUint32(h.raw[offCount:], uint32(count))
		le.PutUint32(h.raw[offEntrySize:], uint32(size))
		copy(data[at:], h.over(array))
	}
	if table, err := Read(blockdev.NewMem(data, 512)); err != nil || len(table.Problems) > 0 || len(table.Partitions) != 1 {
		t.Fatal(err, table)
	}
	return data
}

// TestInsertPrefersBlank: an entry that was taken once is the last choice, as a cut could not be told from damage there.
func TestInsertPrefersBlank(t *testing.T) {
	data := madeDisk(t, 512)
	le := binary.LittleEndian
	for _, at := range []int{512, len(data) - 512} {
		h := &header{raw: data[at : at+512]}
		array := data[int(le.Uint64(h.raw[offArray:]))*512:][:tableSize]
		copy(array[entrySize+offEntryName:], "left over")
		copy(data[at:], h.over(array))
	}
	mem := blockdev.NewMem(data, 512)
	table, err := Read(mem)
	if err != nil || len(table.Problems) > 0 {
		t.Fatal(err, table)
	}
	numbers, err := Insert(mem, table, []Partition{{Type: TypeESP, GUID: DeriveGUID("t", "a"), Start: 6 << 20, Size: 1 << 20}})
	if err != nil || numbers[0] != 3 {
		t.Error(numbers, err)
	}
}

// TestCompleteLeavesAlone: damage that no cut explains is nobody's to mend here.
func TestCompleteLeavesAlone(t *testing.T) {
	for name, damage := range map[string]func(b []byte){
		"backup zeroed, MBR there": func(b []byte) { clear(b[len(b)-512:]) },
		"backup garbage":           func(b []byte) { copy(b[len(b)-512:], "garbage"); clear(b[:512]) },
		"no arrays":                func(b []byte) { clear(b[len(b)-512:]); clear(b[len(b)-33*512:]); clear(b[:512]) },
		"primary header flipped":   func(b []byte) { b[512+57]++ },
		"primary entry flipped":    func(b []byte) { b[1024+20]++ },
		"backup entry flipped":     func(b []byte) { b[len(b)-33*512+20]++ },
		"backup entry gone":        func(b []byte) { clear(b[len(b)-33*512:][:128]) },
		"two entries more":         func(b []byte) { copy(b[len(b)-33*512+256:], b[1024:1152]); copy(b[len(b)-33*512+512:], b[1024:1152]) },
		"another type":             func(b []byte) { copy(b[len(b)-33*512+256:], b[1024:1152]); b[len(b)-33*512+256]++ },
		"everything gone":          func(b []byte) { clear(b) },
		"headers cut off":          func(b []byte) { binary.LittleEndian.PutUint32(b[512+offCount:], 0xffffffff) },
	} {
		t.Run(name, func(t *testing.T) {
			data := madeDisk(t, 512)
			damage(data)
			before := bytes.Clone(data)
			if done, err := Complete(blockdev.NewMem(data, 512)); done || err != nil || !bytes.Equal(data, before) {
				t.Error(done, err, bytes.Equal(data, before))
			}
		})
	}
}

func FuzzComplete(f *testing.F) {
	f.Add([]byte{}, uint64(1))
	f.Fuzz(func(t *testing.T, patch []byte, at uint64) {
		mem := blockdev.NewMem(make([]byte, 128<<10), 512)
		if err := Create(mem, uuid.Max, []Partition{{Number: 1, Type: TypeESP, GUID: uuid.Max, Start: 34 * 512, Size: 512}}); err != nil {
			t.Fatal(err)
		}
		b := mem.Bytes()
		r := rand.New(rand.NewPCG(at, 1))
		for _, v := range patch {
			places := []int{446 + r.IntN(66), 512 + r.IntN(92), 1024 + r.IntN(300), len(b) - 512 + r.IntN(92), len(b) - 33*512 + r.IntN(300)}
			b[places[r.IntN(len(places))]] = v
		}
		if done, err := Complete(mem); err != nil {
			t.Fatal(err)
		} else if done {
			if table, err := Read(mem); err != nil || table.FromBackup {
				t.Fatalf("%+v %v", table, err)
			}
		}
	})
}

func TestFreeExtents(t *testing.T) {
	table := &Table{Partitions: []Partition{{Start: 1 << 20, Size: 1<<20 + 512}, {Start: 6 << 20, Size: 1 << 20}}}
	got := FreeExtents(10<<20, 512, table)
	if len(got) != 2 || got[0] != (Extent{3 << 20, 3 << 20}) || got[1] != (Extent{7 << 20, 2 << 20}) {
		t.Error(got)
	}
	if got := FreeExtents(1<<20, 512, nil); len(got) != 0 {
		t.Error(got)
	}
	if got := FreeExtents(64<<20+512, 4096, nil); len(got) != 1 || got[0] != (Extent{1 << 20, 62 << 20}) {
		t.Error(got)
	}
}

func TestDeriveGUID(t *testing.T) {
	a := DeriveGUID("a", "bc")
	if a == DeriveGUID("ab", "c") || a != DeriveGUID("a", "bc") || a.Version() != 8 || a.Variant() != uuid.RFC4122 {
		t.Error(a)
	}
	// Part of what makes images reproducible: never to be changed.
	if want := "678af48d-c117-8de4-8fef-da8cc8e4dea4"; a.String() != want {
		t.Errorf("%s, want %s", a, want)
	}
}
