// Command espmirror keeps the EFI System Partitions of a machine alike, without mounting any of them.
//
// Each command has a file of its own. A command returns a report and an error; app.go alone turns the two into text or
// JSON and an exit status, and main alone ends the process, so that every lock is released on the way out.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	// A second signal ends the process at once, which is as safe for the volumes as a power cut.
	context.AfterFunc(ctx, stop)
	// A reader that goes away (a pager, head) must not kill a run between two commits: the write fails instead.
	signal.Ignore(syscall.SIGPIPE)
	os.Exit(newApp(os.Stdin, os.Stdout, os.Stderr).run(ctx, os.Args))
}
