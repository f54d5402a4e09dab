//go:build initrd

package main

import (
	"errors"

	"github.com/urfave/cli/v2"

	"espmirror/gpt"
	"espmirror/replicate"
)

// The program for an initramfs leaves out the sources that are not there at boot, because of their size: archives, and exFAT
// volumes; `init`, and manifests. It takes no file for one of them, so that what is named is refused as what it is not.

func (inv *invocation) initCommand() *cli.Command { return nil }

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

func (c *checkedVolume) checkExFAT(*volume) error { return errNotInInitrd }

// manifests says that there are manifests. What is asked only where there are costs not a byte here.
const manifests = false

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
