// Package journal keeps the intent of one change to a secondary volume, so that a change of several commit points that
// a power cut interrupted can be finished, and one that never got that far can be undone without looking for its traces.
//
// The journal is a preallocated, contiguous file on the volume itself. This package sees it as a device over exactly
// that file and knows nothing of file systems: places are byte offsets inside the volume, space is counted in opaque
// units, and what a volume is comes as a Binding, a hash that the caller computes.
//
// # The file
//
//	    0  header slot A      one sector, the rest of the slot is unused
//	 8192  header slot B      one sector
//	16384  payload            up to the end of the file
//
// The slots are two 4 KiB blocks apart, so that they share no physical block even if the file begins in the middle of
// one: whatever a power cut does to the block that is being written, the other slot is not in it. A header is written
// in one write of one sector, zero padded, always over the slot that does not count. The slot that counts is the valid
// one with the higher sequence.
//
// There is one payload area. It is overwritten only while the slot that counts says Idle and is on stable storage, and
// is flushed before the header that names it by length and hash is written. So at any power cut the slot that counts is
// either idle, or names a payload that is there as a whole.
//
// # Header, 512 bytes, little endian
//
//	  0   8  magic "ESPMJRNL"                          *
//	  8   4  version                                   *
//	 12   4  state: 1 idle, 2 prepared, 3 committing
//	 16   8  sequence, 1 or more                       *
//	 24   4  index of the block that may be in flight (committing)
//	 28   4  number of blocks in the payload
//	 32  16  transaction ID; of the last one, when idle
//	 48  32  binding
//	 80  32  SHA-256 of the payload
//	112  32  digest of the new content (committing)
//	144   8  size of the file in bytes
//	152   4  payload length in bytes
//	156   4  number of creation runs, up to 16
//	160 128  creation runs: first unit, number of units, 4 bytes each
//	288 192  zero
//	480  32  SHA-256 of the 480 bytes before it        *
//
// Every version keeps the fields with a star where they are. So a version that is not known is told from damage, and
// is never mistaken for the older state in the other slot. Fields that the state gives no meaning are zero.
//
// # Payload, little endian
//
//	 0   8  magic "ESPMPAYL"
//	 8   4  version
//	12   4  length of all of it in bytes
//	16  16  transaction ID, the same as in the header
//	32   4  number of blocks
//	36   4  length of the encoded Alloc runs in bytes
//	40   4  length of the encoded Free runs
//	44   4  length of the encoded Base runs
//	48   4  length of the note
//	52  12  zero
//	64      blocks, Alloc, Free, Base, note, without gaps
//
// A block is
//
//	 0   8  byte offset inside the volume
//	 8   4  size of an image in bytes
//	12   1  phase
//	13   1  flags: 1 the old image follows the new one
//	14   2  zero
//	16  32  SHA-256 of the old image
//	48      new image, old image if flagged
//
// # Runs
//
// No runs are no bytes. Otherwise the shorter of two forms is used, so that a volume with hundreds of thousands of
// fragments costs one bit a unit at the most:
//
//	1, uvarint number of runs, then for each: uvarint units since the end of the run before it (minus 1, except for the
//	   first, as runs that touch are merged), uvarint length minus 1
//	2, uvarint first unit, uvarint number of bits, then the bits, least significant first; the first and the last are set
package journal
