//go:build !initrd

package main

// initReport is the result of init.
type initReport struct {
	failure
	Command string       `json:"command"`
	DryRun  bool         `json:"dry_run"`
	Primary string       `json:"primary"`
	Targets []initResult `json:"targets"`
	Set     *setReport   `json:"set,omitempty"`

	quiet bool
}

// initResult is what becomes of one target.
type initResult struct {
	Target     string          `json:"target"`
	Size       int64           `json:"disk_size_bytes"`
	Sector     int             `json:"sector_size_bytes"`
	NewImage   bool            `json:"new_image"`
	NewTable   bool            `json:"new_table"`
	DiskGUID   string          `json:"disk_guid,omitempty"`
	Partitions []initPartition `json:"partitions"`
	Found      []initFound     `json:"overwritten"`
	Notes      []string        `json:"notes"`
	Made       bool            `json:"made"`
	Joins      bool            `json:"joins_set"`
	Left       []string        `json:"left_to_do"`
	Error      *jsonError      `json:"error,omitempty"`

	done bool // there was nothing to make
}

type initPartition struct {
	Number  int    `json:"number"`
	Name    string `json:"name"`
	Type    string `json:"partition_type"`
	GUID    string `json:"partition_guid"`
	Label   string `json:"partition_label"`
	Offset  int64  `json:"offset_bytes"`
	Size    int64  `json:"size_bytes"`
	State   string `json:"state"` // new, formatted, resumed, member, table only
	FATType string `json:"fat_type,omitempty"`
	Cluster int    `json:"cluster_bytes,omitempty"`
	Count   uint32 `json:"clusters,omitempty"`
	Serial  string `json:"serial,omitempty"`
	FATName string `json:"label,omitempty"`
}

type initFound struct {
	Off  int64  `json:"offset_bytes"`
	What string `json:"what"`
}

func (r *initReport) fill(plans []*initPlan) {
	r.Targets = make([]initResult, len(plans))
	for i, p := range plans {
		r.Targets[i].fill(p)
	}
}

func (r *initResult) fill(p *initPlan) {
	r.Target, r.Size, r.Sector, r.NewImage, r.NewTable = p.t.name, p.t.size, p.t.sector, p.t.create, p.table
	r.Made, r.done, r.Error = p.made, p.done, newJSONError(p.err)
	r.Joins, r.Notes, r.Left = p.join, append([]string{}, p.notes...), append([]string{}, p.todo...)
	if p.table {
		r.DiskGUID = p.diskGUID.String()
	}
	r.Found, r.Partitions = []initFound{}, []initPartition{}
	for _, f := range p.found {
		r.Found = append(r.Found, initFound{f.Off, f.What})
	}
	for _, v := range p.volumes {
		q := initPartition{Number: v.part.Number, Name: p.volumeName(v), Type: v.part.TypeName(), GUID: v.part.GUID.String(), Label: v.part.Name,
			Offset: v.part.Start, Size: v.part.Size, State: "table only"}
		if v.fill {
			q.FATType, q.Cluster, q.Count, q.Serial, q.FATName = v.form.Type.String(), v.form.ClusterSize, v.form.Clusters, formatSerial(v.serial), v.label
			switch q.State = "new"; {
			case p.done:
				q.State = "member"
			case v.existing:
				q.State = "resumed"
			case v.inTable:
				q.State = "formatted"
			}
		}
		r.Partitions = append(r.Partitions, q)
	}
}

func (r *initReport) print(o *output) {
	if r.quiet {
		return
	}
	t := newTable("VOLUME", "TYPE", "PARTITION GUID", "PARTLABEL", "START", "SIZE", "FAT", "SERIAL", "LABEL", "STATE")
	t.spare = []string{"PARTITION GUID", "PARTLABEL"}
	var left []string
	joins, some := false, false
	for i := range r.Targets {
		x := &r.Targets[i]
		if !r.DryRun && !x.Made && !x.done {
			continue // the error says why
		}
		some = true
		of := ""
		if len(r.Targets) > 1 {
			of = safe(x.Target) + ": "
		}
		for _, f := range x.Found {
			o.printf("%soverwritten: %s at 0x%x\n", of, safe(f.What), f.Off)
		}
		for _, n := range x.Notes {
			o.printf("%snote: %s\n", of, safe(n))
		}
		if x.NewTable && r.DryRun {
			o.printf("new partition table on %s: %s in sectors of %d bytes\n", safe(x.Target), sizeText(x.Size), x.Sector)
		}
		for _, v := range x.Partitions {
			t.row(cell{text: v.Name}, cell{text: v.Type}, cell{text: v.GUID}, cell{text: v.Label}, cell{text: sizeText(v.Offset), right: true},
				cell{text: sizeText(v.Size), right: true}, cell{text: v.FATType}, cell{text: v.Serial}, cell{text: v.FATName}, cell{text: v.State})
		}
		joins = joins || x.Joins
		left = append(left, x.Left...)
	}
	if !some {
		return
	}
	t.print(o)
	if r.Set != nil {
		r.Set.print(o)
	} else if joins && r.DryRun {
		o.printf("%s the replica set of %s\n", map[bool]string{true: "it joins", false: "they join"}[len(r.Targets) == 1], safe(r.Primary))
	}
	if len(left) > 0 {
		o.printf("left to do:\n")
		for _, line := range left {
			o.printf("  %s\n", safe(line))
		}
	}
}
