// Package manifest states what disk images hold, so that somebody who has not the source can check them: the identity of
// each ESP and XBOOTLDR partition, and of each file its size and SHA-256.
//
// A manifest is one JSON document:
//
//	{
//	  "format": "espmirror manifest 1",
//	  "images": [ by name
//	    { "name", "size_bytes", "sector_size_bytes", "disk_guid",
//	      "volumes": [ by partition number
//	        { "partition", "type", "partition_guid", "partition_label", "offset_bytes", "size_bytes",
//	          "fat_type", "serial", "label", "tree" } ] } ],
//	  "trees": [ by digest
//	    { "sha256", "entries": [ by path
//	        { "path", "directory": true }, { "path", "size_bytes", "sha256" } ] } ]
//	}
//
// A tree is known by the SHA-256 of its listing, and stands there once however many volumes hold it. The listing has one
// line for each entry, in the order of the paths' bytes: "d PATH" or "f SHA256 SIZE PATH", each with a newline behind it.
//
// There is one text for each manifest, down to the last space: what Encode gives. Decode refuses every other one, so that
// no two readers of JSON can take the same file for different things.
package manifest

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// Format is the first field of a manifest, and says which version it is.
const Format = "espmirror manifest 1"

// formatName is what the formats of all versions begin with.
const formatName = "espmirror manifest "

// MaxSize is how many bytes of a manifest are read: those of some two million files.
const MaxSize = 256 << 20

// These bound what a decoder accepts: more than FAT can hold of each.
const (
	maxFileSize = math.MaxUint32
	maxText     = 1024 // bytes of a name or label
	maxPath     = 4096 // bytes
	maxParts    = 256  // directories in one path
)

var (
	// ErrNotManifest is returned for a file that is no manifest at all.
	ErrNotManifest = errors.New("it is not a manifest of espmirror")

	// ErrInvalid is returned for a manifest that is damaged, was edited, or is of a newer version.
	ErrInvalid = errors.New("the manifest cannot be used")
)

// Manifest states what some images hold.
type Manifest struct {
	Format string  `json:"format"`
	Images []Image `json:"images"` // by name
	Trees  []Tree  `json:"trees"`  // by digest
}

// Image is a disk, an image of one, or a volume that was named by itself.
type Image struct {
	Name       string   `json:"name"`       // without its directory
	Size       int64    `json:"size_bytes"` // of the whole disk or image; 0 when the name is that of one partition
	SectorSize int      `json:"sector_size_bytes"`
	DiskGUID   string   `json:"disk_guid,omitempty"` // lower case; "" without a GPT
	Volumes    []Volume `json:"volumes"`             // by partition number
}

// Volume is one FAT volume of an image.
type Volume struct {
	Partition int    `json:"partition"` // its number; 0: the volume has no partition table around it
	Type      string `json:"type,omitempty"`
	PartGUID  string `json:"partition_guid,omitempty"` // as PARTUUID= has it
	PartLabel string `json:"partition_label,omitempty"`
	Offset    int64  `json:"offset_bytes"` // on the disk
	Size      int64  `json:"size_bytes"`
	FATType   string `json:"fat_type"`
	Serial    string `json:"serial,omitempty"` // 1234-ABCD
	Label     string `json:"label,omitempty"`
	Tree      Digest `json:"tree"`
}

// Tree is the content of one or more volumes.
type Tree struct {
	Digest  Digest  `json:"sha256"`  // of the listing
	Entries []Entry `json:"entries"` // by path
}

// Entry is a file or directory.
type Entry struct {
	Path string  `json:"path"` // with slashes, from the root
	Dir  bool    `json:"directory,omitempty"`
	Size *int64  `json:"size_bytes,omitempty"` // nil for a directory
	Sum  *Digest `json:"sha256,omitempty"`     // of the content; nil for a directory
}

// Digest is a SHA-256, in JSON 64 lower-case digits.
type Digest [sha256.Size]byte

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText implements encoding.TextMarshaler.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (d *Digest) UnmarshalText(text []byte) error {
	// A sum that is written in any other way is not ours; the comparison with what Encode gives would only say so later.
	if n, err := hex.Decode(d[:], text[:min(len(text), 2*len(d))]); err != nil || n != len(d) || len(text) != 2*len(d) {
		return fmt.Errorf("%w: %.70q is not a SHA-256 in hexadecimal", ErrInvalid, text)
	}
	return nil
}

// bytes is the size of a file, 0 of a directory.
func (e *Entry) bytes() int64 {
	if e.Size == nil {
		return 0
	}
	return *e.Size
}

