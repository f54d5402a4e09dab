package gpt

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"os"
	"strings"
	"testing"
	"unicode/utf16"

	"golang.org/x/sys/unix"
)

// variable puts an EFI variable into the tree.
func (m *fakeMachine) variable(name, vendor string, attributes uint32, data []byte) {
	m.t.Helper()
	m.write(efivars+"/"+name+"-"+vendor, string(binary.LittleEndian.AppendUint32(nil, attributes))+string(data))
}

// utf16le encodes text with the zero character at its end.
func utf16le(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s + "\x00")) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// node makes a device path node.
func node(typ, sub byte, payload ...byte) []byte {
	return append(binary.LittleEndian.AppendUint16([]byte{typ, sub}, uint16(4+len(payload))), payload...)
}

// diskGUID is guid(n) as a disk has it. UEFI specification, "GUID and Time Formats".
func diskGUID(n int) []byte {
	return []byte{0x7e, 0x5c, 0x0c, 0x6f, 0, 0, 0, 0x40, 0x80, 0, 0, 0, 0, 0, byte(n >> 8), byte(n)}
}

// hd makes a hard drive node.
func hd(number uint32, signature []byte, format, kind byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, number)
	b = binary.LittleEndian.AppendUint64(b, 2048)
	b = binary.LittleEndian.AppendUint64(b, 98304)
	b = append(b, make([]byte, 16)...)
	copy(b[20:], signature)
	return node(4, 1, append(b, format, kind)...)
}

var (
	pathEnd  = node(0x7f, 0xff)
	pathFile = node(4, 4, utf16le(`\EFI\systemd\systemd-bootx64.efi`)...)
	pathPCI  = node(1, 1, 0, 2)
)

// option makes an EFI_LOAD_OPTION.
func option(description string, paths ...[]byte) []byte {
	var list []byte
	for _, p := range paths {
		list = append(list, p...)
	}
	b := binary.LittleEndian.AppendUint16([]byte{1, 0, 0, 0}, uint16(len(list)))
	b = append(b, utf16le(description)...)
	return append(append(b, list...), "optional"...)
}

// efiMachine is a machine that systemd-boot was started on from the partition guid(1).
func efiMachine(t *testing.T) *fakeMachine {
	m := newMachine(t)
	m.variable("LoaderDevicePartUUID", vendorLoader, 6, utf16le(strings.ToUpper(guid(1))))
	m.variable("LoaderEntrySelected", vendorLoader, 6, utf16le("debian-6.1.0-18+2-1.conf"))
	m.variable("LoaderEntryDefault", vendorLoader, 6, utf16le("Ünïcode 𝄞.conf"))
	m.variable("LoaderImageIdentifier", vendorLoader, 6, utf16le(`\EFI\systemd\systemd-bootx64.efi`))
	m.variable("BootCurrent", vendorGlobal, 6, []byte{0x0a, 0})
	m.variable("Boot000A", vendorGlobal, 7, option("Linux", hd(2, diskGUID(2), 2, 2), pathFile, pathEnd))
	return m
}

func (m *fakeMachine) unset(name, vendor string) {
	m.t.Helper()
	if err := os.Remove(m.sys.Path(efivars + "/" + name + "-" + vendor)); err != nil {
		m.t.Fatal(err)
	}
}

