package main

import (
	"context"

	"github.com/urfave/cli/v2"

	"espmirror/replicate"
)

// engineRun is replicate.SyncAll or replicate.VerifyAll.
type engineRun = func(context.Context, []replicate.Job) ([][]replicate.Result, error)

func (inv *invocation) verifyCommand() *cli.Command {
	c := &cli.Command{
		Name:        "verify",
		Usage:       "read every selected byte of primary and targets, and tell the differences",
		UsageText:   verifyUsage,
		Description: verifyText,
		Flags:       append(append(setFlags(), selectFlags()...), noProgressFlag()),
		Action:      inv.action(0, maxVerifyArgs, "name the volumes with --primary and --target", inv.verify),
	}
	if !forInitrd {
		c.Flags = append(c.Flags, verifyFlags()...)
	}
	return c
}

func (inv *invocation) verify() (report, error) {
	if !forInitrd {
		if rep, err := inv.verifyManifest(); rep != nil || err != nil {
			return rep, err
		}
	}
	m, err := inv.newMembers("verify")
	if err != nil {
		return nil, err
	}
	return inv.replicate(m, replicate.Options{Selection: inv.selection(), Log: inv.log}, inv.engine.verify, false)
}
