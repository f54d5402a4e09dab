package fatdriver

import (
	"bytes"
	"errors"
	"espmirror/fatdriver/internal/iofs"
	"io"
	"io/fs"
	"strings"
	"sync"
	"testing"
	"testing/fstest"
	"time"
)

func mustScan(t testing.TB, v *Volume) *Tree {
	t.Helper()
	tr, err := v.Scan()
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func TestFS(t *testing.T) {
	testVolumes(t, func(t *testing.T, d *sparseDev, files map[string]string) {
		if fsck := toolPath("fsck.fat"); fsck != "" {
			fsckClean(t, fsck, d.file(t)) // else the volume itself would be in doubt
		}
		checkClean(t, d)
		v, err := Open(d)
		if err != nil {
			t.Fatal(err)
		}
		fsys := mustScan(t, v).FS()
		var names []string
		for name := range files {
			names = append(names, strings.TrimSuffix(name, "/"))
		}
		if err := fstest.TestFS(fsys, names...); err != nil {
			t.Error(err)
		}
		for name, want := range files {
			if strings.HasSuffix(name, "/") {
				continue
			}
			got, err := fs.ReadFile(fsys, name)
			if err != nil || string(got) != want {
				t.Errorf("%s: %d bytes, %v", name, len(got), err)
			}
		}
	})
}

func TestFSDetails(t *testing.T) {
	d, v := mustFormat(t, 2<<20, FormatOptions{})
	populate(t, d, map[string]string{"Loader/Entries/A long name.conf": "0123456789", "ro.txt": "r", "Öl.txt": "x"}, 2)
	tr := mustScan(t, v)
	fsys := tr.FS()
	for _, name := range []string{"loader/ENTRIES/a LONG name.CONF", "LOADER/entries/ALONGN~1.CON", "öL.TXT"} {
		info, err := fs.Stat(fsys, name)
		if err != nil {
			t.Fatal(err)
		}
		if n, ok := info.Sys().(*Node); !ok || n.Name() != info.Name() {
			t.Errorf("%s: Sys is %v", name, info.Sys())
		}
	}
	info, err := fs.Stat(fsys, "Loader/Entries/A long name.conf")
	if err != nil || info.Size() != 10 || info.Mode() != 0o644 || !info.ModTime().Equal(time.Date(2024, 3, 4, 5, 6, 8, 0, time.UTC)) {
		t.Errorf("%v, %v", info, err)
	}
	if info, _ := fs.Stat(fsys, "ro.txt"); info.Mode() != 0o444 {
		t.Errorf("mode of a read-only file: %v", info.Mode())
	}
	if info, _ := fs.Stat(fsys, "."); info.Mode() != fs.ModeDir|0o755 || info.Sys() != tr.Root || info.Name() != "." {
		t.Errorf("root: %v", info)
	}
	for name, want := range map[string]error{
		"nothing": fs.ErrNotExist, "ro.txt/x": fs.ErrNotExist, "/ro.txt": fs.ErrInvalid, "Loader/../ro.txt": fs.ErrInvalid,
		`Loader\Entries`: fs.ErrNotExist,
	} {
		for op, err := range map[string]error{
			"Open": second(fsys.Open(name)), "Stat": second(fs.Stat(fsys, name)),
			"ReadFile": second(fs.ReadFile(fsys, name)), "ReadDir": second(fs.ReadDir(fsys, name)),
		} {
			var pe *fs.PathError
			if !errors.Is(err, want) || !errors.As(err, &pe) || pe.Path != name {
				t.Errorf("%s %s: %v", op, name, err)
			}
		}
	}
	if _, err := fs.ReadDir(fsys, "ro.txt"); !errors.Is(err, iofs.ErrNotDir) {
		t.Error(err)
	}
	if _, err := fs.ReadFile(fsys, "Loader"); !errors.Is(err, iofs.ErrIsDir) {
		t.Error(err)
	}

	f, err := fsys.Open("Loader/Entries/A long name.conf")
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 4)
	if n, err := f.(io.ReaderAt).ReadAt(b, 8); n != 2 || err != io.EOF {
		t.Errorf("ReadAt at the end: %d, %v", n, err)
	}
	if _, err := f.(io.ReaderAt).ReadAt(b, -1); err == nil || err == io.EOF {
		t.Errorf("ReadAt before the start: %v", err)
	}
	if at, err := f.(io.Seeker).Seek(-3, io.SeekEnd); at != 7 || err != nil {
		t.Errorf("Seek: %d, %v", at, err)
	}
	if b, err := io.ReadAll(f); string(b) != "789" || err != nil {
		t.Errorf("read after Seek: %q, %v", b, err)
	}
	f.Close()
	for _, err := range []error{second(f.Read(b)), second(f.(io.ReaderAt).ReadAt(b, 0)), second(f.(io.Seeker).Seek(0, 0)), second(f.Stat()), f.Close()} {
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
	dir, err := fsys.Open(".")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dir.Read(b); !errors.Is(err, iofs.ErrIsDir) {
		t.Error(err)
	}
	var seen []string
	for {
		list, err := dir.(fs.ReadDirFile).ReadDir(2)
		for _, e := range list {
			seen = append(seen, e.Name())
		}
		if err == io.EOF {
			break
		}
		if err != nil || len(seen) > 3 {
			t.Fatal(seen, err)
		}
	}
	if strings.Join(seen, " ") != "Loader ro.txt Öl.txt" {
		t.Error(seen)
	}
	if list, err := dir.(fs.ReadDirFile).ReadDir(-1); len(list) != 0 || err != nil {
		t.Errorf("ReadDir(-1) at the end: %v, %v", list, err)
	}
	dir.Close()
	if _, err := dir.(fs.ReadDirFile).ReadDir(-1); !errors.Is(err, fs.ErrClosed) {
		t.Error(err)
	}
}

func second[T any](_ T, err error) error { return err }

// TestFSSurrogate: io/fs cannot say a name that is not UTF-8; the file must be reachable nevertheless.
func TestFSSurrogate(t *testing.T) {
	d, v := mustFormat(t, 2<<20, FormatOptions{})
	name := "lone" + fromUnits([]uint16{0xD800}) + ".txt"
	populate(t, d, map[string]string{name: "data"}, 1)
	fsys := mustScan(t, v).FS()
	list, err := fs.ReadDir(fsys, ".")
	if err != nil || len(list) != 1 || !strings.HasPrefix(list[0].Name(), "LONE") {
		t.Fatal(list, err)
	}
	if b, err := fs.ReadFile(fsys, list[0].Name()); string(b) != "data" || err != nil {
		t.Error(b, err)
	}
	if err := fstest.TestFS(fsys, list[0].Name()); err != nil {
		t.Error(err)
	}
}

// TestFSDamaged wants errors, never a part of a file or directory.
func TestFSDamaged(t *testing.T) {
	d, v := mustFormat(t, 2<<20, FormatOptions{SectorsPerCluster: 1})
	files := map[string]string{"file": strings.Repeat("x", 3000), "good": "good"}
	for i := range 26 {
		files["dir/"+strings.Repeat("n", 20)+string(rune('A'+i))] = ""
	}
	populate(t, d, files, 1)
	tr := mustScan(t, v)
	for _, name := range []string{"file", "dir"} {
		c := tr.Root.Child(name).Runs[0].First + 1
		off, n := entryOffset(FAT12, c)
		b := make([]byte, n)
		if _, err := d.ReadAt(b, v.geo.FATOff+off); err != nil {
			t.Fatal(err)
		}
		encodeEntry(FAT12, c, b, entryFree)
		d.poke(v.geo.FATOff+off, b...)
	}
	v, err := Open(d)
	if err != nil {
		t.Fatal(err)
	}
	fsys := mustScan(t, v).FS()
	for op, err := range map[string]error{
		"open file": second(fsys.Open("file")), "read file": second(fs.ReadFile(fsys, "file")),
		"open dir": second(fsys.Open("dir")), "list dir": second(fs.ReadDir(fsys, "dir")), "in dir": second(fsys.Open("dir/what")),
	} {
		if !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", op, err)
		}
	}
	if b, err := fs.ReadFile(fsys, "good"); string(b) != "good" || err != nil {
		t.Error(b, err)
	}
}