func TestBooted(t *testing.T) {
	m := efiMachine(t)
	b, err := Booted(m.sys)
	if err != nil || b.PartUUID != guid(1) || b.Via != "LoaderDevicePartUUID" || b.Entry != "debian-6.1.0-18+2-1.conf" ||
		b.Default != "Ünïcode 𝄞.conf" || b.Image != "/EFI/systemd/systemd-bootx64.efi" || len(b.Problems) != 0 {
		t.Errorf("%+v %v", b, err)
	}

	// A loader that says nothing is no problem, one that says nonsense is; the firmware's word is taken.
	m.unset("LoaderEntryDefault", vendorLoader)
	m.unset("LoaderDevicePartUUID", vendorLoader)
	b, err = Booted(m.sys)
	if err != nil || b.PartUUID != guid(2) || b.Via != "BootCurrent" || b.Default != "" || len(b.Problems) != 0 {
		t.Errorf("%+v %v", b, err)
	}
	m.variable("LoaderDevicePartUUID", vendorLoader, 6, utf16le("nonsense"))
	m.variable("LoaderEntrySelected", vendorLoader, 6, []byte{0x3d, 0xd8, 0, 0})
	b, err = Booted(m.sys)
	if err != nil || b.PartUUID != guid(2) || b.Entry != "" || len(b.Problems) != 2 || !strings.Contains(b.Problems[0], `"nonsense"`) ||
		!strings.Contains(b.Problems[1], "surrogate") {
		t.Errorf("%+v %v", b, err)
	}

	// Nobody knows.
	m.unset("LoaderDevicePartUUID", vendorLoader)
	m.unset("Boot000A", vendorGlobal)
	_, err = Booted(m.sys)
	wantErr(t, err, ErrBootUnknown)
	wantErr(t, err, ErrNotSet)
	if !strings.Contains(err.Error(), "Boot000A") || !strings.Contains(err.Error(), "LoaderDevicePartUUID") || strings.Contains(err.Error(), "\n") {
		t.Error(err)
	}
}

// TestBootCurrent: what firmware writes, in its variety.
func TestBootCurrent(t *testing.T) {
	long := [][]byte{pathPCI, hd(2, diskGUID(2), 2, 2), pathFile, pathEnd}
	for _, c := range []struct {
		name string
		data []byte
		want string
		err  error
	}{
		{"Boot000A", option("long form", long...), guid(2), nil},
		{"Boot000a", option("lower case", long...), guid(2), nil},
		{"Boot000A", option("", hd(1, diskGUID(0x1234), 2, 2), pathEnd), guid(0x1234), nil},
		{"Boot000A", option("MBR", hd(5, []byte{0xef, 0xbe, 0xad, 0xde}, 1, 1), pathEnd), "deadbeef-05", nil},
		{"Boot000A", option("the second path", hd(1, diskGUID(1), 2, 2), pathEnd, hd(2, diskGUID(2), 2, 2), pathEnd), guid(1), nil},
		{"Boot000A", option("network", pathPCI, node(3, 11, make([]byte, 33)...), pathEnd), "", ErrNotSet},
		{"Boot000A", option("other path", pathPCI, pathEnd, hd(2, diskGUID(2), 2, 2), pathEnd), "", ErrNotSet},
		{"Boot000A", option("other instance", pathPCI, node(0x7f, 1), hd(2, diskGUID(2), 2, 2), pathEnd), "", ErrNotSet},
		{"Boot000A", option("EFI 1.10", pathPCI, node(0xff, 0xff), hd(2, diskGUID(2), 2, 2), pathEnd), "", ErrNotSet},
		{"Boot000A", option("no signature", hd(2, nil, 2, 2), pathEnd), "", ErrNotSet},
		{"Boot000A", option("signature of another kind", hd(2, diskGUID(2), 2, 1), pathEnd), "", ErrNotSet},
		{"Boot000B", option("another number", long...), "", ErrNotSet},
		{"Boot000A", nil, "", ErrMalformed},
		{"Boot000A", option("x", pathPCI), "", ErrMalformed},
	} {
		m := newMachine(t)
		m.variable("BootCurrent", vendorGlobal, 6, []byte{0x0a, 0})
		m.variable(c.name, vendorGlobal, 7, c.data)
		got, err := BootCurrentPartUUID(m.sys)
		if got != c.want || !errors.Is(err, c.err) {
			t.Errorf("%q: %q %v", c.data, got, err)
		}
	}
	m := efiMachine(t)
	m.variable("BootCurrent", vendorGlobal, 6, []byte{1})
	_, err := BootCurrentPartUUID(m.sys)
	wantErr(t, err, ErrMalformed)
}

