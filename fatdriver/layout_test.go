package fatdriver

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf16"
	"unicode/utf8"
)

// TestLayoutOffsets checks the offsets against those printed in fatgen103.
func TestLayoutOffsets(t *testing.T) {
	for _, c := range []struct {
		name      string
		got, want int
	}{
		{"BPB_BytsPerSec", offBytsPerSec, 11}, {"BPB_SecPerClus", offSecPerClus, 13}, {"BPB_RsvdSecCnt", offRsvdSecCnt, 14},
		{"BPB_NumFATs", offNumFATs, 16}, {"BPB_RootEntCnt", offRootEntCnt, 17}, {"BPB_TotSec16", offTotSec16, 19},
		{"BPB_Media", offMedia, 21}, {"BPB_FATSz16", offFATSz16, 22}, {"BPB_SecPerTrk", offSecPerTrk, 24},
		{"BPB_NumHeads", offNumHeads, 26}, {"BPB_HiddSec", offHiddSec, 28}, {"BPB_TotSec32", offTotSec32, 32},
		{"BS_DrvNum 16", offDrvNum16, 36}, {"BS_Reserved1 16", offFlags16, 37}, {"BS_BootSig 16", offBootSig16, 38},
		{"BS_VolID 16", offVolID16, 39}, {"BS_VolLab 16", offVolLab16, 43}, {"BPB_FATSz32", offFATSz32, 36},
		{"BPB_ExtFlags", offExtFlags32, 40}, {"BPB_FSVer", offFSVer32, 42}, {"BPB_RootClus", offRootClus32, 44},
		{"BPB_FSInfo", offFSInfo32, 48}, {"BPB_BkBootSec", offBkBootSec32, 50}, {"BS_DrvNum 32", offDrvNum32, 64},
		{"BS_Reserved1 32", offFlags32, 65}, {"BS_BootSig 32", offBootSig32, 66}, {"BS_VolID 32", offVolID32, 67},
		{"BS_VolLab 32", offVolLab32, 71}, {"Signature_word", offSignature, 510},
		{"FSI_LeadSig", fsiLead, 0}, {"FSI_StrucSig", fsiStruct, 484}, {"FSI_Free_Count", fsiFree, 488},
		{"FSI_Nxt_Free", fsiNext, 492}, {"FSI_TrailSig", fsiTrail, 508},
		{"slot", slotSize, 32}, {"DIR_Attr", offAttr, 11}, {"DIR_NTRes", offNTRes, 12}, {"DIR_CrtTimeTenth", offCrtTenth, 13},
		{"DIR_CrtTime", offCrtTime, 14}, {"DIR_CrtDate", offCrtDate, 16}, {"DIR_LstAccDate", offAccDate, 18},
		{"DIR_FstClusHI", offClusHI, 20}, {"DIR_WrtTime", offWrtTime, 22}, {"DIR_WrtDate", offWrtDate, 24},
		{"DIR_FstClusLO", offClusLO, 26}, {"DIR_FileSize", offFileSize, 28}, {"LDIR_Ord", offLongOrd, 0},
		{"LDIR_Type", offLongType, 12}, {"LDIR_Chksum", offLongSum, 13}, {"LDIR_FstClusLO", offLongClus, 26},
		{"LDIR_Name1", longUnitOff[0], 1}, {"LDIR_Name2", longUnitOff[5], 14}, {"LDIR_Name3", longUnitOff[11], 28},
	} {
		if c.got != c.want {
			t.Errorf("%s is at %d, want %d", c.name, c.got, c.want)
		}
	}
	if fsiLeadSig != 0x41615252 || fsiStrSig != 0x61417272 || fsiTrailSig != 0xAA550000 {
		t.Error("FSInfo signatures")
	}
	if len(cp437) != 128 {
		t.Errorf("code page 437 has %d upper characters", len(cp437))
	}
	if i := strings.IndexRune(cp437High, '�'); i >= 0 {
		t.Errorf("code page 437 has a replacement character at %d", i)
	}
}

