// Package gpt reads GUID partition tables and finds the volumes on a machine, or in the disk images it is given.
//
// The layout is that of the UEFI specification, chapter "GUID Partition Table (GPT) Disk Layout":
//
//	LBA 0            protective MBR: one partition of type EE
//	LBA 1            primary header ─┐ MyLBA, AlternateLBA, first and last usable LBA,
//	LBA 2…           entry array   ←─┘ entry array LBA, count, size and CRC, header CRC
//	first…last usable partitions
//	…                entry array   ←─┐
//	last LBA         backup header ──┘
//
// Tables are decoded by go-diskfs, which trusts them. So both headers and all entries are checked here first, and the
// library is given a small table in memory that is made of checked bytes only.
package gpt

import (
	"errors"
	"fmt"

	"github.com/google/uuid"
)

var (
	// TypeESP is the type of an EFI System Partition. UEFI specification, "Defined GPT Partition Entry - Partition Type
	// GUIDs".
	TypeESP = uuid.MustParse("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")

	// TypeXBOOTLDR is the type of an extended boot loader partition. Boot Loader Specification, "The Partitions".
	TypeXBOOTLDR = uuid.MustParse("bc13c2ff-59e6-4262-a352-b275fd6f7172")
)

var (
	// ErrNoTable is returned when a device holds neither a partition table nor the remains of one.
	ErrNoTable = errors.New("no partition table")

	// ErrDamaged is returned when there is a partition table and no copy of it can be trusted.
	ErrDamaged = errors.New("partition table is damaged")

	// ErrBackupOnly comes with ErrDamaged when the backup table is whole, and nothing else is left to say that it still counts.
	ErrBackupOnly = errors.New("it stands alone: neither a protective MBR nor a primary header is left")
)

// GUID is a GUID as tables hold it.
type GUID = uuid.UUID

// Partition is one entry of a partition table. Its bounds are inside the disk.
type Partition struct {
	Number     int       // 1-based
	Type       uuid.UUID // MBR partitions: TypeESP for 0xEF, TypeXBOOTLDR for 0xEA, else zero
	GUID       uuid.UUID // unique GUID; zero in an MBR
	Name       string    // GPT partition name
	Start      int64     // bytes from the start of the disk
	Size       int64     // bytes
	Attributes uint64    // UEFI specification, "Defined GPT Partition Entry - Attributes"
	MBRType    byte      // 0 in a GPT
	Overlaps   []int     // numbers of the partitions that share bytes with this one; not nil means: do not write here

	mbrDisk uint32
}

// PARTUUID returns what the kernel and udev call the partition: its GUID in lower case or, in an MBR, the disk's
// signature and the number.
func (p *Partition) PARTUUID() string {
	if p.MBRType != 0 {
		return fmt.Sprintf("%08x-%02x", p.mbrDisk, p.Number)
	}
	return p.GUID.String()
}

// End returns the first byte after the partition.
func (p *Partition) End() int64 { return p.Start + p.Size }

// TypeName names the type for people: "ESP", "XBOOTLDR" or the GUID.
func (p *Partition) TypeName() string {
	switch {
	case p.Type == TypeESP:
		return "ESP"
	case p.Type == TypeXBOOTLDR:
		return "XBOOTLDR"
	case p.MBRType != 0:
		return fmt.Sprintf("MBR type 0x%02x", p.MBRType)
	}
	return p.Type.String()
}

// Table is a partition table that has been checked.
type Table struct {
	MBR        bool      // a plain MBR; otherwise a GPT
	DiskGUID   uuid.UUID // zero in an MBR
	SectorSize int       // bytes, of the LBAs in the table: not always what the device reports
	Partitions []Partition
	FromBackup bool     // the primary table is damaged, and this is the backup
	Problems   []string // what is wrong with it, in words; nothing that makes Partitions unusable
	Grown      string   // that one of them which a disk has to which a smaller one was copied; "" when it has not

	first, end int64 // the usable part of the disk in bytes; 0 in an MBR
}

// Find returns the partition with the given number, nil when there is none.
func (t *Table) Find(number int) *Partition {
	for i := range t.Partitions {
		if t.Partitions[i].Number == number {
			return &t.Partitions[i]
		}
	}
	return nil
}

// OfType returns the partitions of a type, in the order of the table.
func (t *Table) OfType(typ uuid.UUID) []*Partition {
	var found []*Partition
	for i := range t.Partitions {
		if t.Partitions[i].Type == typ {
			found = append(found, &t.Partitions[i])
		}
	}
	return found
}

// NewGUID returns a random GUID in lower case (RFC 9562, "UUID Version 4").
func NewGUID() string { return uuid.NewString() }

// IsGUID says whether s is a GUID as text, in the usual form and in lower case.
func IsGUID(s string) bool {
	g, err := uuid.Parse(s)
	return err == nil && g.String() == s
}
