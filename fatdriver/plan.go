package fatdriver

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"sort"
)

// Want is a file or directory as it is to be after a transaction.
type Want struct {
	Name string
	Dir  bool

	// Have is what the volume has already: the file whose data clusters are kept, or the directory whose slot is. Without
	// a Template and under the same Name, its slots are kept byte for byte.
	Have *Node
	// Template holds slots, from this or another volume, that give name, short name, attributes and times.
	Template []byte
	// Meta gives attributes and times when there is no Template and the entry is new or has another name.
	Meta Meta

	Size       int64 // bytes of a new file
	Content    any   // the caller's handle on the content of a new file
	Contiguous bool  // a new file must lie in one run

	Children []*Want // of a directory
}

// Carry wants a node to stay as it is, with everything below it.
func Carry(n *Node) *Want {
	w := &Want{Name: n.Name(), Dir: n.IsDir(), Have: n}
	for _, c := range n.Children {
		w.Children = append(w.Children, Carry(c))
	}
	return w
}

// Anchor is one directory entry to switch: from Old (nil: there is none) to New (nil: there shall be none). Parent
// exists, and stays where it is.
type Anchor struct {
	Parent *Node
	Old    *Node
	New    *Want

	// Whole switches this very entry, even when all that changes lies deeper and could be switched there.
	Whole bool
}

// Changes says whether New is anything else than Old as it is.
func (a Anchor) Changes() bool {
	if a.Old == nil || a.New == nil {
		return a.Old != nil || a.New != nil
	}
	_, _, same := descend(a.Old, []*Want{a.New})
	return !same
}

// Step is a group of anchors whose commits may come in any order. The steps of a plan are committed one after the
// other, and each leaves a whole tree. The same Old may occur in several steps, with the final content in the last.
type Step []Anchor

// ErrNeedSlots is returned by NewPlan when a directory has no room for a new entry and must grow first. The clusters for
// that, and for everything else, are free.
type ErrNeedSlots struct {
	Dir  *Node
	More int64 // clusters that Dir lacks
	Need int64 // clusters for the whole plan, those for directories that grow included
	Free int64 // clusters
}

func (e *ErrNeedSlots) Error() string {
	return fmt.Sprintf("directory /%s has no room for another entry", e.Dir.Path())
}

// Block is one commit write: a sector (of the device, where its sectors are smaller than the volume's) that goes from its old image to its new one.
type Block struct {
	Off      int64 // byte offset on the volume
	Old, New []byte
	Paths    []string // the directory entries that it switches
}

// NewFile is a file whose content a transaction writes.
type NewFile struct {
	Want *Want
	Runs []Run
	sum  checksum // of its clusters as written, padding included
}

// dirImage is a directory that a transaction writes.
type dirImage struct {
	runs  []Run
	image []byte
	path  string
}

// Plan is everything that a transaction will write, worked out and checked before the first write. It holds no content
// of files.
type Plan struct {
	Files  []*NewFile // in the order of their clusters
	Blocks []Block    // in the order of the commits

	tree      *Tree
	dirs      []*dirImage
	alloc     bitmap
	free      bitmap
	allocRuns []Run
	freeRuns  []Run
	chains    []segment
	freeTotal int64                // clusters free before
	gone      map[Cluster]checksum // of directories that are replaced, where several commits do it
	slotEdits map[int64][]int64    // sector offset → byte offsets of slots that a block may change
}

// segment is a part of a chain to be entered into the FAT: Run.First … with links to the next cluster, the last one
// leading to next (an end mark or the first cluster of the next segment).
type segment struct {
	Run
	next uint32
}

type planner struct {
	p     *Plan
	t     *Tree
	a     *allocator
	files map[*Want]*NewFile
	raw   map[*Node][]byte // content of parents of anchors, as it will be after the steps so far
	slots map[*Node]map[*Node]slotPlace
	old   bitmap             // clusters of everything that anchors replace
	keep  bitmap             // clusters of what the final state has of that
	added map[*Node][]*Entry // entries inserted into a parent by this plan
	gone  []*Node            // directories that anchors replace
	need  *ErrNeedSlots      // set when a parent must grow first: the rest is planned for its need of space alone
}

