package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// worker is how the process is run that does the work of `early`.
type worker struct {
	program string        // "" does the work in this process
	grace   time.Duration // between asking it to stop and killing it
	signal  func(*os.Process, os.Signal) error
}

const (
	// workerGrace is time for a step that is under way: the write of a chunk and a flush on a slow disk.
	workerGrace = 1500 * time.Millisecond
	// workerReap is how long a killed process may take to be gone. One that waits for a disk goes when the disk answers.
	workerReap = 200 * time.Millisecond
	// workerDrain is time to read what a process that is gone has left in the pipes, on a machine that is busy.
	workerDrain = 5 * time.Second
	// maxWorkerReport bounds what is read of a worker's report.
	maxWorkerReport = 16 << 20
	// maxCrashLines is how much of a crash is kept: the reason comes first.
	maxCrashLines = 40
)

// supervise has the work done in a process of its own, and is back when the time is over, whatever happens.
//
// A read from a disk that is dying can take minutes. The process that waits for it sleeps without interruption: no context
// ends that, SIGKILL only counts when the disk has answered, and a process is not gone before the last of its threads is. So
// the one on which a boot waits must not be the one that reads. The other one is asked to stop, which it does between
// two steps; then killed, which is as safe as a power cut; and then left behind.
//
// Its output comes through pipes, so that what is left behind keeps no file open on which somebody waits ($(espmirror early)).
// It gets SIGTERM when this process dies: nobody would end it in time then. It has a process group of its own, as signals
// are passed on to it.
func (inv *invocation) supervise(p earlyPlan) *earlyReport {
	start := time.Now()
	w, err := inv.startWorker(p)
	if err != nil {
		// Without /proc, or without memory for another process. To do nothing would be worse than to have no guard.
		inv.log.Debug("the work is done in this process", "err", err)
		return inv.unsupervised(p)
	}
	// The signal at the death of the parent is sent when the thread dies that started the process.
	defer runtime.UnlockOSThread()
	defer close(w.quit)

	const (
		running = iota
		asked   // to stop
		killed
	)
	state, late := running, false
	deadline := time.NewTimer(max(0, p.limit-time.Since(start)))
	defer deadline.Stop()
	done := inv.ctx.Done()
	var doc []byte
	var crash []string
	docs, exited, lines := w.doc, w.exited, w.lines
	var status error
	for docs != nil || exited != nil || lines != nil {
		select {
		case line, ok := <-lines:
			if !ok {
				lines = nil
			} else if strings.HasPrefix(line, "espmirror: ") || strings.HasPrefix(line, "hint: ") {
				fmt.Fprintln(logWriter{inv}, safe(line))
			} else if len(crash) < maxCrashLines {
				crash = append(crash, line)
			}
		case doc = <-docs:
			docs = nil
		case status = <-exited:
			exited, state = nil, killed
			deadline.Reset(workerDrain)
		case <-done:
			done = nil
			if state == running {
				state = asked
				_ = inv.worker.signal(w.cmd.Process, syscall.SIGTERM)
				deadline.Reset(inv.worker.grace)
			}
		case <-deadline.C:
			switch state {
			case running:
				late, state = true, asked
				_ = inv.worker.signal(w.cmd.Process, syscall.SIGTERM)
				deadline.Reset(inv.worker.grace)
				continue
			case asked:
				state = killed
				_ = inv.worker.signal(w.cmd.Process, syscall.SIGKILL)
				deadline.Reset(workerReap)
				continue
			}
			docs, lines = nil, nil
			if exited != nil {
				exited, status = nil, errLeftBehind
			}
		}
	}

	rep := &earlyReport{}
	if err := json.Unmarshal(doc, rep); err != nil || rep.Mode == "" {
		rep = &earlyReport{Mode: p.mode, Volumes: []earlyVolume{}}
		if !late && inv.ctx.Err() == nil {
			cause := "it left no report"
			if status != nil {
				cause = status.Error()
			}
			if len(crash) > 0 {
				cause += ": " + crash[0]
			}
			rep.stop(&jsonError{Message: "internal error: the process that does the work ended: " + cause, Exit: exitFailed})
			for _, line := range crash {
				inv.log.Debug(line)
			}
		}
	}
	switch {
	case late:
		rep.stopLate(p.limit, errors.Is(status, errLeftBehind))
	case inv.ctx.Err() != nil && rep.Error == nil && status != nil:
		rep.stop(newJSONError(interrupted{context.Canceled}))
	}
	return rep
}