// TestMkfs reads volumes that mkfs.fat made, and compares the fields with those that were asked for.
func TestMkfs(t *testing.T) {
	mkfs := tool(t, "mkfs.fat")
	for _, c := range []struct {
		typ, kib int
		args     []string
		ss, spc  int
		reserved int
	}{
		{12, 1440, []string{"-S512", "-s1", "-R1"}, 512, 1, 1},
		{12, 8000, []string{"-S1024", "-s4", "-R3", "-f1"}, 1024, 4, 3},
		{16, 20000, []string{"-S512", "-s4", "-R8"}, 512, 4, 8},
		{16, 200000, []string{"-S4096", "-s2", "-R2"}, 4096, 2, 2},
		{32, 40000, []string{"-S512", "-s1", "-R40"}, 512, 1, 40},
		{32, 300000, []string{"-S4096", "-s1", "-R32", "-f1"}, 4096, 1, 32},
	} {
		img := filepath.Join(t.TempDir(), "mkfs.img")
		args := append([]string{"-C", img, "-F", fmt.Sprint(c.typ), "-i", "CAFE1234", "-n", "MKFS", fmt.Sprint(c.kib)}, c.args...)
		if out, err := exec.Command(mkfs, args...).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.fat %v: %v\n%s", args, err, out)
		}
		dev := openFileDev(t, img)
		v, err := Open(dev)
		if err != nil {
			t.Fatal(err)
		}
		g := v.Geometry()
		if int(g.Type) != c.typ || g.SectorSize != c.ss || g.ClusterSize != c.ss*c.spc || g.ReservedSectors < c.reserved || v.UUID() != "CAFE-1234" || v.bootLabel() != "MKFS" {
			t.Errorf("%v: %+v", args, g)
		}
		checkClean(t, dev)
		// A boot sector of ours for the same geometry must be read as the same volume.
		d := newSparse(dev.size, c.ss)
		o := FormatOptions{
			Type: g.Type, SectorSize: c.ss, SectorsPerCluster: c.spc, NumFATs: g.NumFATs, Serial: g.Serial, Label: "MKFS",
			ReservedSectors: g.ReservedSectors, RootEntries: g.RootEntries, Align: 1,
		}
		if err := Format(d, o); err != nil {
			t.Fatal(err)
		}
		v, err = Open(d)
		if err != nil {
			t.Fatal(err)
		}
		mine := v.Geometry()
		if mine.Clusters < g.Clusters || mine.Clusters > g.Clusters+64 {
			t.Errorf("%v: %d clusters, mkfs.fat makes %d", args, mine.Clusters, g.Clusters)
		}
	}
}

