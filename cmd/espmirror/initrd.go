//go:build initrd

package main

import (
	"errors"
	"io"

	"github.com/urfave/cli/v2"

	"espmirror/gpt"
	"espmirror/replicate"
)

// forInitrd says that this is the program for an initramfs. It leaves out what nobody does there, because of its size: the commands
// init, add, remove, random-seed and extract, metrics, manifests, boot entries of the firmware, and as sources archives and exFAT
// volumes. It takes no file for one of them, so that what is named is refused as what it is not. Some functions below are not even
// called here, which saves some pages.
const forInitrd = true

func (inv *invocation) initCommand() *cli.Command { return nil } // never called

var errNotInInitrd = errors.New("the program for an initramfs reads neither archives nor exFAT")

var archiveErrors []error

func isArchive(string) bool { return false }

func (inv *invocation) openArchive(string) (replicate.Source, error) { return nil, errNotInInitrd }

func notATarget(verb, name string) error {
	if isDir(name) {
		return refusef("cannot %s %s: it is a directory, and a target is a device or an image", verb, name)
	}
	return nil
}

var archiveFormats map[string]func()

func (inv *invocation) extractArchive(format, _, _ string, _ []string) (report, error) {
	return nil, usagef("--format=%s: %v", format, errNotInInitrd)
}

type exfatVolume struct{}

func exfatAttr(any) byte { return 0 }

func (inv *invocation) openReadable(verb, name string, among ...string) (*volume, error) {
	return inv.openVolume(verb, name, among...)
}

func (v *volume) tree() (scanned, error) { return v.fat.Scan() }

func (m *members) exfatSource() (replicate.Source, error) { return nil, nil }

func targetHint(err error, _ *gpt.Location) error { return err }

// Nobody collects metrics there.

func metricsFlags() []cli.Flag { return nil }

func writeMetrics(io.Writer, *statusReport, int) {}

// No boot entries of the firmware are shown or made: what boots goes by those that are there.

type (
	registration  struct{}
	setEntries    struct{}
	volumeEntries struct{}
)

func registerFlags() []cli.Flag { return nil }

func (inv *invocation) registration() (*registration, error)   { return nil, nil }
func (r *registration) of([]*member) error                     { return nil }
func (r *registration) choose(*members) error                  { return nil }
func (r *registration) planned(*setReport) error               { return nil }
func (r *registration) carryOut(_ *setReport, err error) error { return err }
func (inv *invocation) left(*setReport)                        {}
func (s *setEntries) print(*output)                            {}
func (inv *invocation) addEntries(*statusReport)               {}
func (r *statusReport) entryColumn(*table)                     {}

func (c *checkedVolume) checkExFAT(*volume) error { return errNotInInitrd }

// No manifests are written or compared.

func manifestFlags() []cli.Flag { return nil }

func (inv *invocation) thenManifest(_ *members, _ bool, run func() (report, error)) (report, error) {
	return run()
}

const (
	maxVerifyArgs = 0 // how many arguments `verify` takes
	verifyUsage   = "espmirror verify [OPTIONS] [--primary VOLUME] [--target VOLUME]..."
	verifyText    = "Nothing is written."
)

func verifyFlags() []cli.Flag { return nil }

func (inv *invocation) verifyManifest() (report, error) { return nil, nil }
