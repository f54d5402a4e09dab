package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"sync"

	"espmirror/replicate/crashtest"
)

// progress is what has been done: a line for each scenario and each boot. The first line says for which code and which
// budget; a file of other code is put aside.
type progress struct {
	mu         sync.Mutex
	f          *os.File
	done       map[uint64]bool
	total      crashtest.Tally
	byGeometry map[string]*crashtest.Tally
	fsck       int64
	mtools     int64
	seconds    float64
	old        map[string]int64
	new        map[string]int64
	between    map[string]int64
	mixed      map[string]int64
	again      map[string]int64
	boots      map[string]int64
	violations []violation
}

type heading struct {
	Code         string
	Large, Small crashtest.Budget
}

// tested are the folders whose code the states and their judgement depend on. Left out is reader, which starts the
// machines that read samples of them: how a machine is started changes neither.
var (
	tested = []string{"blockdev", "fatdriver", "journal", "replicate", "fixtures"}
	reader = filepath.Join("fixtures", "vm")
)

// codeHash is a hash over the source that is tested, without its tests.
func codeHash() (string, error) {
	var files []string
	for _, dir := range tested {
		if err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if path == reader {
				return fs.SkipDir
			}
			if err == nil && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
				files = append(files, path)
			}
			return err
		}); err != nil {
			return "", fmt.Errorf("cannot read the source (run this at the top of the checkout): %w", err)
		}
	}
	sort.Strings(files)
	h := sha256.New()
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s %d\n", f, len(b))
		h.Write(b)
	}
	return hex.EncodeToString(h.Sum(nil))[:16], nil
}

func openProgress(path string) (*progress, error) {
	code, err := codeHash()
	if err != nil {
		return nil, err
	}
	p := &progress{done: map[uint64]bool{}, byGeometry: map[string]*crashtest.Tally{}, old: map[string]int64{}, new: map[string]int64{},
		between: map[string]int64{}, mixed: map[string]int64{}, again: map[string]int64{}, boots: map[string]int64{}}
	want := heading{code, large, small}
	if p.f, err = os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644); err != nil {
		return nil, err
	}
	lines := bufio.NewScanner(p.f)
	lines.Buffer(nil, 1<<20)
	end := int64(0)
	for n := 0; lines.Scan(); n++ {
		if n == 0 {
			var have heading
			if json.Unmarshal(lines.Bytes(), &have) != nil || have != want {
				p.f.Close()
				if err := os.Rename(path, path+".old"); err != nil {
					return nil, err
				}
				return openProgress(path)
			}
		} else {
			var o outcome
			if err := json.Unmarshal(lines.Bytes(), &o); err != nil {
				break // the line that was being written when the run was stopped
			}
			p.count(o)
		}
		end += int64(len(lines.Bytes())) + 1
	}
	if err := lines.Err(); err != nil {
		return nil, err
	}
	if err := p.f.Truncate(end); err != nil {
		return nil, err
	}
	if _, err := p.f.Seek(end, 0); err != nil {
		return nil, err
	}
	if end == 0 {
		return p, p.write(want)
	}
	return p, nil
}

func (p *progress) close() { p.f.Close() }

func (p *progress) write(v any) error {
	b, err := json.Marshal(v)
	if err == nil {
		_, err = p.f.Write(append(b, '\n'))
	}
	if err != nil {
		return errors.Join(errors.New("cannot write progress"), err)
	}
	return nil
}

func (p *progress) add(o outcome) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count(o)
	return p.write(o)
}

func (p *progress) count(o outcome) {
	p.seconds += o.Seconds
	p.violations = append(p.violations, o.Violations...)
	if o.Kind != "scenario" {
		p.old[o.Kind] += o.Old
		p.new[o.Kind] += o.New
		p.between[o.Kind] += o.Between
		p.mixed[o.Kind] += o.Mixed
		p.again[o.Kind] += o.Again
		p.boots[o.Kind]++
		return
	}
	p.done[o.Seed] = true
	p.total.Add(o.Tally)
	p.fsck += o.Fsck
	p.mtools += o.Mtools
	if p.byGeometry[o.Geometry] == nil {
		p.byGeometry[o.Geometry] = &crashtest.Tally{}
	}
	p.byGeometry[o.Geometry].Add(o.Tally)
}

func (p *progress) has(seed uint64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.done[seed]
}

// readings is how many samples a system has read.
func (p *progress) readings(kind string) int64 {
	return p.old[kind] + p.new[kind] + p.between[kind] + p.mixed[kind]
}
