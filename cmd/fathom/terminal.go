package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/fathom-network/fathom/internal/kernel/machine"
)

// runInTerminal runs cmd in a terminal of the node, connected to ours. The node's /dev/pts is not the host's: with the
// host's terminal, a shell would find no terminal of that name and have no job control.
func (a *app) runInTerminal(ctx context.Context, m *machine.Machine, cmd *exec.Cmd) error {
	master, slave, err := openTerminal(m)
	if err != nil {
		return fmt.Errorf("open a terminal on the node: %w", err)
	}
	defer master.Close()
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}

	resize := func() {
		if size, err := unix.IoctlGetWinsize(int(a.in.Fd()), unix.TIOCGWINSZ); err == nil {
			_ = unix.IoctlSetWinsize(int(master.Fd()), unix.TIOCSWINSZ, size)
		}
	}
	resize()
	sizes := make(chan os.Signal, 1)
	signal.Notify(sizes, unix.SIGWINCH)
	defer signal.Stop(sizes)
	go func() {
		for range sizes {
			resize()
		}
	}()
	state, err := term.MakeRaw(int(a.in.Fd()))
	if err != nil {
		return fmt.Errorf("set up the terminal: %w", err)
	}
	defer func() { _ = term.Restore(int(a.in.Fd()), state) }()

	go func() { _, _ = io.Copy(master, a.in) }()
	drained := make(chan struct{})
	go func() {
		_, _ = io.Copy(a.out, master) // ends with EIO when the last process closes the terminal
		close(drained)
	}()
	err = m.Run(ctx, cmd)
	slave.Close()
	<-drained
	return err
}

// openTerminal creates a pseudoterminal in the machine's /dev/pts: pts(4).
func openTerminal(m *machine.Machine) (master, slave *os.File, err error) {
	master, err = os.OpenFile(m.File("/dev/pts/ptmx"), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, err
	}
	fd := int(master.Fd())
	var n int
	if err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err == nil {
		n, err = unix.IoctlGetInt(fd, unix.TIOCGPTN)
	}
	if err == nil {
		slave, err = os.OpenFile(m.File(fmt.Sprintf("/dev/pts/%d", n)), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		return nil, nil, errors.Join(err, master.Close())
	}
	return master, slave, nil
}
