package replicate

import (
	"context"
	"fmt"

	"espmirror/blockdev"
	"espmirror/fatdriver"
)

// Verify reads every selected byte of the source and of the targets and reports what differs. It writes nothing. A
// target that an interrupted run left behind is compared as readers see it, and reported with ErrNeedsRecovery when it
// is otherwise the same.
func Verify(ctx context.Context, src Source, targets []*Target, o Options) ([]Result, error) {
	r, err := begin(src, targets, o)
	if err != nil {
		return nil, err
	}
	r.each(func(s *side) {
		s.dev = blockdev.NewOverlay(s.t.Dev)
		if err := r.look(s); err != nil {
			s.fail(fmt.Errorf("cannot verify %s: %w", s.t.Name, err))
		}
	})
	r.opt.Fingerprint = false // it reads everything
	if err := inOrder(r.adapt, func() error { return r.compare(ctx) }); err != nil {
		r.stop(err)
		return r.results, err
	}
	r.each(func(s *side) {
		_, changes, err := r.wants(s, false)
		if err != nil {
			s.fail(fmt.Errorf("cannot verify %s: %w", s.t.Name, err))
			return
		}
		words := map[string]string{"create": "missing", "replace": "differs", "delete": "extra", "rename": "differs"}
		for i := range changes {
			changes[i].Op = words[changes[i].Op]
		}
		if err := r.warnDangling(s); err != nil {
			s.fail(fmt.Errorf("cannot verify %s: %w", s.t.Name, err))
			return
		}
		s.res.Summary.Changes = changes
		s.res.Outcome = InSync
		if len(changes) > 0 {
			s.res.Outcome = Differs
		}
		pending, err := unfinished(s.vol, s.tree)
		if err == nil && pending {
			err = fmt.Errorf("%s: %w", s.t.Name, ErrNeedsRecovery)
		}
		if err != nil {
			s.fail(&Hint{err, fmt.Sprintf("run `espmirror recover %s`", s.t.Name)})
		}
	})
	return r.results, nil
}

// VerifyAll verifies several jobs one after the other.
func VerifyAll(ctx context.Context, jobs []Job) ([][]Result, error) {
	var all [][]Result
	for _, j := range jobs {
		rs, err := Verify(ctx, j.Source, j.Targets, j.Options)
		if rs == nil && len(all) == 0 {
			return nil, err
		}
		if all = append(all, rs); err != nil {
			return all, err
		}
	}
	return all, nil
}

// look opens and walks a target for reading.
func (r *run) look(s *side) error {
	if err := s.dev.Invalidate(); err != nil {
		return fmt.Errorf("cannot drop caches: %w", err)
	}
	var err error
	if s.vol, err = fatdriver.Open(s.dev); err != nil {
		return err
	}
	return r.scan(s)
}
