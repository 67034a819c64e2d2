package cni

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"github.com/fathom-network/fathom/internal/kernel/link"
	"github.com/fathom-network/fathom/internal/kernel/podlink"
)

// deleteDevice is the argument with which DEL runs the program itself, for DeleteDevice. A runtime gives none.
const deleteDevice = "delete-device"

// deletePatience is how long DEL waits for another process to delete a device, before it does so itself.
const deletePatience = 2 * time.Second

// deletePod is link's, for who need not wait until the kernel has freed the device's memory: that takes it nine tenths
// of the time, in the context of the process that asks (netdev_run_todo). So another process asks, and this one waits
// until the device has gone, which the kernel announces.
func deletePod(node *link.Namespace, device, alias string) error {
	d, found, err := podlink.Find(node, device, alias)
	if err != nil || !found {
		return err
	}
	elsewhere := deleteElsewhere(node, d)
	// This finds that the device has gone, which is when the lock of all devices is free again, or takes it away.
	if err := podlink.Delete(node, device, alias); err != nil {
		return errors.Join(err, elsewhere)
	}
	return nil
}

// deleteElsewhere has a process delete the device, which goes on when this one ends, and has nothing of what the runtime
// may be waiting for the end of.
func deleteElsewhere(node *link.Namespace, d podlink.Device) error {
	ctx, cancel := context.WithTimeout(context.Background(), deletePatience)
	defer cancel()
	gone, err := node.WatchGone(ctx, d.Index)
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", deleteDevice, strconv.Itoa(d.Index), d.Name, d.Alias)
	cmd.Env = []string{} // what is in ours is for a plugin
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("delete device %s by another process: %w", d.Name, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case <-gone:
		return nil
	case err = <-ended:
	case <-ctx.Done():
		err = errors.Join(ctx.Err(), cmd.Process.Kill(), <-ended)
	}
	if err != nil {
		return fmt.Errorf("delete device %s by another process: %w", d.Name, err)
	}
	return nil
}

// DeletesDevice says whether the program is run by DEL, for DeleteDevice.
func DeletesDevice(args []string) bool { return len(args) > 0 && args[0] == deleteDevice }

// DeleteDevice deletes the device that the arguments name, if it still is the one, and stays until the kernel has
// done with it.
func DeleteDevice(args []string) error {
	usage := fmt.Errorf("%s is what DEL runs, with the index, the name and the alias of a pod's device: not with %q", deleteDevice, args[1:])
	if len(args) != 4 {
		return usage
	}
	index, err := strconv.Atoi(args[1])
	if err != nil || index <= 0 {
		return usage
	}
	node, err := link.Here()
	if err != nil {
		return err
	}
	defer node.Close()
	return podlink.DeleteDevice(node, podlink.Device{Index: index, Name: args[2], Alias: args[3]})
}