// slotPlace is where an anchor's slots are in its parent.
type slotPlace struct{ first, n int }

// NewPlan works out the transaction that takes the tree through steps. keepFree bytes must remain free at the peak.
// Nothing is written. It returns ErrNoSpace with the shortfall, *ErrNeedSlots, or ErrName.
func (t *Tree) NewPlan(steps []Step, keepFree int64) (*Plan, error) {
	a, err := newAllocator(t.vol)
	if err != nil {
		return nil, err
	}
	g := &t.vol.geo
	pl := &planner{
		p: &Plan{tree: t, freeTotal: a.total, slotEdits: map[int64][]int64{}}, t: t, a: a,
		files: map[*Want]*NewFile{},
		raw:   map[*Node][]byte{}, slots: map[*Node]map[*Node]slotPlace{},
		old: newBitmap(g), keep: newBitmap(g), added: map[*Node][]*Entry{},
	}
	steps = lower(steps)
	seen := map[*Node]bool{}
	last := map[*Node]*Want{}
	for _, s := range steps {
		for _, an := range s {
			if an.Old != nil && !seen[an.Old] {
				seen[an.Old] = true
				pl.collect(an.Old, pl.old)
			}
			if an.Old != nil {
				last[an.Old] = an.New
			}
		}
	}
	for _, w := range last {
		if w != nil {
			pl.keepFiles(w)
		}
	}
	for _, s := range steps {
		if err := pl.step(s, last); err != nil {
			return nil, err
		}
	}
	if err := a.shortfall(keepFree); err != nil {
		return nil, err
	}
	if pl.need != nil {
		pl.need.Need, pl.need.Free = a.asked, a.total
		return nil, pl.need
	}
	return pl.finish()
}

// lower moves each anchor down to the lowest directory that holds all of its changes, so that a change deep in a
// selected tree makes shadows of the directories below that point only. The tree still switches in one write.
func lower(steps []Step) []Step {
	wants := map[*Node][]*Want{}
	whole := map[*Node]bool{}
	var order []*Node
	for _, s := range steps {
		for _, an := range s {
			if an.Old != nil {
				whole[an.Old] = whole[an.Old] || an.Whole && an.Changes()
				if _, ok := wants[an.Old]; !ok {
					order = append(order, an.Old)
				}
				wants[an.Old] = append(wants[an.Old], an.New)
			}
		}
	}
	to := map[*Node]*Node{} // anchor → lowered anchor, nil when nothing changes
	into := map[*Want]*Want{}
	for _, old := range order {
		cur, ws := old, wants[old]
		orig := ws
		for !whole[old] {
			next, nws, same := descend(cur, ws)
			if same {
				cur = nil
				break
			}
			if next == nil {
				break
			}
			cur, ws = next, nws
		}
		to[old] = cur
		for i := range orig {
			if cur != nil {
				into[orig[i]] = ws[i]
			}
		}
	}
	var out []Step
	for _, s := range steps {
		var ns Step
		for _, an := range s {
			if an.Old == nil {
				if an.New != nil {
					ns = append(ns, an)
				}
				continue
			}
			cur := to[an.Old]
			if cur == nil {
				continue
			}
			nw := an.New
			if nw != nil {
				nw = into[nw]
			}
			ns = append(ns, Anchor{Parent: cur.Parent, Old: cur, New: nw})
		}
		if len(ns) > 0 {
			out = append(out, ns)
		}
	}
	return out
}

