package main

import (
	"context"

	"github.com/urfave/cli/v2"

	"espmirror/replicate"
)

// engineRun is replicate.SyncAll or replicate.VerifyAll.
type engineRun = func(context.Context, []replicate.Job) ([][]replicate.Result, error)

func (inv *invocation) verifyCommand() *cli.Command {
	return &cli.Command{
		Name:        "verify",
		Usage:       "read every selected byte of primary and targets, and tell the differences",
		UsageText:   "espmirror verify [OPTIONS] [--primary VOLUME] [--target VOLUME]...",
		Description: "Nothing is written.",
		Flags:       append(append(setFlags(), selectFlags()...), noProgressFlag()),
		Action:      inv.action(0, 0, "name the volumes with --primary and --target", inv.verify),
	}
}

func (inv *invocation) verify() (report, error) {
	m, err := inv.newMembers("verify")
	if err != nil {
		return nil, err
	}
	return inv.replicate(m, replicate.Options{Selection: inv.selection(), Log: inv.log}, inv.engine.verify, false)
}
