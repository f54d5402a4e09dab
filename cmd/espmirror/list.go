package main

import (
	"errors"
	"strings"

	"github.com/urfave/cli/v2"

	"espmirror/gpt"
)

func (inv *invocation) listCommand() *cli.Command {
	return &cli.Command{
		Name:      "list",
		Usage:     "list the ESPs and XBOOTLDR partitions of disks and images, or of this machine",
		UsageText: "espmirror list [OPTIONS] [DISK|IMAGE]...",
		Description: "A volume that cannot be read is listed all the same, and so is a disk or image; when not everything could\n" +
			"be looked at, the exit status is 1. Nothing is written.",
		Action: inv.action(0, -1, "", inv.listVolumes),
	}
}

func (inv *invocation) listVolumes() (report, error) {
	rep := &listReport{Volumes: []listedVolume{}}
	listing, err := inv.finder(inv.c.Args().Slice()...).List()
	if err != nil {
		return nil, err
	}
	for _, p := range listing.Problems {
		inv.log.Warn(p)
	}
	rep.Problems = listing.Problems
	var errs []error
	for _, u := range listing.Unread {
		err := unreadError(u)
		errs = append(errs, err)
		rep.Unread = append(rep.Unread, unreadDisk{u.Path, newJSONError(err)})
	}
	for _, loc := range listing.Volumes {
		rep.Volumes = append(rep.Volumes, inv.listOne(loc))
	}
	return rep, worst(errs)
}

// unreadError is the error of a disk or image whose volumes cannot be listed.
func unreadError(u gpt.Unread) error {
	err := prefixed("list", u.Path, u.Err)
	if errors.Is(err, gpt.ErrDamaged) && !errors.Is(err, gpt.ErrBackupOnly) {
		return withHint(err, "`sgdisk --verify %s` tells what is left of the table", u.Path)
	}
	return err
}

// listOne tells what can be found out about one volume. An error is part of that.
func (inv *invocation) listOne(loc *gpt.Location) listedVolume {
	l := listedVolume{Name: loc.String(), identity: identityOf(loc)}
	if id := loc.ID(); id.Block {
		by, err := inv.system.Holders(id)
		if err != nil {
			inv.log.Warn("cannot find out who uses a volume: "+err.Error(), "volume", l.Name)
		}
		l.UsedBy = by
	}
	v, err := inv.openLocation(l.Name, loc)
	if err != nil {
		l.Error = newJSONError(err)
		return l
	}
	defer v.Close()
	l.addFAT(v.fat, nil)
	tree, err := v.fat.Scan()
	if err == nil {
		l.Label = tree.Label
		err = tree.Damage()
	}
	if err != nil {
		l.Error = newJSONError(err)
	}
	return l
}

// listReport is the result of list.
type listReport struct {
	failure
	Volumes  []listedVolume `json:"volumes"`
	Problems []string       `json:"problems,omitempty"`
	Unread   []unreadDisk   `json:"unread,omitempty"`
}

// unreadDisk is a disk or image that could not be looked at.
type unreadDisk struct {
	Name  string     `json:"name"`
	Error *jsonError `json:"error"`
}

type listedVolume struct {
	Name string `json:"name"`
	identity
	UsedBy []string   `json:"used_by,omitempty"`
	Error  *jsonError `json:"error,omitempty"`
}

func (r *listReport) print(o *output) {
	t := newTable("VOLUME", "TYPE", "PARTITION GUID", "PARTLABEL", "FAT", "SERIAL", "LABEL", "SIZE", "NOTE")
	t.spare = []string{"PARTITION GUID", "PARTLABEL"}
	for _, v := range r.Volumes {
		note, color := strings.Join(v.UsedBy, ", "), dim
		if v.Error != nil {
			note, color = v.Error.Message, red
		}
		t.row(cell{text: v.Name}, cell{text: v.PartType}, cell{text: v.PartGUID}, cell{text: v.PartName}, cell{text: v.FATType},
			cell{text: v.Serial}, cell{text: v.Label}, cell{text: sizeText(v.Size), right: true}, cell{text: note, tint: color})
	}
	for _, u := range r.Unread {
		row := make([]cell, len(t.head))
		row[0], row[7].right, row[8] = cell{text: u.Name}, true, cell{text: "cannot be read", tint: red}
		t.row(row...)
	}
	if len(t.rows) > 0 {
		t.print(o)
	}
	if len(r.Volumes) == 0 {
		o.noVolume(len(r.Unread) > 0)
	}
}

// noVolume says that there is nothing to show.
func (o *output) noVolume(unread bool) {
	switch {
	case !o.legend:
	case unread:
		o.printf("No ESP or XBOOTLDR partition was found, but not everything could be read.\n")
	default:
		o.printf("No ESP or XBOOTLDR partition was found.\n")
	}
}