// descend says whether the wants are all the same as old (same), or differ from it only within one and the same child
// directory, which it returns with the wants for it.
func descend(old *Node, ws []*Want) (next *Node, nws []*Want, same bool) {
	same = true
	for _, w := range ws {
		if w == nil || w.Have != old || w.Dir != old.IsDir() {
			return nil, nil, false
		}
		if !old.IsDir() {
			continue
		}
		if len(w.Children) != len(old.Children) {
			return nil, nil, false
		}
		var diff *Want
		for _, c := range w.Children {
			if c.Have == nil || c.Have.Parent != old || c.Template != nil || c.Name != c.Have.Name() {
				return nil, nil, false
			}
			if c.Dir && differs(c) {
				if diff != nil {
					return nil, nil, false
				}
				diff = c
			}
		}
		if diff == nil {
			// This one is unchanged; an earlier or later step may still differ below.
			nws = append(nws, nil)
			continue
		}
		same = false
		if next != nil && next != diff.Have {
			return nil, nil, false
		}
		next = diff.Have
		nws = append(nws, diff)
	}
	if same {
		return nil, nil, true
	}
	for i := range nws {
		if nws[i] == nil {
			for _, c := range ws[i].Children {
				if c.Have == next {
					nws[i] = c
				}
			}
		}
	}
	return next, nws, false
}

// differs says whether a directory that exists is to change anywhere below.
func differs(w *Want) bool {
	if w.Have == nil || len(w.Children) != len(w.Have.Children) {
		return true
	}
	for _, c := range w.Children {
		if c.Have == nil || c.Have.Parent != w.Have || c.Template != nil || c.Name != c.Have.Name() || c.Dir && differs(c) {
			return true
		}
	}
	return false
}

// collect enters the clusters of a node and of everything below it into b.
func (pl *planner) collect(n *Node, b bitmap) {
	b.setRuns(n.Runs)
	if n.IsDir() {
		pl.gone = append(pl.gone, n)
	}
	for _, c := range n.Children {
		pl.collect(c, b)
	}
}

// keepFiles enters the clusters of the files that a final state keeps.
func (pl *planner) keepFiles(w *Want) {
	if !w.Dir && w.Have != nil {
		pl.keep.setRuns(w.Have.Runs)
	}
	for _, c := range w.Children {
		pl.keepFiles(c)
	}
}

// step plans one group of anchors: the shadows, then the sectors of the parents that switch to them.
func (pl *planner) step(s Step, last map[*Node]*Want) error {
	var parents []*Node
	before := map[*Node][]byte{}
	paths := map[*Node][]string{}
	for _, an := range s {
		raw, err := pl.parentRaw(an.Parent)
		if err != nil {
			return err
		}
		if _, ok := before[an.Parent]; !ok {
			parents = append(parents, an.Parent)
			before[an.Parent] = append([]byte(nil), raw...)
		}
		var name string
		switch {
		case an.Old != nil:
			name = an.Old.Path()
		case an.Parent.Parent == nil:
			name = an.New.Name
		default:
			name = an.Parent.Path() + "/" + an.New.Name
		}
		paths[an.Parent] = append(paths[an.Parent], name)
		if err := pl.anchor(an, last[an.Old] == an.New); err != nil {
			return err
		}
	}
	for _, parent := range parents {
		pl.blocks(parent, before[parent], paths[parent])
	}
	return nil
}

// parentRaw is the content of a directory that keeps its place, with the changes planned so far.
func (pl *planner) parentRaw(n *Node) ([]byte, error) {
	if raw, ok := pl.raw[n]; ok {
		return raw, nil
	}
	raw, err := pl.t.vol.rawDir(n)
	if err != nil {
		return nil, err
	}
	pl.raw[n] = raw
	pl.slots[n] = map[*Node]slotPlace{}
	for _, c := range n.Children {
		pl.slots[n][c] = slotPlace{c.Entry.Index, c.Entry.slots()}
	}
	return raw, nil
}

