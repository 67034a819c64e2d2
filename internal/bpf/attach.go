package bpf

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	ebpflink "github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/link"
)

// Programs are attached to devices by themselves, not by links: then nothing has to be pinned for each device, and
// what a device has goes with it. The program's name says that it is ours.

// attached returns the ids of the programs of that name on a device.
func attached(node *link.Namespace, tcx bool, index int, name string) ([]ebpf.ProgramID, error) {
	var ids []ebpf.ProgramID
	if !tcx {
		all, err := node.Filters(index, name)
		for _, id := range all {
			ids = append(ids, ebpf.ProgramID(id))
		}
		return ids, err
	}
	err := node.Do(func() error {
		all, err := ebpflink.QueryPrograms(ebpflink.QueryOptions{Target: index, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
				return nil
			}
			return fmt.Errorf("ask for the programs of device %d: %w", index, err)
		}
		for _, a := range all.Programs {
			if called(a.ID) == name {
				ids = append(ids, a.ID)
			}
		}
		return nil
	})
	return ids, err
}

func called(id ebpf.ProgramID) string {
	program, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer program.Close()
	info, err := program.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

// attach puts a program on a device, in place of older ones of ours.
func attach(node *link.Namespace, tcx bool, index int, name string, program *ebpf.Program) error {
	if !tcx {
		return node.SetFilter(index, program.FD(), name)
	}
	info, err := program.Info()
	if err != nil {
		return err
	}
	id, _ := info.ID()
	old, err := attached(node, tcx, index, name)
	if err != nil {
		return err
	}
	there := false
	for _, o := range old {
		there = there || o == id
	}
	return node.Do(func() error {
		for _, o := range old {
			if o == id {
				continue
			}
			if there {
				err = detachID(index, o)
			} else {
				err = replace(index, o, program)
				there = err == nil
			}
			if err != nil {
				return fmt.Errorf("replace the program %s of device %d: %w", name, index, err)
			}
		}
		if there {
			return nil
		}
		err := ebpflink.RawAttachProgram(ebpflink.RawAttachProgramOptions{Target: index, Program: program, Attach: ebpf.AttachTCXIngress})
		if err != nil && !errors.Is(err, unix.EEXIST) { // the plugin was faster
			return fmt.Errorf("attach the program %s to device %d: %w", name, index, err)
		}
		return nil
	})
}

func replace(index int, old ebpf.ProgramID, program *ebpf.Program) error {
	there, err := ebpf.NewProgramFromID(old)
	if err != nil {
		return err
	}
	defer there.Close()
	return ebpflink.RawAttachProgram(ebpflink.RawAttachProgramOptions{
		Target: index, Program: program, Attach: ebpf.AttachTCXIngress, Anchor: ebpflink.ReplaceProgram(there)})
}

// detach takes the programs of that name off a device.
func detach(node *link.Namespace, tcx bool, index int, name string) error {
	errs := []error{node.DeleteFilter(index, name)}
	if !tcx {
		return errs[0]
	}
	ids, err := attached(node, tcx, index, name)
	errs = append(errs, err, node.Do(func() error {
		var errs []error
		for _, id := range ids {
			if err := detachID(index, id); err != nil {
				errs = append(errs, fmt.Errorf("detach the program %s from device %d: %w", name, index, err))
			}
		}
		return errors.Join(errs...)
	}))
	return errors.Join(errs...)
}

func detachID(index int, id ebpf.ProgramID) error {
	program, err := ebpf.NewProgramFromID(id)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer program.Close()
	err = ebpflink.RawDetachProgram(ebpflink.RawDetachProgramOptions{Target: index, Program: program, Attach: ebpf.AttachTCXIngress})
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}
