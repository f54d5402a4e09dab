package replicate

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"sync"

	"espmirror/fatdriver"
)

// chunkSize is how much of a file is read at a time.
const chunkSize = 1 << 20

// matches says for source files which file of one target has the same content, by the target's path. It outlives a
// rescan of the target, which paths do and nodes do not.
type matches map[*Item]string

// compare finds out which selected files the targets have already, by content. Each source file is read once, in step
// with all targets that have a file of the same name and size, and no further than the first difference with all of
// them. Files that no target has under their name are then looked for under another one in the same selected directory.
func (r *run) compare(ctx context.Context) error {
	live := r.alive()
	for _, s := range live {
		s.skip = r.unread(s)
	}
	live = slices.DeleteFunc(live, func(s *side) bool { return s.skip })
	if len(live) == 0 {
		return nil
	}
	files := r.selectedFiles()
	var total, done int64
	for _, f := range files {
		total += f.Size
	}
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		var cand []*side
		var nodes []*fatdriver.Node
		for _, s := range live {
			n, e := r.inPlace(s, f), s.item(f)
			if n == nil || n.IsDir() || n.Size() != e.Size {
				continue
			}
			if e.Size == 0 {
				s.match[f] = n.Path()
				continue
			}
			if e.data != nil {
				if same, err := s.holds(n, e.data); err != nil {
					s.fail(fmt.Errorf("cannot read %s: %w", n.Path(), err))
				} else if same {
					s.match[f] = n.Path()
				}
				continue
			}
			cand, nodes = append(cand, s), append(nodes, n)
		}
		if len(cand) > 0 || r.line != nil && f.Size > 0 {
			if err := r.lockstep(f, cand, nodes); err != nil {
				return err
			}
		}
		done += f.Size
		r.progress(Progress{Phase: "compare", Done: done, Total: total})
	}
	for _, s := range live {
		if s.res.Err != nil {
			continue
		}
		if err := r.renames(s); err != nil {
			return err
		}
		// A plan that is refused is refused in the plan, with its reason.
		_, changes, err := r.wants(s, false)
		s.same = err == nil && len(changes) == 0
		s.counters = err == nil && !slices.ContainsFunc(changes, func(c Change) bool { return !countsAlone(c) })
	}
	return nil
}

// holds says whether a file of the target has the content.
func (s *side) holds(n *fatdriver.Node, content []byte) (bool, error) {
	sr, err := s.tree.Open(n)
	if err != nil {
		return false, err
	}
	have := make([]byte, len(content))
	_, err = io.ReadFull(sr, have)
	return bytes.Equal(have, content), err
}

// selectedFiles lists the files of the source below all anchors, in the order of the tree.
func (r *run) selectedFiles() []*Item {
	var out []*Item
	for _, a := range r.sel.anchors {
		if it := r.src.Root().lookup(a); it != nil {
			r.walkItems(it, func(f *Item) { out = append(out, f) })
		}
	}
	return out
}

// walkItems calls f for each selected file of an item.
func (r *run) walkItems(it *Item, f func(*Item)) {
	if r.sel.excluded(it.Path) || it.Err != nil {
		return
	}
	if !it.Dir {
		f(it)
	}
	for _, c := range it.Children {
		r.walkItems(c, f)
	}
}

// lockstep compares one source file with the files that targets have in its place. Where generations are counted it is
// read to its end, and its hash kept.
func (r *run) lockstep(f *Item, cand []*side, nodes []*fatdriver.Node) error {
	rd, err := r.src.Open(f)
	if err != nil {
		return fmt.Errorf("%w: cannot read %s: %w", ErrSource, f.Path, err)
	}
	defer rd.Close()
	readers := make([]io.Reader, len(cand))
	for i, s := range cand {
		sr, err := s.tree.Open(nodes[i])
		if err != nil {
			s.fail(err)
			continue
		}
		readers[i] = sr
	}
	src := make([]byte, min(chunkSize, f.Size))
	sum := sha256.New()
	for at := int64(0); at < f.Size; {
		k := min(int64(len(src)), f.Size-at)
		if _, err := io.ReadFull(rd, src[:k]); err != nil {
			return fmt.Errorf("%w: cannot read %s: %w", ErrSource, f.Path, shrunk(err))
		}
		var wg sync.WaitGroup
		left := 0
		for i := range cand {
			if readers[i] == nil {
				continue
			}
			left++
			wg.Add(1)
			go func() {
				defer wg.Done()
				r.turns.take()
				defer r.turns.done()
				if len(cand[i].buf) < int(k) {
					cand[i].buf = make([]byte, chunkSize)
				}
				buf := cand[i].buf[:k]
				if _, err := io.ReadFull(readers[i], buf); err != nil {
					cand[i].fail(fmt.Errorf("cannot read %s: %w", f.Path, err))
					readers[i] = nil
				} else if !bytes.Equal(buf, src[:k]) {
					readers[i] = nil
				}
			}()
		}
		wg.Wait()
		if r.line != nil {
			sum.Write(src[:k])
		} else if left == 0 {
			return nil
		}
		at += k
	}
	if err := ended(rd); err != nil {
		return fmt.Errorf("%w: cannot read %s: %w", ErrSource, f.Path, err)
	}
	if r.line != nil {
		r.hashes[f] = [32]byte(sum.Sum(nil))
	}
	for i, s := range cand {
		if readers[i] != nil {
			s.match[f] = nodes[i].Path()
		}
	}
	return nil
}

