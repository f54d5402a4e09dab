//go:build !initrd

package main

import (
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
)

func metricsFlags() []cli.Flag {
	return []cli.Flag{&cli.BoolFlag{Name: "metrics", Usage: "print gauges for Prometheus (OpenMetrics text) in place of the table", DisableDefaultText: true}}
}

// memberStates are the states that a volume can be in. Each is a series, so that an alert can name the one it is about.
var memberStates = []string{
	"ok", "in sync", "drifted", "stale", "new", "newer", "changed", "diverged", "not compared", "needs recovery", "damaged", "busy", "missing",
	"refused", "failed", "stopped",
}

// family is a metric family with its samples.
type family struct {
	name, help string
	unit       string // the end of the name, "" when it has none
	samples    []sample
}

// sample is one value; labels are name and value in turn.
type sample struct {
	labels []string
	value  string
}

func (f *family) add(value string, labels ...string) {
	f.samples = append(f.samples, sample{labels, value})
}

// writeMetrics writes the status as gauges. The text is what OpenMetrics 1.0 and the older format of Prometheus (0.0.4) have in
// common, since the collector of text files of node_exporter reads only the latter: it has no info and no stateset, takes
// no timestamps, and passes over # UNIT and # EOF as comments. rep is nil when nothing could be found out.
func writeMetrics(w io.Writer, rep *statusReport, code int) {
	var volumes []statusVolume
	if rep != nil {
		volumes = rep.Volumes
	}
	build := &family{name: "espmirror_build_info", help: "The version of espmirror that wrote this."}
	build.add("1", "version", version)
	exit := &family{name: "espmirror_status_exit_code",
		help: "Exit status: 0 in sync, 1 failed, 3 some members failed or are missing, 4 differences, 5 needs recovery, 6 refused."}
	exit.add(strconv.Itoa(code))
	info := &family{name: "espmirror_member_info", help: "The members. The label member is the partition GUID where there is one, and the same in all families."}
	state := &family{name: "espmirror_member_state", help: "1 for the state that a member is in, 0 for the others."}
	generation := &family{name: "espmirror_member_generation", help: "Generation of the replicated tree; it grows by one with each completed change. 0: none yet."}
	lag := &family{name: "espmirror_member_generation_lag", help: "How many generations a member is behind the newest one that was seen."}
	pending := &family{name: "espmirror_member_pending_changes", help: "Changes that a sync would make. Absent where it could not be worked out."}
	size := &family{name: "espmirror_member_size_bytes", unit: "bytes", help: "Size of the volume."}
	free := &family{name: "espmirror_member_free_bytes", unit: "bytes", help: "Free space of the filesystem."}
	last := &family{name: "espmirror_member_last_run_timestamp_seconds", unit: "seconds", help: "When the last completed run ended, by the clock of then."}

	var newest uint64
	for i := range volumes {
		newest = max(newest, volumes[i].Generation)
	}
	keys := memberKeys(volumes)
	for i := range volumes {
		v, key := &volumes[i], keys[i]
		info.add("1", "member", key, "role", v.Role, "name", v.Name, "device", v.Device, "partition_type", v.PartType,
			"partition_guid", v.PartGUID, "serial", v.Serial, "fat_type", v.FATType, "label", v.Label, "directory", v.Directory)
		for _, s := range memberStates {
			value := "0"
			if s == v.State {
				value = "1"
			}
			state.add(value, "member", key, "state", s)
		}
		if v.Generation > 0 || v.Lineage != "" {
			generation.add(strconv.FormatUint(v.Generation, 10), "member", key)
			lag.add(strconv.FormatUint(newest-v.Generation, 10), "member", key)
		}
		if v.compared {
			pending.add(strconv.Itoa(v.Changes), "member", key)
		}
		if v.Size > 0 {
			size.add(strconv.FormatInt(v.Size, 10), "member", key)
		}
		if v.Free != nil {
			free.add(strconv.FormatInt(*v.Free, 10), "member", key)
		}
		if !v.lastRun.IsZero() {
			last.add(strconv.FormatInt(v.lastRun.Unix(), 10), "member", key)
		}
	}
	for _, f := range []*family{build, exit, info, state, generation, lag, pending, size, free, last, entryFamily(volumes, keys)} {
		f.write(w)
	}
	fmt.Fprint(w, "# EOF\n")
}

// memberKeys are the labels by which the members are told apart. Two volumes can have the same GUID, which is a fault to
// be reported: a series that is there twice would have the whole file refused.
func memberKeys(volumes []statusVolume) []string {
	var keys []string
	for i := range volumes {
		v := &volumes[i]
		key := v.PartGUID
		if key == "" {
			key = v.Name
		}
		for n := 2; slices.Contains(keys, key); n++ {
			key = fmt.Sprintf("%s (%s, %d)", v.PartGUID, v.Name, n)
		}
		keys = append(keys, key)
	}
	return keys
}

// write writes a family that has samples. https://prometheus.io/docs/specs/om/open_metrics_spec/, "Text Format". Help texts
// have nothing in them that would have to be escaped.
func (f *family) write(w io.Writer) {
	if len(f.samples) == 0 {
		return
	}
	fmt.Fprintf(w, "# HELP %s %s\n# TYPE %s gauge\n", f.name, f.help, f.name)
	if f.unit != "" {
		fmt.Fprintf(w, "# UNIT %s %s\n", f.name, f.unit)
	}
	for _, s := range f.samples {
		var labels []string
		for i := 0; i < len(s.labels); i += 2 {
			labels = append(labels, s.labels[i]+`="`+labelEscapes.Replace(safe(s.labels[i+1]))+`"`)
		}
		text := ""
		if len(labels) > 0 {
			text = "{" + strings.Join(labels, ",") + "}"
		}
		fmt.Fprintf(w, "%s%s %s\n", f.name, text, s.value)
	}
}

var labelEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)
