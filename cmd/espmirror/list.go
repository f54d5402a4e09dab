package main

import (
	"strings"

	"github.com/urfave/cli/v2"

	"espmirror/gpt"
)

func (inv *invocation) listCommand() *cli.Command {
	return &cli.Command{
		Name:        "list",
		Usage:       "list the ESPs and XBOOTLDR partitions of disks and images, or of this machine",
		UsageText:   "espmirror list [OPTIONS] [DISK|IMAGE]...",
		Description: "A volume that cannot be read is listed all the same. Nothing is written.",
		Action:      inv.action(0, -1, "", inv.listVolumes),
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
	for _, loc := range listing.Volumes {
		rep.Volumes = append(rep.Volumes, inv.listOne(loc))
	}
	return rep, nil
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
}

type listedVolume struct {
	Name string `json:"name"`
	identity
	UsedBy []string   `json:"used_by,omitempty"`
	Error  *jsonError `json:"error,omitempty"`
}

func (r *listReport) print(o *output) {
	t := newTable("VOLUME", "TYPE", "PARTITION GUID", "PARTLABEL", "FAT", "SERIAL", "LABEL", "SIZE", "NOTE")
	for _, v := range r.Volumes {
		note, color := strings.Join(v.UsedBy, ", "), dim
		if v.Error != nil {
			note, color = v.Error.Message, red
		}
		t.row(cell{text: v.Name}, cell{text: v.PartType}, cell{text: v.PartGUID}, cell{text: v.PartName}, cell{text: v.FATType},
			cell{text: v.Serial}, cell{text: v.Label}, cell{text: sizeText(v.Size), right: true}, cell{text: note, tint: color})
	}
	if len(r.Volumes) > 0 {
		t.print(o)
	} else if o.legend {
		o.printf("No ESP or XBOOTLDR partition was found.\n")
	}
}