// anchor plans one switch: patch, insert or delete in the parent's slots.
func (pl *planner) anchor(an Anchor, final bool) error {
	raw := pl.raw[an.Parent]
	switch {
	case an.Old == nil:
		group, err := pl.insertGroup(an)
		if err != nil {
			return err
		}
		if err := pl.place(an.New, group, an.Parent.cluster(), 0, join(an.Parent, an.New.Name)); err != nil {
			return err
		}
		return pl.insert(an.Parent, group)
	case an.New == nil:
		at := pl.slots[an.Parent][an.Old]
		for i := at.first; i < at.first+at.n; i++ {
			raw[i*slotSize] = slotDeleted
			pl.mayEdit(an.Parent, i)
		}
		delete(pl.slots[an.Parent], an.Old)
		return nil
	}
	at := pl.slots[an.Parent][an.Old]
	i := at.first + at.n - 1
	slot := raw[i*slotSize : (i+1)*slotSize]
	fresh := append([]byte(nil), slot...)
	if an.New.Have != an.Old {
		// Another file, or a directory where a file was: its own attributes and times under the name that is there.
		from := make([]byte, slotSize)
		if t := an.New.Template; t != nil {
			copy(from, t[len(t)-slotSize:])
		} else {
			an.New.Meta.put(from)
		}
		copy(fresh[offCrtTenth:offClusHI], from[offCrtTenth:offClusHI])
		copy(fresh[offWrtTime:offClusLO], from[offWrtTime:offClusLO])
		fresh[offAttr] = from[offAttr] &^ AttrDir
		if an.New.Dir {
			fresh[offAttr] |= AttrDir
		}
	}
	if err := pl.place(an.New, fresh, an.Parent.cluster(), an.Old.cluster(), join(an.Parent, an.Old.Name())); err != nil {
		return err
	}
	copy(slot, fresh)
	pl.mayEdit(an.Parent, i)
	return nil
}

// insertGroup makes the slots of a new entry, with a short name that nobody else in the parent has.
func (pl *planner) insertGroup(an Anchor) ([]byte, error) {
	names := newNameSet()
	present := append([]*Entry(nil), pl.added[an.Parent]...)
	for _, c := range an.Parent.Children {
		if _, live := pl.slots[an.Parent][c]; live {
			present = append(present, c.Entry)
		}
	}
	for _, e := range present {
		if err := names.claim(e.Name); err != nil {
			return nil, err
		}
	}
	if err := names.claim(an.New.Name); err != nil {
		return nil, err
	}
	for _, e := range present {
		// What is there keeps its slots, so its alias cannot make way as it does in a shadow.
		if !names.claimShort(e.Name, e.short()) {
			return nil, fmt.Errorf("%w: %q equals the short name of %q in its directory", ErrName, an.New.Name, e.Name)
		}
	}
	group, err := names.newGroup(an.New.Name, an.New.Template, an.New.Meta, an.New.Dir)
	if err != nil {
		return nil, err
	}
	pl.added[an.Parent] = append(pl.added[an.Parent], &Entry{Name: an.New.Name, Group: group})
	return group, nil
}

func join(parent *Node, name string) string {
	if p := parent.Path(); p != "" {
		return p + "/" + name
	}
	return name
}

// place allocates what w needs and enters first cluster and size into the last slot of group. near is the cluster that
// the entry had before.
func (pl *planner) place(w *Want, group []byte, parent, near Cluster, path string) error {
	s := group[len(group)-slotSize:]
	g := &pl.t.vol.geo
	if w.Dir {
		first, err := pl.shadow(w, parent, near, path)
		if err != nil {
			return err
		}
		putSlotCluster(g.Type, s, first)
		clear(s[offFileSize:])
		return nil
	}
	if w.Have != nil {
		putSlotCluster(g.Type, s, w.Have.cluster())
		binary.LittleEndian.PutUint32(s[offFileSize:], uint32(w.Have.Size()))
		return nil
	}
	if w.Size < 0 || w.Size > 1<<32-1 {
		return fmt.Errorf("cannot store %s: it has %d bytes, FAT holds at most %d", path, w.Size, int64(1<<32-1))
	}
	f, ok := pl.files[w]
	if !ok {
		cs := int64(g.ClusterSize)
		runs, err := pl.a.file((w.Size+cs-1)/cs, w.Contiguous)
		if err != nil {
			return fmt.Errorf("cannot store %s: %w", path, err)
		}
		f = &NewFile{Want: w, Runs: runs}
		pl.files[w] = f
		pl.p.Files = append(pl.p.Files, f)
		pl.p.addChain(runs)
	}
	var first Cluster
	if len(f.Runs) > 0 {
		first = f.Runs[0].First
	}
	putSlotCluster(g.Type, s, first)
	binary.LittleEndian.PutUint32(s[offFileSize:], uint32(w.Size))
	return nil
}