// NewTree sorts the entries and takes their digest.
func NewTree(entries []Entry) Tree {
	slices.SortFunc(entries, func(a, b Entry) int { return strings.Compare(a.Path, b.Path) })
	t := Tree{Entries: entries}
	t.Digest = t.listing()
	return t
}

// listing is the digest of the listing that the package comment describes.
func (t *Tree) listing() Digest {
	h := sha256.New()
	for _, e := range t.Entries {
		if e.Dir {
			fmt.Fprintf(h, "d %s\n", e.Path)
		} else if e.Sum != nil {
			fmt.Fprintf(h, "f %s %d %s\n", e.Sum, e.bytes(), e.Path)
		}
	}
	return Digest(h.Sum(nil))
}

// New puts a manifest together from images, whose volumes name their trees, and these trees, of which some may be equal.
func New(images []Image, trees []Tree) (*Manifest, error) {
	m := &Manifest{Format: Format, Images: slices.Clone(images), Trees: slices.Clone(trees)}
	slices.SortStableFunc(m.Images, func(a, b Image) int { return strings.Compare(a.Name, b.Name) })
	for i := range m.Images {
		v := slices.Clone(m.Images[i].Volumes)
		slices.SortStableFunc(v, func(a, b Volume) int { return a.Partition - b.Partition })
		m.Images[i].Volumes = v
	}
	slices.SortFunc(m.Trees, func(a, b Tree) int { return bytes.Compare(a.Digest[:], b.Digest[:]) })
	m.Trees = slices.CompactFunc(m.Trees, func(a, b Tree) bool { return a.Digest == b.Digest })
	if err := m.check(); err != nil {
		return nil, err
	}
	return m, nil
}

// Tree returns the tree with a digest, nil when there is none.
func (m *Manifest) Tree(d Digest) *Tree {
	i, ok := slices.BinarySearchFunc(m.Trees, d, func(t Tree, d Digest) int { return bytes.Compare(t.Digest[:], d[:]) })
	if !ok {
		return nil
	}
	return &m.Trees[i]
}

// Encode gives the text of a manifest: the same for the same manifest, ever.
func (m *Manifest) Encode() ([]byte, error) {
	var buf bytes.Buffer
	if err := m.encodeTo(&buf); err != nil {
		return nil, err
	}
	if buf.Len() > MaxSize {
		return nil, fmt.Errorf("%w: it would have %d bytes, at most %d are read", ErrInvalid, buf.Len(), MaxSize)
	}
	return buf.Bytes(), nil
}

func (m *Manifest) encodeTo(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(m); err != nil {
		return fmt.Errorf("cannot encode the manifest: %w", err)
	}
	return nil
}

// IsManifest says whether a file that begins with these bytes is a manifest, of whatever version.
func IsManifest(head []byte) bool {
	return bytes.HasPrefix(head, []byte("{\n  \"format\": \""+formatName))
}

// Decode reads a manifest. It returns ErrNotManifest for something else, and ErrInvalid, with the place, for one that
// Encode would not have written.
func Decode(data []byte) (*Manifest, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("%w: it has more than %d bytes", ErrInvalid, MaxSize)
	}
	if !IsManifest(data) {
		return nil, ErrNotManifest
	}
	if line, _, _ := bytes.Cut(data[2:], []byte("\n")); string(line) != `  "format": "`+Format+`",` {
		return nil, fmt.Errorf("%w: line 2: the format is not %q: a newer espmirror may read it", ErrInvalid, Format)
	}
	// The decoder would put another character in the place of what is no UTF-8.
	if at := invalidUTF8(data); at >= 0 {
		return nil, fmt.Errorf("%w: line %d: it is not UTF-8", ErrInvalid, lineAt(data, int64(at)))
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	m := &Manifest{}
	if err := dec.Decode(m); err != nil {
		return nil, decodeError(data, dec, err)
	}
	if err := m.check(); err != nil {
		return nil, err
	}
	// What is left: fields that come twice, in another order or with another case, other spaces, and what follows.
	same := &comparer{want: data}
	if err := m.encodeTo(same); err == nil && len(same.want) > 0 {
		same.differs = true
	} else if err != nil && !same.differs {
		return nil, err
	}
	if same.differs {
		return nil, fmt.Errorf("%w: line %d is not as espmirror writes it", ErrInvalid, lineAt(data, int64(len(data)-len(same.want))))
	}
	return m, nil
}

// comparer is a writer that fails where something else is written than it wants.
type comparer struct {
	want    []byte
	differs bool
}

func (c *comparer) Write(p []byte) (int, error) {
	for i := range p {
		if i == len(c.want) || c.want[i] != p[i] {
			c.want, c.differs = c.want[i:], true
			return 0, ErrInvalid
		}
	}
	c.want = c.want[len(p):]
	return len(p), nil
}

