package archive

import (
	"context"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"espmirror/fatdriver"
	"espmirror/replicate"
)

// maxDepth bounds how deep directories may nest, as replicate and fatdriver bound it.
const maxDepth = 250

// maxFile is the largest file that FAT can hold, in bytes.
const maxFile = 1<<32 - 1

// content says where in the archive a file lies. Hard links share one.
type content struct {
	off  int64 // of the data; of the header when the file is sparse
	size int64
	// sparse files are read through archive/tar, which alone knows their holes.
	sparse bool
}

// node is a name in the archive, with what the last member of that name says.
type node struct {
	dir   bool
	kids  map[string]*node
	made  bool // a directory that no member is
	mode  fs.FileMode
	mtime time.Time
	data  *content
	err   error // why it cannot be replicated
	mixed bool  // a directory and something else; err stays whatever comes later
}

// builder collects the members of an archive.
type builder struct {
	ctx     context.Context
	limits  Limits
	root    *node
	members int
	names   int64
	sparse  int64 // bytes of sparse files, with their holes
}

func newBuilder(ctx context.Context, l Limits) *builder {
	return &builder{ctx: ctx, limits: l, root: &node{dir: true, made: true, kids: map[string]*node{}}}
}

// count refuses an archive with too many members. The offset is that of the member's header.
func (b *builder) count(off int64) error {
	if err := b.ctx.Err(); err != nil {
		return err
	}
	if b.members++; b.members > b.limits.Members {
		return fmt.Errorf("%w: at offset 0x%x is more than its %dth member or directory", ErrTooLarge, off, b.limits.Members)
	}
	return nil
}

// keep refuses an archive with too much text in its names, which stay in memory.
func (b *builder) keep(name string) error {
	if b.names += int64(len(name)); b.names > b.limits.Names {
		return fmt.Errorf("%w: its names have more than %d bytes", ErrTooLarge, b.limits.Names)
	}
	return nil
}

// parts splits the name of a member; none are left of the root's.
func parts(name string, off int64) ([]string, error) {
	if len(name) > maxName {
		return nil, fmt.Errorf("%w: the name of the member at offset 0x%x has %d bytes, at most %d are read", ErrTooLarge, off, len(name), maxName)
	}
	var out []string
	for part := range strings.SplitSeq(name, "/") {
		switch part {
		case "", ".":
		case "..":
			return nil, fmt.Errorf("%w: the member %q at offset 0x%x leads out of it", ErrDamaged, name, off)
		default:
			out = append(out, part)
		}
	}
	return out, nil
}

// add puts a member into the tree.
func (b *builder) add(name string, off int64, n *node) error {
	ps, err := parts(name, off)
	if err != nil {
		return err
	}
	// Every member counts, also one that replaces another: an archive of nothing else must end as well.
	if err := b.count(off); err != nil {
		return err
	}
	if len(ps) == 0 {
		if !n.dir {
			return fmt.Errorf("%w: the member at offset 0x%x has the name %q, which no file can have", ErrDamaged, off, name)
		}
		return nil
	}
	at := b.root
	for i, part := range ps {
		if i > maxDepth {
			return nil // what is too deep is in error with its directory
		}
		kid := at.kids[part]
		last := i == len(ps)-1
		if kid == nil {
			if !last {
				if err := b.count(off); err != nil {
					return err
				}
			}
			full := strings.Join(ps[:i+1], "/")
			if err := b.keep(full); err != nil {
				return err
			}
			kid = &node{dir: true, made: true}
			if last {
				kid = n
			}
			if kid.dir {
				kid.kids = map[string]*node{}
			}
			// A part would keep all of the name in memory, which may have been longer by any number of "./".
			if at.kids[strings.Clone(part)] = kid; kid.dir && i+1 > maxDepth {
				kid.err, kid.mixed = fmt.Errorf("cannot replicate %s: directories nest deeper than %d levels", full, maxDepth), true
			}
			at = kid
			continue
		}
		if isDir := !last || n.dir; isDir != kid.dir && !kid.mixed {
			kid.mixed = true
			kid.err = fmt.Errorf("cannot replicate %s: one member of the archive makes it a directory, and another one something else", strings.Join(ps[:i+1], "/"))
			if kid.dir, kid.data = true, nil; kid.kids == nil {
				kid.kids = map[string]*node{}
			}
		}
		switch {
		case !last || kid.mixed:
		case n.dir:
			kid.made, kid.mode, kid.mtime = false, n.mode, n.mtime
		default:
			*kid = *n
		}
		at = kid
	}
	return nil
}

// find returns the node with the name of a member, nil when there is none.
func (b *builder) find(name string) *node {
	ps, err := parts(name, 0)
	if err != nil {
		return nil
	}
	at := b.root
	for _, part := range ps {
		if at = at.kids[part]; at == nil {
			return nil
		}
	}
	return at
}

