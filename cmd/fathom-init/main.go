// Command fathom-init is the first process of a lab's node. fathom starts it in new namespaces. It makes
// the node's root file system, and then keeps containerd and kubelet running. It is a program of its own because every
// node has one: it takes a few megabytes where the fathom command would take tens.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/machine"
	"github.com/fathom-network/fathom/internal/kernel/machine/boot"
)

func main() {
	if len(os.Args) > 3 && os.Args[1] == machine.EnterCommand {
		err := boot.Become(os.Args[2], os.Args[3:])
		fmt.Fprintln(os.Stderr, err)
		os.Exit(126) // the status that shells use for a program that cannot be executed
	}
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "fathom-init is the first process of a lab's node; it is started by `fathom up`")
		os.Exit(2)
	}
	if len(os.Args) == 2 && os.Args[1] == "supervise" {
		exit(supervise())
	}
	runtime.LockOSThread() // Setup changes this thread's namespaces; exec carries them to the whole process
	exit(setup())
}

func exit(err error) {
	if err == nil {
		os.Exit(0)
	}
	fmt.Fprintln(os.Stderr, err)
	_, _ = fmt.Fprintln(os.NewFile(machine.ReadyFD, "ready"), err)
	os.Exit(1)
}

func setup() error {
	var spec machine.Spec
	if err := json.NewDecoder(os.NewFile(machine.SpecFD, "spec")).Decode(&spec); err != nil {
		return fmt.Errorf("read the machine's spec: %w", err)
	}
	if err := boot.Setup(spec); err != nil {
		return err
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if err := os.WriteFile("/run/fathom-spec.json", data, 0o600); err != nil {
		return err
	}
	if _, err := unix.FcntlInt(machine.ReadyFD, unix.F_SETFD, 0); err != nil {
		return fmt.Errorf("keep the ready pipe: %w", err)
	}
	return unix.Exec("/proc/self/exe", []string{"fathom-init", "supervise"}, []string{"PATH=" + machine.Path, "GOGC=25", "GOMAXPROCS=1"})
}

func supervise() error {
	data, err := os.ReadFile("/run/fathom-spec.json")
	if err != nil {
		return err
	}
	// It was executed as /proc/self/exe, so ps would show "exe".
	if err := os.WriteFile("/proc/self/comm", []byte("fathom-init"), 0o644); err != nil {
		return err
	}
	var spec machine.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return fmt.Errorf("read the machine's spec: %w", err)
	}
	unix.CloseOnExec(machine.ReadyFD)
	ready := os.NewFile(machine.ReadyFD, "ready")
	return boot.Supervise(spec, func() error {
		if _, err := fmt.Fprintln(ready, "ok"); err != nil {
			return err
		}
		return ready.Close()
	})
}
