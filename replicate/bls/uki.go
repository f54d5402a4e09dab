package bls

import (
	"fmt"
	"strings"
)

// The sections of a unified kernel image that are looked at (UAPI.5, "UKI Components" and "Multi-Profile UKIs").
const (
	sectionLinux   = ".linux"
	sectionOSRel   = ".osrel"
	sectionUname   = ".uname"
	sectionCmdline = ".cmdline"
	sectionProfile = ".profile"
)

// maxProfiles bounds the profiles of an image, as systemd-boot's UNIFIED_PROFILES_MAX does.
const maxProfiles = 256

// IsUKI says whether the image is a unified kernel image: an EFI application with a kernel in it. systemd-boot lists it
// in its menu when it has .osrel too; PE.Entries says so.
func (p *PE) IsUKI() bool {
	return p.Subsystem == SubsystemEFIApplication && p.Has(sectionLinux)
}

// IsAddon says whether the image is an add-on for a UKI: resources without a kernel (UAPI.5, "PE Addons").
func (p *PE) IsAddon() bool {
	if p.Subsystem != SubsystemEFIApplication || p.Has(sectionLinux) {
		return false
	}
	return p.Has(sectionCmdline) || p.Has(".dtb") || p.Has(".ucode") || p.Has(".initrd")
}

// Has says whether there is a section of that name, in whatever profile.
func (p *PE) Has(name string) bool {
	for _, s := range p.Sections {
		if s.Name == name {
			return true
		}
	}
	return false
}

// profiles returns the sections of each profile of the image, its own and then those of the base profile, which all share.
// An image without .profile sections has one.
func (p *PE) profiles() [][2][]Section {
	base := p.Sections
	var own [][]Section
	for i, s := range p.Sections {
		if s.Name != sectionProfile {
			continue
		}
		if own == nil {
			base = p.Sections[:i]
		}
		end := i + 1
		for end < len(p.Sections) && p.Sections[end].Name != sectionProfile {
			end++
		}
		if own = append(own, p.Sections[i:end]); len(own) == maxProfiles {
			break
		}
	}
	if own == nil {
		own = [][]Section{nil}
	}
	var out [][2][]Section
	for _, o := range own {
		out = append(out, [2][]Section{o, base})
	}
	return out
}

// find returns the section of a profile: its own, or the base profile's. An empty one counts as none, and hides that of the
// base profile all the same.
func find(profile [2][]Section, name string) (Section, bool) {
	for _, sections := range profile {
		for _, s := range sections {
			if s.Name == name {
				return s, s.Size > 0
			}
		}
	}
	return Section{}, false
}

// OSRelease are the fields of an os-release file that name a boot entry (os-release(5)).
type OSRelease struct {
	ID, Name, PrettyName, Version, VersionID, BuildID, ImageID, ImageVersion string
}

// ParseOSRelease reads an os-release file as systemd-boot does: without the escapes of a shell.
func ParseOSRelease(text string) OSRelease {
	var o OSRelease
	to := map[string]*string{
		"ID": &o.ID, "NAME": &o.Name, "PRETTY_NAME": &o.PrettyName, "VERSION": &o.Version, "VERSION_ID": &o.VersionID,
		"BUILD_ID": &o.BuildID, "IMAGE_ID": &o.ImageID, "IMAGE_VERSION": &o.ImageVersion,
	}
	for _, f := range fields(text, "=") {
		if v := to[f.key]; v != nil {
			*v = f.value
		}
	}
	return o
}

func first(s ...string) string {
	for _, v := range s {
		if v != "" {
			return v
		}
	}
	return ""
}

// OSRelease returns what the image says of the system that it starts; false when it says nothing.
func (p *PE) OSRelease() (OSRelease, bool, error) {
	s, ok := find(p.profiles()[0], sectionOSRel)
	if !ok {
		return OSRelease{}, false, nil
	}
	b, err := p.Data(s)
	return ParseOSRelease(string(b)), err == nil, err
}

// Uname returns the version of the image's kernel, as `uname -r` prints it; "" when it does not say.
func (p *PE) Uname() (string, error) {
	s, ok := find(p.profiles()[0], sectionUname)
	if !ok {
		return "", nil
	}
	b, err := p.Data(s)
	text, _, _ := strings.Cut(string(b), "\x00")
	return strings.TrimSpace(text), err
}

// Entries returns the type 2 entries of the image, one for each profile (UAPI.1, "Type #2 EFI Unified Kernel Images"); path
// is that of the file, as for Parse. There are none when its os-release does not name a system. Title, version and sort
// key are those that systemd-boot picks from that; the kernel's version, which is in .uname, does not count for it.
func (p *PE) Entries(path string) ([]*Entry, error) {
	var out []*Entry
	for n, profile := range p.profiles() {
		s, ok := find(profile, sectionOSRel)
		if !ok {
			continue
		}
		b, err := p.Data(s)
		if err != nil {
			return nil, err
		}
		o := ParseOSRelease(string(b))
		e := &Entry{
			Path: path, Loader: image, Profile: uint(n),
			Title:   first(o.PrettyName, o.ImageID, o.Name, o.ID),
			Version: first(o.ImageVersion, o.Version, o.VersionID, o.BuildID),
			SortKey: first(o.ImageID, o.ID),
		}
		if e.Title == "" {
			continue
		}
		e.setID(path)
		if err := e.profile(p, profile); err != nil {
			return nil, err
		}
		if c, ok := find(profile, sectionCmdline); ok && c.Size <= maxSection {
			if b, err = p.Data(c); err != nil {
				return nil, err
			}
			text, _, _ := strings.Cut(string(b), "\x00")
			e.Options = []string{strings.TrimSpace(text)}
		}
		out = append(out, e)
	}
	return out, nil
}

// profile names the entry after its profile.
func (e *Entry) profile(p *PE, profile [2][]Section) error {
	var id, title string
	if s, ok := find(profile, sectionProfile); ok {
		b, err := p.Data(s)
		if err != nil {
			return err
		}
		for _, f := range fields(string(b), "=") {
			switch f.key {
			case "ID":
				id = f.value
			case "TITLE":
				title = f.value
			}
		}
	}
	number := fmt.Sprint(e.Profile)
	if e.Profile > 0 {
		suffix := "@" + lower(first(id, number))
		e.ID, e.ownID = e.ID+suffix, e.ownID+suffix
		title = first(title, id, fmt.Sprintf("Profile #%d", e.Profile+1))
	}
	if title != "" {
		e.Title += " (" + title + ")"
	}
	return nil
}