// link makes a node the hard link to another name: it has what that has at this place in the archive.
func (b *builder) link(n *node, name, target string) {
	t := b.find(target)
	switch {
	case t == nil:
		n.err = fmt.Errorf("cannot replicate %s: it is a hard link to %s, which does not stand before it in the archive", shown(name), shown(target))
	case t.err != nil:
		n.err = fmt.Errorf("cannot replicate %s: it is a hard link: %w", shown(name), t.err)
	case t.dir:
		n.err = fmt.Errorf("cannot replicate %s: it is a hard link to %s, which is a directory", shown(name), shown(target))
	default:
		n.data = t.data
	}
}

// shown is the name of a member as messages have it.
func shown(name string) string { return strings.TrimPrefix(path.Join("/", name), "/") }

// special is a member that is neither a file nor a directory.
func special(name, what string) *node {
	return &node{err: fmt.Errorf("cannot replicate %s: it is %s, which FAT cannot hold", shown(name), what)}
}

// items makes the tree that package replicate reads.
func (b *builder) items() (*replicate.Item, map[*replicate.Item]*content) {
	files := map[*replicate.Item]*content{}
	return b.root.item("", "", nil, files), files
}

// item makes the item of a node. err is that of a directory above it.
func (n *node) item(name, at string, err error, files map[*replicate.Item]*content) *replicate.Item {
	it := &replicate.Item{Name: name, Path: at, Dir: n.dir, Err: err}
	if it.Err == nil {
		it.Err = n.err
	}
	if at != "" && it.Err == nil {
		if err := fatdriver.CheckName(name); err != nil {
			it.Err = fmt.Errorf("cannot replicate %s: %w", at, err)
		}
	}
	if !n.dir {
		if n.data != nil {
			if it.Size = n.data.size; it.Size > maxFile && it.Err == nil {
				it.Err = fmt.Errorf("cannot replicate %s: it has %d bytes, FAT holds at most %d", at, it.Size, int64(maxFile))
			}
			files[it] = n.data
		}
		it.Meta.Attr = fatdriver.AttrArchive
		if n.mode&0o200 == 0 {
			it.Meta.Attr |= fatdriver.AttrReadOnly
		}
		setTime(it, n.mtime)
		return it
	}
	names := make([]string, 0, len(n.kids))
	for name := range n.kids {
		names = append(names, name)
	}
	slices.Sort(names)
	same := map[string][]string{} // names that FAT takes for one
	for _, name := range names {
		k := fatdriver.Fold(name)
		same[k] = append(same[k], name)
	}
	newest := time.Time{}
	passed := map[string]int{} // how many of them there were so far
	grafts := map[string]*graft{}
	for _, name := range names {
		k, p, err := fatdriver.Fold(name), path.Join(at, name), it.Err
		if all := same[k]; err == nil && len(all) > 1 {
			// They come in the order of all. There may be a million of them.
			i := passed[k]
			passed[k] = i + 1
			err = fmt.Errorf("cannot replicate %s: FAT takes its name for that of %s", p, path.Join(at, all[(i+1)%len(all)]))
		}
		c := n.kids[name].item(name, p, err, files)
		it.Children = append(it.Children, c)
		if c.Meta.Modified.After(newest) {
			newest = c.Meta.Modified
		}
		if len(same[k]) > 1 {
			if grafts[k] == nil {
				grafts[k] = &graft{on: c}
			} else {
				grafts[k].add(c)
			}
		}
	}
	if n.made {
		setTime(it, newest)
	} else {
		setTime(it, n.mtime)
	}
	return it
}

// graft puts what is below an item also below another one, whose name FAT takes for the same. Both are in error, and so is
// all below them. Without this, what is selected below the second of two directories would not be found: a path leads
// through the first one, and what the source does not have is removed from the targets.
type graft struct {
	on   *replicate.Item
	have map[string]*graft // on each of its children, by the folded name; nil before the first add
}

func (g *graft) add(second *replicate.Item) {
	if g.have == nil {
		g.have = map[string]*graft{}
		for _, c := range g.on.Children {
			if k := fatdriver.Fold(c.Name); g.have[k] == nil {
				g.have[k] = &graft{on: c}
			}
		}
	}
	for _, c := range second.Children {
		k := fatdriver.Fold(c.Name)
		if h := g.have[k]; h != nil {
			h.add(c)
		} else {
			g.have[k] = &graft{on: c}
			g.on.Children = append(g.on.Children, c)
		}
	}
}

// setTime dates an item as a file of a directory is dated: with the one time that is known.
func setTime(it *replicate.Item, t time.Time) {
	it.Meta.Created, it.Meta.Modified, it.Meta.Accessed = t, t, t
}
