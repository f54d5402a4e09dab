package replicate

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"

	"espmirror/fatdriver"
)

// treeDigest is the digest of the selected part of a tree in the form that all members share: names folded and without
// boot counters, of loader entries the text with the member's own words replaced by what they stand for. Times and
// attributes have no part in it, nor have directories: on a target one may stay for the sake of what is not replicated.
// hash gives the SHA-256 of a file; files for which without is true are left out, unless it is nil.
func treeDigest(src Source, sel *selection, texts map[string]string, without func(*Item) bool, hash func(*Item) ([32]byte, error)) (Digest, error) {
	var lines []string
	var add func(it *Item, key string) error
	add = func(it *Item, key string) error {
		if sel.excluded(it.Path) || it.Err != nil || without != nil && without(it) {
			return nil
		}
		if it.Dir {
			for _, c := range it.Children {
				if err := add(c, key+"/"+entryKey(it.Path, c.Name)); err != nil {
					return err
				}
			}
			return nil
		}
		var sum [32]byte
		if len(texts) > 0 && hasWords(it) {
			text, err := readItem(src, it)
			if err != nil {
				return err
			}
			h := sha256.New()
			w := bufio.NewWriter(h)
			canonicalTo(w, text, texts)
			if err := w.Flush(); err != nil {
				return err
			}
			h.Sum(sum[:0])
		} else {
			var err error
			if sum, err = hash(it); err != nil {
				return err
			}
		}
		lines = append(lines, hex.EncodeToString(sum[:])+" "+key)
		return nil
	}
	anchors := sel.anchors
	if sel.everything() {
		anchors = nil // and what has come to the root since
		for _, c := range src.Root().Children {
			anchors = append(anchors, c.Path)
		}
	}
	for _, a := range anchors {
		if it := src.Root().lookup(a); it != nil {
			if err := add(it, path.Join(fatdriver.Fold(path.Dir(it.Path)), entryKey(path.Dir(it.Path), it.Name))); err != nil {
				return Digest{}, err
			}
		}
	}
	slices.Sort(lines)
	h := sha256.New()
	fmt.Fprintf(h, "espmirror tree 1\n")
	for _, l := range lines {
		var n [8]byte
		binary.LittleEndian.PutUint64(n[:], uint64(len(l)))
		h.Write(n[:])
		h.Write([]byte(l))
	}
	var d Digest
	h.Sum(d[:0])
	return d, nil
}

// hasWords says whether a file may hold words that differ from member to member: it is a loader entry.
func hasWords(it *Item) bool {
	return !it.Dir && it.Size <= maxEntryFile && fatdriver.Fold(path.Dir(it.Path)) == "LOADER/ENTRIES" &&
		strings.HasSuffix(fatdriver.Fold(it.Name), ".CONF")
}

// fingerprint is a hash over what a volume's directories say of the selected files, and where these lie: it changes with
// every change that does not write into the clusters of a file in place, and takes no reading of files. Dates of last
// access are left out, they change by reading. texts are what else the comparison goes by; without any they add nothing.
func fingerprint(tree *fatdriver.Tree, sel *selection, texts ...map[string]string) string {
	h := sha256.New()
	fmt.Fprintf(h, "espmirror fingerprint 1\n")
	h.Write(tree.Volume().Identity())
	var b [8]byte
	put := func(n uint64) {
		binary.LittleEndian.PutUint64(b[:], n)
		h.Write(b[:])
	}
	var add func(n *fatdriver.Node, at string)
	add = func(n *fatdriver.Node, at string) {
		if sel.excluded(at) {
			return
		}
		put(uint64(len(at)))
		h.Write([]byte(at))
		if n.Entry != nil {
			group := n.Entry.Unread()
			put(uint64(len(group)))
			h.Write(group)
		}
		put(uint64(len(n.Runs)))
		for _, r := range n.Runs {
			put(uint64(r.First))
			put(uint64(r.Count))
		}
		for _, c := range n.Children {
			add(c, path.Join(at, c.Name()))
		}
	}
	anchors := slices.Clone(sel.anchors)
	if sel.everything() {
		for _, c := range tree.Root.Children {
			if !sel.covers(c.Name()) {
				anchors = append(anchors, c.Name())
			}
		}
	}
	slices.Sort(anchors)
	for _, a := range anchors {
		if n := lookup(tree.Root, a); n != nil {
			add(n, a)
		}
	}
	for i, m := range texts {
		for _, name := range slices.Sorted(maps.Keys(m)) {
			put(uint64(i))
			for _, t := range []string{name, m[name]} {
				put(uint64(len(t)))
				h.Write([]byte(t))
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}
