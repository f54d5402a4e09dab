package gpt

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/google/uuid"
)

// LoadOption is an EFI_LOAD_OPTION, what a variable Boot#### holds. UEFI specification, "Load Options":
//
//	0  uint32  Attributes
//	4  uint16  FilePathListLength, bytes
//	6          Description, UTF-16, ended by a zero character
//	           FilePathList, device paths; the first one is the image to start
//	           OptionalData, up to the end
type LoadOption struct {
	Attributes  uint32
	Description string
	Partition   *HardDrive // the partition that the first device path leads through; nil when it leads through none

	paths []byte // FilePathList
}

// HardDrive is the partition in a device path. UEFI specification, "Hard Drive" (a media device path):
//
//	0  uint8   Type, 4
//	1  uint8   Sub-Type, 1
//	2  uint16  Length, 42
//	4  uint32  Partition Number
//	8  uint64  Partition Start, LBA
//	16 uint64  Partition Size, blocks
//	24 [16]    Partition Signature
//	40 uint8   Partition Format: 1 MBR, 2 GPT
//	41 uint8   Signature Type: 0 none, 1 that of the MBR, 2 GUID
type HardDrive struct {
	Number   uint32 // of the partition, from 1; 0 is the whole disk
	Start    uint64 // LBA
	Blocks   uint64
	PartUUID string // as Partition.PARTUUID; "" when the node has no signature that the kernel would know
}

// UEFI specification, "Generic Device Path Structures" and "Media Device Path".
const (
	nodeHeader    = 4
	nodeMedia     = 4
	nodeHardDrive = 1
	nodeEnd       = 0x7f
	hardDriveSize = 42

	formatMBR, formatGPT       = 1, 2
	signatureMBR, signatureGPT = 1, 2
)

// ParseLoadOption decodes the data of a variable Boot####. It returns ErrMalformed when a length in it leads outside.
func ParseLoadOption(b []byte) (*LoadOption, error) {
	malformed := func(format string, a ...any) (*LoadOption, error) {
		return nil, fmt.Errorf("cannot read load option: it %w: %s", ErrMalformed, fmt.Sprintf(format, a...))
	}
	if len(b) < 6 {
		return malformed("it has %d bytes, at least 6 are needed", len(b))
	}
	o := &LoadOption{Attributes: binary.LittleEndian.Uint32(b)}
	length := int(binary.LittleEndian.Uint16(b[4:]))
	_, size, err := text16(b[6:])
	if size < 0 {
		return malformed("its description has no end")
	}
	if err == nil {
		// A description that cannot be shown is no reason to miss the path.
		o.Description, _, _ = text16(b[6 : 6+size])
	}
	list := b[6+size:]
	if length > len(list) {
		return malformed("0x%x bytes of device paths at offset 0x%x, and 0x%x are left", length, 6+size, len(list))
	}
	o.paths = list[:length]
	o.Partition, err = firstHardDrive(o.paths)
	if err != nil {
		return malformed("%v", err)
	}
	return o, nil
}

// firstHardDrive returns the first partition node of the first device path in a list, nil when there is none. A path
// may begin with that node: UEFI specification, "Load Option Processing", the short form.
func firstHardDrive(list []byte) (*HardDrive, error) {
	for off := 0; ; {
		node := list[off:]
		if len(node) < nodeHeader {
			return nil, fmt.Errorf("a device path has no end at offset 0x%x", off)
		}
		length := int(binary.LittleEndian.Uint16(node[2:]))
		if length < nodeHeader || length > len(node) {
			return nil, fmt.Errorf("a device path node of 0x%x bytes at offset 0x%x, and 0x%x are left", length, off, len(node))
		}
		switch {
		case node[0]&0x7f == nodeEnd: // EFI 1.10, "Device Path End Structure", has 0xff for it as well
			return nil, nil
		case node[0] == nodeMedia && node[1] == nodeHardDrive:
			if length != hardDriveSize {
				return nil, fmt.Errorf("a hard drive node of %d bytes at offset 0x%x, expected %d", length, off, hardDriveSize)
			}
			return parseHardDrive(node), nil
		}
		off += length
	}
}

// parseHardDrive decodes a node of hardDriveSize bytes.
func parseHardDrive(node []byte) *HardDrive {
	le := binary.LittleEndian
	h := &HardDrive{Number: le.Uint32(node[4:]), Start: le.Uint64(node[8:]), Blocks: le.Uint64(node[16:])}
	signature := node[24:40]
	if bytes.Count(signature, []byte{0}) == len(signature) {
		return h // nothing was filled in, and zero names no partition
	}
	switch format, kind := node[40], node[41]; {
	case format == formatGPT && kind == signatureGPT:
		h.PartUUID = guidFromDisk(signature).String()
	case format == formatMBR && kind == signatureMBR && h.Number > 0 && h.Number <= 0xff:
		h.PartUUID = fmt.Sprintf("%08x-%02x", le.Uint32(signature), h.Number)
	}
	return h
}

// guidFromDisk decodes an EFI_GUID, whose first three fields are little endian. UEFI specification, "GUID and Time
// Formats".
func guidFromDisk(b []byte) uuid.UUID {
	var g uuid.UUID
	copy(g[:], b[:16])
	for _, field := range [][]byte{g[0:4], g[4:6], g[6:8]} {
		for i, j := 0, len(field)-1; i < j; i, j = i+1, j-1 {
			field[i], field[j] = field[j], field[i]
		}
	}
	return g
}
