package blockdev

import (
	"os"
	"path"
	"strconv"
	"strings"
)

// KnownPartUUID returns the PARTUUID, in lower case, by which the system knows partition b, without opening any device;
// "" when nobody says. The kernel's word (since Linux 6.13) counts before that of udev's database. sure is false when it
// is udev's word and the place on the disk that goes with it is not that of b: the record is of an older table.
//
// Neither proves anything about the disk: the table may have been rewritten since. What is found so has to be compared
// with the table.
func (s System) KnownPartUUID(b Block) (partUUID string, sure bool) {
	if b.PartUUID != "" {
		return b.PartUUID, true
	}
	// systemd, src/libsystemd/sd-device/sd-device.c, "b%u:%u"; a line of the database is a letter, a colon and a value.
	// The keys are those of udev's builtin blkid, which counts in 512 bytes.
	text, err := os.ReadFile(s.Path("/run/udev/data/b" + b.Num.String()))
	if err != nil {
		return "", false // no udev, or it has not seen the device yet
	}
	var start, size string
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "=")
		switch key {
		case "E:ID_PART_ENTRY_UUID":
			partUUID = strings.ToLower(value)
		case "E:ID_PART_ENTRY_OFFSET":
			start = value
		case "E:ID_PART_ENTRY_SIZE":
			size = value
		}
	}
	sure = partUUID != "" && start == strconv.FormatInt(b.Start/512, 10) && size == strconv.FormatInt(b.Size/512, 10)
	return partUUID, sure
}

// PartUUIDLink returns the node, below the root of the System, to which udev's link for a PARTUUID leads; "" when there
// is none. The link may be left over from a disk that is gone, or of an older table.
func (s System) PartUUIDLink(partUUID string) string {
	const dir = "/dev/disk/by-partuuid/"
	if partUUID == "" || strings.ContainsAny(partUUID, "/\x00") {
		return ""
	}
	target, err := os.Readlink(s.Path(dir + partUUID))
	if err != nil {
		return ""
	}
	if !path.IsAbs(target) {
		target = dir + target
	}
	// Cleaned as an absolute path, no ".." leads out of the root.
	return s.Path(path.Clean(target))
}
