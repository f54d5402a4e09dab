package main

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"espmirror/blockdev"
	"espmirror/fatdriver"
	"espmirror/gpt"
	"espmirror/replicate"
)

func TestExitCode(t *testing.T) {
	wrap := func(err error) error { return fmt.Errorf("cannot sync b.img: %w", err) }
	failed := errors.New("input/output error")
	refused, pending := wrap(replicate.ErrRefused), wrap(replicate.ErrNeedsRecovery)
	for name, tc := range map[string]struct {
		err  error
		want int
	}{
		"nil":                      {nil, 0},
		"any":                      {failed, 1},
		"not FAT, only looking":    {wrap(fatdriver.ErrNotFAT), 1},
		"damaged, only looking":    {wrap(fatdriver.ErrDamaged), 1},
		"source":                   {wrap(replicate.ErrSource), 1},
		"flush failed":             {wrap(blockdev.ErrFlushFailed), 1},
		"differs":                  {errDiffers, 4},
		"needs recovery":           {pending, 5},
		"refused":                  {refused, 6},
		"refused by the command":   {refusef("cannot sync b.img: %w", fatdriver.ErrNotFAT), 6},
		"wrong selection":          {wrap(replicate.ErrSelection), 64},
		"empty selection":          {wrap(replicate.ErrEmptySelection), 6},
		"busy":                     {wrap(&blockdev.BusyError{By: []string{"mounted on /efi"}}), 6},
		"read-only":                {wrap(blockdev.ErrReadOnly), 6},
		"no ESP":                   {wrap(gpt.ErrNotESP), 6},
		"ambiguous":                {wrap(gpt.ErrAmbiguous), 6},
		"no target":                {wrap(fatdriver.ErrNotTarget), 6},
		"no space":                 {wrap(fatdriver.ErrNoSpace), 6},
		"missing":                  {wrap(missing{failed}), 3},
		"usage":                    {usagef("x"), 64},
		"interrupted":              {wrap(context.Canceled), 130},
		"one target failed":        {&targetsError{errs: []error{failed}, total: 1}, 3},
		"one of two failed":        {&targetsError{errs: []error{failed}, total: 2, wrote: true}, 3},
		"one missing":              {&targetsError{errs: []error{missing{failed}}, total: 2}, 3},
		"all refused":              {&targetsError{errs: []error{refused, refused}, total: 2}, 6},
		"one refused, one written": {&targetsError{errs: []error{refused}, total: 2, wrote: true}, 3},
		"one refused, one failed":  {&targetsError{errs: []error{refused, failed}, total: 2}, 3},
		"one refused, one pending": {&targetsError{errs: []error{refused, pending}, total: 2}, 3},
		"all pending":              {&targetsError{errs: []error{pending, pending}, total: 2}, 5},
		"targets interrupted":      {&targetsError{errs: []error{wrap(context.Canceled)}, total: 2}, 130},
		"volumes agree":            {&volumesError{[]error{pending, pending}}, 5},
		"volumes do not":           {&volumesError{[]error{pending, failed}}, 1},
	} {
		if got := exitCode(tc.err); got != tc.want {
			t.Errorf("%s: exit status %d, want %d", name, got, tc.want)
		}
	}
}

func TestHints(t *testing.T) {
	for want, err := range map[string]error{
		"do this":    fmt.Errorf("x: %w", withHint(errors.New("y"), "do this")),
		"unmount it": fmt.Errorf("x: %w", &blockdev.BusyError{Hint: "unmount it"}),
		"wait until that program is done, then try again":                   &blockdev.BusyError{By: []string{"locked by another program"}},
		"use /dev/loop3 instead, or detach it with `losetup -d /dev/loop3`": &blockdev.BusyError{By: []string{"attached to loop3"}, Hint: "unmount it"},
		"":                              errors.New("x"),
		"run `espmirror recover b.img`": recoverHint(fmt.Errorf("x: %w", replicate.ErrNeedsRecovery), "b.img"),
	} {
		if got := hintOf(err); got != want {
			t.Errorf("hint of %v is %q, want %q", err, got, want)
		}
	}
}
