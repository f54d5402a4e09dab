package archive

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	"espmirror/fixtures"
	"espmirror/replicate"
)

// FuzzTar opens what may be a tar archive.
func FuzzTar(f *testing.F) {
	f.Add(tarOf(f, file("EFI/BOOT/a", "1"), dir("d"), file("d/b", strings.Repeat("2", 600)), hardLink("l", "d/b")))
	f.Add(tarOf(f, file(strings.Repeat("long/", 60)+"Ünïcode", "1")))
	f.Add(oldSparse())
	f.Add(paxSparse(f))
	f.Fuzz(func(t *testing.T, data []byte) {
		// The mutations are for what the headers say, and not for their checksums.
		for at := 0; at+blockSize <= len(data); at += blockSize {
			if block := data[at : at+blockSize]; bytes.HasPrefix(block[257:], []byte("ustar")) {
				sumTar(block)
			}
		}
		checkOpen(t, data)
	})
}

// FuzzCPIO opens what may be a cpio archive.
func FuzzCPIO(f *testing.F) {
	f.Add(cpioOf(cpioFileOf(1, 2, "EFI/a", ""), cpioFileOf(1, 2, "b", "data"), newc{mode: cpioDir, name: "d"}, newc{mode: cpioSymlink, name: "l", data: "x"}))
	f.Add(cpioOf(newc{magic: "070702", mode: cpioFile, name: "a", data: "\x01\x02", check: 3}))
	f.Add(append(cpioOf(cpioFileOf(1, 1, "a", "1")), cpioOf(cpioFileOf(1, 1, "b", "1"))...))
	f.Add([]byte("070707000001000002100644000000000000000001000000171674016600000200000000003a\x00abc0707070000000000000000000000000000000000010000000000000000000001300000000000TRAILER!!!\x00"))
	f.Fuzz(checkOpen)
}

// FuzzStream opens what may be compressed.
func FuzzStream(f *testing.F) {
	small := tarOf(f, file("a", "1"))
	f.Add(fixtures.Gzip(f, small))
	f.Add(zst(f, small))
	f.Add(append(fixtures.Gzip(f, cpioOf(cpioFileOf(1, 1, "a", "1"))), 0, 0, 0, 0))
	f.Fuzz(checkOpen)
}

// checkOpen wants an error that is ours, or a tree of which every file can be read.
func checkOpen(t *testing.T, data []byte) {
	src, err := Open(ctx, "x", bytes.NewReader(data), Limits{Unpacked: 4 << 20, Members: 2000, Names: 1 << 20})
	if err != nil {
		if !errors.Is(err, ErrDamaged) && !errors.Is(err, ErrTooLarge) {
			t.Fatal(err)
		}
		return
	}
	defer src.Close()
	var walk func(it *replicate.Item, below error)
	walk = func(it *replicate.Item, below error) {
		if below != nil && it.Err == nil {
			t.Errorf("%q has no error, what is above it has: %v", it.Path, below)
		}
		for _, part := range strings.Split(it.Path, "/") {
			if part == "." || part == ".." || part == "" && it.Path != "" {
				t.Errorf("%q is a path", it.Path)
			}
		}
		if !it.Dir && it.Err == nil {
			r, err := src.Open(it)
			if err != nil {
				t.Fatal(err)
			}
			// A sparse file may have gigabytes of holes.
			n, err := io.Copy(io.Discard, io.LimitReader(r, 1<<20))
			if err != nil || n != min(it.Size, 1<<20) {
				t.Errorf("%q: %d bytes of %d: %v", it.Path, n, it.Size, err)
			}
			r.Close()
		}
		for _, c := range it.Children {
			walk(c, it.Err)
		}
	}
	walk(src.Root(), nil)
}

// oldSparse is a file with holes as GNU tar wrote it first: the map is in the header.
func oldSparse() []byte {
	b := make([]byte, 4*blockSize)
	copy(b, "sparse")
	copy(b[100:], "0000644\x000000000\x000000000\x0000000000005\x0000000000000\x00")
	b[156] = 'S'
	copy(b[257:], "ustar  \x00")
	copy(b[386:], "00000001000\x0000000000005\x00") // one piece: offset, length
	copy(b[483:], "00000002000\x00")                // the size with the holes
	copy(b[blockSize:], "piece")
	sumTar(b[:blockSize])
	return b
}

// paxSparse is one of the pax format 1.0: the map is in front of the data.
func paxSparse(t testing.TB) []byte { return paxSparseOf(t, 1) }

func paxSparseOf(t testing.TB, major int) []byte {
	records := fmt.Sprintf("22 GNU.sparse.major=%d\n", major) + "22 GNU.sparse.minor=0\n" + "26 GNU.sparse.name=sparse\n" + "28 GNU.sparse.realsize=1024\n"
	x := tarOf(t, file("PaxHeaders.0/sparse", records))
	x = x[:2*blockSize]
	x[156] = 'x'
	sumTar(x)
	data := make([]byte, blockSize)
	copy(data, "1\n512\n5\n")
	return append(x, tarOf(t, file("GNUSparseFile.0/sparse", string(data)+"piece"))...)
}

// TestSparseVersion: the map of a version that nobody knows is not taken for a part of the file.
func TestSparseVersion(t *testing.T) {
	got, err := openBoth(t, paxSparseOf(t, 2), Limits{})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range got {
		if !strings.HasPrefix(text, "error: ") && text != "dir" || strings.HasPrefix(text, "error: ") && !strings.Contains(text, `unknown version "2.0"`) {
			t.Errorf("%q: %q", name, text)
		}
	}
}

// TestSparse reads the files with holes that the fuzzer starts from.
func TestSparse(t *testing.T) {
	for i, data := range [][]byte{oldSparse(), paxSparse(t)} {
		got, err := openBoth(t, data, Limits{})
		if err != nil {
			t.Error(i, err)
			continue
		}
		off := 512
		want(t, got, map[string]string{"sparse": strings.Repeat("\x00", off) + "piece" + strings.Repeat("\x00", 1024-off-5)})
	}
}
