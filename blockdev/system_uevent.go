package blockdev

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNoEvents is returned by BlockEvents when the System is not this machine, whose kernel alone sends events.
var ErrNoEvents = errors.New("only the running kernel sends events")

// BlockEvents tells when block devices of this machine come, or change. It is a hint: events are lost when there are
// many of them, and in a container none may come.
type BlockEvents struct {
	// C receives a value after one or more events. It is never closed.
	C <-chan struct{}

	socket *os.File
	done   chan struct{}
}

// kernelGroup is the multicast group of the events that the kernel sends; those of group 2 are udev's, which does not run
// everywhere. Linux, lib/kobject_uevent.c.
const kernelGroup = 1

// maxUevent is more than a message can have, in bytes. Linux, include/linux/kobject.h, UEVENT_BUFFER_SIZE is 2048 and does
// not count the first line.
const maxUevent = 8192

// BlockEvents listens to the kernel from now on: what happens after it returned is told. It returns ErrNoEvents for a
// System with a root, and the error of the system where the socket is not allowed.
func (s System) BlockEvents() (*BlockEvents, error) {
	fail := func(err error) (*BlockEvents, error) {
		return nil, fmt.Errorf("cannot listen to events of the kernel: %w", err)
	}
	if s.Root != "" {
		return fail(ErrNoEvents)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return fail(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		_ = unix.Close(fd)
		return fail(err)
	}
	socket := os.NewFile(uintptr(fd), "uevents") // not blocking, so that Close ends a read under way
	conn, err := socket.SyscallConn()
	if err != nil {
		_ = socket.Close()
		return fail(err)
	}
	c := make(chan struct{}, 1)
	e := &BlockEvents{C: c, socket: socket, done: make(chan struct{})}
	go e.listen(conn, c)
	return e, nil
}

// Close ends the listening.
func (e *BlockEvents) Close() error {
	err := e.socket.Close()
	<-e.done
	return err
}

// listen passes events on until the socket is closed.
func (e *BlockEvents) listen(conn syscall.RawConn, c chan<- struct{}) {
	defer close(e.done)
	buf := make([]byte, maxUevent)
	for {
		var n int
		var from unix.Sockaddr
		var err error
		if conn.Read(func(fd uintptr) bool {
			n, from, err = unix.Recvfrom(int(fd), buf, 0)
			return err != unix.EAGAIN
		}) != nil {
			return
		}
		switch {
		case err == unix.EINTR:
			continue
		case err == unix.ENOBUFS:
			// Events were lost; one of them may have been the one.
		case err != nil:
			return // it will not get better, and whoever waits looks from time to time anyway
		default:
			sender, ok := from.(*unix.SockaddrNetlink)
			if !ok || sender.Pid != 0 || !newsOfBlock(buf[:n]) {
				continue
			}
		}
		select {
		case c <- struct{}{}:
		default: // one that nobody has looked at yet says the same
		}
	}
}

// newsOfBlock says whether a message of the kernel is about a block device that came or changed: "add@/devices/…" and
// then KEY=value, each ended by a zero byte. Linux, Documentation/ABI/testing/sysfs-uevent, and lib/kobject_uevent.c.
func newsOfBlock(msg []byte) bool {
	block, news := false, true
	for field := range bytes.SplitSeq(msg, []byte{0}) {
		switch string(field) {
		case "SUBSYSTEM=block":
			block = true
		case "ACTION=remove":
			news = false
		}
	}
	return block && news
}