// TestFATEntries: an entry that was written is read back, and nothing else of the table changes.
func TestFATEntries(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	values := map[Type][]uint32{
		FAT12: {0, 2, 0x555, 0xAAA, 0xFEF, entryBad, entryEOC, entryLast},
		FAT16: {0, 2, 0x5555, 0xAAAA, 0xFFEF, entryBad, entryEOC, entryLast},
		FAT32: {0, 2, 0x5555555, 0xAAAAAAA, 0x0FFFFFEF, entryBad, entryEOC, entryLast},
	}
	for _, typ := range []Type{FAT12, FAT16, FAT32} {
		buf := make([]byte, 512*3)
		for i := range buf {
			buf[i] = byte(rng.Uint32())
		}
		n := len(buf) * 8 / int(typ)
		for range 2000 {
			c := Cluster(rng.IntN(n))
			v := values[typ][rng.IntN(len(values[typ]))]
			off, k := entryOffset(typ, c)
			before := append([]byte(nil), buf...)
			encodeEntry(typ, c, buf[off:off+int64(k)], v)
			if got := decodeEntry(typ, c, buf[off:]); got != v {
				t.Fatalf("%v: entry %d is 0x%x, want 0x%x", typ, c, got, v)
			}
			for i := range Cluster(n) {
				o, _ := entryOffset(typ, i)
				if i != c && decodeEntry(typ, i, buf[o:]) != decodeEntry(typ, i, before[o:]) {
					t.Fatalf("%v: setting entry %d changed entry %d", typ, c, i)
				}
			}
			copy(before[off:off+int64(k)], buf[off:])
			if typ != FAT12 && !bytes.Equal(buf, before) {
				t.Fatalf("%v: setting entry %d changed bytes outside it", typ, c)
			}
		}
	}
	// fatgen103: the top four bits of a FAT32 entry are kept, and not looked at.
	b := []byte{1, 2, 3, 0xA4}
	if encodeEntry(FAT32, 9, b, entryLast); b[3] != 0xAF || decodeEntry(FAT32, 9, b) != entryLast {
		t.Errorf("% x", b)
	}
	// The values that FAT12 and FAT16 reserve do not become marks of another kind.
	for v, want := range map[uint16]uint32{0xFF6: 0xFF6, 0xFF7: entryBad, 0xFF8: entryEOC, 0xFFF: entryLast} {
		if got := decodeEntry(FAT12, 0, binary.LittleEndian.AppendUint16(nil, v)); got != want {
			t.Errorf("FAT12 0x%x is 0x%x, want 0x%x", v, got, want)
		}
		if got := decodeEntry(FAT12, 1, binary.LittleEndian.AppendUint16(nil, v<<4)); got != want {
			t.Errorf("FAT12 odd 0x%x is 0x%x, want 0x%x", v, got, want)
		}
		if got := decodeEntry(FAT16, 0, binary.LittleEndian.AppendUint16(nil, v|0xF000)); got != want && want >= entryBad {
			t.Errorf("FAT16 0x%x is 0x%x, want 0x%x", v|0xF000, got, want)
		}
	}
	g := Geometry{Type: FAT12, SectorSize: 512}
	for c := range Cluster(4086) {
		if want := (int(c)+int(c)/2)%512 == 511; g.straddles(c) != want {
			t.Errorf("cluster %d: straddles is %v", c, !want)
		}
	}
}

// TestSlotCluster: the high word counts, and changes, on FAT32 only.
func TestSlotCluster(t *testing.T) {
	s := bytes.Repeat([]byte{0xEE}, slotSize)
	putSlotCluster(FAT16, s, 0x1234)
	if slotCluster(FAT16, s) != 0x1234 || s[20] != 0xEE || s[21] != 0xEE {
		t.Errorf("% x", s)
	}
	putSlotCluster(FAT32, s, 0x0ABC1234)
	if slotCluster(FAT32, s) != 0x0ABC1234 || s[19] != 0xEE || s[22] != 0xEE || s[25] != 0xEE || s[28] != 0xEE {
		t.Errorf("% x", s)
	}
}

func TestTimes(t *testing.T) {
	for _, c := range []struct{ in, want time.Time }{
		{time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)},
		{time.Date(2107, 12, 31, 23, 59, 59, 999999999, time.UTC), time.Date(2107, 12, 31, 23, 59, 58, 0, time.UTC)},
		{time.Date(2024, 2, 29, 12, 34, 57, 0, time.UTC), time.Date(2024, 2, 29, 12, 34, 56, 0, time.UTC)},
		{time.Date(2024, 1, 1, 1, 0, 0, 0, time.FixedZone("", 2*3600)), time.Date(2023, 12, 31, 23, 0, 0, 0, time.UTC)},
		{time.Date(1970, 5, 5, 5, 5, 5, 0, time.UTC), time.Date(1980, 1, 1, 0, 0, 0, 0, time.UTC)},
		{time.Date(2200, 5, 5, 5, 5, 5, 0, time.UTC), time.Date(2107, 12, 31, 23, 59, 58, 0, time.UTC)},
	} {
		d, tod, tenth := encodeTime(c.in)
		if got := decodeTime(d, tod); !got.Equal(c.want) || tenth > 199 {
			t.Errorf("%v became %v and %d tenths, want %v", c.in, got, tenth, c.want)
		}
	}
	if _, _, tenth := encodeTime(time.Date(2024, 1, 1, 0, 0, 1, 230_000_000, time.UTC)); tenth != 123 {
		t.Errorf("1.23 s are %d units of 10 ms", tenth)
	}
	for _, date := range []uint16{0, 1, 1 << 5, 13<<5 | 1} {
		if got := decodeTime(date, 0); !got.IsZero() {
			t.Errorf("date 0x%x is %v", date, got)
		}
	}
}

