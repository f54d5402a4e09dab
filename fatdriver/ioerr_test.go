package fatdriver

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"espmirror/blockdev"
)

// failDev fails one read and counts them all.
type failDev struct {
	blockdev.Device
	fail, reads int
}

func (d *failDev) ReadAt(p []byte, off int64) (int, error) {
	d.reads++
	if d.reads-1 == d.fail {
		clear(p) // what a failed read leaves behind must not be taken for data
		return 0, errInjected
	}
	return d.Device.ReadAt(p, off)
}

// TestReadErrors fails the k-th read of each operation, for every k: the operation must fail with that error. A medium
// that cannot be read must never look like a volume with less on it.
func TestReadErrors(t *testing.T) {
	readAll := func(v *Volume) error {
		tr, err := v.Scan()
		if err != nil {
			return err
		}
		fsys := tr.FS()
		return fs.WalkDir(fsys, ".", func(p string, e fs.DirEntry, err error) error {
			if err != nil || e.IsDir() {
				return err
			}
			_, err = fs.ReadFile(fsys, p)
			return err
		})
	}
	ops := map[string]func(v *Volume) error{
		"Scan":        func(v *Volume) error { return second(v.Scan()) },
		"Check":       func(v *Volume) error { return second(v.Check()) },
		"FS":          readAll,
		"FreeBytes":   func(v *Volume) error { return second(v.FreeBytes()) },
		"TargetError": (*Volume).TargetError,
		"Refresh":     (*Volume).Refresh,
	}
	testVolumes(t, func(t *testing.T, d *sparseDev, _ map[string]string) {
		for name, op := range ops {
			for k := 0; ; k++ {
				dev := &failDev{Device: d, fail: k}
				v, err := Open(dev)
				if err == nil {
					err = op(v)
				}
				if dev.reads <= k {
					if err != nil {
						t.Errorf("%s: %v without any error of the device", name, err)
					}
					if k < 2 {
						t.Errorf("%s takes only %d reads", name, k)
					}
					break
				}
				if !errors.Is(err, errInjected) {
					t.Errorf("%s: read %d failed, and it said: %v", name, k, err)
				} else if !strings.HasPrefix(err.Error(), "cannot ") && name != "FS" {
					t.Errorf("%s: error without a prefix: %v", name, err)
				}
			}
		}
	})
}
