// Package kerneltypes finds one field of one of the running kernel's structs, for a program that reads it.
//
// The loader would do so by itself, by an index over all names and types of the kernel: 36 ms of processor time, as
// much as all else that loading connect()'s programs takes, where reading through the types once takes 4. What this
// package does not understand it refuses, and the caller leaves it to the loader.
package kerneltypes

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// vmlinux is where the kernel shows its own types, in BTF: docs.kernel.org/bpf/btf.html.
const vmlinux = "/sys/kernel/btf/vmlinux"

// Flag returns types among which there is the struct of that name alone, and of its fields that one alone, which is a
// bitfield of one bit: a target for the relocations of programs that read no other field.
func Flag(structure, field string) (*btf.Spec, error) {
	raw, unmap, err := read(vmlinux)
	if err != nil {
		return nil, fmt.Errorf("read the kernel's types: %w", err)
	}
	defer unmap()
	size, offset, err := find(raw, binary.NativeEndian, structure, field)
	if err != nil {
		return nil, fmt.Errorf("find the flag %s of the struct %s in the kernel's types: %w", field, structure, err)
	}
	// The type of the bitfield is not the kernel's: a bit is found by its offset, in whatever it is said to lie.
	builder, err := btf.NewBuilder([]btf.Type{&btf.Struct{Name: structure, Size: size, Members: []btf.Member{{
		Name: field, Type: &btf.Int{Name: "unsigned char", Size: 1}, Offset: btf.Bits(offset), BitfieldSize: 1,
	}}}}, nil)
	if err != nil {
		return nil, err
	}
	small, err := builder.Marshal(nil, nil)
	if err != nil {
		return nil, err
	}
	return btf.LoadSpecFromReader(bytes.NewReader(small))
}

// read maps the file: to copy it takes longer than to read through it.
func read(path string) (raw []byte, unmap func(), err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	raw, err = unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_PRIVATE)
	if err == nil {
		return raw, func() { _ = unix.Munmap(raw) }, nil
	}
	raw, err = os.ReadFile(path) // before Linux 6.16 it cannot be mapped
	return raw, func() {}, err
}

const (
	magic      = 0xeb9f
	headerSize = 24
	typeSize   = 12 // of what each type begins with: name, info, size
	memberSize = 12 // of a struct's field: name, type, offset

	kindStruct = 4
	byBits     = 1 << 31 // in a struct's info: a field's offset has its size, in bits, in the upper 8 bits
)

// extra are the bytes that follow a type: those of its kind, and those for each of what its info counts. A kind that is
// not known here may have any, so that no type behind it could be found.
var extra = [...]struct{ fixed, each int }{
	1: {fixed: 4}, // INT
	2: {},         // PTR
	3: {fixed: 12},
	4: {each: memberSize}, 5: {each: memberSize}, // STRUCT, UNION
	6: {each: 8},                                // ENUM
	7: {}, 8: {}, 9: {}, 10: {}, 11: {}, 12: {}, // FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC
	13: {each: 8},  // FUNC_PROTO
	14: {fixed: 4}, // VAR
	15: {each: 12}, // DATASEC
	16: {},         // FLOAT
	17: {fixed: 4}, // DECL_TAG
	18: {},         // TYPE_TAG
	19: {each: 12}, // ENUM64
}

var errMalformed = errors.New("they end too early, or are no BTF")

// find returns the size in bytes of a struct, and the offset in bits of a field of it that is one bit.
func find(raw []byte, order binary.ByteOrder, structure, field string) (size, offset uint32, err error) {
	types, names, err := sections(raw, order)
	if err != nil {
		return 0, 0, err
	}
	structName, fieldName := nameOf(names, structure), nameOf(names, field)
	if structName == 0 || fieldName == 0 {
		return 0, 0, errors.New("there is no such name")
	}
	found := false
	for len(types) >= typeSize {
		name, info := order.Uint32(types), order.Uint32(types[4:])
		kind, count := int(info>>24&0x1f), int(info&0xffff)
		if kind == 0 || kind >= len(extra) {
			return 0, 0, fmt.Errorf("they have types of kind %d, which is not known", kind)
		}
		length := typeSize + extra[kind].fixed + extra[kind].each*count
		if length > len(types) {
			return 0, 0, errMalformed
		}
		if kind == kindStruct && name == structName {
			for m := types[typeSize:length]; len(m) > 0; m = m[memberSize:] {
				if order.Uint32(m) != fieldName {
					continue
				}
				at := order.Uint32(m[8:])
				if info&byBits == 0 || at>>24 != 1 {
					return 0, 0, errors.New("the field is not one bit")
				}
				s, o := order.Uint32(types[8:]), at&0xffffff
				if found && (s != size || o != offset) {
					return 0, 0, errors.New("several structs of that name have it, at different places")
				}
				size, offset, found = s, o, true
			}
		}
		types = types[length:]
	}
	switch {
	case len(types) > 0:
		return 0, 0, errMalformed
	case !found:
		return 0, 0, errors.New("no such struct has such a field of its own")
	case offset/8 >= size:
		return 0, 0, errMalformed
	}
	return size, offset, nil
}

// sections returns the types and the names of BTF.
func sections(raw []byte, order binary.ByteOrder) (types, names []byte, err error) {
	if len(raw) < headerSize || order.Uint16(raw) != magic {
		return nil, nil, errMalformed
	}
	header := uint64(order.Uint32(raw[4:]))
	section := func(at int) []byte {
		from := header + uint64(order.Uint32(raw[at:]))
		to := from + uint64(order.Uint32(raw[at+4:]))
		if to > uint64(len(raw)) {
			return nil
		}
		return raw[from:to]
	}
	if types, names = section(8), section(16); types == nil || names == nil {
		return nil, nil, errMalformed
	}
	return types, names, nil
}

// nameOf returns the offset at which types refer to a name; 0 is none, the empty one. A name stands there once.
func nameOf(names []byte, name string) uint32 {
	return uint32(bytes.Index(names, append(append([]byte{0}, name...), 0)) + 1)
}