// unitNames are names as UTF-16, lone surrogates and all.
func unitNames() [][]uint16 {
	list := [][]uint16{
		utf16.Encode([]rune("plain.txt")), utf16.Encode([]rune("grüße 日本 😀")),
		{0xD800}, {0xDC00}, {0xDC00, 0xD800}, {'a', 0xD83D, 'b', 0xDE00}, {0xD83D, 0xD83D, 0xDE00, 0xDE00},
		{0xDBFF, 0xDFFF}, {0xFFFE, 0xE000, 0xD7FF, 0xFFFD}, slices.Repeat([]uint16{0xDFFF}, 255),
	}
	rng := rand.New(rand.NewPCG(3, 4))
	for range 500 {
		u := make([]uint16, 1+rng.IntN(255))
		for i := range u {
			switch rng.IntN(3) {
			case 0:
				u[i] = 0xD800 + uint16(rng.IntN(0x800))
			case 1:
				u[i] = uint16('a' + rng.IntN(26))
			default:
				u[i] = 0x80 + uint16(rng.IntN(0xFF00))
			}
		}
		list = append(list, u)
	}
	return list
}

// TestUnits: every sequence of UTF-16 units survives, and different ones never become one name.
func TestUnits(t *testing.T) {
	seen := map[string][]uint16{}
	for _, u := range unitNames() {
		s := fromUnits(u)
		if got := units(s); !slices.Equal(got, u) {
			t.Fatalf("%x became %x through %q", u, got, s)
		}
		if old, ok := seen[s]; ok && !slices.Equal(old, u) {
			t.Fatalf("%x and %x are both %q", old, u, s)
		}
		seen[s] = u
		if string(utf16.Decode(u)) == s != utf8.ValidString(s) && !slices.Contains(u, 0xFFFD) {
			t.Fatalf("%x became %q", u, s)
		}
	}
}

// TestLongNames: what newGroup and putLongName make, longName and parseDir read.
func TestLongNames(t *testing.T) {
	for _, u := range unitNames() {
		name := fromUnits(u)
		if CheckName(name) != nil {
			continue
		}
		set := newNameSet()
		if err := set.claim(name); err != nil {
			t.Fatal(err)
		}
		g, err := set.newGroup(name, nil, Meta{Attr: AttrArchive}, false)
		if err != nil {
			t.Fatal(err)
		}
		d := parseDir(FAT32, append(append([]byte(nil), g...), make([]byte, slotSize)...), true)
		if len(d.issues) > 0 || len(d.entries) != 1 || d.entries[0].Name != name || !bytes.Equal(d.entries[0].Group, g) {
			t.Fatalf("%q: %v %v", name, d.issues, d.entries)
		}
		if len(g) > slotSize {
			if got, err := longName(g); got != name || err != nil {
				t.Fatalf("%q: longName gives %q, %v", name, got, err)
			}
			if want := (len(u)+12)/13 + 1; len(g)/slotSize != want {
				t.Fatalf("%q takes %d slots, want %d", name, len(g)/slotSize, want)
			}
		}
		// Taken over from another volume, its bytes stay; where the alias is taken, only that and the checksums change.
		other := newNameSet()
		if err := other.claim(name); err != nil {
			t.Fatal(err)
		}
		again, err := other.newGroup(name, g, Meta{}, false)
		if err != nil || !bytes.Equal(again, g) {
			t.Fatalf("%q: taken over as % x, %v", name, again, err)
		}
		if len(g) > slotSize {
			third := newNameSet()
			third.claim(name)
			third.short[Fold(displayPlain(g[len(g)-slotSize:]))] = true
			again, err := third.newGroup(name, g, Meta{}, false)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := longName(again); got != name || err != nil || bytes.Equal(again, g) {
				t.Fatalf("%q: with another alias %q, %v", name, got, err)
			}
		}
	}
}