// errLeftBehind is the state of a process that was killed and is not gone.
var errLeftBehind = errors.New("it waits for a disk")

// stop notes what ended the run.
func (r *earlyReport) stop(e *jsonError) { r.Stopped, r.Error = e, e }

// stopLate notes that the time was over. A run that was done all the same, at the last moment, stays so.
func (r *earlyReport) stopLate(limit time.Duration, left bool) {
	if r.Error == nil && r.Mode != "" && (r.Nothing != "" || len(r.Volumes) > 0) {
		return
	}
	text := fmt.Sprintf("the time limit of %s is over", limit)
	if left {
		text += ", and a disk does not answer"
	}
	r.stop(&jsonError{Message: text + ": what was under way is stopped, which harms nothing, and the next run finishes it",
		Hint: "espmirror.limit=1min on the kernel command line gives more time, espmirror=no does without", Exit: exitPartial})
}

// unsupervised does the work in this process. It ends between two steps when the time is over, and so not while a disk
// does not answer.
func (inv *invocation) unsupervised(p earlyPlan) *earlyReport {
	outer := inv.ctx
	ctx, cancel := context.WithCancel(outer)
	defer cancel()
	defer time.AfterFunc(p.limit, cancel).Stop() // no deadline, which would be a failure and not an interruption
	inner := *inv
	inner.ctx = ctx
	rep, err := inner.earlyWork(p)
	rep.Error = newJSONError(err)
	if ctx.Err() != nil && outer.Err() == nil {
		rep.stopLate(p.limit, false)
	}
	return rep
}

// runningWorker is a worker that was started.
type runningWorker struct {
	cmd    *exec.Cmd
	lines  chan string // of its standard error; closed at the end
	doc    chan []byte // its standard output, once it is complete
	exited chan error
	quit   chan struct{} // closed when nobody listens any more
}

// startWorker starts the process. When it succeeds, the calling goroutine is locked to its thread.
func (inv *invocation) startWorker(p earlyPlan) (*runningWorker, error) {
	if inv.worker.program == "" {
		return nil, errors.New("there is no program to start")
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	errR, errW, err := os.Pipe()
	if err != nil {
		return nil, errors.Join(err, outR.Close(), outW.Close())
	}
	cmd := exec.Command(inv.worker.program, inv.workerArgs(p)...)
	cmd.Args[0] = "espmirror"
	// os/exec would open /dev/null, which an initramfs need not have yet. Nothing is read.
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, outW, errW
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	runtime.LockOSThread()
	err = cmd.Start()
	_, _ = outW.Close(), errW.Close()
	if err != nil {
		runtime.UnlockOSThread()
		_, _ = outR.Close(), errR.Close()
		return nil, err
	}
	w := &runningWorker{cmd, make(chan string), make(chan []byte, 1), make(chan error, 1), make(chan struct{})}
	go func() {
		defer outR.Close()
		doc, _ := io.ReadAll(io.LimitReader(outR, maxWorkerReport)) // what does not decode is no report
		w.doc <- doc
	}()
	go func() {
		defer errR.Close()
		defer close(w.lines)
		r := bufio.NewReader(errR)
		for {
			line, err := r.ReadString('\n')
			if line = strings.TrimSuffix(line, "\n"); line != "" {
				select {
				case w.lines <- line:
				case <-w.quit:
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	go func() { w.exited <- cmd.Wait() }()
	return w, nil
}

// workerArgs is the command line of the process.
func (inv *invocation) workerArgs(p earlyPlan) []string {
	args := []string{"early", "--" + supervisedFlag, "--json=short"}
	if p.mode == earlyRecover {
		args = append(args, "--recover-only")
	}
	if p.timeout != nil {
		args = append(args, "--timeout="+strconv.FormatFloat(p.timeout.Seconds(), 'f', -1, 64)+"s")
	}
	if inv.flag("kmsg") {
		args = append(args, "--kmsg")
	}
	if inv.quiet {
		args = append(args, "--quiet")
	}
	if inv.verbose {
		args = append(args, "--verbose")
	}
	if inv.system.Root != "" {
		args = append(args, "--system-root="+inv.system.Root)
	}
	return args
}
