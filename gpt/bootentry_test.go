package gpt

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// order makes BootOrder.
func order(numbers ...uint16) []byte {
	var b []byte
	for _, n := range numbers {
		b = binary.LittleEndian.AppendUint16(b, n)
	}
	return b
}

// bootMachine was started by Boot0001 from guid(1); Boot0003 is the network, Boot0004 is malformed, and BootOrder has also one
// that is gone, Boot0000.
func bootMachine(t *testing.T) *fakeMachine {
	m := newMachine(t)
	m.variable("BootOrder", vendorGlobal, 7, order(1, 3, 0))
	m.variable("BootCurrent", vendorGlobal, 6, order(1))
	m.variable("Boot0001", vendorGlobal, 7, option("Linux", hd(1, diskGUID(1), 2, 2), pathFile, pathEnd))
	m.variable("Boot0003", vendorGlobal, 7, option("PXE", pathPCI, node(3, 11, make([]byte, 33)...), pathEnd))
	m.variable("Boot0004", vendorGlobal, 7, []byte("\x01\x00\x00\x00\xff\x00x"))
	m.variable("Boot000b", vendorGlobal, 7, option("Second", pathPCI, hd(1, diskGUID(2), 2, 2), node(4, 4, utf16le(`\EFI\BOOT\BOOTX64.EFI`)...), pathEnd))
	m.variable("Boot00FG", vendorGlobal, 7, nil)
	m.variable("Boot0007", vendorLoader, 7, nil) // somebody else's
	m.variable("BootOptionSupport", vendorGlobal, 6, make([]byte, 4))
	return m
}

