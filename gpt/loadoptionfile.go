package gpt

import (
	"encoding/binary"
	"fmt"
	"strings"
	"unicode/utf16"

	"github.com/google/uuid"
)

// Attributes of a load option. UEFI specification, "Load Options".
const loadOptionActive = 1

// The other nodes of a path to a file. UEFI specification, "File Path Media Device Path" and "Device Path End Structure".
const (
	nodeFilePath = 4
	nodeEndAll   = 0xff
)

// Active says whether firmware tries the option by itself.
func (o *LoadOption) Active() bool { return o.Attributes&loadOptionActive != 0 }

// File returns the path of the image on the partition, with slashes: "/EFI/BOOT/BOOTX64.EFI". It is "" when the first
// device path leads through no partition, has no file in it, or one whose name is no text. Without a file firmware takes
// the fallback, EFI/BOOT/BOOT*.EFI.
func (o *LoadOption) File() string {
	if o.Partition == nil {
		return ""
	}
	file, through := "", false
	// The lengths in the path have been checked up to the partition, not behind it.
	for list := o.paths; len(list) >= nodeHeader; {
		length := int(binary.LittleEndian.Uint16(list[2:]))
		if length < nodeHeader || length > len(list) || list[0]&0x7f == nodeEnd {
			break
		}
		switch {
		case list[0] == nodeMedia && list[1] == nodeHardDrive:
			through = true
		case through && list[0] == nodeMedia && list[1] == nodeFilePath:
			// "File Path Media Device Path", rules: the names of several such nodes are one path.
			part, _, err := text16(list[nodeHeader:length])
			if err != nil {
				return ""
			}
			file = strings.TrimRight(file, `\`) + `\` + strings.TrimLeft(part, `\`)
		}
		list = list[length:]
	}
	return strings.ReplaceAll(file, `\`, "/")
}

// encodeLoadOption makes an active load option: the short form of a path, by which firmware finds the partition on whatever
// disk it is ("Load Option Processing"). file has slashes.
func encodeLoadOption(description string, h *HardDrive, file string) ([]byte, error) {
	fail := func(format string, a ...any) ([]byte, error) {
		return nil, fmt.Errorf("cannot make a load option: %s", fmt.Sprintf(format, a...))
	}
	guid, err := uuid.Parse(h.PartUUID)
	if err != nil || guid == uuid.Nil || guid.String() != h.PartUUID {
		return fail("%q is not the GUID of a partition", h.PartUUID)
	}
	if h.Number == 0 || h.Start == 0 || h.Blocks == 0 {
		return fail("partition %d at LBA 0x%x with 0x%x blocks is none", h.Number, h.Start, h.Blocks)
	}
	file = strings.ReplaceAll(file, "/", `\`)
	if len(file) < 2 || file[0] != '\\' {
		return fail("%q is not an absolute path", file)
	}
	title, ok := encode16(description)
	path, ok2 := encode16(file)
	if !ok || !ok2 || description == "" {
		return fail("%q or %q is no text that it can hold", description, file)
	}
	le := binary.LittleEndian
	list := append([]byte{nodeMedia, nodeHardDrive}, 0, 0)
	le.PutUint16(list[2:], hardDriveSize)
	list = le.AppendUint32(list, h.Number)
	list = le.AppendUint64(list, h.Start)
	list = le.AppendUint64(list, h.Blocks)
	list = append(list, guidToDisk(guid)...)
	list = append(list, formatGPT, signatureGPT)
	list = append(list, nodeMedia, nodeFilePath)
	if nodeHeader+len(path) > 0xffff-hardDriveSize-nodeHeader {
		return fail("%q is too long", file)
	}
	list = le.AppendUint16(list, uint16(nodeHeader+len(path)))
	list = append(list, path...)
	list = append(list, nodeEnd, nodeEndAll, nodeHeader, 0)

	b := le.AppendUint32(nil, loadOptionActive)
	b = le.AppendUint16(b, uint16(len(list)))
	return append(append(b, title...), list...), nil
}

// encode16 makes UTF-16 with the zero character at its end; ok is false for what would not be read as it was written.
func encode16(s string) (b []byte, ok bool) {
	for _, u := range append(utf16.Encode([]rune(s)), 0) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	again, size, err := text16(b)
	return b, err == nil && size == len(b) && again == s
}

// guidToDisk encodes an EFI_GUID, whose first three fields are little endian. UEFI specification, "GUID and Time Formats".
func guidToDisk(g uuid.UUID) []byte {
	other := guidFromDisk(g[:]) // the exchange of bytes undoes itself
	return other[:]
}