// addChain notes that runs become one chain.
func (p *Plan) addChain(runs []Run) {
	for i, r := range runs {
		next := uint32(entryLast)
		if i+1 < len(runs) {
			next = uint32(runs[i+1].First)
		}
		p.chains = append(p.chains, segment{r, next})
	}
}

// shadow builds the image of a new directory and of all directories beneath it: their ".." names their parent, so they
// move when it does. It returns the first cluster, 0 when the volume is too full (which finish reports).
func (pl *planner) shadow(w *Want, parent, near Cluster, path string) (Cluster, error) {
	g := &pl.t.vol.geo
	names := newNameSet()
	for _, c := range w.Children {
		if err := names.claim(c.Name); err != nil {
			return 0, fmt.Errorf("cannot build directory %s: %w", path, err)
		}
	}
	groups := make([][]byte, len(w.Children))
	// What is there already keeps its short names; new entries find theirs around them.
	for pass := 0; pass < 2; pass++ {
		for i, c := range w.Children {
			kept := c.Have != nil && c.Template == nil && c.Name == c.Have.Name()
			if kept != (pass == 0) {
				continue
			}
			template := c.Template
			if kept {
				template = c.Have.Entry.Group
			}
			group, err := names.newGroup(c.Name, template, c.Meta, c.Dir)
			if err != nil {
				return 0, fmt.Errorf("cannot build directory %s: %w", path, err)
			}
			groups[i] = group
		}
	}
	n := 2
	for _, grp := range groups {
		n += len(grp) / slotSize
	}
	var labels []*Entry
	if w.Have != nil && w.Have.IsDir() {
		labels = w.Have.labels
	}
	n += len(labels)
	if n > maxSlots {
		return 0, fmt.Errorf("cannot build directory %s: %d slots are needed, a directory has at most %d", path, n, maxSlots)
	}
	cs := g.ClusterSize
	clusters := (n*slotSize + cs - 1) / cs
	runs, err := pl.a.dir(int64(clusters), near)
	if err != nil {
		return 0, err
	}
	var first Cluster
	if len(runs) > 0 {
		first = runs[0].First
	}
	image := make([]byte, clusters*cs) // zero padded whole (I4)
	dot := func(i int, name string, c Cluster) {
		s := image[i*slotSize : (i+1)*slotSize]
		if w.Have != nil && w.Have.Entry != nil {
			// Times and attributes of the directory it replaces.
			src := w.Have.Entry.short()
			copy(s, src)
		} else if t := w.Template; t != nil {
			copy(s, t[len(t)-slotSize:])
		} else {
			w.Meta.put(s)
		}
		copy(s[:11], "           ")
		copy(s, name)
		s[offNTRes] = 0
		s[offAttr] = s[offAttr]&^(AttrReadOnly|AttrHidden|AttrSystem|AttrLabel|AttrArchive) | AttrDir
		clear(s[offClusHI : offClusHI+2])
		putSlotCluster(g.Type, s, c)
		clear(s[offFileSize:])
	}
	dot(0, ".", first)
	dot(1, "..", parent)
	at := 2 * slotSize
	for i, c := range w.Children {
		near := Cluster(0)
		if err := pl.place(c, groups[i], first, near, path+"/"+c.Name); err != nil {
			return 0, err
		}
		at += copy(image[at:], groups[i])
	}
	for _, l := range labels {
		at += copy(image[at:], l.Group)
	}
	pl.p.dirs = append(pl.p.dirs, &dirImage{runs, image, path})
	pl.p.addChain(runs)
	return first, nil
}

// mayEdit notes that a block may change slot i of a parent.
func (pl *planner) mayEdit(parent *Node, i int) {
	if pl.need != nil {
		return
	}
	off := pl.slotOff(parent, i)
	ss := int64(pl.t.vol.geo.block())
	pl.p.slotEdits[off/ss*ss] = append(pl.p.slotEdits[off/ss*ss], off)
}

