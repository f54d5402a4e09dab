package bls

import (
	"cmp"
	"slices"
)

// Compare orders two entries as systemd-boot's menu has them (UAPI.1, "Sorting"): negative when a is above b. Entries that
// are bad come last; then those with a sort key first, by it, the machine ID, and the version, newest first; all others,
// and those that are equal in these, by their IDs as versions, newest first; then by profile, and by the tries left.
func Compare(a, b *Entry) int {
	if d := cmp.Compare(boolean(a.Name.State() == Bad), boolean(b.Name.State() == Bad)); d != 0 {
		return d
	}
	if d := cmp.Compare(boolean(a.SortKey == ""), boolean(b.SortKey == "")); d != 0 {
		return d
	}
	if a.SortKey != "" {
		if d := cmp.Or(cmp.Compare(a.SortKey, b.SortKey), cmp.Compare(a.MachineID, b.MachineID), CompareVersions(b.Version, a.Version)); d != 0 {
			return d
		}
	}
	if d := cmp.Or(CompareVersions(b.imageID, a.imageID), cmp.Compare(a.Profile, b.Profile)); d != 0 {
		return d
	}
	if !a.Name.Counter.Present || !b.Name.Counter.Present {
		return 0
	}
	return cmp.Or(cmp.Compare(b.Name.Counter.Left, a.Name.Counter.Left), cmp.Compare(a.Name.Counter.Done, b.Name.Counter.Done))
}

func boolean(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Sort sorts entries as the menu shows them, those that are equal in the order in which they are.
func Sort(entries []*Entry) { slices.SortStableFunc(entries, Compare) }

// Vars are the EFI variables of the Boot Loader Interface that choose an entry, "" where one is not set: LoaderEntryOneShot,
// LoaderEntryPreferred, LoaderEntryDefault and LoaderEntryLastBooted.
type Vars struct{ OneShot, Preferred, Default, LastBooted string }

// Default returns the entry that systemd-boot starts when nobody touches the keyboard; nil when there is none. It is the
// first in the order of the menu that matches the first of these that any matches: the one-shot variable, the preferred
// variable, loader.conf's preferred (both without bad entries), the default variable, loader.conf's default. Otherwise it
// is the top of the menu. The entries may be in any order; those of other architectures the caller leaves out. Entries
// that systemd-boot adds by itself, such as Windows, are not known here: nil of a pattern for one is no proof that nothing
// starts.
//
// A pattern is matched against IDs without counters, as systemd-boot does since 258, and where that finds none against the
// file names, as earlier ones do.
func Default(entries []*Entry, conf Conf, efi Vars) *Entry {
	var menu []*Entry
	for _, e := range entries {
		if !e.Hidden() {
			menu = append(menu, e)
		}
	}
	Sort(menu)
	for _, by := range []struct {
		pattern string
		bad     bool // whether a bad entry will do
	}{
		{efi.OneShot, true},
		{efi.Preferred, false}, {conf.Preferred, false},
		{efi.Default, true}, {conf.Default, true},
	} {
		pattern := lower(by.pattern)
		if pattern == saved {
			pattern = lower(efi.LastBooted)
		}
		if pattern == "" {
			continue
		}
		for _, id := range []func(e *Entry) string{func(e *Entry) string { return e.ID }, func(e *Entry) string { return e.ownID }} {
			at := slices.IndexFunc(menu, func(e *Entry) bool {
				return (by.bad || e.Name.State() != Bad) && match(pattern, id(e))
			})
			if at >= 0 {
				return menu[at]
			}
		}
	}
	if len(menu) == 0 {
		return nil
	}
	return menu[0]
}
