package fastpath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	ebpflink "github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/fathom-network/fathom/internal/kernel/bpf/pin"
	"github.com/fathom-network/fathom/internal/kernel/link"
)

// Programs are attached to devices directly, not by links: nothing has to be pinned for each device, and a device's
// programs go with it. The program's name is the mark. There are two ways to attach: tcx and tc filters. The plugin
// attaches by filters, as does everything on kernels without tcx.

// attachment is one of our programs on a device.
type attachment struct {
	id  ebpf.ProgramID
	tcx bool // else a filter
}

// attached returns our programs of a device by name: those attached as filters, and those attached by tcx.
func attached(node *link.Namespace, tcx bool, filters []link.Filter, index int) (map[string][]attachment, error) {
	all := map[string][]attachment{}
	for _, f := range filters {
		if !f.Egress && (f.Name == pin.FromPod || f.Name == pin.FromNet) {
			all[f.Name] = append(all[f.Name], attachment{id: ebpf.ProgramID(f.Program)})
		}
	}
	if !tcx {
		return all, nil
	}
	err := node.Do(func() error {
		there, err := ebpflink.QueryPrograms(ebpflink.QueryOptions{Target: index, Attach: ebpf.AttachTCXIngress})
		if err != nil {
			if errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENOENT) {
				return nil
			}
			return fmt.Errorf("ask for the programs of device %d: %w", index, err)
		}
		for _, a := range there.Programs {
			if name := called(a.ID); name == pin.FromPod || name == pin.FromNet {
				all[name] = append(all[name], attachment{id: a.ID, tcx: true})
			}
		}
		return nil
	})
	return all, err
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

// attach puts a program on a device in place of older versions. The same version stays as it is.
func attach(node *link.Namespace, tcx bool, index int, name string, program *ebpf.Program) error {
	info, err := program.Info()
	if err != nil {
		return err
	}
	id, _ := info.ID()
	filters, err := node.FiltersOf(index)
	if err != nil {
		return err
	}
	all, err := attached(node, tcx, filters, index)
	if err != nil {
		return err
	}
	there, byTCX := false, false
	for _, old := range all[name] {
		there = true
		byTCX = byTCX || old.tcx && old.id == id
	}
	for _, old := range all[name] {
		switch {
		case old.id == id:
		case !old.tcx:
			err = node.SetFilter(index, program.FD(), name)
		case byTCX:
			err = node.Do(func() error { return detachID(index, old.id) })
		default:
			err = node.Do(func() error { return replace(index, old.id, program) })
			byTCX = err == nil
		}
		if err != nil {
			return fmt.Errorf("replace the program %s of device %d: %w", name, index, err)
		}
	}
	if there {
		return nil
	}
	if !tcx {
		return node.SetFilter(index, program.FD(), name)
	}
	// Not by a filter: the plugin may be attaching at the same time, and later plugins may need the filters' place.
	return node.Do(func() error {
		err := ebpflink.RawAttachProgram(ebpflink.RawAttachProgramOptions{Target: index, Program: program, Attach: ebpf.AttachTCXIngress})
		if err != nil && !errors.Is(err, unix.EEXIST) { // the plugin attached first
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

// detach removes the programs of that name from a device.
func detach(node *link.Namespace, tcx bool, index int, name string) error {
	errs := []error{node.DeleteFilter(index, name)}
	all, err := attached(node, tcx, nil, index)
	errs = append(errs, err, node.Do(func() error {
		var errs []error
		for _, a := range all[name] {
			if err := detachID(index, a.id); err != nil {
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
