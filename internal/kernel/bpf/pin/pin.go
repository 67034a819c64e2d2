// Package pin is what the fast path keeps in a bpffs, and how the plugin registers a pod there. It makes the few system
// calls itself: the plugin is executed for each pod, and a library that loads programs would double its size.
//
// docs/design/fastpath.md says what the parts are for.
package pin

import (
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"path/filepath"
	"runtime"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Dir is where the fast path is pinned on a node.
const Dir = "/sys/fs/bpf/fathom"

// Names of maps and programs in that directory. They are their names in the kernel as well; a program's name is our mark on
// a device.
const (
	Pods    = "fathom_pods"
	Ports   = "fathom_ports"
	Remotes = "fathom_remotes"
	Counts  = "fathom_counts"
	// What policies allow, and what was judged by that.
	Identities = "fathom_identities"
	Allowed    = "fathom_allowed"
	Blocks     = "fathom_blocks"
	Flows      = "fathom_flows"
	Judge      = "fathom_judge"
	FromPod    = "fathom_pod"
	FromNet    = "fathom_wire"
)

// TCXIngress is BPF_TCX_INGRESS, where programs are attached.
const TCXIngress = 46

// Stack says why a pod's packets take the kernel's stack: each bit is a reason. 0 is the fast path.
type Stack uint32

// The reasons.
const (
	New    Stack = 1 << iota // the agent has not processed it yet
	Off                      // the fast path is off on this node
	Shaped                   // its device has a queueing discipline, which the fast path would bypass
	Policy                   // policies are to be asked: by maps where they know the pod's, else by the stack's rules
)

// Key is an address as a key of maps: an IPv4 address is mapped, ::ffff:a.b.c.d.
type Key [16]byte

// KeyOf returns an address's key.
func KeyOf(a netip.Addr) Key { return a.As16() }

// Addr returns the key's address.
func (k Key) Addr() netip.Addr { return netip.AddrFrom16(k).Unmap() }

// Pod is the value of an address in the map Pods.
type Pod struct {
	Index        uint32 // of the node's end of the pod's veth pair
	Stack        Stack
	MAC, HostMAC [6]byte
}

// Port is the value of a device in the map Ports.
type Port struct {
	MAC [6]byte
	_   uint16
}

// Device is the node's end of a pod's veth pair.
type Device struct {
	Index        int
	MAC, HostMAC [6]byte // the pod's end and the node's
	Addrs        []netip.Addr
}

// Attach drops packets from false sources of a pod from its first packet on. It writes the device into the maps and calls
// put with the program's file descriptor, to attach it. The pod's other packets take the stack until the agent has seen the
// device as all plugins have left it. If nothing is pinned, because no agent ran yet or the kernel lacks something, Attach
// does nothing and the error is fs.ErrNotExist.
func Attach(dir string, d Device, put func(program int) error) error {
	program, err := get(filepath.Join(dir, FromPod))
	if err != nil {
		return err
	}
	defer unix.Close(program)
	if err := d.record(dir); err != nil {
		return err
	}
	return put(program)
}

// AttachTCX attaches a program that sees a device's incoming packets before any tc filter does (Linux 6.6).
func AttachTCX(index, program int) error {
	attr := struct{ target, program, kind, flags, replace, relative, revisionLow, revisionHigh uint32 }{
		target: uint32(index), program: uint32(program), kind: TCXIngress}
	_, err := call(unix.BPF_PROG_ATTACH, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	if err != nil && !errors.Is(err, unix.EEXIST) { // the agent attached first
		return fmt.Errorf("attach the program %s to device %d: %w", FromPod, index, err)
	}
	return nil
}

// record writes the device into the maps, before the program is attached: that drops packets of unknown devices.
func (d Device) record(dir string) error {
	ports, err := get(filepath.Join(dir, Ports))
	if err != nil {
		return err
	}
	defer unix.Close(ports)
	index, port := uint32(d.Index), Port{MAC: d.MAC}
	if err := update(ports, unsafe.Pointer(&index), unsafe.Pointer(&port), unix.BPF_ANY); err != nil {
		return fmt.Errorf("write the map %s: %w", Ports, err)
	}
	pods, err := get(filepath.Join(dir, Pods))
	if err != nil {
		return err
	}
	defer unix.Close(pods)
	for _, a := range d.Addrs {
		key, pod := KeyOf(a), Pod{Index: index, Stack: New, MAC: d.MAC, HostMAC: d.HostMAC}
		err := update(pods, unsafe.Pointer(&key), unsafe.Pointer(&pod), unix.BPF_NOEXIST)
		if errors.Is(err, unix.EEXIST) {
			// The entry belongs to the address's previous pod, or the agent wrote it first.
			var there Pod
			if lookup(pods, unsafe.Pointer(&key), unsafe.Pointer(&there)) == nil && there.Index == index && there.MAC == d.MAC {
				continue
			}
			err = update(pods, unsafe.Pointer(&key), unsafe.Pointer(&pod), unix.BPF_ANY)
		}
		if err != nil {
			return fmt.Errorf("write the map %s: %w", Pods, err)
		}
	}
	return nil
}

func get(path string) (int, error) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	attr := struct {
		path      uint64
		fd, flags uint32
	}{path: uint64(uintptr(unsafe.Pointer(name)))}
	fd, err := call(unix.BPF_OBJ_GET, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(name)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) || errors.Is(err, unix.EPERM) {
			err = fs.ErrNotExist // no bpffs, or no BPF
		}
		return -1, fmt.Errorf("open %s: %w", path, err)
	}
	return fd, nil
}

type element struct {
	fd, _             uint32
	key, value, flags uint64
}

func update(fd int, key, value unsafe.Pointer, flags uint64) error {
	attr := element{fd: uint32(fd), key: uint64(uintptr(key)), value: uint64(uintptr(value)), flags: flags}
	_, err := call(unix.BPF_MAP_UPDATE_ELEM, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(key)
	runtime.KeepAlive(value)
	return err
}

func lookup(fd int, key, value unsafe.Pointer) error {
	attr := element{fd: uint32(fd), key: uint64(uintptr(key)), value: uint64(uintptr(value))}
	_, err := call(unix.BPF_MAP_LOOKUP_ELEM, unsafe.Pointer(&attr), unsafe.Sizeof(attr))
	runtime.KeepAlive(key)
	runtime.KeepAlive(value)
	return err
}

func call(command uintptr, attr unsafe.Pointer, size uintptr) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(attr), size)
		switch errno {
		case 0:
			return int(r), nil
		case unix.EINTR, unix.EAGAIN:
		default:
			return -1, errno
		}
	}
}

func (s Stack) String() string {
	if s == 0 {
		return "fast"
	}
	var why []string
	for i, name := range []string{"new", "off", "shaped", "policy"} {
		if s&(1<<i) != 0 {
			why = append(why, name)
		}
	}
	return "stack (" + strings.Join(why, ", ") + ")"
}
