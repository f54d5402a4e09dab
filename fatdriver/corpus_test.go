package fatdriver

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"espmirror/fatdriver/internal/iofs"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// The corpus is a folder of FAT volumes that other projects made: good/, odd/ and bad/ with NAME.img.zst, index.tsv, and
// files/NAME.tsv with what mtools (or, as NAME.linux.tsv, Linux) reads from each. It is not part of this repository.
func corpusDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("ESPMIRROR_CORPUS")
	if dir == "" {
		dir = filepath.Join("..", "..", "shared", "corpus")
	}
	if _, err := os.Stat(filepath.Join(dir, "index.tsv")); err != nil {
		t.Skip("no corpus of foreign volumes; ESPMIRROR_CORPUS names its folder")
	}
	return dir
}

// maxCorpusImage is the largest expanded image that is tested, in bytes.
const maxCorpusImage = 300 << 20

// corpusFile is one line of files/NAME.tsv.
type corpusFile struct{ kind, attr, size, time, sum, path string }

func readCorpusFiles(t *testing.T, dir, name string) (list []corpusFile, onlyFiles bool) {
	t.Helper()
	f, err := os.Open(filepath.Join(dir, "files", name+".linux.tsv"))
	if onlyFiles = err == nil; !onlyFiles {
		f, err = os.Open(filepath.Join(dir, "files", name+".tsv"))
	}
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		p := strings.SplitN(s.Text(), "\t", 6)
		if p[0] == "#by" {
			onlyFiles = true
		}
		if len(p) == 6 && (p[0] == "F" || p[0] == "D") {
			list = append(list, corpusFile{p[0], corpusAttr(t, p[1]), p[2], p[3], p[4], p[5]})
		}
	}
	if err := s.Err(); err != nil {
		t.Fatal(err)
	}
	return list, onlyFiles
}

// corpusAttr makes letters of an attribute in hex, as Linux tells it; mtools tells letters.
func corpusAttr(t *testing.T, s string) string {
	v, err := strconv.ParseUint(s, 16, 8)
	if err != nil || s == "A" {
		return s
	}
	return attrLetters(byte(v))
}

func attrLetters(a byte) string {
	s := ""
	for _, l := range []struct {
		bit byte
		c   string
	}{{AttrArchive, "A"}, {AttrSystem, "S"}, {AttrHidden, "H"}, {AttrReadOnly, "R"}} {
		if a&l.bit != 0 {
			s += l.c
		}
	}
	if s == "" {
		return "-"
	}
	return s
}

// treeFiles lists a tree in the form of the corpus.
func treeFiles(t *testing.T, tr *Tree, onlyFiles bool) (list []corpusFile) {
	t.Helper()
	fsys := tr.FS()
	err := fs.WalkDir(fsys, ".", func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == "." {
			return err
		}
		n := e.(*iofs.Info).Sys().(*Node)
		c := corpusFile{"D", attrLetters(n.Entry.Attr()), "-", "-", "-", p}
		if !e.IsDir() {
			f, err := fsys.Open(p)
			if err != nil {
				return err
			}
			h := sha256.New()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
			c.kind, c.size, c.sum = "F", fmt.Sprint(n.Size()), hex.EncodeToString(h.Sum(nil))
			c.time = n.Entry.ModTime().Format("2006-01-02T15:04:05")
		} else if onlyFiles {
			return nil
		}
		list = append(list, c)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	return list
}

func TestCorpus(t *testing.T) {
	dir := corpusDir(t)
	zstd := tool(t, "zstd")
	index, err := os.ReadFile(filepath.Join(dir, "index.tsv"))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]int{}
	for line := range strings.Lines(string(index)) {
		p := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(p) < 17 || p[0] == "class" {
			continue
		}
		class, name := p[0], p[1]
		size, err := strconv.ParseInt(p[10], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seen[class]++
		t.Run(class+"/"+name, func(t *testing.T) {
			t.Parallel()
			if size > maxCorpusImage {
				t.Skipf("%d bytes is too large", size)
			}
			img := filepath.Join(t.TempDir(), "volume.img")
			src := filepath.Join(dir, class, name+".img.zst")
			if out, err := exec.Command(zstd, "-q", "-d", "--long=27", "--sparse", src, "-o", img).CombinedOutput(); err != nil {
				t.Fatalf("zstd: %v\n%s", err, out)
			}
			dev := openFileDev(t, img)
			if p[3] == "4096" {
				dev.sector = 4096
			}
			v, err := Open(dev)
			if class == "bad" {
				corpusBad(t, v, err)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			g := v.Geometry()
			if got := fmt.Sprint(int(g.Type), g.SectorSize, g.ClusterSize/g.SectorSize, g.ReservedSectors, g.NumFATs, g.RootEntries, g.TotalSectors, g.Clusters); got != strings.Join(p[2:10], " ") {
				t.Errorf("geometry %s, want %v", got, p[2:10])
			}
			r, err := v.Check()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range r.Findings {
				if class == "good" && f.Severity > Note || f.Severity == Damage {
					t.Errorf("%v: %v", f.Severity, f)
				} else {
					t.Logf("%v: %v", f.Severity, f)
				}
			}
			corpusTree(t, v, dir, name)
		})
	}
	if seen["good"] == 0 || seen["odd"] == 0 || seen["bad"] == 0 {
		t.Errorf("the index lists %v", seen)
	}
}

// corpusTree compares the tree with what the references read.
func corpusTree(t *testing.T, v *Volume, dir, name string) {
	want, onlyFiles := readCorpusFiles(t, dir, name)
	tr := mustScan(t, v)
	got := treeFiles(t, tr, onlyFiles)
	byPath := func(a, b corpusFile) int { return strings.Compare(a.path, b.path) }
	slices.SortFunc(want, byPath)
	slices.SortFunc(got, byPath)
	for i := range min(len(got), len(want)) {
		// A zero date is a matter of taste: 1979 for mtools, 1980 for Linux, the zero time here.
		if y := want[i].time; strings.HasPrefix(y, "1979-12-31") || strings.HasPrefix(y, "1980-01-01") {
			want[i].time = got[i].time
		}
		if got[i] != want[i] {
			t.Errorf("got  %v\nwant %v", got[i], want[i])
		}
	}
	if len(got) != len(want) {
		t.Errorf("%d files and directories, want %d", len(got), len(want))
	}
}

// corpusBad wants to be told that something is wrong.
func corpusBad(t *testing.T, v *Volume, err error) {
	if err != nil {
		if !errors.Is(err, ErrNotFAT) {
			t.Error(err)
		}
		return
	}
	r, err := v.Check()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range r.Findings {
		t.Logf("%v: %v", f.Severity, f)
	}
	if s, ok := r.Worst(); !ok || s == Note {
		t.Error("nothing found wrong")
	}
}