// TestLongNameErrors breaks each field of a long-name slot.
func TestLongNameErrors(t *testing.T) {
	set := newNameSet()
	g, err := set.newGroup("A somewhat longer name.txt", nil, Meta{}, false)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		off  int
		val  byte
		want string
	}{
		{0, 0x43, "ordinal 0x43"}, {slotSize, 2, "ordinal 0x02"}, {offLongType, 1, "type 0x01"}, {offLongSum, g[offLongSum] + 1, "checksum"},
		{offLongClus, 1, "first cluster"}, {2 * slotSize, 'X', "checksum"}, {1, 0, "its end"}, {slotSize + 1, 0, ""},
	} {
		b := append([]byte(nil), g...)
		b[c.off] = c.val
		if c.off == 1 || c.off == slotSize+1 {
			b[c.off+1] = 0
		}
		name, err := longName(b)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("byte %d = 0x%02x: %q, %v; want an error with %q", c.off, c.val, name, err, c.want)
		}
		d := parseDir(FAT16, b, true)
		if len(d.entries) != 1 || len(d.issues) == 0 || strings.Contains(d.entries[0].Name, "somewhat") {
			t.Errorf("byte %d = 0x%02x: parseDir gives %v with %v", c.off, c.val, d.entries, d.issues)
		}
	}
}

// TestNoShortName: with the bit that says so, an invalid short name is right and a valid one wrong; a new alias clears it.
func TestNoShortName(t *testing.T) {
	set := newNameSet()
	g, err := set.newGroup("secret file.txt.PFILE", nil, Meta{}, false)
	if err != nil {
		t.Fatal(err)
	}
	s := g[len(g)-slotSize:]
	s[offNTRes] = ntNoShort
	if d := parseDir(FAT32, g, true); len(d.issues) != 1 || d.issues[0].fatal {
		t.Errorf("a valid short name: %v", d.issues)
	}
	copy(s, "S:CRET~1PFI")
	putLongName(g, units("secret file.txt.PFILE"))
	if d := parseDir(FAT32, g, true); len(d.issues) != 0 || d.entries[0].Name != "secret file.txt.PFILE" {
		t.Errorf("an invalid short name: %v", d.issues)
	}
	other := newNameSet()
	other.short[Fold(displayPlain(s))] = true
	g, err = other.newGroup("secret file.txt.PFILE", g, Meta{}, false)
	if d := parseDir(FAT32, g, true); err != nil || len(d.issues) != 0 {
		t.Errorf("with a new alias: %v, %v", d.issues, err)
	}
	s[offNTRes] = 0
	if d := parseDir(FAT32, s, true); len(d.issues) != 1 || !d.issues[0].fatal {
		t.Errorf("an invalid short name alone: %v", d.issues)
	}
}

func TestShortForm(t *testing.T) {
	for _, c := range []struct {
		name, short string
		nt          byte
		ok          bool
	}{
		{"README.TXT", "README  TXT", 0, true},
		{"readme.txt", "README  TXT", ntLowerBase | ntLowerExt, true},
		{"README.txt", "README  TXT", ntLowerExt, true},
		{"readme", "README     ", ntLowerBase, true},
		{"12345678.123", "12345678123", 0, true},
		{"a-b_c~1.x$!", "A-B_C~1 X$!", ntLowerBase | ntLowerExt, true},
		{"Readme.txt", "", 0, false}, {"123456789", "", 0, false}, {"a.html", "", 0, false}, {"a.b.c", "", 0, false},
		{".x", "", 0, false}, {"a b", "", 0, false}, {"a+b", "", 0, false}, {"é", "", 0, false}, {"a;", "", 0, false},
	} {
		short, nt, ok := shortForm(c.name)
		if ok != c.ok || ok && (string(short[:]) != c.short || nt != c.nt) {
			t.Errorf("%q: %q 0x%02x %v", c.name, short, nt, ok)
		}
		if ok {
			var s [slotSize]byte
			copy(s[:], short[:])
			s[offNTRes] = nt
			if got := displayShort(s[:]); got != c.name {
				t.Errorf("%q is shown as %q", c.name, got)
			}
		}
	}
}