// slotOff is the byte offset on the volume of slot i of a directory.
func (pl *planner) slotOff(n *Node, i int) int64 {
	g := &pl.t.vol.geo
	pos := int64(i) * slotSize
	if n.Parent == nil && g.Type != FAT32 {
		return g.RootOff + pos
	}
	cs := int64(g.ClusterSize)
	for _, r := range n.Runs {
		if size := int64(r.Count) * cs; pos >= size {
			pos -= size
			continue
		}
		return g.ClusterOff(r.First) + pos
	}
	panic("internal error: slot beyond the end of its directory")
}

// insert puts a new group into a parent: into deleted slots that lie in one sector, or behind the last entry. Only a group
// that is larger than a sector spans two; blocks sees to their order.
func (pl *planner) insert(parent *Node, group []byte) error {
	raw := pl.raw[parent]
	k := len(group) / slotSize
	per := pl.t.vol.geo.block() / slotSize
	total := len(raw) / slotSize
	end := total
	run := 0
	for i := 0; i < total; i++ {
		b := raw[i*slotSize]
		if b == slotEnd {
			end = i
			break
		}
		if i%per == 0 {
			run = 0
		}
		if b != slotDeleted {
			run = 0
			continue
		}
		if run++; run == k {
			at := i - k + 1
			copy(raw[at*slotSize:], group)
			for j := at; j < at+k; j++ {
				pl.mayEdit(parent, j)
			}
			return nil
		}
	}
	if end+k > total {
		if parent.Parent == nil && pl.t.vol.geo.Type != FAT32 {
			return fmt.Errorf("%w: the root directory has %d slots, %d of them at its end are free, %d are needed", ErrNoSpace, total, total-end, k)
		}
		if pl.need == nil {
			pl.need = &ErrNeedSlots{Dir: parent}
		}
		cs := pl.t.vol.geo.ClusterSize
		for ; end+k > total; total = len(raw) / slotSize {
			raw = append(raw, make([]byte, cs)...)
			pl.a.asked++
			if parent == pl.need.Dir {
				pl.need.More++
			}
		}
		pl.raw[parent] = raw
	}
	if rest := per - end%per; k > rest && k <= per {
		// A group in one sector appears in one write. In two it would leave long-name slots behind where a cut comes in
		// between and no journal is there yet to finish it. What is left of this sector serves shorter names.
		for j := end; j < end+rest; j++ {
			clear(raw[j*slotSize : (j+1)*slotSize])
			raw[j*slotSize] = slotDeleted
			pl.mayEdit(parent, j)
		}
		end += rest
	}
	copy(raw[end*slotSize:], group)
	for j := end; j < end+k; j++ {
		pl.mayEdit(parent, j)
	}
	// The slot after the new end must be an end marker, whatever lay there.
	for j := end + k; j < total && (j%per != 0 || j == end+k); j++ {
		s := raw[j*slotSize : (j+1)*slotSize]
		if !zero(s) {
			clear(s)
			pl.mayEdit(parent, j)
		}
	}
	return nil
}

func zero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }

