// Package tree holds what the trees of all kinds of volumes have in common: paths, and findings about what is wrong.
package tree

import (
	"fmt"
	"strings"
)

// MaxNodes is how many files and directories a volume may have. A boot volume has some dozens; a hostile one of a few GiB would
// take all memory. A tree that was cut off there would make what lies behind look lost, so it is an error, not a finding.
const MaxNodes = 1 << 20

// TooMany is the error of a volume that has more than max files and directories.
func TooMany(damaged error, max int) error {
	return fmt.Errorf("%w: it has more than %d files and directories", damaged, max)
}

// Severity says what a finding means for somebody who wants to use the volume.
type Severity int

const (
	// Note is something unusual that nobody has to mend.
	Note Severity = iota
	// Warning is something that fsck would mend and that harms no reader: lost clusters, a stale free count.
	Warning
	// Damage is something that makes readers disagree or fail. A volume with damage is neither source nor target.
	Damage
)

func (s Severity) String() string { return [...]string{"note", "warning", "damage"}[s] }

// Finding is one thing that is wrong with a volume, and where.
type Finding struct {
	Severity Severity
	Path     string // the file or directory, "/" and below; "" when it concerns the volume
	Cluster  uint32 // 0 when none is to blame
	Off      int64  // byte offset on the volume, -1 when a cluster or a path says more
	Msg      string
}

func (f Finding) String() string {
	var sb strings.Builder
	if f.Path != "" {
		fmt.Fprintf(&sb, "%s: ", f.Path)
	}
	if f.Off >= 0 {
		fmt.Fprintf(&sb, "offset 0x%x: ", f.Off)
	}
	if f.Cluster != 0 {
		fmt.Fprintf(&sb, "cluster %d: ", f.Cluster)
	}
	return sb.String() + f.Msg
}

// Damaged wraps damaged with the first finding that is damage; nil when none is.
func Damaged(findings []Finding, damaged error) error {
	n := 0
	var first Finding
	for _, f := range findings {
		if f.Severity == Damage {
			if n == 0 {
				first = f
			}
			n++
		}
	}
	switch n {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("%w: %v", damaged, first)
	}
	return fmt.Errorf("%w: %v (and %d more findings)", damaged, first, n-1)
}

// SplitPath splits a path at slashes and backslashes, and leaves out empty parts.
func SplitPath(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' || r == '\\' })
}

// Lookup finds a path below the root. "" and "/" are the root; the zero value means that there is none.
func Lookup[N comparable](root N, path string, child func(dir N, name string) N) N {
	var none N
	for _, name := range SplitPath(path) {
		if root = child(root, name); root == none {
			break
		}
	}
	return root
}