func TestReadBootEntries(t *testing.T) {
	m := bootMachine(t)
	b, err := ReadBootEntries(m.sys)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range b.Entries {
		got = append(got, fmt.Sprintf("%s %s %q %v %v", e.Name(), e.Description, e.File(), e.Usable(), e.Leads(guid(1), 1)))
	}
	want := []string{`Boot0001 Linux "/EFI/systemd/systemd-bootx64.efi" true true`, `Boot0003 PXE "" true false`, `Boot000B Second "/EFI/BOOT/BOOTX64.EFI" false false`}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
	if len(b.Problems) != 1 || !strings.Contains(b.Problems[0], "Boot0004") || b.Current() == nil || b.Current().Number != 1 {
		t.Error(b.Problems, b.Current())
	}
	if n, _ := b.free(); n != 2 {
		t.Errorf("Boot%04X is taken for free", n)
	}
	if l := b.Leading(guid(2), 0); len(l) != 1 || l[0].Number != 0xb || len(b.Leading(guid(2), 2)) != 0 || len(b.Leading(guid(9), 0)) != 0 {
		t.Error(l)
	}
	_, err = ReadBootEntries(nothing(t))
	wantErr(t, err, ErrNoEFI)
	sys := nothing(t)
	if err := os.MkdirAll(sys.Path(efivars), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err = ReadBootEntries(sys)
	wantErr(t, err, ErrNoVariables)
	wantErr(t, CheckVariablesWritable(sys), ErrNoVariables)
	wantErr(t, CheckVariablesWritable(nothing(t)), ErrNoEFI)
}

func TestLoadOptionFile(t *testing.T) {
	file := func(s string) []byte { return node(4, 4, utf16le(s)...) }
	h := hd(1, diskGUID(1), 2, 2)
	for _, c := range []struct {
		path []byte
		want string
	}{
		{slices.Concat(pathPCI, h, file(`\EFI\A.EFI`), pathEnd), "/EFI/A.EFI"},
		{slices.Concat(h, file(`\EFI\`), file(`A.EFI`), pathEnd), "/EFI/A.EFI"},
		{slices.Concat(h, file(`EFI`), file(`\A.EFI`), pathEnd), "/EFI/A.EFI"},
		{slices.Concat(h, pathEnd), ""},
		{slices.Concat(file(`\A.EFI`), h, pathEnd), ""},
		{slices.Concat(pathPCI, file(`\A.EFI`), pathEnd), ""},
		{slices.Concat(h, pathEnd, file(`\A.EFI`), pathEnd), ""},
		{slices.Concat(h, node(4, 4, 0x34, 0xd8, 0, 0), pathEnd), ""},
		{slices.Concat(h, []byte{4, 4, 2, 0}), ""},
		{slices.Concat(h, []byte{4, 4, 200, 0, 1}), ""},
	} {
		o, err := ParseLoadOption(option("x", c.path))
		if err != nil || o.File() != c.want {
			t.Errorf("%x: %q %v", c.path, o.File(), err)
		}
	}
}

// efibootmgrOption is Boot0000 as efibootmgr 17 writes it, attributes first, for --label "Linux on x" --loader
// \EFI\systemd\systemd-bootx64.efi on partition 3 of a disk with sectors of 512 bytes.
const efibootmgrOption = "" +
	"07000000" + "010000007400" + "4c0069006e007500780020006f006e00200078000000" +
	"04012a0003000000000800000000000000800100000000007e5c0c6f3412bc4a8def0123456789ab0202" +
	"040446005c004500460049005c00730079007300740065006d0064005c00730079007300740065006d0064002d0062006f006f0074007800360034002e00650066006900" + "0000" +
	"7fff0400"

// thePartition is that of efibootmgrOption.
var thePartition = HardDrive{3, 0x800, 0x18000, "6f0c5c7e-1234-4abc-8def-0123456789ab"}

// TestRegister makes an entry, twice, and compares the bytes with those of another program.
func TestRegister(t *testing.T) {
	m := bootMachine(t)
	n := &NewEntry{Description: "Linux on x", File: "/EFI/systemd/systemd-bootx64.efi", Partition: thePartition}
	if err := CheckVariablesWritable(m.sys); err != nil {
		t.Fatal(err)
	}
	b, err := ReadBootEntries(m.sys)
	if err != nil {
		t.Fatal(err)
	}
	if r, err := b.Plan(n); err != nil || r.Name() != "Boot0002" || r.What != EntryCreated || r.File() != n.File {
		t.Errorf("%+v %v", r, err)
	}
	r, err := Register(m.sys, n)
	if err != nil || r.Name() != "Boot0002" || r.What != EntryCreated || !r.Usable() || r.File() != n.File {
		t.Fatalf("%+v %v", r, err)
	}
	raw := func(name string) string {
		t.Helper()
		b, err := os.ReadFile(m.sys.Path(efivars + "/" + name + "-" + vendorGlobal))
		if err != nil {
			t.Fatal(err)
		}
		return hex.EncodeToString(b)
	}
	if got := raw("Boot0002"); got != efibootmgrOption {
		t.Error(got)
	}
	if got := raw("BootOrder"); got != "070000000100030000000200" {
		t.Error(got)
	}
	// Another time there is nothing to do, whatever the case of the file's name and the description.
	again := *n
	again.File, again.Description = strings.ToUpper(n.File), "other"
	before := m.hash()
	r, err = Register(m.sys, &again)
	if err != nil || r.Name() != "Boot0002" || r.What != EntryThere || m.hash() != before {
		t.Errorf("%+v %v", r, err)
	}
	// One that is in no order, as a power cut leaves it.
	m.variable("BootOrder", vendorGlobal, 7, order(1, 3, 0))
	r, err = Register(m.sys, n)
	if err != nil || r.Name() != "Boot0002" || r.What != EntryOrdered || raw("BootOrder") != "070000000100030000000200" || m.hash() != before {
		t.Errorf("%+v %v", r, err)
	}
	// Another file or another partition is another entry, and the description is not given twice.
	again = *n
	again.File = "/EFI/BOOT/BOOTX64.EFI"
	r, err = Register(m.sys, &again)
	if err != nil || r.Name() != "Boot0005" || r.Description != "Linux on x 2" {
		t.Errorf("%+v %v", r, err)
	}
	again.Partition.Number = 4
	if r, err = Register(m.sys, &again); err != nil || r.Name() != "Boot0006" || r.Description != "Linux on x 3" {
		t.Errorf("%+v %v", r, err)
	}
	if got := raw("BootOrder"); got != "07000000010003000000020005000600" {
		t.Error(got)
	}
}

// TestRegisterOrder: what there is when BootOrder is not as usual.
func TestRegisterOrder(t *testing.T) {
	n := &NewEntry{Description: "x", File: "/A.EFI", Partition: thePartition}
	m := bootMachine(t)
	m.unset("BootOrder", vendorGlobal)
	r, err := Register(m.sys, n)
	v, verr := ReadVariable(m.sys, "BootOrder", vendorGlobal)
	if err != nil || verr != nil || r.Number != 0 || !bytes.Equal(v.Data, order(1, 0)) || v.Attributes != 7 {
		t.Errorf("%+v %+v %v %v", r, v, err, verr)
	}
	// An entry of nobody's choice must not come first.
	for _, without := range []string{"BootCurrent", "Boot0001"} {
		m = bootMachine(t)
		m.unset("BootOrder", vendorGlobal)
		m.unset(without, vendorGlobal)
		before := m.hash()
		_, err = Register(m.sys, n)
		wantErr(t, err, ErrNoOrder)
		if m.hash() != before {
			t.Error("something was written")
		}
	}
	// One that cannot be read is not written.
	m = bootMachine(t)
	m.variable("BootOrder", vendorGlobal, 7, []byte{1, 0, 3})
	before := m.hash()
	_, err = Register(m.sys, n)
	wantErr(t, err, ErrMalformed)
	b, err := ReadBootEntries(m.sys)
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Plan(n) // nor is an entry made and taken back
	wantErr(t, err, ErrMalformed)
	if m.hash() != before {
		t.Error("something was written")
	}
	// Its attributes stay, and a number that BootNext names is not free.
	m = bootMachine(t)
	m.variable("BootOrder", vendorGlobal, 0x17, order(1))
	m.variable("BootNext", vendorGlobal, 7, order(0))
	if r, err = Register(m.sys, n); err != nil || r.Number != 2 {
		t.Errorf("%+v %v", r, err)
	}
	if v, err = ReadVariable(m.sys, "BootOrder", vendorGlobal); err != nil || v.Attributes != 0x17 || !bytes.Equal(v.Data, order(1, 2)) {
		t.Errorf("%+v %v", v, err)
	}
	m.variable("Boot0009", vendorGlobal, 7, option("", pathPCI, pathEnd))
	for _, bad := range []NewEntry{
		{"x", "EFI", thePartition}, {"x", "/A.EFI", HardDrive{1, 1, 1, "deadbeef-05"}}, {"x", "/A.EFI", HardDrive{1, 1, 1, ""}}, {"", "/A.EFI", thePartition},
		{"x", "/A.EFI", HardDrive{0, 1, 1, thePartition.PartUUID}}, {"x\x00", "/A.EFI", thePartition}, {"x", "/A\x00", thePartition},
		{"x", "/" + strings.Repeat("x", 40000), thePartition},
	} {
		if _, err = Register(m.sys, &bad); err == nil {
			t.Errorf("%+v", bad.Partition)
		}
	}
}

// hash is all of the variables.
func (m *fakeMachine) hash() string {
	m.t.Helper()
	files, err := filepath.Glob(m.sys.Path(efivars) + "/*")
	if err != nil {
		m.t.Fatal(err)
	}
	var sb strings.Builder
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			m.t.Fatal(err)
		}
		fmt.Fprintf(&sb, "%s %x\n", filepath.Base(f), b)
	}
	return sb.String()
}

// TestRegisterFails has each step fail, with each error that efivarfs has: no variable is lost, and none is left over that has
// no place in the order, unless it cannot be taken back.
func TestRegisterFails(t *testing.T) {
	real := efivarOps
	defer func() { efivarOps = real }()
	n := &NewEntry{Description: "x", File: "/A.EFI", Partition: thePartition}
	steps := 0
	for _, cause := range []error{unix.ENOSPC, unix.EIO, unix.EROFS, unix.EPERM, unix.EINVAL} {
		for step := 1; ; step++ {
			m := bootMachine(t)
			before, at, what := m.hash(), 0, ""
			fails := func(op string) error {
				if at++; at == step {
					what = op
					return cause
				}
				return nil
			}
			efivarOps.open = func(path string, flags int) (int, error) {
				if err := fails(fmt.Sprintf("open %s %x", filepath.Base(path), flags)); err != nil {
					return -1, err
				}
				return real.open(path, flags)
			}
			efivarOps.write = func(fd int, b []byte) (int, error) {
				if err := fails("write"); err != nil {
					return 0, err
				}
				return real.write(fd, b)
			}
			efivarOps.unlink = func(path string) error {
				if !strings.Contains(path, "/Boot0002-") || step == 1 {
					t.Errorf("%d: %s was deleted", step, path)
				}
				return real.unlink(path)
			}
			r, err := Register(m.sys, n)
			if err == nil {
				if what != "" || r == nil {
					t.Errorf("%s failed, and nothing was said of it", what)
				}
				break
			}
			steps++
			wantErr(t, err, cause)
			if m.hash() != before {
				t.Errorf("%s failed, and this is left:\n%s", what, m.hash())
			}
			if h := ""; cause != unix.EIO && cause != unix.EINVAL {
				var hint interface{ Hint() string }
				if !errors.As(err, &hint) || hint.Hint() == h {
					t.Errorf("%v: no hint", err)
				}
			}
		}
	}
	if steps != 5*5 { // create: open, write; BootOrder: open for its flags, open, write
		t.Errorf("%d steps failed", steps)
	}
	// What cannot be taken back is told, and found by the next run.
	m := bootMachine(t)
	efivarOps = real
	efivarOps.unlink = func(string) error { return unix.EIO }
	writes := 0
	efivarOps.write = func(fd int, b []byte) (int, error) {
		if writes++; writes == 2 {
			return 0, unix.ENOSPC
		}
		return real.write(fd, b)
	}
	_, err := Register(m.sys, n)
	wantErr(t, err, unix.ENOSPC)
	if !strings.Contains(err.Error(), "Boot0002 was made, and could not be taken back") {
		t.Error(err)
	}
	efivarOps = real
	if r, err := Register(m.sys, n); err != nil || r.Number != 2 || r.What != EntryOrdered {
		t.Errorf("%+v %v", r, err)
	}
	// Firmware that keeps something else.
	m = bootMachine(t)
	before := m.hash()
	efivarOps.write = func(fd int, b []byte) (int, error) {
		b = bytes.Clone(b)
		b[len(b)-1] ^= 1
		return real.write(fd, b)
	}
	if _, err = Register(m.sys, n); err == nil || !strings.Contains(err.Error(), "has kept something else") || m.hash() != before {
		t.Error(err)
	}
	efivarOps.write = func(fd int, b []byte) (int, error) { return real.write(fd, b[:5]) }
	if _, err = Register(m.sys, n); err == nil || m.hash() != before {
		t.Error(err)
	}
	// An interruption is no failure, and a number that somebody else takes meanwhile is not ours.
	efivarOps = real
	calls := 0
	efivarOps.write = func(fd int, b []byte) (int, error) {
		if calls++; calls%3 != 0 {
			return 0, unix.EINTR
		}
		return real.write(fd, b)
	}
	taken := false
	efivarOps.open = func(path string, flags int) (int, error) {
		if flags&unix.O_EXCL != 0 && !taken {
			taken = true
			m.variable("Boot0002", vendorGlobal, 7, option("theirs", pathPCI, pathEnd))
		}
		return real.open(path, flags)
	}
	if r, err := Register(m.sys, n); err != nil || r.Number != 5 || calls != 6 {
		t.Errorf("%+v %v %d", r, err, calls)
	}
	if v, err := ReadVariable(m.sys, "Boot0002", vendorGlobal); err != nil || !strings.Contains(string(v.Data), "t\x00h\x00e\x00i\x00r\x00s") {
		t.Error(v, err)
	}
}

// TestRegisterMeanwhile has BootOrder fail, or changed by another program, behind the entry.
func TestRegisterMeanwhile(t *testing.T) {
	real := efivarOps
	defer func() { efivarOps = real }()
	n := &NewEntry{Description: "Linux on x", File: "/A.EFI", Partition: thePartition}
	// An entry that was there stays, whatever becomes of the order.
	m := bootMachine(t)
	if _, err := Register(m.sys, n); err != nil {
		t.Fatal(err)
	}
	m.variable("BootOrder", vendorGlobal, 7, order(1, 3, 0))
	before := m.hash()
	efivarOps.write = func(int, []byte) (int, error) { return 0, unix.ENOSPC }
	_, err := Register(m.sys, n)
	wantErr(t, err, unix.ENOSPC)
	if !strings.Contains(err.Error(), "Boot0002 is there, and BootOrder could not be changed") || m.hash() != before {
		t.Error(err)
	}
	for _, c := range []struct {
		meanwhile []byte // BootOrder
		want      []byte // afterwards
		err       error
	}{
		{order(1, 2), order(1, 2), nil},    // somebody put it in order
		{order(3, 1), order(3, 1, 2), nil}, // somebody changed the order
		{[]byte{1}, []byte{1}, ErrMalformed},
	} {
		m = bootMachine(t)
		efivarOps.write = func(fd int, b []byte) (int, error) {
			efivarOps = real // the entry alone
			m.variable("BootOrder", vendorGlobal, 7, c.meanwhile)
			return real.write(fd, b)
		}
		_, err := Register(m.sys, n)
		if !errors.Is(err, c.err) {
			t.Errorf("%x: %v", c.meanwhile, err)
		}
		if b, err := os.ReadFile(m.sys.Path(efivars + "/BootOrder-" + vendorGlobal)); err != nil || !bytes.Equal(b[4:], c.want) {
			t.Errorf("%x became %x %v", c.meanwhile, b, err)
		}
		if _, err := ReadVariable(m.sys, "Boot0002", vendorGlobal); c.err == nil && err != nil || c.err != nil && !errors.Is(err, ErrNotSet) {
			t.Errorf("%x: the entry: %v", c.meanwhile, err)
		}
	}
	// A file of our own that neither holds what it should nor goes away.
	m = bootMachine(t)
	efivarOps.write = func(int, []byte) (int, error) { return 0, unix.EIO }
	efivarOps.unlink = func(string) error { return unix.EROFS }
	_, err = Register(m.sys, n)
	wantErr(t, err, unix.EIO)
	if !errors.Is(err, unix.EROFS) || !strings.Contains(err.Error(), "could not be taken back") {
		t.Error(err)
	}
	_, err = Register(nothing(t), n)
	wantErr(t, err, ErrNoEFI)
}

// TestImmutable: BootOrder may be protected, and is so again afterwards.
func TestImmutable(t *testing.T) {
	real := efivarOps
	defer func() { efivarOps = real }()
	m := bootMachine(t)
	var state uint32 = fsImmutable | 0x80
	var log []string
	efivarOps.flags = func(int) (uint32, error) { return state, nil }
	efivarOps.setFlags = func(_ int, f uint32) error {
		state = f
		log = append(log, fmt.Sprintf("flags %x", f))
		return nil
	}
	efivarOps.open = func(path string, flags int) (int, error) {
		if flags&unix.O_WRONLY != 0 && flags&unix.O_CREAT == 0 && state&fsImmutable != 0 {
			return -1, unix.EPERM
		}
		return real.open(path, flags)
	}
	efivarOps.write = func(fd int, b []byte) (int, error) {
		log = append(log, "write")
		return real.write(fd, b)
	}
	n := &NewEntry{Description: "x", File: "/A.EFI", Partition: thePartition}
	if _, err := Register(m.sys, n); err != nil || !slices.Equal(log, []string{"write", "flags 80", "write", "flags 90"}) {
		t.Error(err, log)
	}
	// So are files that are taken back.
	m, log = bootMachine(t), nil
	before := m.hash()
	efivarOps.write = func(fd int, b []byte) (int, error) { return 0, unix.ENOSPC }
	if _, err := Register(m.sys, n); !errors.Is(err, unix.ENOSPC) || m.hash() != before || !slices.Contains(log, "flags 80") {
		t.Error(err, log)
	}
	efivarOps.setFlags = func(int, uint32) error { return unix.EPERM }
	efivarOps.write = real.write
	m = bootMachine(t)
	if _, err := Register(m.sys, n); !errors.Is(err, ErrVariablesReadOnly) {
		t.Error(err)
	}
}

func TestVariablesReadOnly(t *testing.T) {
	m := bootMachine(t)
	m.write("/proc/self/mountinfo", "30 25 0:24 / /sys/firmware/efi/efivars ro,nosuid shared:9 - efivarfs efivarfs rw\n")
	err := CheckVariablesWritable(m.sys)
	wantErr(t, err, ErrVariablesReadOnly)
	var hint interface{ Hint() string }
	if !errors.As(err, &hint) || !strings.Contains(hint.Hint(), "remount,rw /sys/firmware/efi/efivars") {
		t.Error(err)
	}
	m.write("/proc/self/mountinfo", "30 25 0:24 / /sys/firmware/efi/efivars rw,nosuid shared:9 - efivarfs efivarfs rw\n")
	if err := CheckVariablesWritable(m.sys); err != nil {
		t.Error(err)
	}
}

// TestEfibootmgrReads has another program read an entry, for partitions in sectors of both sizes.
func TestEfibootmgrReads(t *testing.T) {
	m := bootMachine(t)
	m.unset("Boot0004", vendorGlobal) // it stops there
	m.unset("Boot00FG", vendorGlobal)
	part := &Partition{Number: 3, Type: TypeESP, GUID: guidFromDisk(diskGUID(7)), Start: 1 << 20, Size: 48 << 20}
	for _, sector := range []int{512, 4096} {
		h := (&Location{Part: part, DiskTable: &Table{SectorSize: sector}}).HardDrive()
		h.Number += uint32(sector / 4096)
		if _, err := Register(m.sys, &NewEntry{fmt.Sprint("sectors of ", sector), "/EFI/BOOT/BOOTX64.EFI", h}); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("efibootmgr", "-v")
	cmd.Env = append(os.Environ(), "EFIVARFS_PATH="+m.sys.Path(efivars)+"/")
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		t.Skip("skipped: efibootmgr is not installed")
	}
	for _, want := range []string{
		"BootOrder: 0001,0003,0000,0002,0004\n",
		"Boot0002* sectors of 512\tHD(3,GPT," + guid(7) + ",0x800,0x18000)/File(\\EFI\\BOOT\\BOOTX64.EFI)\n",
		"Boot0004* sectors of 4096\tHD(4,GPT," + guid(7) + ",0x100,0x3000)/File(\\EFI\\BOOT\\BOOTX64.EFI)\n",
	} {
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("%v, no %q in\n%s", err, want, out)
		}
	}
}

func FuzzEncodeLoadOption(f *testing.F) {
	f.Add(option("Linux", pathPCI, hd(1, diskGUID(1), 2, 2), pathFile, pathEnd))
	ovmf, _ := hex.DecodeString(ovmfOption)
	f.Add(ovmf)
	made, _ := hex.DecodeString(efibootmgrOption[8:])
	f.Add(made)
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := ParseLoadOption(b)
		if err != nil || o.Partition == nil {
			return
		}
		file := o.File()
		data, err := encodeLoadOption(o.Description, o.Partition, file)
		if err != nil {
			return // it is no such entry
		}
		again, err := ParseLoadOption(data)
		if err != nil || !again.Active() || again.Description != o.Description || *again.Partition != *o.Partition || again.File() != file {
			t.Fatalf("%+v %q\n%+v %q %v", o, file, again, again.File(), err)
		}
		twice, err := encodeLoadOption(again.Description, again.Partition, again.File())
		if err != nil || !bytes.Equal(twice, data) {
			t.Fatal(err)
		}
	})
}
