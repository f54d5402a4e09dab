// Package noenv keeps an environment variable from a library that panics at it while the program starts: go-logging, which
// go-exfat needs, does so when the name of a level in LogExcludeBypassLevelName is none that it knows. At boot the
// environment is what somebody wrote on the kernel's command line.
//
// Packages are initialised in the order of their import paths as soon as all that they import is (the Go specification,
// "Program initialization"). This one needs nothing that go-logging does not need, and comes before it.
package noenv

import "os"

func init() { _ = os.Unsetenv("LogExcludeBypassLevelName") }