// TestDisplayShort: bytes that no name should have never become separators, and E5 has its stand-in.
func TestDisplayShort(t *testing.T) {
	for in, want := range map[string]string{
		"\x05AB     TXT": "σAB.TXT", "A/B     T\x01T": "A_B.T_T", ".          ": "_", "..         ": "_", "           ": "_",
		"\x80\x81      \x82  ": "Çü.é", "A B     C  ": "A B.C",
	} {
		if got := displayPlain([]byte(in)); got != want {
			t.Errorf("%q is shown as %q, want %q", in, got, want)
		}
	}
}

// TestAliases makes thousands of similar names in one directory: short names differ from all names, long and short.
func TestAliases(t *testing.T) {
	var names []string
	for i := range 3000 {
		names = append(names, fmt.Sprintf("kernel image with a long name %d.conf", i))
	}
	for i := range 40 {
		names = append(names, fmt.Sprintf("KERNEL~%d.CON", i), fmt.Sprintf("KE%04X~1.CON", i), strings.Repeat("é", i+1), fmt.Sprintf(".%d...", i)+"x")
	}
	set := newNameSet()
	for _, n := range names {
		if err := set.claim(n); err != nil {
			t.Fatal(err)
		}
	}
	if err := set.claim("kernel IMAGE with a long name 7.CONF"); !errors.Is(err, ErrName) {
		t.Errorf("a name that differs in case: %v", err)
	}
	start := time.Now()
	used := map[string]string{}
	for _, n := range names {
		used[Fold(n)] = n
	}
	shorts := map[string]string{}
	for _, n := range names {
		g, err := set.newGroup(n, nil, Meta{}, false)
		if err != nil {
			t.Fatal(err)
		}
		s := g[len(g)-slotSize:]
		if why := badShortName(s); why != "" {
			t.Fatalf("%q: short name %q %s", n, s[:11], why)
		}
		k := Fold(displayPlain(s))
		if owner, ok := used[k]; ok && owner != n {
			t.Fatalf("the short name of %q is the name of %q", n, owner)
		}
		if owner, ok := shorts[k]; ok {
			t.Fatalf("%q and %q have the short name %s", n, owner, k)
		}
		shorts[k] = n
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("%d names took %v", len(names), d)
	}
}

func TestCheckName(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", `a\b`, "a:b", "a*", "a?", "a<", "a>", "a|", `a"`, "a\x1f", "a\x7f", "a.", "a ", "\xff", strings.Repeat("x", 256), strings.Repeat("😀", 128)} {
		if err := CheckName(name); !errors.Is(err, ErrName) {
			t.Errorf("%q: %v", name, err)
		}
	}
	for _, name := range []string{"a", ".a", " a", "a b.c.d", "a+,;=[]", strings.Repeat("x", 255), strings.Repeat("😀", 127) + "x", "\xed\xa0\x80"} {
		if err := CheckName(name); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestFold(t *testing.T) {
	for _, c := range [][2]string{{"abc.TXT", "ABC.txt"}, {"straße", "STRAßE"}, {"Öl", "öl"}, {"жук", "ЖУК"}, {"a\xed\xa0\x80", "A\xed\xa0\x80"}} {
		if Fold(c[0]) != Fold(c[1]) {
			t.Errorf("%q and %q differ", c[0], c[1])
		}
	}
	if Fold("\xed\xa0\x80") == Fold("\xed\xa0\x81") {
		t.Error("two lone surrogates are one")
	}
	if Fold("ı") == Fold("i") || Fold("ſ") == Fold("s") {
		t.Error("a letter whose upper case is ASCII is taken for an ASCII letter")
	}
}
