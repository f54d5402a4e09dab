package journal

import (
	"errors"
	"fmt"
)

var (
	// ErrInvalid is returned when neither header slot can be relied on. It covers ErrAbsent.
	ErrInvalid = errors.New("invalid journal header")

	// ErrAbsent is returned when no slot even begins like a header: this never was a journal, or was wiped whole.
	// What is not ErrAbsent but is ErrInvalid was a journal and is damaged.
	ErrAbsent = fmt.Errorf("%w: no magic number", ErrInvalid)

	// ErrVersion is returned when an intact header, or payload, was written by a newer version of the format.
	ErrVersion = errors.New("journal has a newer version")

	// ErrBinding is returned when an intact journal was made for another volume or another place: the volume is a copy,
	// or was resized. Its record must not be acted on; Reinit makes the journal usable.
	ErrBinding = errors.New("journal belongs to another volume")

	// ErrGeometry is returned when a size or sector size cannot hold a journal.
	ErrGeometry = errors.New("unsuitable size or sector size")

	// ErrPayload is returned when the record that the header names cannot be read, or is not what the header names.
	// The record is lost; Done abandons it.
	ErrPayload = errors.New("journal payload is not the one that its header names")

	// ErrRecord is returned for a record that breaks a rule of its format; a record to be written is refused with it
	// before anything is written.
	ErrRecord = errors.New("malformed record")

	// ErrTooLarge is returned when a record exceeds the capacity of the journal, or a list exceeds its limit; nothing
	// was written. The caller splits the transaction.
	ErrTooLarge = errors.New("too large for the journal")

	// ErrPending is returned by Prepare when the last record is not finished; nothing was written.
	ErrPending = errors.New("an earlier record is not finished")

	// ErrIdle is returned by Advance when there is no record to advance; nothing was written.
	ErrIdle = errors.New("no record is pending")

	// ErrFailed is returned by every writing call that follows a failed write or flush: what the medium holds is
	// unknown then, and writing on could damage the slot that counts. Open reads the medium afresh.
	ErrFailed = errors.New("an earlier journal write failed")
)