func invalidUTF8(b []byte) int {
	if utf8.Valid(b) {
		return -1
	}
	for i := 0; i < len(b); {
		r, n := utf8.DecodeRune(b[i:])
		if r == utf8.RuneError && n == 1 {
			return i
		}
		i += n
	}
	return -1
}

// lineAt is the number of the line that holds an offset.
func lineAt(data []byte, off int64) int {
	return 1 + bytes.Count(data[:max(0, min(off, int64(len(data))))], []byte("\n"))
}

// decodeError adds the line to what the decoder says.
func decodeError(data []byte, dec *json.Decoder, err error) error {
	off := dec.InputOffset()
	var syntax *json.SyntaxError
	var kind *json.UnmarshalTypeError
	switch {
	case errors.As(err, &syntax):
		off = syntax.Offset
	case errors.As(err, &kind):
		off = kind.Offset
		err = fmt.Errorf("%s has no place in field %s", kind.Value, kind.Field)
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, io.EOF):
		off, err = int64(len(data)), errors.New("it ends in the middle")
	}
	text := strings.TrimPrefix(strings.TrimPrefix(err.Error(), ErrInvalid.Error()+": "), "json: ")
	if name, ok := strings.CutPrefix(text, "unknown field "); ok {
		// The decoder says so when it has come to the end of what the field is in.
		if at := bytes.Index(data, []byte(name+":")); at >= 0 {
			off = int64(at)
		}
	}
	return fmt.Errorf("%w: line %d: %s", ErrInvalid, lineAt(data, off), text)
}

// invalidf is ErrInvalid with a place.
func invalidf(place, format string, a ...any) error {
	return fmt.Errorf("%w: %s: %s", ErrInvalid, place, fmt.Sprintf(format, a...))
}

// check says what is wrong with a manifest.
func (m *Manifest) check() error {
	if m.Format != Format {
		return invalidf("format", "%.40q is not %q", m.Format, Format)
	}
	if len(m.Images) == 0 {
		return invalidf("images", "there is none")
	}
	used := map[Digest]bool{}
	for i := range m.Images {
		im := &m.Images[i]
		place := fmt.Sprintf("image %.80q", im.Name)
		if i > 0 && m.Images[i-1].Name == im.Name {
			return invalidf(place, "there are two of that name")
		}
		if i > 0 && m.Images[i-1].Name > im.Name {
			return invalidf(place, "the images are not in the order of their names")
		}
		if err := im.check(place); err != nil {
			return err
		}
		for _, v := range im.Volumes {
			if m.Tree(v.Tree) == nil {
				return invalidf(fmt.Sprintf("%s, partition %d", place, v.Partition), "there is no tree %s", v.Tree)
			}
			used[v.Tree] = true
		}
	}
	for i := range m.Trees {
		t := &m.Trees[i]
		place := "tree " + t.Digest.String()
		if i > 0 && bytes.Compare(m.Trees[i-1].Digest[:], t.Digest[:]) >= 0 {
			return invalidf(place, "the trees are not in the order of their digests, or one is there twice")
		}
		if !used[t.Digest] {
			return invalidf(place, "no volume has it")
		}
		if err := t.check(place); err != nil {
			return err
		}
	}
	return nil
}

// CheckName says why an image cannot stand in a manifest under a name. It must lead to a file beside the manifest, and
// to none anywhere else.
func CheckName(name string) error {
	if name == "" || name == "." || name == ".." || strings.ContainsAny(name, `/\`) || !plainText(name) {
		return fmt.Errorf("%.80q is not the name of an image", name)
	}
	return nil
}

var (
	serialForm = regexp.MustCompile(`^[0-9A-F]{4}-[0-9A-F]{4}$`)
	mbrForm    = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{2}$`) // a partition of an MBR, as the kernel calls it
)

var fatTypes = []string{fatdriver.FAT12.String(), fatdriver.FAT16.String(), fatdriver.FAT32.String()}