func TestReadVariable(t *testing.T) {
	m := efiMachine(t)
	v, err := ReadVariable(m.sys, "BootCurrent", vendorGlobal)
	if err != nil || v.Attributes != 6 || string(v.Data) != "\x0a\x00" {
		t.Errorf("%+v %v", v, err)
	}
	_, err = ReadVariable(m.sys, "BootNext", vendorGlobal)
	wantErr(t, err, ErrNotSet)
	for content, want := range map[string]error{"": ErrNotSet, "\x06\x00\x00": ErrMalformed, strings.Repeat("x", maxVariable+1): ErrMalformed} {
		m.write(efivars+"/Odd-"+vendorLoader, content)
		_, err = ReadVariable(m.sys, "Odd", vendorLoader)
		wantErr(t, err, want)
	}
	m.write(efivars+"/Odd-"+vendorLoader, strings.Repeat("x", maxVariable))
	if v, err = ReadVariable(m.sys, "Odd", vendorLoader); err != nil || len(v.Data) != maxVariable-4 {
		t.Error(len(v.Data), err)
	}
	m.write(efivars+"/Dir-"+vendorLoader+"/x", "")
	_, err = ReadVariable(m.sys, "Dir", vendorLoader)
	wantErr(t, err, unix.EISDIR)

	// A BIOS machine, and EFI ones whose variables nobody has mounted or the kernel does not give.
	for _, dir := range []string{"", "/sys/firmware/efi", efivars} {
		sys := nothing(t)
		want := ErrNoEFI
		if dir != "" {
			want = ErrNoVariables
			if err := os.MkdirAll(sys.Path(dir), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		b, err := Booted(sys)
		if b != nil || !errors.Is(err, want) || errors.Is(err, ErrNotSet) {
			t.Errorf("%q: %v", dir, err)
		}
		var hint interface{ Hint() string }
		if errors.As(err, &hint) != (dir != "") || dir != "" && !strings.Contains(hint.Hint(), "mount -t efivarfs") {
			t.Error("hint", dir, hint)
		}
	}
}

// TestReadVariableInterrupted: efivarfs interrupts, and not for ever.
func TestReadVariableInterrupted(t *testing.T) {
	m := efiMachine(t)
	real := readWhole
	defer func() { readWhole = real }()
	for _, c := range []struct {
		fails int
		err   error
		calls int
		want  error
	}{{19, unix.EINTR, 20, nil}, {24, unix.EINTR, 25, nil}, {25, unix.EINTR, 25, unix.EINTR}, {1, unix.EIO, 1, unix.EIO}} {
		calls := 0
		readWhole = func(path string) ([]byte, error) {
			if calls++; calls <= c.fails {
				return nil, c.err
			}
			return real(path)
		}
		_, err := ReadVariable(m.sys, "BootCurrent", vendorGlobal)
		if !errors.Is(err, c.want) || calls != c.calls {
			t.Errorf("%+v: %d calls, %v", c, calls, err)
		}
	}
}

func TestText16(t *testing.T) {
	for in, want := range map[string]string{
		"":                         "",
		"\x00\x00":                 "",
		"a\x00":                    "a",     // no end
		"a\x00\x00\x00b\x00":       "a",     // something behind the end
		"a\x00\x00\x00b":           "a",     // half of something
		"\x34\xd8\x1e\xdd\x00\x00": "𝄞",     // a pair
		"\x1e\xdd":                 "error", // the halves in disorder
		"\x34\xd8":                 "error",
		"\x34\xd8\x00\x00":         "error",
		"\x34\xd8a\x00":            "error",
		"a\x00b":                   "error",
		"a":                        "error",
	} {
		v := &Variable{Data: []byte(in)}
		got, err := v.Text()
		if want == "error" {
			wantErr(t, err, ErrMalformed)
		} else if err != nil || got != want {
			t.Errorf("%q: %q %v", in, got, err)
		}
	}
}

// TestLoadOptionLayout: sizes and offsets.
func TestLoadOptionLayout(t *testing.T) {
	b := option("x", hd(7, diskGUID(3), 2, 2), pathEnd)
	if len(hd(0, nil, 0, 0)) != 42 || hex.EncodeToString(b[:10]) != "010000002e0078000000" {
		t.Fatalf("%x", b)
	}
	o, err := ParseLoadOption(b)
	if err != nil || o.Attributes != 1 || o.Description != "x" || *o.Partition != (HardDrive{7, 2048, 98304, guid(3)}) {
		t.Errorf("%+v %v", o, err)
	}
	// A description that is no text does not hide the path.
	copy(b[6:], "\x34\xd8")
	if o, err = ParseLoadOption(b); err != nil || o.Description != "" || o.Partition == nil {
		t.Errorf("%+v %v", o, err)
	}
	end := len(b) - len("optional")
	for n := range end {
		_, err := ParseLoadOption(b[:n])
		if !errors.Is(err, ErrMalformed) {
			t.Errorf("cut at %d: %v", n, err)
		}
	}
	for _, length := range []byte{0, 3, 41, 43, 255} {
		bad := option("x", hd(7, diskGUID(3), 2, 2), pathEnd)
		bad[10+2] = length
		_, err := ParseLoadOption(bad)
		if !errors.Is(err, ErrMalformed) || !strings.Contains(err.Error(), "offset 0x0") {
			t.Errorf("length %d: %v", length, err)
		}
	}
}

// ovmfOption is Boot0004 as OVMF 2022.11 wrote it into its variable store, after `bcfg boot add 0 fs0:\EFI\X.EFI
// "espmirror …"` in its shell, on a disk with the ESP as partition 3: PciRoot(0x0)/Pci(0x2,0x0)/HD(3,GPT,
// 6F0C5C7E-1234-4ABC-8DEF-0123456789AB,0x800,0x18000)/\EFI\X.EFI.
const ovmfOption = "" +
	"010000005a006500730070006d006900720072006f0072002000c300bc00000002010c00d041030a00000000010106000002" +
	"04012a0003000000000800000000000000800100000000007e5c0c6f3412bc4a8def0123456789ab020204041a005c004500" +
	"460049005c0058002e0045004600490000007fff0400"

// TestOVMFOption reads bytes that firmware wrote.
func TestOVMFOption(t *testing.T) {
	b, err := hex.DecodeString(ovmfOption)
	if err != nil {
		t.Fatal(err)
	}
	o, err := ParseLoadOption(b)
	if err != nil || o.Attributes != 1 || !strings.HasPrefix(o.Description, "espmirror ") ||
		*o.Partition != (HardDrive{3, 0x800, 0x18000, "6f0c5c7e-1234-4abc-8def-0123456789ab"}) {
		t.Errorf("%+v %+v %v", o, o.Partition, err)
	}
}

func FuzzLoadOption(f *testing.F) {
	f.Add(option("Linux", pathPCI, hd(1, diskGUID(1), 2, 2), pathFile, pathEnd))
	f.Add(option("", hd(1, []byte{1, 2, 3, 4}, 1, 1), pathEnd))
	f.Add(option("x", pathPCI, node(0x7f, 1), pathEnd))
	f.Fuzz(func(t *testing.T, b []byte) {
		o, err := ParseLoadOption(b)
		if err != nil {
			if o != nil || !errors.Is(err, ErrMalformed) {
				t.Fatal(o, err)
			}
			return
		}
		if p := o.Partition; p != nil && p.PartUUID != "" {
			// What is found must be a name that FindPartUUID takes.
			again, err := ParsePartUUID(p.PartUUID)
			if err != nil || again != p.PartUUID {
				t.Fatalf("%+v %v", p, err)
			}
		}
		if strings.Contains(o.Description, "\x00") || 2*len(utf16.Encode([]rune(o.Description)))+8 > len(b) {
			t.Fatalf("%q", o.Description)
		}
	})
}