func TestFSConcurrent(t *testing.T) {
	d, v := mustFormat(t, 40<<20, FormatOptions{})
	files := testFiles()
	populate(t, d, files, 2)
	fsys := mustScan(t, v).FS()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			err := fs.WalkDir(fsys, ".", func(p string, e fs.DirEntry, err error) error {
				if err != nil || e.IsDir() {
					return err
				}
				b, err := fs.ReadFile(fsys, p)
				if err == nil && !bytes.Equal(b, []byte(files[p])) {
					t.Errorf("%s: wrong content", p)
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// TestFSDuplicates: of two entries with one name the first counts, as for every other reader.
func TestFSDuplicates(t *testing.T) {
	d, v := mustFormat(t, 2<<20, FormatOptions{})
	populate(t, d, map[string]string{"A.TXT": "first", "B.TXT": "second"}, 1)
	d.poke(v.geo.RootOff+slotSize, 'A')
	tr := mustScan(t, v)
	fsys := tr.FS()
	list, err := fs.ReadDir(fsys, ".")
	if err != nil || len(list) != 1 || tr.Damage() == nil {
		t.Error(list, err, tr.Damage())
	}
	if b, err := fs.ReadFile(fsys, "a.txt"); string(b) != "first" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if n := tr.Lookup("A.TXT"); n != tr.Root.Children[0] {
		t.Error("Lookup finds another file")
	}
}

// TestTooManyNodes: a volume with more files than any boot volume has is an error, and never a tree with some of them.
func TestTooManyNodes(t *testing.T) {
	testVolumes(t, func(t *testing.T, d *sparseDev, files map[string]string) {
		v, err := Open(d)
		if err != nil {
			t.Fatal(err)
		}
		all := mustScan(t, v).nodes
		defer func(n int) { maxNodes = n }(maxNodes)
		maxNodes = all
		mustScan(t, v)
		if maxNodes = all - 1; all == 0 {
			return
		}
		if tree, err := v.Scan(); tree != nil || !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
		if tree, _, err := v.ScanAround(); tree != nil || !errors.Is(err, ErrDamaged) {
			t.Error(err)
		}
	})
}
