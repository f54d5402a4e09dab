package crashtest

import (
	"io"
	"slices"
	"sort"
	"strings"

	"espmirror/replicate"
)

// Tree is a tree of files in memory: path → content. A path that ends in a slash is a directory, which needs naming
// only when it is empty.
type Tree map[string]string

// source is a Tree as what is replicated.
type source struct {
	files Tree
	root  *replicate.Item
}

// Source returns t as a source.
func (t Tree) Source() replicate.Source {
	s := &source{files: t, root: &replicate.Item{Dir: true}}
	dirs := map[string]*replicate.Item{"": s.root}
	var dir func(path string) *replicate.Item
	dir = func(path string) *replicate.Item {
		if d := dirs[path]; d != nil {
			return d
		}
		parent, name := split(path)
		up := dir(parent)
		d := &replicate.Item{Name: name, Path: path, Dir: true}
		up.Children = append(up.Children, d)
		dirs[path] = d
		return d
	}
	for _, p := range t.paths() {
		if d, ok := strings.CutSuffix(p, "/"); ok {
			dir(d)
			continue
		}
		parent, name := split(p)
		up := dir(parent)
		up.Children = append(up.Children, &replicate.Item{Name: name, Path: p, Size: int64(len(t[p]))})
	}
	return s
}

func split(path string) (dir, name string) {
	i := strings.LastIndexByte(path, '/')
	return path[:max(i, 0)], path[i+1:]
}

// paths lists the paths in order.
func (t Tree) paths() []string {
	paths := make([]string, 0, len(t))
	for p := range t {
		paths = append(paths, p)
	}
	sort.Strings(paths)
	return paths
}

// below lists the files in directory dir and below it.
func (t Tree) below(dir string) []string {
	return slices.DeleteFunc(t.paths(), func(p string) bool { return !strings.HasPrefix(p, dir+"/") || strings.HasSuffix(p, "/") })
}

func (s *source) Name() string          { return "memory" }
func (s *source) Root() *replicate.Item { return s.root }
func (s *source) Close() error          { return nil }
func (s *source) Open(it *replicate.Item) (io.ReadCloser, error) {
	return io.NopCloser(strings.NewReader(s.files[it.Path])), nil
}