// blocks compares a parent before and after a step, sector by sector, and appends a block for each write that leads from
// one to the other.
//
// Up to the sector of the end marker it goes from the end to the beginning, so that a deleted entry whose slots lie in
// two sectors loses its short slot, which is the last, before its long name. What lies behind that sector comes alive
// after it, from the beginning to the end. For firmware nothing behind the marker is there, but Linux reads on, and would
// see what is left of a directory that was there once, or an entry without the long name that is still to come: where
// that could be, the sector is first written with all slots deleted.
func (pl *planner) blocks(parent *Node, before []byte, paths []string) {
	if pl.need != nil {
		return
	}
	raw := pl.raw[parent]
	ss := pl.t.vol.geo.block()
	add := func(at int, old, now []byte) {
		if bytes.Equal(old, now) {
			return
		}
		pl.p.Blocks = append(pl.p.Blocks, Block{
			Off:   pl.slotOff(parent, at/slotSize),
			Old:   append([]byte(nil), old...),
			New:   append([]byte(nil), now...),
			Paths: paths,
		})
	}
	marker := 0
	for marker < len(before) && before[marker] != slotEnd {
		marker += slotSize
	}
	behind := marker/ss*ss + ss // where the sector of the marker ends
	changed := func(at int) bool { return !bytes.Equal(before[at:at+ss], raw[at:at+ss]) }
	// A sector that begins with an end marker stays out of sight until it is written, and what it then holds is whole,
	// unless its first slot goes on with the long name of the sector before.
	seen := func(at int) bool {
		last := raw[at-slotSize : at]
		return before[at] != slotEnd || last[0] != slotDeleted && last[offAttr]&attrLongMask == attrLong
	}
	for at := len(raw) - ss; at >= 0; at -= ss {
		switch {
		case !changed(at):
		case at < behind:
			add(at, before[at:at+ss], raw[at:at+ss])
		case seen(at):
			add(at, before[at:at+ss], asleep(raw[at:at+ss]))
		}
	}
	for at := behind; at < len(raw); at += ss {
		switch {
		case !changed(at):
		case seen(at):
			add(at, asleep(raw[at:at+ss]), raw[at:at+ss])
		default:
			add(at, before[at:at+ss], raw[at:at+ss])
		}
	}
}

// asleep is a sector of a directory with every slot in it marked deleted.
func asleep(sector []byte) []byte {
	b := bytes.Clone(sector)
	for at := 0; at < len(b) && b[at] != slotEnd; at += slotSize {
		b[at] = slotDeleted
	}
	return b
}

// finish sorts the plan and asserts the invariants.
func (pl *planner) finish() (*Plan, error) {
	p := pl.p
	p.alloc = pl.a.taken
	p.free = newBitmap(&pl.t.vol.geo)
	for i := range p.free {
		p.free[i] = pl.old[i] &^ pl.keep[i]
	}
	// Shadows that only an intermediate step uses are freed as well.
	final := pl.finalDirs()
	for _, d := range p.dirs {
		if !final[d] {
			p.free.setRuns(d.runs)
		}
	}
	p.allocRuns, p.freeRuns = p.alloc.runs(), p.free.runs()
	sort.Slice(p.Files, func(i, j int) bool { return firstOf(p.Files[i].Runs) < firstOf(p.Files[j].Runs) })
	sort.Slice(p.dirs, func(i, j int) bool { return firstOf(p.dirs[i].runs) < firstOf(p.dirs[j].runs) })
	sort.Slice(p.chains, func(i, j int) bool { return p.chains[i].First < p.chains[j].First })
	if len(p.Blocks) > 1 {
		// Whoever rolls forward must know that nobody has changed what is replaced, besides what replaces it.
		p.gone = map[Cluster]checksum{}
		buf := make([]byte, pageSize)
		for _, n := range pl.gone {
			sum, err := pl.t.vol.hashRuns(n.Runs, buf, nil)
			if err != nil {
				return nil, err
			}
			p.gone[firstOf(n.Runs)] = sum
		}
	}
	if err := p.assert(); err != nil {
		return nil, err
	}
	return p, nil
}

// finalDirs follows the parents as they are after the last step into the new directories that they reach.
func (pl *planner) finalDirs() map[*dirImage]bool {
	byFirst := map[Cluster]*dirImage{}
	for _, d := range pl.p.dirs {
		byFirst[firstOf(d.runs)] = d
	}
	reach := map[*dirImage]bool{}
	var visit func(raw []byte)
	visit = func(raw []byte) {
		d := parseDir(pl.t.vol.geo.Type, raw, true)
		for _, e := range d.entries {
			if !e.IsDir() {
				continue
			}
			if n := byFirst[slotCluster(pl.t.vol.geo.Type, e.short())]; n != nil && !reach[n] {
				reach[n] = true
				visit(n.image[2*slotSize:])
			}
		}
	}
	for _, raw := range pl.raw {
		visit(raw)
	}
	return reach
}

func firstOf(runs []Run) Cluster {
	if len(runs) == 0 {
		return 0
	}
	return runs[0].First
}

var errInvariant = errors.New("internal error: a plan breaks an invariant")