// shrunk words an early end as what it is.
func shrunk(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("it became shorter while it was read")
	}
	return err
}

// ended checks that nothing follows the bytes that the size promised: a file that grows is still being written.
func ended(r io.Reader) error {
	var b [1]byte
	switch _, err := io.ReadFull(r, b[:]); {
	case err == nil:
		return errors.New("it became longer while it was read")
	case !errors.Is(err, io.EOF):
		return err
	}
	return nil
}

// renames looks for files that a target has under another name: same selected directory, same size, same content.
func (r *run) renames(s *side) error {
	for _, a := range r.sel.anchors {
		n, it := lookup(s.tree.Root, a), r.src.Root().lookup(a)
		if n == nil || it == nil || !n.IsDir() || !it.Dir || r.sel.excluded(a) {
			continue
		}
		taken := map[string]bool{}
		var missing []*Item
		r.walkItems(it, func(f *Item) {
			if p, ok := s.match[f]; ok {
				taken[p] = true
			} else if s.item(f).Size > 0 {
				missing = append(missing, f)
			}
		})
		bySize := map[int64][]*fatdriver.Node{}
		r.walkNodes(n, a, func(c *fatdriver.Node) {
			if !taken[c.Path()] {
				bySize[c.Size()] = append(bySize[c.Size()], c)
			}
		})
		hashes := map[*fatdriver.Node][32]byte{}
		for _, f := range missing {
			e := s.item(f)
			if len(bySize[e.Size]) == 0 {
				continue
			}
			want, err := r.hash(e)
			if err != nil {
				return err
			}
			for i, c := range bySize[e.Size] {
				have, ok := hashes[c]
				if !ok {
					sr, err := s.tree.Open(c)
					if err == nil {
						have, err = hashReader(sr, c.Size())
					}
					if err != nil {
						s.fail(fmt.Errorf("cannot read %s: %w", c.Path(), err))
						return nil
					}
					hashes[c] = have
				}
				if have == want {
					s.match[f] = c.Path()
					bySize[e.Size] = append(bySize[e.Size][:i:i], bySize[e.Size][i+1:]...)
					break
				}
			}
		}
	}
	return nil
}

// walkNodes calls f for each file of a target that is selected.
func (r *run) walkNodes(n *fatdriver.Node, at string, f func(*fatdriver.Node)) {
	if r.sel.excluded(at) {
		return
	}
	if !n.IsDir() {
		f(n)
	}
	for _, c := range n.Children {
		r.walkNodes(c, path.Join(at, c.Name()), f)
	}
}

// hash returns the SHA-256 of a source file, worked out once for all targets.
func (r *run) hash(f *Item) ([32]byte, error) {
	if h, ok := r.hashes[f]; ok {
		return h, nil
	}
	if f.data != nil {
		return sha256.Sum256(f.data), nil
	}
	rd, err := r.src.Open(f)
	if err != nil {
		return [32]byte{}, fmt.Errorf("%w: cannot read %s: %w", ErrSource, f.Path, err)
	}
	defer rd.Close()
	h, err := hashReader(rd, f.Size)
	if err != nil {
		return h, fmt.Errorf("%w: cannot read %s: %w", ErrSource, f.Path, err)
	}
	r.hashes[f] = h
	return h, nil
}

func hashReader(r io.Reader, size int64) (sum [32]byte, err error) {
	h := sha256.New()
	if _, err := io.CopyN(h, r, size); err != nil {
		return sum, shrunk(err)
	}
	if err := ended(r); err != nil {
		return sum, err
	}
	h.Sum(sum[:0])
	return sum, nil
}

// lookup finds a path by long names alone: an alias of one file is not the name of another.
func lookup(n *fatdriver.Node, p string) *fatdriver.Node {
	for _, name := range fatdriver.SplitPath(p) {
		if n = childNode(n, name); n == nil {
			return nil
		}
	}
	return n
}

func childNode(n *fatdriver.Node, name string) *fatdriver.Node {
	if c := n.Child(name); c != nil && fatdriver.Fold(c.Name()) == fatdriver.Fold(name) {
		return c
	}
	return nil
}