func (im *Image) check(place string) error {
	if err := CheckName(im.Name); err != nil {
		return invalidf(place, "%v", err)
	}
	switch {
	case im.Size < 0:
		return invalidf(place, "it has %d bytes", im.Size)
	case im.SectorSize < 512 || im.SectorSize > 64<<10 || im.SectorSize&(im.SectorSize-1) != 0:
		return invalidf(place, "sectors have %d bytes", im.SectorSize)
	case im.DiskGUID != "" && !gpt.IsGUID(im.DiskGUID):
		return invalidf(place, "disk_guid: %.40q is not a GUID in lower case", im.DiskGUID)
	case len(im.Volumes) == 0:
		return invalidf(place, "it has no volume")
	case im.Size == 0 && len(im.Volumes) != 1:
		return invalidf(place, "it has no size and %d volumes", len(im.Volumes))
	}
	for i := range im.Volumes {
		v := &im.Volumes[i]
		place := fmt.Sprintf("%s, partition %d", place, v.Partition)
		if i > 0 && im.Volumes[i-1].Partition >= v.Partition {
			return invalidf(place, "the volumes are not in the order of their numbers, or one is there twice")
		}
		if err := v.check(place, im); err != nil {
			return err
		}
	}
	return nil
}

func (v *Volume) check(place string, im *Image) error {
	switch {
	case v.Partition < 0 || v.Partition > 1<<20:
		return invalidf(place, "that is not the number of a partition")
	case v.Partition == 0 && (len(im.Volumes) > 1 || v.Type != "" || v.PartGUID != "" || v.PartLabel != ""):
		return invalidf(place, "a volume without a partition table has no neighbour, type, GUID or name")
	case v.Partition > 0 && v.Type == "":
		return invalidf(place, "it has no type")
	case v.PartGUID != "" && !gpt.IsGUID(v.PartGUID) && !mbrForm.MatchString(v.PartGUID):
		return invalidf(place, "partition_guid: %.40q is not a GUID in lower case", v.PartGUID)
	case !text(v.Type) || !text(v.PartLabel) || !text(v.Label):
		return invalidf(place, "its type or a label is too long")
	case v.Offset < 0 || v.Size <= 0 || v.Offset > math.MaxInt64-v.Size:
		return invalidf(place, "it has 0x%x bytes at offset 0x%x", v.Size, v.Offset)
	case im.Size > 0 && v.Offset+v.Size > im.Size:
		return invalidf(place, "it ends at 0x%x, and the image has 0x%x bytes", v.Offset+v.Size, im.Size)
	case !slices.Contains(fatTypes, v.FATType):
		return invalidf(place, "fat_type: %.40q is not %s", v.FATType, strings.Join(fatTypes, ", "))
	case v.Serial != "" && !serialForm.MatchString(v.Serial):
		return invalidf(place, "serial: %.40q is not written as 1234-ABCD", v.Serial)
	}
	return nil
}

func (t *Tree) check(place string) error {
	dirs := map[string]bool{}
	seen := make(map[string]bool, len(t.Entries))
	for i := range t.Entries {
		e := &t.Entries[i]
		place := fmt.Sprintf("%s, %.160q", place, e.Path)
		if err := checkPath(e.Path); err != nil {
			return invalidf(place, "%v", err)
		}
		switch {
		case i > 0 && t.Entries[i-1].Path > e.Path:
			return invalidf(place, "the entries are not in the order of their paths")
		case seen[fatdriver.Fold(e.Path)]:
			return invalidf(place, "it is there twice, as FAT compares names")
		case replicate.OwnFile(e.Path):
			return invalidf(place, "that belongs to one volume alone")
		}
		seen[fatdriver.Fold(e.Path)] = true
		if dir := path.Dir(e.Path); dir != "." && !dirs[dir] {
			return invalidf(place, "the directory that it is in is not there")
		}
		switch {
		case e.Dir && (e.Size != nil || e.Sum != nil):
			return invalidf(place, "a directory has no size and no sum")
		case e.Dir:
			dirs[e.Path] = true
		case e.Size == nil || e.Sum == nil:
			return invalidf(place, "it is no directory, and has no size or no sum")
		case *e.Size < 0 || *e.Size > maxFileSize:
			return invalidf(place, "it has %d bytes, FAT holds at most %d", *e.Size, int64(maxFileSize))
		}
	}
	if have := t.listing(); have != t.Digest {
		return invalidf(place, "the digest of its entries is %s", have)
	}
	return nil
}

// checkPath refuses what is no path of one file below the root.
func checkPath(p string) error {
	if len(p) > maxPath || strings.Count(p, "/") >= maxParts {
		return errors.New("the path is too long")
	}
	for part := range strings.SplitSeq(p, "/") {
		if part == "" || part == "." || part == ".." || strings.Contains(part, `\`) || !plainText(part) {
			return fmt.Errorf("%.80q is not the name of a file", part)
		}
	}
	return nil
}

// text says whether s may stand in a field that nothing is found by.
func text(s string) bool { return len(s) <= maxText && utf8.ValidString(s) }

// plainText says whether s may be part of a name: a line break would make two lines of one in a listing.
func plainText(s string) bool { return text(s) && !strings.ContainsFunc(s, unicode.IsControl) }
