package main

import (
	"context"
	"errors"
	"fmt"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

// The exit statuses, the same for all commands. 2 is what a crash of the Go runtime exits with, and 77 has a meaning of
// its own to kernel-install: neither is used.
const (
	exitDone      = 0
	exitFailed    = 1
	exitPartial   = 3
	exitDiffers   = 4
	exitRecover   = 5
	exitRefused   = 6
	exitUsage     = 64
	exitInterrupt = 130
)

// exitHelp is the part of every help text that explains them.
const exitHelp = `EXIT STATUS:
   0    done, or in sync
   1    failed
   3    some targets failed or are missing
   4    differences found (verify, status, sync --dry-run)
   5    a volume needs ` + "`espmirror recover`" + `
   6    refused by a guard, nothing was written
   64   the command line is wrong
   130  interrupted
`

// errDiffers is returned when a comparison found differences. The report has said so: nothing more is printed.
var errDiffers = errors.New("differences found")

// usageError says what is wrong with the command line.
type usageError struct{ msg, hint string }

func (e *usageError) Error() string { return "cannot read the command line: " + e.msg }

// Hint returns what to write instead.
func (e *usageError) Hint() string { return e.hint }

func usagef(format string, a ...any) error { return &usageError{msg: fmt.Sprintf(format, a...)} }

// refusal marks an error as a guard's: it is replicate.ErrRefused without saying so in the message.
type refusal struct{ error }

func (r refusal) Unwrap() error        { return r.error }
func (r refusal) Is(target error) bool { return target == replicate.ErrRefused }

func refusef(format string, a ...any) error { return refusal{fmt.Errorf(format, a...)} }

// interrupted stands for whatever an operation said when it was told to stop.
type interrupted struct{ error }

func (i interrupted) Error() string { return "interrupted" }
func (i interrupted) Unwrap() error { return i.error }

// told is an error that has been told already, or that somebody else is going to tell: only the exit status is left.
type told struct{ *jsonError }

func (t told) Error() string { return t.Message }

// Hint returns what to do about it.
func (t told) Hint() string { return t.jsonError.Hint }

// missing marks the error of a target that is not there, as opposed to one that is wrong.
type missing struct{ error }

func (m missing) Unwrap() error { return m.error }

// targetsError is what went wrong with some of the targets of a run; the others are done.
type targetsError struct {
	verb  string
	errs  []error
	total int  // targets that were named
	wrote bool // something was written to at least one of them
}

func (e *targetsError) Error() string {
	if len(e.errs) == 1 {
		return e.errs[0].Error()
	}
	return fmt.Sprintf("cannot %s %d of %d targets", e.verb, len(e.errs), e.total)
}

// Unwrap returns the error of each target.
func (e *targetsError) Unwrap() []error { return e.errs }

// refusals are the errors by which the packages below say no before they write. Those that also mean that a volume
// cannot be read (fatdriver.ErrNotFAT, ErrDamaged) are no refusal by themselves: the guards of sync make them one.
var refusals = []error{
	replicate.ErrRefused, replicate.ErrEmptySelection, blockdev.ErrBusy, blockdev.ErrReadOnly,
	gpt.ErrNotESP, gpt.ErrAmbiguous, fatdriver.ErrNotTarget, fatdriver.ErrNoSpace,
}

func isRefusal(err error) bool {
	for _, r := range refusals {
		if errors.Is(err, r) {
			return true
		}
	}
	return false
}

// exitCode is the one place that decides the exit status.
func exitCode(err error) int {
	var usage *usageError
	var targets *targetsError
	var volumes *volumesError
	var missing missing
	var told told
	switch {
	case err == nil:
		return exitDone
	case errors.Is(err, context.Canceled):
		return exitInterrupt
	case errors.As(err, &usage), errors.Is(err, replicate.ErrSelection):
		return exitUsage
	case errors.As(err, &targets):
		return targets.exitCode()
	case errors.As(err, &volumes):
		return volumes.exitCode()
	case errors.As(err, &told):
		return told.Exit
	case errors.As(err, &missing):
		return exitPartial
	case errors.Is(err, errDiffers):
		return exitDiffers
	case errors.Is(err, replicate.ErrNeedsRecovery):
		return exitRecover
	case isRefusal(err):
		return exitRefused
	}
	return exitFailed
}

// exitCode is a special status when it holds for every target that is not done, else the general one.
func (e *targetsError) exitCode() int {
	code := 0
	for _, err := range e.errs {
		c := exitCode(err)
		switch {
		case c != exitRefused && c != exitRecover, c == exitRefused && e.wrote, code != 0 && code != c:
			return exitPartial
		}
		code = c
	}
	return code
}

// volumesError is what went wrong with several volumes that a command looked at one after the other.
type volumesError struct{ errs []error }

func (e *volumesError) Error() string {
	return fmt.Sprintf("%v (and %s)", e.errs[0], plural(int64(len(e.errs)-1), "more error", "more errors"))
}

// Unwrap returns every error.
func (e *volumesError) Unwrap() []error { return e.errs }

// exitCode is the status on which all agree, else the general one.
func (e *volumesError) exitCode() int {
	code := exitCode(e.errs[0])
	for _, err := range e.errs[1:] {
		if exitCode(err) != code {
			return exitFailed
		}
	}
	return code
}
